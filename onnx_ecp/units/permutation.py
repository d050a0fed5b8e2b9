"""Units in an order in which an N:M pattern loses less (``--permute``).

N:M keeps N of every M *neighbours* among the inputs of a layer. Where these are units that a layer
in the same file makes, their order is free: rows of the producers, columns of the readers and
whatever stored numbers lie between them change places together, and the network computes what it
did. The order is found by exchanging units between two runs of M as long as more importance is kept
(after Pool & Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021, whose search is wider).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_ecp.layers import Layer
from onnx_ecp.pruning.selection import NM
from onnx_ecp.units.groups import Structure

# Products that a search may take; of wide layers it then sees a part of all pairs of runs.
WORK = 2e9
# Candidates that are held at once.
CHUNK = 2**22


@dataclass(frozen=True)
class Reordered:
    """What an order gains for one layer.

    Args:
        before: share of the layer's importance that the pattern keeps in the given order.
        after: in the new one.
    """

    before: float
    after: float


def best_order(
    structure: Structure,
    layers: Sequence[Layer],
    scores: Mapping[str, np.ndarray],
    patterns: Mapping[str, NM],
) -> tuple[np.ndarray, dict[str, Reordered]]:
    """An order of the units, and what it gains, by name of the layers that gain.

    Args:
        structure: of the units.
        layers: of the model.
        scores: by layer name, importance (out, in) >= 0.
        patterns: by layer name, for the layers that get one.

    Returns:
        (units,): the unit that takes the place of each; and the gains.
    """
    order, gains = np.arange(structure.units), {}
    for units in interchangeable(structure):
        seen = {
            layer.name: by_seat
            for layer in layers
            if layer.name in patterns
            and (by_seat := _by_seat(structure, layer, scores[layer.name], units, patterns))
            is not None
        }
        if not seen:
            continue
        (pattern,) = {patterns[name] for name in seen}
        seats = exchanged(np.concatenate(list(seen.values())), pattern)
        order[units] = units[seats]
        for name, values in seen.items():
            total = float(values.sum()) or 1.0
            before, after = (kept_by(x, pattern).sum() / total for x in (values, values[:, seats]))
            gains[name] = Reordered(float(before), float(after))
    return order, gains


def interchangeable(structure: Structure) -> list[np.ndarray]:
    """Units (ascending) that lie in the same tensors, equally often: their order is free."""
    lying = [axis.marks for axis in structure.axes.values()]
    rows = [np.bincount(x[x >= 0], minlength=structure.units) for x in lying]
    rows += [np.bincount(s.marks[s.marks >= 0], minlength=structure.units) for s in structure.slots]
    if not rows or not structure.units:
        return []
    _, kinds = np.unique(np.stack(rows), axis=1, return_inverse=True)
    found = (np.flatnonzero(kinds.reshape(-1) == kind) for kind in range(kinds.max() + 1))
    return sorted((units for units in found if len(units) > 1), key=lambda units: int(units[0]))


def _by_seat(
    structure: Structure,
    layer: Layer,
    scores: np.ndarray,
    units: np.ndarray,
    patterns: Mapping[str, NM],
) -> np.ndarray | None:
    """Importance (rows, units): what lies side by side there does in the layer's N:M runs.

    None where the units are not the entries of whole runs, in order.
    """
    m = patterns[layer.name].m
    entries = structure.columns[layer.name].reshape(layer.reduction, -1)
    if not (entries == entries[:, :1]).all():
        return None
    places = np.flatnonzero(np.isin(entries[:, 0], units))
    if not np.array_equal(entries[places, 0], units) or len(units) % m or places[0] % m:
        return None
    if places[-1] - places[0] != len(places) - 1:
        return None
    by_entry = scores.reshape(len(scores), layer.reduction, -1)[:, places]
    return np.asarray(np.moveaxis(by_entry, 2, 1).reshape(-1, len(units)))


def kept_by(values: np.ndarray, pattern: NM) -> np.ndarray:
    """(runs,): importance (rows, runs * M) that the pattern keeps."""
    return _kept(values.reshape(len(values), -1, pattern.m).swapaxes(0, 1), pattern)


def _kept(runs: np.ndarray, pattern: NM) -> np.ndarray:
    """(...): of (..., rows, M), the sum of the N largest of every row."""
    top = np.partition(runs, pattern.m - pattern.n, axis=-1)[..., pattern.m - pattern.n :]
    return np.asarray(top.sum(axis=(-2, -1)))


def exchanged(values: np.ndarray, pattern: NM) -> np.ndarray:
    """(seats,): which column sits where, so that runs of M keep more than in the order given.

    Every two runs meet once a round and make the one exchange that gains most; rounds end where
    none gains. Deterministic.

    Args:
        values: importance (rows, seats); M divides the seats.
        pattern: N:M.
    """
    m = pattern.m
    values = np.ascontiguousarray(values.T, dtype=np.float32)
    seats = np.arange(len(values)).reshape(-1, m)
    left = WORK
    while True:
        changed = False
        for first, second in _meetings(len(seats)):
            size = max(1, CHUNK // (m * m * m * values.shape[1]))
            for start in range(0, len(first), size):
                part = slice(start, start + size)
                changed |= _exchange(values, seats, first[part], second[part], pattern)
            left -= len(first) * m**3 * values.shape[1]
            if left < 0:
                return seats.reshape(-1)
        if not changed:
            return seats.reshape(-1)


def _meetings(runs: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Disjoint pairs of runs, until every two have met (the circle method)."""
    circle = list(range(runs + runs % 2))
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], circle[half:][::-1], strict=True)
        met = np.array([p for p in pairs if max(p) < runs], int).reshape(-1, 2)
        yield met[:, 0], met[:, 1]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _exchange(
    values: np.ndarray, seats: np.ndarray, first: np.ndarray, second: np.ndarray, pattern: NM
) -> bool:
    """Let disjoint pairs of runs make their best exchange, in place; whether any did."""
    m, pairs = pattern.m, np.arange(len(first))
    here, there = values[seats[first]], values[seats[second]]  # (pairs, m, rows)
    now = _kept(here.swapaxes(1, 2), pattern) + _kept(there.swapaxes(1, 2), pattern)
    gain = np.empty((len(first), m, m))
    for i in range(m):
        for j in range(m):
            a, b = here.copy(), there.copy()
            a[:, i], b[:, j] = there[:, j], here[:, i]
            gain[:, i, j] = _kept(a.swapaxes(1, 2), pattern) + _kept(b.swapaxes(1, 2), pattern)
    gain -= now[:, None, None]
    best = gain.reshape(len(first), -1).argmax(axis=1)
    i, j = np.divmod(best, m)
    better = gain[pairs, i, j] > 1e-6 * now
    a, b = (first[better], i[better]), (second[better], j[better])
    seats[a], seats[b] = seats[b], seats[a].copy()
    return bool(better.any())
