"""The nouns of layer finding: what a prunable layer is, whatever its spelling, and why one is not.

A layer computes ``z = W a + b``. It presents its input as rows ``a`` (groups, rows, in) and its
output as rows ``z`` (groups, rows, out per group): a row is one position of one sample (
Gemm has one position, MatMul on tokens many, Conv its patches). Only a grouped Conv has more than
one group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.graph.builder import Builder

if TYPE_CHECKING:
    from onnx_ecp.layers.bias import Bias


@dataclass(frozen=True)
class Transpose:
    """The graph transposes the stored tensor on its way to the operator."""

    perm: tuple[int, ...]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """From the stored side to the operator's side."""
        return x.transpose(self.perm)

    def backward(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """From the operator's side back; ``shape`` is the shape before ``forward``."""
        return x.transpose(np.argsort(self.perm))


@dataclass(frozen=True)
class Reshape:
    """The graph reshapes the stored tensor on its way to the operator."""

    shape: tuple[int, ...]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """From the stored side to the operator's side."""
        return x.reshape(self.shape)

    def backward(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """From the operator's side back; ``shape`` is the shape before ``forward``."""
        return x.reshape(shape)


Step = Transpose | Reshape


@dataclass(frozen=True)
class Weight:
    """A stored tensor seen as the matrix W (out, in); identity is the stored tensor's name.

    Args:
        tensor: name of the initializer, or the output name of the Constant node, that is stored.
        shape: shape of the stored tensor.
        dtype: its ONNX element type (TensorProto.FLOAT, FLOAT16, BFLOAT16, DOUBLE).
        steps: transposes and reshapes from the stored tensor to the matrix (out, in), in order.
        scale: constant factor of the operator (Gemm's alpha); the matrix includes it.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: int
    steps: tuple[Step, ...] = ()
    scale: float = 1.0

    def matrix(self, stored: np.ndarray) -> np.ndarray:
        """The stored tensor as (out, in); a view where no factor is applied."""
        for step in self.steps:
            stored = step.forward(stored)
        return stored if self.scale == 1.0 else stored * self.scale

    def unmatrix(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of ``matrix`` for a weight: (out, in) back to the stored shape and scale."""
        return self.layout(matrix) if self.scale == 1.0 else self.layout(matrix) / self.scale

    def layout(self, matrix: np.ndarray) -> np.ndarray:
        """(out, in) values, such as importances or a keep mask, in the stored layout, unscaled."""
        shapes = [self.shape]
        for step in self.steps[:-1]:
            shapes.append(step.forward(np.empty(shapes[-1], dtype=np.bool_)).shape)
        for step, shape in zip(reversed(self.steps), reversed(shapes), strict=False):
            matrix = step.backward(matrix, shape)
        return matrix


@dataclass(frozen=True)
class Skip:
    """A candidate that is not pruned, and why.

    Args:
        name: the node's name (its output's name where the node has none or shares it).
        op: operator type.
        reason: one sentence for the user.
    """

    name: str
    op: str
    reason: str


class Layer(Protocol):
    """An affine layer that can be pruned. The spellings are the other files of this package."""

    @property
    def name(self) -> str:
        """Unique name for the user: the node's name, or its output's where it has none."""

    @property
    def op(self) -> str:
        """Operator type of the node, such as "Gemm"."""

    @property
    def input(self) -> str:
        """Name of the tensor that carries ``a``."""

    @property
    def output(self) -> str:
        """Name of the tensor that carries ``z`` in the prepared graph (before a fused activation).

        Adding a constant to this tensor is what a bias shift does. A bias that a later node adds
        (MatMul + Add) is not in it yet.
        """

    @property
    def dtype(self) -> int:
        """ONNX element type of tensor ``output``: what the operator sees W in."""

    @property
    def weight(self) -> Weight:
        """The stored tensor behind W."""

    @property
    def groups(self) -> int:
        """How many parts of the input have a part of the output each: 1, mostly."""

    @property
    def bias(self) -> Bias:
        """Where a shift of z goes."""

    @property
    def has_bias(self) -> bool:
        """Whether the model already has a bias that ``store`` can edit."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix W; with groups, ``in`` is what one group sees."""

    @property
    def reduction(self) -> int:
        """How many columns in a row, in the order of ``nm_order``, N:M groups may divide.

        N:M needs a length that M divides; it is ``in``, but for a Conv the input channels of one
        kernel position.
        """

    def nm_order(self) -> np.ndarray | None:
        """Permutation of the columns of W after which N:M groups are consecutive; None: as is."""

    def rows_in(self, a: np.ndarray) -> np.ndarray:
        """The array of tensor ``input`` as rows (groups, rows, in)."""

    def count_rows(self, a: np.ndarray) -> int:
        """How many rows ``rows_in`` gives."""

    def some_rows_in(self, a: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Some rows of ``rows_in``, by their numbers (k,)."""

    def rows_out(self, z: np.ndarray) -> np.ndarray:
        """An array (P, *shape of tensor ``output``) as rows (P, groups, rows, out // groups)."""

    def rows_in_graph(self, op: Builder, a: gs.Tensor, z: gs.Tensor) -> gs.Tensor:
        """Nodes that do what ``rows_in`` does, with columns in the order of ``graph_order``.

        Args:
            op: writes them; it knows ranks and shapes of one run, but sizes may be others.
            a: the values of tensor ``input``, in any float type.
            z: tensor ``output``, for its sizes.
        """

    def rows_out_graph(self, op: Builder, z: gs.Tensor) -> gs.Tensor:
        """Nodes that do what ``rows_out`` does, but with rows last: (P, groups, out, rows)."""

    def graph_order(self) -> np.ndarray | None:
        """Which column of W each column of ``rows_in_graph`` is; None: they are in order."""

    @property
    def reads_vectors(self) -> bool:
        """Whether rows are the vectors along ``units_axis`` of the input, as it is.

        Layers of which this is true see the same rows where they read the same tensor.
        """

    @property
    def makes_number(self) -> bool:
        """Whether the output has no axis of units: one number per row, as MatMul with a vector."""

    @property
    def groups_side_by_side(self) -> bool:
        """Whether groups lie one behind the other on ``units_axis``; else on their own axis."""

    @property
    def adds_zeros(self) -> bool:
        """Whether a row may hold zeros where the input has nothing: padding, for one."""

    def fits(self, a: tuple[int, ...], z: tuple[int, ...]) -> bool:
        """Whether tensors ``input`` and ``output`` of these shapes have the same rows.

        They have not where a batch makes the operator broadcast what it did not in another.
        """

    def uses(self, a: tuple[int, ...], z: tuple[int, ...]) -> int:
        """How often every weight is multiplied, for tensors ``input`` and ``output`` of a shape."""

    @property
    def units_axis(self) -> int:
        """Where units lie in tensor ``output``, and inputs in ``input``: from the end if < 0."""

    def weight_axes(self, node: gs.Node) -> tuple[int, tuple[int, int]]:
        """Which input of the node is the weight, and the axes of rows and of columns in it."""

    @property
    def units_refusal(self) -> str:
        """Why whole units of the layer cannot be followed; empty where they can."""

    @property
    def shift_shape(self) -> tuple[int, ...]:
        """Shape in which a per-unit vector (out,) broadcasts against tensor ``output``."""

    def bias_values(self, model: onnx.ModelProto, base: Path | None = None) -> np.ndarray | None:
        """(out,) float64: what ``store`` adds shifts to; None where it differs by position.

        Zeros where there is no bias yet.
        """

    def store(
        self,
        model: onnx.ModelProto,
        weight: np.ndarray | None,
        shift: np.ndarray | None,
        base: Path | None = None,
    ) -> bool:
        """Write into ``model``, our own copy, once: the only function that changes a graph.

        Args:
            model: a copy of the model in which this layer was found.
            weight: new stored tensor (``weight.shape``), or None to leave it.
            shift: (out,) float64 to add to the bias, or None; all zeros count as None.
            base: directory of the model's external data, where it has any.

        Returns:
            Whether a bias was created: an Add node, or an operator input that was not there.

        Raises:
            ModelError: a value is beyond the range of the element type, or external data that
                must be read cannot be.
        """


@dataclass(frozen=True)
class Found:
    """All candidates of a model, in graph order."""

    layers: tuple[Layer, ...]
    skips: tuple[Skip, ...] = field(default=())
