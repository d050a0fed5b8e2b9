"""What all spellings of an affine layer share: its names, its weight, its bias, and ``store``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnx_ecp.layers import edit
from onnx_ecp.layers.bias import Bias
from onnx_ecp.layers.layer import Weight


@dataclass(frozen=True)
class Affine:
    """The part of a ``Layer`` that does not depend on how rows are cut out of tensors.

    Args:
        name: unique name for the user.
        op: operator type.
        input: tensor that carries ``a``.
        output: tensor that carries ``z`` in the prepared graph.
        weight: the stored tensor behind W.
        shape: (out, in) of W.
        bias: where a shift of z goes.
    """

    name: str
    op: str
    input: str
    output: str
    weight: Weight
    shape: tuple[int, int]
    bias: Bias

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
