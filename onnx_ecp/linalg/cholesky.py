"""Cholesky factors and triangular systems, in matrix products: NumPy has no triangular solve."""

from __future__ import annotations

import numpy as np

from onnx_ecp.runtime.limits import check_deadline

# Rows that are taken at a time: of one matrix, and of matrices that may be many and small.
BLOCK, SMALL = 256, 32


class Cholesky:
    """``matrix + ridge I = L L^T`` with L lower triangular; systems with it.

    Args:
        matrix: (n, n), symmetric positive semidefinite; the ridge is added to it in place.
        ridge: > 0.

    Raises:
        numpy.linalg.LinAlgError: the sum is not positive definite, rounding included.
    """

    def __init__(self, matrix: np.ndarray, ridge: float) -> None:
        matrix.flat[:: len(matrix) + 1] += ridge
        self._lower = np.linalg.cholesky(matrix)
        ends = range(0, len(matrix), BLOCK)
        self._blocks = [slice(i, min(i + BLOCK, len(matrix))) for i in ends]
        self._inverses = [np.linalg.inv(self._lower[b, b]) for b in self._blocks]

    def half(self, right: np.ndarray) -> np.ndarray:
        """(n, ...): L^-1 b."""
        x = np.empty(right.shape)
        for b, inverse in zip(self._blocks, self._inverses, strict=True):
            check_deadline()
            x[b] = inverse @ (right[b] - self._lower[b, : b.start] @ x[: b.start])
        return x

    def solve(self, right: np.ndarray) -> np.ndarray:
        """(n, ...): (L L^T)^-1 b."""
        x = self.half(right)
        for b, inverse in zip(reversed(self._blocks), reversed(self._inverses), strict=True):
            x[b] = inverse.T @ (x[b] - self._lower[b.stop :, b].T @ x[b.stop :])
        return x


def diagonal_of_inverse(matrix: np.ndarray) -> np.ndarray:
    """(..., n): the diagonals of inverses of (..., n, n), symmetric positive definite.

    They are the squared lengths of the columns of L^-1, of which each block of rows follows from
    those above it: less than half the work of the whole inverse.
    """
    try:
        lower = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:  # a tiny ridge, lost in the rounding of the sums
        return np.diagonal(np.linalg.inv(matrix), axis1=-2, axis2=-1)
    x = np.zeros_like(lower)
    for i in range(0, lower.shape[-1], SMALL):
        check_deadline()
        b, above = slice(i, i + SMALL), slice(i)
        inverse = np.linalg.inv(lower[..., b, b])
        x[..., b, above] = inverse @ -(lower[..., b, above] @ x[..., above, above])
        x[..., b, b] = inverse
    return np.asarray(np.einsum("...ij,...ij->...j", x, x))


def inverse_factor(matrix: np.ndarray) -> np.ndarray:
    """Upper triangular U with ``U^T U = matrix^-1``.

    With the order of rows and columns reversed a Cholesky factor is upper triangular: matrix =
    R R^T, and U = R^-1, without the inverse of the matrix.
    """
    reverse = np.linalg.cholesky(matrix[::-1, ::-1])
    return np.asarray(np.triu(np.linalg.inv(reverse[::-1, ::-1])))
