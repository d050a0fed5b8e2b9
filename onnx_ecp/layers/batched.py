"""A batch of matrices, side by side on the third last axis: experts, each with a matrix of its own.

z[..., e, :, :] = a[..., e, :, :] W[e]^T        e = 1 .. experts
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_ecp.layers.affine import Affine


@dataclass(frozen=True)
class Batched(Affine):
    """MatMul with a stored batch of matrices; every matrix is a group of the layer.

    W is (out, in): the rows of the first matrix, then those of the next one.

    Args:
        axis: where inputs and units lie, in the input as in the output: -1, or -2 where the weight
            is the left operand.
        groups: how many matrices there are.
    """

    axis: int
    groups: int

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

    @property
    def shift_shape(self) -> tuple[int, ...]:
        """(groups, 1, out per group), or (groups, out per group, 1)."""
        out = self.shape[0] // self.groups
        return (self.groups, 1, out) if self.axis == -1 else (self.groups, out, 1)
