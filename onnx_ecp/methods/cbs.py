"""Combinatorial Brain Surgeon (Yu, Serra, Ramalingam & Zhe 2022, arXiv:2203.04466).

Which weights P go, and what the others become, is chosen for all of them together: with
H = E[g g^T] over samples (``curvature``: of the loss with labels, else of the outputs)

    min over P of  f(P) = w_P^T H_PP w_P                                          (CBS-S)
    d_K = (l I + H_KK)^-1 H_KP w_P  on the weights K that stay                    (CBS-U)

CBS-S begins with the best of 50 masks by the true error on the samples: the one by magnitude, and
random ones that keep the largest |w| of each chunk of shuffled weights. Then it swaps: with

    alpha_i = 2 w_i (H w_P)_i - w_i^2 H_ii     what f loses when i of P stays
    beta_j  = 2 w_j (H w_P)_j + w_j^2 H_jj     what f gains when j goes
    gamma_ij = 2 w_i H_ij w_j                  counted in both

a swap changes f by beta_j - alpha_i - gamma_ij. P is taken by falling alpha, its i-th with the
candidates j of rank i - RHO to i + RHO - 1 by beta - gamma for the first i; the first swap that is
worth it is made. A pass ends after TAU weights without one; after every pass the mask with the
lowest true error so far is remembered.

The sign: in the start "large" is large |w|. (A known implementation sorts w itself there and drops
large negative weights.) Deviations: without a loss, f and l are in units of the mean squared
output; under N:M the candidates are those of the same block, and the start is the one by magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_ecp.methods.method import BlockProblem, Compensation, MaskProblem, Method
from onnx_ecp.methods.simple import MAGNITUDE
from onnx_ecp.runtime.limits import check_deadline

# The ridge of the published rows of MLPNet.
DAMPING = 1e-3
# The paper's search parameters.
TRIES, PASSES, RHO, TAU, EPSILON = 50, 100, 10, 20, 1e-4

# (out, in) arrays by stored tensor.
Arrays = dict[str, np.ndarray]


def search(problem: MaskProblem) -> Arrays:
    """CBS-S: keep masks by stored tensor with as many zeros as the start."""
    keep = dict(problem.start)
    best, least = keep, problem.error(keep)
    for _ in range(0 if problem.block else TRIES - 1):
        check_deadline()
        tried = shuffled_start(problem)
        error = problem.error(tried)
        if error < least:
            best, least = tried, error
    keep = best
    for _ in range(PASSES):
        found = swapped(problem, keep)
        if found is None:
            break
        keep, error = found, problem.error(found)
        if error < least:
            best, least = keep, error
    return best


def shuffled_start(problem: MaskProblem) -> Arrays:
    """Random chunks of the weights that are there lose their smallest |w|, all the same share."""
    present = np.concatenate([problem.present[n].reshape(-1) for n in problem.weight])
    size = np.concatenate([np.abs(problem.weight[n]).reshape(-1) for n in problem.weight])
    start = np.concatenate([problem.start[n].reshape(-1) for n in problem.weight])
    newly_removed = int(np.count_nonzero(present & ~start))
    order = problem.rng.permutation(np.flatnonzero(present))
    chunks = max(min(int(np.sqrt(len(order))), 1000), 1)
    chunk = -(-len(order) // chunks)
    keep, gone = present.copy(), 0
    for first in range(0, len(order), chunk):
        part = order[first : first + chunk]
        goal = int(np.floor(newly_removed * (first + len(part)) / len(order) + 0.5))
        keep[part[np.argsort(size[part], kind="stable")[: goal - gone]]] = False
        gone = goal
    return _split(keep, problem.weight)


def swapped(problem: MaskProblem, keep: Mapping[str, np.ndarray]) -> Arrays | None:
    """One pass of swaps; None where none was worth it."""
    check_deadline()
    swaps = _Swaps(problem, keep)
    misses = 0
    for rank, i in enumerate(swaps.leaving):
        if misses >= TAU:
            break
        if not swaps.swap(int(i), swaps.candidates(rank, int(i))):
            misses += 1
    return _split(swaps.keep, problem.weight) if swaps.made else None


class _Swaps:
    """The weights of a group as one vector, and what swaps do to f.

    Attributes:
        keep: (d,), True where the weight stays.
        leaving: P in the order in which its weights are tried.
        made: number of swaps so far.
    """

    def __init__(self, problem: MaskProblem, keep: Mapping[str, np.ndarray]) -> None:
        self._names = list(problem.weight)
        shapes = [problem.weight[n].shape for n in self._names]
        self._ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        self._widths = [shape[1] for shape in shapes]
        self._block = problem.block
        self._w = self._flat(problem.weight)
        self._present = self._flat(problem.present)
        self.keep, self.made = self._flat(keep), 0
        gone = {n: np.where(keep[n], 0.0, w) for n, w in problem.weight.items()}
        gone |= problem.elsewhere
        # Of every tensor the block it is in, and of every block r = G w_P.
        self._blocks = problem.blocks
        self._home = {n: b for b, block in enumerate(self._blocks) for n in block.rows}
        self._residuals = [block.times(gone) for block in self._blocks]
        self.f = sum(
            float(r @ r) / block.divisor
            for r, block in zip(self._residuals, self._blocks, strict=True)
        )
        product: Arrays = {}
        diagonal: Arrays = {}
        for block, r in zip(self._blocks, self._residuals, strict=True):
            product |= {n: v / block.divisor for n, v in block.back(r).items()}
            diagonal |= block.diagonal()
        cross, square = self._w * self._flat(product), self._w**2 * self._flat(diagonal)
        alpha, beta = 2 * cross - square, 2 * cross + square
        removed = np.flatnonzero(self._present & ~self.keep)
        self.leaving = removed[np.argsort(-alpha[removed], kind="stable")]
        self._entering = np.flatnonzero(self._present & self.keep)
        if len(removed):
            gain = (beta - self._gamma(int(self.leaving[0])))[self._entering]
            self._entering = self._entering[np.argsort(gain, kind="stable")]
        self._labels = self._runs_of(problem) if self._block else None

    def candidates(self, rank: int, i: int) -> np.ndarray:
        """Indices of the weights that may go instead of weight i, the ``rank``-th to be tried."""
        if self._labels is not None:
            found = np.flatnonzero(self._labels == self._labels[i])
        else:
            found = self._entering[max(rank - RHO, 0) : rank + RHO]
        return found[self.keep[found] & self._present[found]]

    def swap(self, i: int, candidates: np.ndarray) -> bool:
        """Let i stay and the first candidate go that makes f fall enough; False if none does."""
        if not len(candidates):
            return False
        both = np.concatenate([[i], candidates])
        gradients, homes = self._gradients(both)
        w = self._w[both]
        divisors = np.array([self._blocks[b].divisor for b in homes])
        product = np.empty(len(both))
        for b, r in enumerate(self._residuals):
            product[homes == b] = gradients[homes == b] @ r
        product /= divisors
        square = w**2 * np.square(gradients).sum(axis=1) / divisors
        alpha = 2 * w[0] * product[0] - square[0]
        beta = (2 * w * product + square)[1:]
        gamma = np.where(
            homes[1:] == homes[0], 2 * w[0] * w[1:] * (gradients[1:] @ gradients[0]), 0.0
        )
        change = beta - alpha - gamma / divisors[0]
        worth = np.flatnonzero(change <= -EPSILON)
        if not len(worth):
            return False
        j = 1 + int(worth[0])
        self._residuals[homes[j]] = self._residuals[homes[j]] + w[j] * gradients[j]
        self._residuals[homes[0]] = self._residuals[homes[0]] - w[0] * gradients[0]
        self.keep[i], self.keep[both[j]] = True, False
        self.f += float(change[worth[0]])
        self.made += 1
        return True

    def _gamma(self, i: int) -> np.ndarray:
        """(d,): gamma of weight i with all others."""
        gradient, home = self._gradients(np.array([i]))
        block = self._blocks[home[0]]
        found = {n: np.zeros_like(self._part(n, self._w)) for n in self._names}
        found |= {n: v / block.divisor for n, v in block.back(gradient[0]).items() if n in found}
        return np.asarray(2 * self._w[i] * self._w * self._flat(found))

    def _gradients(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(k, rows) gradients of these weights, and the block (k,) that each is in."""
        tensors = np.searchsorted(self._ends, indices, side="right") - 1
        rows: np.ndarray | None = None
        homes = np.empty(len(indices), int)
        for t in np.unique(tensors):
            where = tensors == t
            name = self._names[t]
            units, inputs = np.divmod(indices[where] - self._ends[t], self._widths[t])
            block = self._home[name]
            found = self._blocks[block].rows[name].columns(units, inputs)
            rows = np.empty((len(indices), found.shape[1])) if rows is None else rows
            rows[where], homes[where] = found, block
        assert rows is not None, "the caller has some indices"
        return rows, homes

    def _runs_of(self, problem: MaskProblem) -> np.ndarray:
        """(d,): a number for every block of every row."""
        labels = {}
        for t, n in enumerate(self._names):
            shape = problem.weight[n].shape
            order = problem.orders.get(n)
            place = np.arange(shape[1]) if order is None else np.argsort(order)
            first = self._ends[t] + np.arange(shape[0])[:, None] * shape[1]
            labels[n] = first + place // self._block
        return self._flat(labels)

    def _flat(self, by_tensor: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([by_tensor[n].reshape(-1) for n in self._names])

    def _part(self, name: str, flat: np.ndarray) -> np.ndarray:
        t = self._names.index(name)
        return flat[self._ends[t] : self._ends[t + 1]]


def update(problem: BlockProblem) -> dict[str, np.ndarray]:
    """CBS-U: the weights (out, in) that stay after the best joint change."""
    target = problem.curvature.times(problem.removed)
    change = problem.curvature.fit(problem.keep, target, problem.damping)
    return {n: np.where(problem.keep[n], w + change[n], 0.0) for n, w in problem.weight.items()}


def _split(flat: np.ndarray, like: Mapping[str, np.ndarray]) -> Arrays:
    ends = np.cumsum([w.size for w in like.values()])[:-1]
    parts = np.split(flat, ends)
    return {n: part.reshape(w.shape) for (n, w), part in zip(like.items(), parts, strict=True)}


COMPENSATION = Compensation(
    "curvature",
    update=update,
    damping=DAMPING,
    summary="the best joint change of all remaining weights",
)

CBS = Method(
    MAGNITUDE.importance,
    search=search,
    compensation="cbs",
    needs="curvature",
    damping=DAMPING,
    options=("cbs_select", "cbs_update"),
    summary="masks searched by swaps (Combinatorial Brain Surgeon, arXiv:2203.04466)",
)
