"""Which rows of very many are looked at: the positions of a convolution over long inputs.

Rows are drawn in proportion to what they count, so that each that is drawn counts about alike, and
their weights are divided by the expected number of draws, which leaves every sum as it is on
average (Horvitz & Thompson 1952). From every interval of equal sum one row is drawn (stratified
resampling, Kitagawa 1996), so that all samples have their part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# So many rows are looked at for every column of W, and at least so many: the sums of that many rows
# determine the solution about as well as those of all. See docs/benchmarks/engine.md.
ROWS_PER_INPUT, LEAST_ROWS = 32, 8_192


@dataclass(frozen=True)
class Rows:
    """Rows that are looked at.

    Args:
        at: (k,) their numbers in order; None for all.
        weights: (groups, k) how much each counts.
    """

    at: np.ndarray | None
    weights: np.ndarray


def drawn(weights: np.ndarray, share: float, inputs: int, *, skip_unread: bool) -> Rows:
    """Draw rows where there are more than are needed; their weights as ``shrunk`` gives them.

    The draws are the same for the same weights.

    Args:
        weights: of all rows (groups, rows), >= 0.
        share: of the mean weight that every row gets.
        inputs: columns of W.
        skip_unread: see ``shrunk``.
    """
    most = max(LEAST_ROWS, ROWS_PER_INPUT * inputs)
    number = weights.shape[1]
    if number <= 2 * most:  # choosing takes time too
        return Rows(None, shrunk(weights, share, skip_unread=skip_unread))
    totals = weights.sum(axis=1)
    each = 1.0 / (len(weights) * np.where(totals > 0, totals, 1.0))
    chance = (1 - share) * (each @ weights) + share / number
    if not chance.any():
        chance = np.full(number, 1.0 / number)
    ends = np.cumsum(chance)
    places = (np.arange(most) + np.random.default_rng(0).random(most)) * (ends[-1] / most)
    found = np.minimum(np.searchsorted(ends, places, side="right"), number - 1)
    at, times = np.unique(found, return_counts=True)
    read = np.count_nonzero(weights, axis=1, keepdims=True) if skip_unread else number
    mean = totals[:, None] / np.maximum(read, 1)
    taken = shrunk(weights[:, at], share, skip_unread=skip_unread, mean=mean)
    return Rows(at, taken * (times * (ends[-1] / most) / chance[at]))


def shrunk(
    weights: np.ndarray, share: float, *, skip_unread: bool, mean: np.ndarray | None = None
) -> np.ndarray:
    """Weights of rows (groups, rows), of which a share is replaced by their mean.

    Args:
        weights: >= 0.
        share: of the mean weight that every row gets.
        skip_unread: whether rows of weight zero keep it, and count in no mean: positions that no
            output depends on, such as padding under an attention mask.
        mean: (groups, 1) of all rows, where these are some of them.
    """
    read = weights > 0 if skip_unread else np.ones(weights.shape, np.bool_)
    if mean is None:
        number = np.maximum(np.count_nonzero(read, axis=1, keepdims=True), 1)
        mean = weights.sum(axis=1, keepdims=True) / number
    return np.where(read, (1 - share) * weights + share * mean, 0.0)
