"""Optimal Brain Compression (Frantar & Alistarh 2022, arXiv:2208.11580): exact greedy OBS per row.

With the second moments ``H = E[a a^T]`` of a layer's input, damped, every row on its own loses,
again and again, the weight that costs least after the best change of the rest of the row:

    p = argmin w_p^2 / [H^-1]_pp     w <- w - w_p H^-1_:p / [H^-1]_pp     H^-1 <- H^-1 less row p

(Gaussian elimination keeps H^-1 that of the weights still there). The costs of all rows of a layer
are then merged: the cheapest next step of any row is taken until the layer has its zeros. Under
N:M every row takes from each run what it must. The weights that stay are solved for once more on
their support, which is what the updates add up to.

Time grows as out * in^3: for small layers; ``sparsegpt`` is the way for others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from onnx_ecp.errors import UsageError
from onnx_ecp.linalg.masked import solve as solve_on_support
from onnx_ecp.methods.method import Compensation, LayerProblem, Method, Part, Solved
from onnx_ecp.methods.sparsegpt import importance
from onnx_ecp.runtime.limits import check_deadline

# Elements of H^-1 that eliminations may touch per layer; hours on one core.
MOST = 2e12
# H^-1 is made smaller once this share of its rows is gone.
COMPACT = 0.1


def solve(problem: LayerProblem) -> Solved:
    """The greedy choice for every row, and the exact solution on what it leaves.

    Raises:
        UsageError: the layer is too large.
    """
    rows, columns = problem.weight.shape
    if problem.may_reselect and rows * columns**3 / 3 > MOST:
        raise UsageError(
            f"--method obc would take hours for a layer of {rows} x {columns} weights.",
            hint="Use --method sparsegpt, or leave the layer out with --exclude.",
        )
    return problem.solved(_solved)


def _solved(part: Part) -> tuple[np.ndarray, np.ndarray]:
    keep = _chosen(part) if part.may_reselect else part.keep
    right = part.weight @ part.hessian
    weight = solve_on_support(part.hessian, right, keep, start=part.weight, direct=True)
    touched = (keep != part.present).any(axis=1)
    return np.where(touched[:, None], weight, part.weight), keep


def _chosen(part: Part) -> np.ndarray:
    """Keep mask (rows, in): the greedy one with as many zeros as the part's own."""
    inverse = np.linalg.inv(part.hessian)
    keep = part.present.copy()
    if part.block:
        for i in range(len(keep)):
            for column, _ in _steps(part, i, inverse):
                keep[i, column] = False
        return keep
    traces = [list(_steps(part, i, inverse)) for i in range(len(keep))]
    ahead = [(trace[0][1], i, 0) for i, trace in enumerate(traces) if trace]
    heapq.heapify(ahead)
    for _ in range(int(np.count_nonzero(part.present & ~part.keep))):
        _, i, step = heapq.heappop(ahead)
        keep[i, traces[i][step][0]] = False
        if step + 1 < len(traces[i]):
            heapq.heappush(ahead, (traces[i][step + 1][1], i, step + 1))
    return keep


def _steps(part: Part, row: int, inverse: np.ndarray) -> Iterator[tuple[int, float]]:
    """(column, cost) in the order in which a row loses its weights: all, or what runs must lose."""
    check_deadline()
    present, left = part.present[row], None
    columns = np.flatnonzero(present)
    h = inverse.copy()
    if len(columns) < len(present):
        h = np.linalg.inv(part.hessian[np.ix_(columns, columns)])
    if part.block:
        left = (present & ~part.keep[row]).reshape(-1, part.block).sum(axis=1)
    w, alive = part.weight[row, columns], np.ones(len(columns), np.bool_)
    for _ in range(len(columns) if left is None else int(left.sum())):
        allowed = alive if left is None else alive & (left[columns // part.block] > 0)
        cost = np.full(len(w), np.inf)
        np.divide(w**2, np.diagonal(h), out=cost, where=allowed)
        p = int(cost.argmin())
        yield int(columns[p]), float(cost[p])
        alive[p] = False
        if left is not None:
            left[columns[p] // part.block] -= 1
        scaled = h[p] / h[p, p]
        w = w - w[p] * scaled
        h -= h[:, p, None] * scaled
        if np.count_nonzero(alive) < (1 - COMPACT) * len(alive):
            h, w, columns = h[np.ix_(alive, alive)], w[alive], columns[alive]
            alive = np.ones(len(columns), np.bool_)


COMPENSATION = Compensation(solve=solve, summary="the rest of the row, exactly")

OBC = Method(
    importance,
    compensation="obc",
    needs_gram=True,
    scope="layer",
    may_reselect=True,
    summary="exact greedy optimal brain surgeon per row, for small layers (arXiv:2208.11580)",
)
