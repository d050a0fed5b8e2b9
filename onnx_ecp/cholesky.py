"""Cholesky factors and triangular systems, in matrix products: NumPy has no triangular solve."""

from __future__ import annotations

import numpy as np

from onnx_ecp.runtime import check_deadline

# Rows that are taken at a time.
BLOCK = 256


class Cholesky:
    """``matrix + ridge I = L L^T`` with L lower triangular; systems with it.

    Args:
        matrix: (n, n), symmetric positive semidefinite; the ridge is added to it in place.
        ridge: >= 0.

    Raises:
        numpy.linalg.LinAlgError: the sum is not positive definite, rounding included.
    """

    def __init__(self, matrix: np.ndarray, ridge: float = 0.0) -> None:
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

    def inverse_diagonal(self) -> np.ndarray:
        """(n,): the diagonal of (L L^T)^-1: squared lengths of the columns of L^-1.

        A third of what the whole inverse takes.
        """
        x = np.zeros_like(self._lower)
        for b, inverse in zip(self._blocks, self._inverses, strict=True):
            check_deadline()
            x[b, : b.start] = inverse @ -(self._lower[b, : b.start] @ x[: b.start, : b.start])
            x[b, b] = inverse
        return np.asarray(np.einsum("ij,ij->j", x, x))
