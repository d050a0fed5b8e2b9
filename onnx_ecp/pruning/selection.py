"""Scores to keep masks. Scores are importances: what is smallest goes first.

Counts are exact: of the weights concerned, ``round(sparsity * number)`` are zero afterwards, zeros
that are already there included. Of equal scores the smaller sizes go first, then those of the
earlier layer and index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_ecp.errors import UsageError
from onnx_ecp.runtime.lazy import LazyArrays


@dataclass(frozen=True)
class NM:
    """N:M sparsity: at most n of every m consecutive weights along the reduction axis stay."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Sparsity = float | NM
# A threshold is found by counting this many bits at a time, until so few candidates are left that
# sorting them takes no memory to speak of.
_PIECE = 16
MOST_SORTED = 2**22
SCOPES = ("global", "layer")


def parse_sparsity(value: float | str | NM) -> Sparsity:
    """0.5, "0.5" or "2:4".

    >>> parse_sparsity("2:4")
    NM(n=2, m=4)

    Raises:
        UsageError: not a number in [0, 1], nor N:M with 0 < N < M.
    """
    if isinstance(value, NM):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+):(\d+)", value.strip())):
        n, m = int(match[1]), int(match[2])
        if 0 < n < m:
            return NM(n, m)
    else:
        try:
            share = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            share = -1.0
        if 0 <= share <= 1:
            return share
        percent = _percent(value) if share < 0 else share
        if 2 <= percent <= 100:
            raise UsageError(
                f"sparsity {value} is not a share from 0 to 1.",
                hint=f"Did you mean {percent / 100:g}?",
            )
    raise UsageError(
        f"sparsity {value!r} is neither a number from 0 to 1 nor N:M with 0 < N < M.",
        hint="Examples: --sparsity 0.8, --sparsity 2:4.",
    )


def _percent(value: object) -> float:
    """80 of "80%"; -1 of anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(value))
    return float(found[1]) if found else -1.0


def zeros_wanted(sparsity: float, number: int) -> int:
    """``round(sparsity * number)``, halves up, whatever the binary fraction says.

    >>> zeros_wanted(0.5, 5), zeros_wanted(0.7, 10)
    (3, 7)
    """
    return int(np.floor(round(sparsity * number, 6) + 0.5))


def lowest(
    scores: Mapping[str, np.ndarray],
    keep: Mapping[str, np.ndarray],
    zeros: int,
    sizes: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Keep masks with ``zeros`` False entries over all arrays: the lowest scores, one ranking.

    The scores are never put together: they are read array by array, about three times.

    Args:
        scores: importance >= 0 by name.
        keep: what is still there; False stays False, even where more than ``zeros`` are.
        zeros: number of False entries wanted.
        sizes: >= 0 by name; of equal scores the smaller ones go. They are read only where the
            ranking ends among equal scores, and then as the scores are. None: the first ones go.
    """
    number_removed = zeros - sum(int(np.count_nonzero(~keep[n])) for n in scores)
    if number_removed <= 0:
        return {n: keep[n].copy() for n in scores}
    limit, ties, equal = _threshold(scores, keep, number_removed)
    masks = {n: keep[n] & (scores[n] > limit) for n in scores}
    if ties == equal:
        return masks
    tied = {n: keep[n] & (scores[n] == limit) for n in scores}
    if sizes is None:
        stay = _without_first(tied, ties)
    else:
        others = sum(int(np.count_nonzero(~there)) for there in tied.values())
        stay = lowest(LazyArrays(scores, sizes.__getitem__), tied, others + ties)
    return {n: masks[n] | stay[n] for n in scores}


