"""A layer that maps one axis: z = a W^T on the last axis, or z = W a on the second last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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

    SPARSE_KERNELS: ClassVar[tuple[str, ...]] = ("Gemm", "MatMul")

    axis: int = -1
    groups: int = 1  # type: ignore[assignment]  # overrides the property

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
        left = node.inputs[0].name != self.input
        turned = bool(node.attrs.get("transA" if left else "transB", 0))
        return (0 if left else 1), ((-2, -1) if left != turned else (-1, -2))


def _swapped(op: Builder, x: gs.Tensor, rank: int) -> gs.Tensor:
    """The last two axes exchanged."""
    return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])


def dense_units(out: int, axis: int) -> tuple[int, ...]:
    """Shape in which a vector (out,) meets the units on ``axis`` (-1 or -2).

    >>> dense_units(4, -1), dense_units(4, -2)
    ((4,), (4, 1))
    """
    return (out,) + (1,) * (-1 - axis)
