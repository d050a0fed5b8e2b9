"""Which weights of a layer stay, of as many as a ranking leaves it: ADMM on the refit's problem.

The masks are those with which the refit itself would leave little (``linalg/admm.py``), every row
weighing as its unit is sensitive: a ranking tells what one removal costs, ADMM what all of them
together do. A weight that an earlier stage removed may come back.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.linalg.admm import Projection, support
from onnx_ecp.linalg.masked import damped, ridge_of
from onnx_ecp.methods.method import LayerProblem


def chosen(problem: LayerProblem) -> np.ndarray:
    """Keep mask (out, in) with as many weights as ``problem.keep``, of those in ``candidates``.

    Each group of a layer keeps its number; under N:M each block of each row does.
    """
    groups = len(problem.gram.weight)
    keep = np.empty_like(problem.keep)
    moments = zip(problem.gram.covariance, problem.gram.cross_covariance, strict=True)
    for rows, (h, k) in zip(np.split(np.arange(len(keep)), groups), moments, strict=True):
        target = problem.original[rows]
        keep[rows] = support(
            damped(h, problem.damping),
            target @ k + ridge_of(h, problem.damping) * target,
            problem.weight[rows],
            problem.sensitivity[rows],
            _projection(problem, rows),
        )
    return keep


def _projection(problem: LayerProblem, rows: np.ndarray) -> Projection:
    candidates, keep = problem.candidates[rows], problem.keep[rows]
    if problem.block:
        return _PerBlock(candidates, keep, problem.block, problem.order)
    return _Largest(candidates, int(np.count_nonzero(keep)))


class _Largest:
    """The largest of all rows together."""

    def __init__(self, candidates: np.ndarray, number: int) -> None:
        self._candidates, self._number = candidates, number

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Keep mask (rows, in) of ``number`` candidates."""
        size = np.where(self._candidates, np.abs(z), np.float32(-1)).reshape(-1)
        keep = np.zeros(size.shape, np.bool_)
        first = len(size) - self._number
        if self._number:
            keep[np.argpartition(size, first)[first:]] = True
        return keep.reshape(z.shape)


class _PerBlock:
    """Of every block of consecutive columns as many as it has in a mask."""

    def __init__(
        self, candidates: np.ndarray, keep: np.ndarray, block: int, order: np.ndarray | None
    ) -> None:
        self._block = block
        self._order = np.arange(keep.shape[1]) if order is None else order
        self._back = np.argsort(self._order)
        self._candidates = self._blocks(candidates)
        self._numbers = self._blocks(keep).sum(axis=2)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Keep mask (rows, in)."""
        size = np.where(self._candidates, np.abs(self._blocks(z)), np.float32(-1))
        rank = np.argsort(np.argsort(-size, axis=2, kind="stable"), axis=2)
        keep = rank < self._numbers[:, :, None]
        return keep.reshape(z.shape)[:, self._back]

    def _blocks(self, x: np.ndarray) -> np.ndarray:
        """(rows, blocks, block) of (rows, in)."""
        return x[:, self._order].reshape(len(x), -1, self._block)
