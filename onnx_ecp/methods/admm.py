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

# An input whose variance is less than this share of the mean one never varies, but for rounding.
CONSTANT = 1e-9


def chosen(problem: LayerProblem, *, brief: bool = False) -> np.ndarray:
    """Keep mask (out, in) with as many weights as ``problem.keep``, of those in ``candidates``.

    Each group of a layer keeps its number; under N:M each block of each row does. Else weights of
    inputs that never vary are kept only if there are not enough of others.

    Args:
        problem: the layer.
        brief: whether a later stage chooses again.
    """
    groups = len(problem.gram.weight)
    keep = np.empty_like(problem.keep)
    moments = zip(problem.gram.covariance, problem.gram.cross_covariance, strict=True)
    for rows, (h, k) in zip(np.split(np.arange(len(keep)), groups), moments, strict=True):
        target, columns = problem.original[rows], _varying(problem, rows, h)
        right = target @ k + ridge_of(h, problem.damping) * target
        part = np.ix_(rows, columns)
        keep[rows] = False
        keep[part] = support(
            damped(h, problem.damping)[np.ix_(columns, columns)],
            right[:, columns],
            problem.weight[part],
            problem.sensitivity[rows],
            _projection(problem, rows, columns),
            brief=brief,
        )
    return keep


def _varying(problem: LayerProblem, rows: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The columns that the rows choose from, ascending."""
    variance = np.diagonal(covariance)
    columns = np.flatnonzero(variance > CONSTANT * variance.mean())
    enough = np.count_nonzero(problem.candidates[np.ix_(rows, columns)])
    if problem.block or enough < np.count_nonzero(problem.keep[rows]):
        return np.arange(len(variance))
    return columns


def _projection(problem: LayerProblem, rows: np.ndarray, columns: np.ndarray) -> Projection:
    candidates, keep = problem.candidates[np.ix_(rows, columns)], problem.keep[rows]
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
