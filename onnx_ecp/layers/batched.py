"""A batch of matrices, side by side on the third last axis: experts, each with a matrix of its own.

z[..., e, :, :] = a[..., e, :, :] W[e]^T        e = 1 .. experts
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.graph.builder import Builder
from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.dense import matrix_axes


@dataclass(frozen=True)
class Batched(Affine):
    """MatMul with a stored batch of matrices; every matrix is a group of the layer.

    W is (out, in): the rows of the first matrix, then those of the next one.

    Args:
        axis: where inputs and units lie, in the input as in the output: -1, or -2 where the weight
            is the left operand.
    """

    axis: int

    @property
    def reduction(self) -> int:
        """N:M groups divide the whole input axis."""
        return self.shape[1]

    def nm_order(self) -> np.ndarray | None:
        """The columns are in order as they are."""
        return None

    def rows_in(self, a: np.ndarray) -> np.ndarray:
        """(..., groups or 1, rows, in) as (groups, rows, in); one input is read by all matrices."""
        a = np.moveaxis(np.moveaxis(a, self.axis, -1), -3, 0)
        a = a.reshape(len(a), -1, self.shape[1])
        return np.broadcast_to(a, (self.groups, *a.shape[1:]))

    def rows_out(self, z: np.ndarray) -> np.ndarray:
        """(P, ..., groups, rows, out per group) as (P, groups, rows, out per group)."""
        z = np.moveaxis(np.moveaxis(z, self.axis, -1), -3, 1)
        return z.reshape(*z.shape[:2], -1, z.shape[-1])

    def rows_in_graph(self, op: Builder, a: gs.Tensor, z: gs.Tensor) -> gs.Tensor:
        """(..., groups or 1, rows, in) as (groups, rows, in)."""
        shape = op.facts[self.input].shape
        rank = len(shape)
        last = [rank - 2, rank - 1] if self.axis == -1 else [rank - 1, rank - 2]
        front = op.Transpose(a, perm=[rank - 3, *range(rank - 3), *last])
        rows = op.Reshape(front, [shape[-3], -1, self.shape[1]])
        return op.Expand(rows, [self.groups, 1, 1]) if shape[-3] == 1 else rows

    def rows_out_graph(self, op: Builder, z: gs.Tensor) -> gs.Tensor:
        """(P, ..., groups, rows, out per group) as (P, groups, out per group, rows)."""
        rank = 1 + len(op.facts[self.output].shape)
        last = [rank - 1, rank - 2] if self.axis == -1 else [rank - 2, rank - 1]
        front = op.Transpose(z, perm=[0, rank - 3, last[0], *range(1, rank - 3), last[1]])
        return op.Reshape(front, [0, self.groups, self.shape[0] // self.groups, -1])

    @property
    def groups_side_by_side(self) -> bool:
        """Groups have an axis of their own."""
        return False

    def fits(self, a: tuple[int, ...], z: tuple[int, ...]) -> bool:
        """As many vectors of inputs as of units; one input may be read by all matrices."""
        repeats = self.groups if a[-3] == 1 else 1
        return math.prod(a) * self.shape[0] // self.groups * repeats == math.prod(z) * self.shape[1]

    @property
    def units_axis(self) -> int:
        """The axis that is mapped; k-th rows of all matrices lie at k."""
        return self.axis

    def weight_axes(self, node: gs.Node) -> tuple[int, tuple[int, int]]:
        """Those of every matrix, as the node transposes it."""
        return matrix_axes(node, self.input)

    @property
    def shift_shape(self) -> tuple[int, ...]:
        """(groups, 1, out per group), or (groups, out per group, 1)."""
        out = self.shape[0] // self.groups
        return (self.groups, 1, out) if self.axis == -1 else (self.groups, out, 1)
