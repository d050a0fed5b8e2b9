"""Weights on a grid of int8: scales, and the point of the grid that costs the layer least.

A row of W becomes ``s q`` with integers q from -127 to 127 and one scale s per row, zero at zero.
In the manner of GPTQ (Frantar et al. 2022, arXiv:2210.17323, which is OBQ with one order of columns
for all rows) columns are rounded from left to right, and what rounding takes away moves the columns
still to come:

    e = (W_j - s q_j) / U_jj          W_k -= e U_jk   for k > j          H^-1 = U^T U

with H the damped covariance of the layer's input. Then every weight is rounded once more, given all
others of its row, until none changes: each such step lowers ``(s q - w) H (s q - w)^T``. A weight
that is zero stays zero.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.linalg.cholesky import inverse_factor
from onnx_ecp.runtime.limits import check_deadline

# The largest integer: -128 has no counterpart, and a symmetric grid does without it.
LARGEST = 127
# Scales that are tried, as shares of the one with which the largest weight of a row still fits.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
# Columns that are updated together.
BLOCK = 128
# Sweeps over all columns, at most; mostly three or four leave nothing to change.
SWEEPS = 8


def fitting_scales(weight: np.ndarray) -> np.ndarray:
    """(out,) float32: scales with which the largest weight of every row (out, in) is 127.

    Rows without a weight get 1, as ONNX Runtime gives them.
    """
    most = np.abs(weight).max(axis=1, initial=0.0)
    scale = (most / LARGEST).astype(np.float32)
    return np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1))


def nearest(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(out, in): the integers nearest to ``weight / scale``, as floats.

    >>> nearest(np.array([[0.5, -1.0, 0.0]]), np.array([0.25]))
    array([[ 2., -4.,  0.]])
    """
    return np.asarray(np.clip(np.rint(weight / scale[:, None]), -LARGEST, LARGEST) + 0.0)


def best_scales(weight: np.ndarray, system: np.ndarray) -> np.ndarray:
    """(out,) float32: of SHARES of the fitting scale, the one with which rounding costs least.

    Args:
        weight: (out, in).
        system: H, (in, in).
    """
    fitting = fitting_scales(weight)
    best, least = fitting, np.full(len(weight), np.inf)
    for share in SHARES:
        scale = (fitting * np.float32(share)).astype(np.float32)
        found = cost(_values(nearest(weight, scale), scale) - weight, system)
        best, least = np.where(found < least, scale, best), np.minimum(found, least)
    return best


def cost(off: np.ndarray, system: np.ndarray) -> np.ndarray:
    """(out,): ``d H d^T`` of every row d of ``off`` (out, in)."""
    return np.asarray(((off @ system) * off).sum(axis=1))


def on_grid(
    weight: np.ndarray, system: np.ndarray, keep: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """(out, in): the integers, as floats, that come closest to the weights in the metric of H.

    No row is further away than its nearest integers are.

    Args:
        weight: (out, in), zero where not kept.
        system: H, (in, in), symmetric positive definite.
        keep: (out, in), False where the integer must be 0.
        scale: (out,).
    """
    plain = np.where(keep, nearest(weight, scale), 0.0)
    found = [
        _descended(start, weight, system, keep, scale)
        for start in (plain, _swept(weight, system, keep, scale))
    ]
    costs = [cost(_values(q, scale) - weight, system) for q in found]
    return np.where((costs[1] < costs[0])[:, None], found[1], found[0])


def _values(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.asarray(integers * scale.astype(np.float64)[:, None])


def _swept(
    weight: np.ndarray, system: np.ndarray, keep: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """The integers that one sweep over the columns gives."""
    left, upper = weight.copy(), inverse_factor(system)
    integers, columns = np.zeros_like(weight), weight.shape[1]
    for first in range(0, columns, BLOCK):
        check_deadline()
        last = min(first + BLOCK, columns)
        errors = np.empty((len(weight), last - first))
        for j in range(first, last):
            q = np.where(keep[:, j], nearest(left[:, j : j + 1], scale)[:, 0], 0.0)
            integers[:, j] = q
            errors[:, j - first] = (left[:, j] - q * scale) / upper[j, j]
            left[:, j:last] -= np.outer(errors[:, j - first], upper[j, j:last])
        left[:, last:] -= errors @ upper[first:last, last:]
    return integers


def _descended(
    integers: np.ndarray,
    weight: np.ndarray,
    system: np.ndarray,
    keep: np.ndarray,
    scale: np.ndarray,
) -> np.ndarray:
    """Every integer the best one given all others of its row, column after column."""
    q, s = integers.copy(), scale.astype(np.float64)
    diagonal = np.diagonal(system)
    slope = (_values(q, scale) - weight) @ system
    for _ in range(SWEEPS):
        check_deadline()
        changed = False
        for j in range(weight.shape[1]):
            wanted = np.rint(q[:, j] - slope[:, j] / (diagonal[j] * s))
            new = np.where(keep[:, j], np.clip(wanted, -LARGEST, LARGEST), 0.0)
            rows = np.flatnonzero(new != q[:, j])
            if len(rows):
                changed = True
                step = (new[rows] - q[rows, j]) * s[rows]
                slope[rows] += step[:, None] * system[j]
                q[rows, j] = new[rows]
        if not changed:
            break
    return q + 0.0
