"""SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): optimal brain surgeon, column by column.

With the second moments ``H = E[a a^T]`` of a layer's input, damped, and ``H^-1 = U^T U`` (U upper
triangular), columns are visited from left to right. Whatever is removed from column j moves the
columns behind it:

    e = W_j (where removed) / U_jj          W_k -= e U_jk   for k >= j

which is the optimal brain surgeon's update with the columns in front held fixed. Which weights go
is chosen on the way, in blocks of 128 columns for all rows together (under N:M, run by run), by
what their removal costs then: ``W_ij^2 / U_jj^2``.

Deviations: the number of zeros is exact, each block having its share of them; an input that is
always zero needs no special case, since the damping makes its weights the cheapest.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.linalg.cholesky import inverse_factor
from onnx_ecp.methods.method import Compensation, LayerProblem, Method, Part, Solved, View

# Columns whose mask is chosen together, and within which every step is taken at once (the paper's).
BLOCK = 128


def importance(view: View) -> np.ndarray:
    """``W_ij^2 / [H^-1]_jj`` (out, in): the layer's own squared error after the row's best change.

    It decides how many weights of a layer go only where layers are ranked together.
    """
    assert view.gram is not None, "needs_gram has it measured"
    return np.asarray(view.weight**2 * view.removal_cost(view.gram.second_moments))


def solve(problem: LayerProblem) -> Solved:
    """The sweep over all columns."""
    return problem.solved(_swept)


def _swept(part: Part) -> tuple[np.ndarray, np.ndarray]:
    choice = _Choice(part.present, part.keep, part.may_reselect, part.block)
    return _sweep(part.weight, part.hessian, choice), choice.keep


class _Choice:
    """Which weights stay, decided from left to right.

    Args:
        present: (rows, in), what may stay.
        keep: (rows, in), a mask with the right number of zeros.
        may_reselect: whether another one may be chosen.
        block: 0, or the length of runs of columns in which each row keeps its number of zeros.
    """

    def __init__(
        self, present: np.ndarray, keep: np.ndarray, may_reselect: bool, block: int
    ) -> None:
        self.keep, self._present, self._may_reselect, self._block = (
            keep.copy(),
            present,
            may_reselect,
            block,
        )
        newly_removed = int(np.count_nonzero(present & ~keep))
        share = np.cumsum(present.sum(axis=0)) / max(np.count_nonzero(present), 1)
        # How many weights are gone after each column, so that blocks share them evenly.
        self._gone = np.concatenate([[0], np.floor(newly_removed * share + 0.5).astype(int)])

    @property
    def block(self) -> int:
        """Columns per block: whole runs."""
        return max(BLOCK // self._block, 1) * self._block if self._block else BLOCK

    def enter_block(self, first: int, last: int, scores: np.ndarray) -> None:
        """Choose for the columns ``first`` to ``last``; scores are (rows, last - first)."""
        if not self._may_reselect or self._block:
            return
        present = self._present[:, first:last]
        number = self._gone[last] - self._gone[first]
        ranked = np.where(present, scores, np.inf).reshape(-1)
        keep = present.copy()
        keep.reshape(-1)[np.argsort(ranked, kind="stable")[:number]] = False
        self.keep[:, first:last] = keep

    def enter_column(self, column: int, scores: np.ndarray) -> None:
        """Choose for the run that begins with a column; scores are of this and the next ones."""
        if not self._may_reselect or not self._block or column % self._block:
            return
        block = slice(column, column + self._block)
        zeros = np.count_nonzero(~self.keep[:, block], axis=1)
        ranked = np.where(self._present[:, block], scores[:, : self._block], -1.0)
        rank = np.argsort(np.argsort(ranked, axis=1, kind="stable"), axis=1)
        self.keep[:, block] = rank >= zeros[:, None]


def _sweep(weight: np.ndarray, hessian: np.ndarray, choice: _Choice) -> np.ndarray:
    """The new weights (rows, in)."""
    weight, upper = weight.copy(), inverse_factor(hessian)
    diagonal = np.diagonal(upper)
    columns = weight.shape[1]
    for first in range(0, columns, choice.block):
        last = min(first + choice.block, columns)
        choice.enter_block(first, last, (weight[:, first:last] / diagonal[first:last]) ** 2)
        errors = np.empty((len(weight), last - first))
        for j in range(first, last):
            choice.enter_column(j, (weight[:, j:last] / diagonal[j:last]) ** 2)
            removed = np.where(choice.keep[:, j], 0.0, weight[:, j])
            errors[:, j - first] = removed / diagonal[j]
            weight[:, j:last] -= np.outer(errors[:, j - first], upper[j, j:last])
            weight[~choice.keep[:, j], j] = 0.0  # exactly, whatever rounding left
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight


COMPENSATION = Compensation(solve=solve, summary="the columns still to come")

SPARSEGPT = Method(
    importance,
    compensation="sparsegpt",
    needs_gram=True,
    scope="layer",
    may_reselect=True,
    summary="optimal brain surgeon, column by column (SparseGPT, arXiv:2301.00774)",
)
