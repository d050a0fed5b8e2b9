"""What all spellings of an affine layer share: its names, its weight, its bias, and ``store``.

A spelling is a frozen dataclass on ``Affine`` that says how rows are cut out of tensors, by NumPy
and in a graph, and where units lie. What a spelling may leave as it is stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.graph.builder import Builder
from onnx_ecp.layers import edit
from onnx_ecp.layers.bias import Bias
from onnx_ecp.layers.layer import Weight


@dataclass(frozen=True)
class Affine(ABC):
    """The part of a ``Layer`` that does not depend on how rows are cut out of tensors.

    Args:
        name: unique name for the user.
        op: operator type.
        input: tensor that carries ``a``.
        output: tensor that carries ``z`` in the prepared graph.
        weight: the stored tensor behind W.
        shape: (out, in) of W.
        bias: where a shift of z goes.
        groups: see ``Layer.groups``.
    """

    name: str
    op: str
    input: str
    output: str
    weight: Weight
    shape: tuple[int, int]
    bias: Bias
    groups: int = field(default=1, kw_only=True)

    @property
    @abstractmethod
    def reduction(self) -> int:
        """See ``Layer.reduction``."""

    @abstractmethod
    def nm_order(self) -> np.ndarray | None:
        """See ``Layer.nm_order``."""

    @abstractmethod
    def rows_in(self, a: np.ndarray) -> np.ndarray:
        """See ``Layer.rows_in``."""

    def count_rows(self, a: np.ndarray) -> int:
        """See ``Layer.count_rows``."""
        return self.rows_in(a).shape[1]

    def some_rows_in(self, a: np.ndarray, at: np.ndarray) -> np.ndarray:
        """See ``Layer.some_rows_in``."""
        return self.rows_in(a)[:, at]

    @abstractmethod
    def rows_out(self, z: np.ndarray) -> np.ndarray:
        """See ``Layer.rows_out``."""

    @abstractmethod
    def rows_in_graph(self, op: Builder, a: gs.Tensor, z: gs.Tensor) -> gs.Tensor:
        """See ``Layer.rows_in_graph``."""

    @abstractmethod
    def rows_out_graph(self, op: Builder, z: gs.Tensor) -> gs.Tensor:
        """See ``Layer.rows_out_graph``."""

    @property
    @abstractmethod
    def shift_shape(self) -> tuple[int, ...]:
        """See ``Layer.shift_shape``."""

    @property
    @abstractmethod
    def units_axis(self) -> int:
        """See ``Layer.units_axis``."""

    @abstractmethod
    def weight_axes(self, node: gs.Node) -> tuple[int, tuple[int, int]]:
        """See ``Layer.weight_axes``."""

    def graph_order(self) -> np.ndarray | None:
        """The columns are in the order of W."""
        return None

    @property
    def reads_vectors(self) -> bool:
        """Rows are cut out in a way of the layer's own."""
        return False

    @property
    def makes_number(self) -> bool:
        """Every unit has an entry of its own in the output."""
        return False

    @property
    def groups_side_by_side(self) -> bool:
        """Groups, where there are any, lie on the units' axis."""
        return True

    @property
    def adds_zeros(self) -> bool:
        """Rows hold entries of the input alone."""
        return False

    def fits(self, a: tuple[int, ...], z: tuple[int, ...]) -> bool:
        """Nothing is broadcast in this spelling."""
        return True

    def uses(self, a: tuple[int, ...], z: tuple[int, ...]) -> int:
        """Once per position of the output."""
        return int(np.prod(z)) // self.shape[0]

    @property
    def units_refusal(self) -> str:
        """Units are followed."""
        return ""

    @property
    def has_bias(self) -> bool:
        """Whether the model already has a bias that ``store`` can edit."""
        return self.bias.exists

    @property
    def dtype(self) -> int:
        """ONNX element type of ``output``."""
        return self.bias.dtype

    def bias_values(self, model: onnx.ModelProto, base: Path | None = None) -> np.ndarray | None:
        """(out,): what ``store`` adds shifts to; see ``Layer.bias_values``."""
        values = self.bias.values(model, base)
        return None if values.size not in (1, self.shape[0]) else values + np.zeros(self.shape[0])

    def store(
        self,
        model: onnx.ModelProto,
        weight: np.ndarray | None,
        shift: np.ndarray | None,
        base: Path | None = None,
    ) -> bool:
        """Write a stored tensor and a shift (out,) of z into our copy; see ``Layer.store``."""
        if weight is not None:
            edit.write(model, self.weight.tensor, weight, base)
        if shift is None or not np.any(shift):
            return False
        self.bias.add(model, np.asarray(shift, np.float64), self.name, base)
        return not self.has_bias
