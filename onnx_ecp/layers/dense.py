"""A layer that maps one axis: z = a W^T on the last axis, or z = W a on the second last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_ecp.layers.affine import Affine


@dataclass(frozen=True)
class Dense(Affine):
    """Gemm and MatMul in all spellings; every vector along ``axis`` is one row.

    Args:
        axis: where inputs and units lie, in the input as in the output: -1, or -2 where the weight
            is the left operand.
    """

    axis: int = -1
    groups: int = 1

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

    @property
    def shift_shape(self) -> tuple[int, ...]:
        """(out,), or (out, 1) where the units lie on the second last axis."""
        return dense_units(self.shape[0], self.axis)


@dataclass(frozen=True)
class Dot(Dense):
    """MatMul with a stored vector, W (1, in): the output has no axis of units.

    Args:
        axis: where inputs lie: -1, or -2 where the weight is the left operand.
    """

    def rows_out(self, z: np.ndarray) -> np.ndarray:
        """(P, ...) as (P, 1, rows, 1)."""
        return z.reshape(len(z), 1, -1, 1)

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
