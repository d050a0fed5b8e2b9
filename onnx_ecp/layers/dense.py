"""A layer that maps one axis: z = a W^T on the last axis, or z = W a on the second last."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.graph.builder import Builder
from onnx_ecp.layers.affine import Affine


@dataclass(frozen=True)
class Dense(Affine):
    """Gemm and MatMul in all spellings; every vector along ``axis`` is one row.

    Args:
        axis: where inputs and units lie, in the input as in the output: -1, or -2 where the weight
            is the left operand.
    """

    axis: int = -1

    @property
    def reduction(self) -> int:
        """N:M groups divide the whole input axis."""
        return self.shape[1]

    def nm_order(self) -> np.ndarray | None:
        """The columns are in order as they are."""
        return None

    def rows_in(self, a: np.ndarray) -> np.ndarray:
        """(..., in) as (1, rows, in)."""
        return np.moveaxis(a, self.axis, -1).reshape(1, -1, self.shape[1])

    def rows_out(self, z: np.ndarray) -> np.ndarray:
        """(P, ..., out) as (P, 1, rows, out)."""
        return np.moveaxis(z, self.axis, -1).reshape(len(z), 1, -1, self.shape[0])

    def rows_in_graph(self, op: Builder, a: gs.Tensor, z: gs.Tensor) -> gs.Tensor:
        """(..., in) as (1, rows, in)."""
        if self.axis == -2:
            a = _swapped(op, a, len(op.facts[self.input].shape))
        return op.Reshape(a, [1, -1, self.shape[1]])

    def rows_out_graph(self, op: Builder, z: gs.Tensor) -> gs.Tensor:
        """(P, ..., out) as (P, 1, out, rows)."""
        if self.axis == -2:
            z = _swapped(op, z, 1 + len(op.facts[self.output].shape))
        return op.Transpose(op.Reshape(z, [0, 1, -1, self.shape[0]]), perm=[0, 1, 3, 2])

    @property
    def reads_vectors(self) -> bool:
        """Every vector along the axis is a row."""
        return True

    def fits(self, a: tuple[int, ...], z: tuple[int, ...]) -> bool:
        """As many vectors of inputs as of units."""
        return math.prod(a) * self.shape[0] == math.prod(z) * self.shape[1]

    @property
    def shift_shape(self) -> tuple[int, ...]:
        """(out,), or (out, 1) where the units lie on the second last axis."""
        return dense_units(self.shape[0], self.axis)

    @property
    def units_axis(self) -> int:
        """The axis that is mapped."""
        return self.axis

    def weight_axes(self, node: gs.Node) -> tuple[int, tuple[int, int]]:
        """The operand that is not the input; its axes as the node transposes it."""
        return matrix_axes(node, self.input)


def matrix_axes(node: gs.Node, data: str) -> tuple[int, tuple[int, int]]:
    """Of a product of matrices: which operand is not ``data``, and its axes of rows and columns."""
    left = node.inputs[0].name != data
    turned = bool(node.attrs.get("transA" if left else "transB", 0))
    return (0 if left else 1), ((-2, -1) if left != turned else (-1, -2))


def _swapped(op: Builder, x: gs.Tensor, rank: int) -> gs.Tensor:
    """The last two axes exchanged."""
    return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])


@dataclass(frozen=True)
class Dot(Dense):
    """MatMul with a stored vector, W (1, in): the output has no axis of units.

    Args:
        axis: where inputs lie: -1, or -2 where the weight is the left operand.
    """

    def rows_out(self, z: np.ndarray) -> np.ndarray:
        """(P, ...) as (P, 1, rows, 1)."""
        return z.reshape(len(z), 1, -1, 1)

    def rows_out_graph(self, op: Builder, z: gs.Tensor) -> gs.Tensor:
        """(P, ...) as (P, 1, 1, rows)."""
        return op.Reshape(z, [0, 1, 1, -1])

    @property
    def makes_number(self) -> bool:
        """A product of two vectors is a number."""
        return True

    def weight_axes(self, node: gs.Node) -> tuple[int, tuple[int, int]]:
        """The only axis of the vector is that of the columns."""
        index, _ = super().weight_axes(node)
        return index, (0, 0)

    @property
    def shift_shape(self) -> tuple[int, ...]:
        """(1,): the output has no axis of units."""
        return (1,)


def dense_units(out: int, axis: int) -> tuple[int, ...]:
    """Shape in which a vector (out,) meets the units on ``axis`` (-1 or -2).

    >>> dense_units(4, -1), dense_units(4, -2)
    ((4,), (4, 1))
    """
    return (out,) + (1,) * (-1 - axis)