def _without_first(keep: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The masks without their first ``number`` entries, in order of layer and index."""
    masks = {}
    for name, there in keep.items():
        masks[name] = there.copy()
        first = np.flatnonzero(there)[:number]
        masks[name].reshape(-1)[first] = False
        number -= len(first)
    return masks


def _threshold(
    scores: Mapping[str, np.ndarray], keep: Mapping[str, np.ndarray], number_removed: int
) -> tuple[float, int, int]:
    """The score of a rank among those kept, how many equal to it must go, and how many are equal.

    Floats >= 0 are ordered as their bits are, read as integers. So the leading bits of the
    threshold are found by counting, a piece at a time, until few scores begin with them.
    """
    known, bits, rank = (
        0,
        0,
        number_removed,
    )  # of 64 bits; rank among those
    while True:
        shift = np.uint64(64 - bits - _PIECE)
        counts = np.zeros(2**_PIECE, np.int64)
        for name in scores:
            pieces = _beginning(scores[name][keep[name]], known, bits) >> shift
            counts += np.bincount(
                (pieces & np.uint64(2**_PIECE - 1)).astype(np.int64), minlength=len(counts)
            )
        lower = np.cumsum(counts)
        piece = int(np.searchsorted(lower, rank))
        rank -= int(lower[piece - 1]) if piece else 0
        known, bits = (known << _PIECE) | piece, bits + _PIECE
        if bits == 64:
            return float(np.uint64(known).view(np.float64)), rank, int(counts[piece])
        if counts[piece] <= MOST_SORTED:
            break
    rest = np.concatenate([_beginning(scores[n][keep[n]], known, bits) for n in scores])
    limit = np.partition(rest, rank - 1)[rank - 1]
    below, equal = (int(np.count_nonzero(x)) for x in (rest < limit, rest == limit))
    return float(limit.view(np.float64)), rank - below, equal


def _beginning(scores: np.ndarray, known: int, bits: int) -> np.ndarray:
    """The bits (n,) uint64 of those of the scores >= 0 (n,) whose first ``bits`` are ``known``."""
    # Adding 0.0 turns -0.0, whose bits are those of a huge number, into 0.0.
    found = (scores.astype(np.float64, copy=False) + 0.0).view(np.uint64)
    return found[found >> np.uint64(64 - bits) == np.uint64(known)] if bits else found


def n_of_m(
    scores: np.ndarray, keep: np.ndarray, pattern: NM, sizes: np.ndarray | None = None
) -> np.ndarray:
    """Keep mask in which of every m consecutive entries of a row at least m - n are False.

    Args:
        scores: (out, in) importances in N:M order; ``in`` is divisible by m.
        keep: what is still there.
        pattern: n kept of every m.
        sizes: (out, in); of equal scores the smaller ones go. None: the first ones.
    """
    groups = np.where(keep, scores, -1.0).reshape(len(scores), -1, pattern.m)
    if sizes is None:
        order = np.argsort(groups, axis=2, kind="stable")
    else:
        order = np.lexsort((sizes.reshape(groups.shape), groups), axis=2)
    mask = keep.reshape(groups.shape).copy()
    np.put_along_axis(mask, order[:, :, : pattern.m - pattern.n], False, axis=2)
    return mask.reshape(scores.shape)


@dataclass(frozen=True)
class RankingGroup:
    """Stored tensors that are ranked together for one target.

    Args:
        tensors: their names.
        sparsity: their common target.
        orders: by name, the permutation of columns that makes N:M groups consecutive, where the
            natural order does not.
        masks: by name, the keep masks (out, in) to end with, where they are given; the sparsity
            then plays no part.
    """

    tensors: tuple[str, ...]
    sparsity: Sparsity
    orders: Mapping[str, np.ndarray | None]
    masks: Mapping[str, np.ndarray] | None = None


def select(
    group: RankingGroup,
    scores: Mapping[str, np.ndarray],
    keep: Mapping[str, np.ndarray],
    initial: Mapping[str, np.ndarray],
    *,
    share: float = 1.0,
    floor: float = 0.0,
    sizes: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Keep masks of one group after a share of the way to its target.

    Args:
        group: what is ranked together.
        scores: by name, importance (out, in) >= 0.
        keep: by name, (out, in), what is still there.
        initial: by name, (out, in), what was there before pruning began.
        share: 1 reaches the target.
        floor: least density of any one tensor, as a share of the group's density (N:M needs none).
        sizes: by name, (out, in) >= 0; of equal scores the smaller ones go. None: the first ones.
    """
    names = group.tensors
    gone = sum(int(np.count_nonzero(~initial[n])) for n in names)
    size = sum(keep[n].size for n in names)
    last = _last(group, scores, keep, sizes)
    if last is not None:
        # On the way there only victims of these masks may go, the least important of them first.
        number_removed = sum(int(np.count_nonzero(~mask)) for mask in last.values())
        held = last
    else:
        assert not isinstance(group.sparsity, NM), "a pattern has masks to end with"
        number_removed = max(zeros_wanted(group.sparsity, size), gone)
        density = floor * (1 - (gone + share * (number_removed - gone)) / max(size, 1))
        held = _best(names, scores, keep, density, sizes) if density else {}
    ranked = LazyArrays(
        names, lambda n: np.where(held[n], np.inf, scores[n]) if held else scores[n]
    )
    return lowest(ranked, keep, round(gone + share * (number_removed - gone)), sizes)


def _last(
    group: RankingGroup,
    scores: Mapping[str, np.ndarray],
    keep: Mapping[str, np.ndarray],
    sizes: Mapping[str, np.ndarray] | None,
) -> dict[str, np.ndarray] | None:
    """The keep masks that a group must end within, where a number of zeros does not say all."""
    if group.masks is not None:
        return {n: keep[n] & group.masks[n] for n in group.tensors}
    if isinstance(group.sparsity, NM):
        found = {}
        for n in group.tensors:
            size = None if sizes is None else sizes[n]
            found[n] = _pattern(scores[n], keep[n], group.sparsity, group.orders[n], size)
        return found
    return None


def _pattern(
    scores: np.ndarray,
    keep: np.ndarray,
    pattern: NM,
    order: np.ndarray | None,
    sizes: np.ndarray | None,
) -> np.ndarray:
    if order is None:
        return n_of_m(scores, keep, pattern, sizes)
    mask = np.empty_like(keep)
    size = None if sizes is None else sizes[:, order]
    mask[:, order] = n_of_m(scores[:, order], keep[:, order], pattern, size)
    return mask


def _best(
    names: Iterable[str],
    scores: Mapping[str, np.ndarray],
    keep: Mapping[str, np.ndarray],
    density: float,
    sizes: Mapping[str, np.ndarray] | None,
) -> dict[str, np.ndarray]:
    """Masks of the best ``density`` of every tensor, of what is still there: they go last."""
    best: dict[str, np.ndarray] = {}
    for name in names:
        score = scores[name]
        number = int(np.ceil(density * score.size))
        best |= lowest({name: score}, keep, score.size - number, sizes)
    return best
