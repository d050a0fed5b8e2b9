"""Weighted sums over rows of one layer's inputs in two versions of the network; they add up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_ecp.linalg.rows import per_row

# Rows whose products are summed before they join the float64 sums.
BLOCK = 4096
# An input whose variance is less than this share of its mean square about c never varies: of sums
# of products in single precision the rest is rounding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Gram:
    """Weighted sums over rows of one layer's inputs in two versions of the network.

    ``first + second`` are the sums over both sets of rows.

    Args:
        weight: (groups,), sum of s.
        now: (groups, in), sum of s (a' - c).
        before: (groups, in), sum of s (a - c).
        gram: (groups, in, in), sum of s (a' - c) (a' - c)^T.
        cross: (groups, in, in), sum of s (a - c) (a' - c)^T.
        centre: (groups, in), the constant c.
    """

    weight: np.ndarray
    now: np.ndarray
    before: np.ndarray
    gram: np.ndarray
    cross: np.ndarray
    centre: np.ndarray

    @staticmethod
    def of(a: np.ndarray, before: np.ndarray, s: np.ndarray, centre: np.ndarray) -> Gram:
        """Sums of one batch.

        Products are taken in the type of the rows, at least float32, over blocks of rows; sums of
        blocks and batches are float64. Rows are centred first, so nothing large cancels.

        Args:
            a: a', rows (groups, rows, in) of the current network.
            before: a, rows of the original network; may be the same.
            s: weight of every row (groups, rows).
            centre: c, (groups, in); rounded to the type of the rows, in which a' - c is taken.
        """
        kind = np.promote_types(a.dtype, np.float32)
        c = centre.astype(kind)
        same = before is a or np.array_equal(before, a)
        most = s.max(axis=1, initial=0)
        root = np.sqrt(s / np.where(most > 0, most, 1)[:, None])  # at most 1: no overflow
        first = np.zeros((2, *centre.shape))
        second = np.zeros((1 if same else 2, *centre.shape, centre.shape[1]))
        for begin in range(0, a.shape[1], BLOCK):
            rows = slice(begin, begin + BLOCK)
            r = root[:, rows, None].astype(kind)
            x = (a[:, rows] - c[:, None, :]) * r
            second[0] += x.swapaxes(1, 2) @ x
            first[0] += (r * x).sum(axis=1, dtype=np.float64)
            if not same:
                y = (before[:, rows] - c[:, None, :]) * r
                second[1] += y.swapaxes(1, 2) @ x
                first[1] += (r * y).sum(axis=1, dtype=np.float64)
        first *= most[:, None]
        second *= most[:, None, None]
        now, past = (first[0], first[0]) if same else first
        return Gram(s.sum(axis=1), now, past, second[0], second[-1], c.astype(np.float64))

    def __add__(self, other: Gram) -> Gram:
        """The sums over both sets of rows, about the centre of the first."""
        other = other.recentred(self.centre)
        return Gram(
            self.weight + other.weight,
            self.now + other.now,
            self.before + other.before,
            self.gram + other.gram,
            self.cross + other.cross,
            self.centre,
        )

    def recentred(self, centre: np.ndarray) -> Gram:
        """The same sums about another constant (groups, in)."""
        if np.array_equal(centre, self.centre):
            return self
        d = self.centre - centre  # a - centre = (a - self.centre) + d
        moved = self.weight[:, None] * d
        square = moved[:, :, None] * d[:, None, :]

        def second(sums: np.ndarray, first: np.ndarray) -> np.ndarray:
            products = first[:, :, None] * d[:, None, :] + d[:, :, None] * self.now[:, None, :]
            return np.asarray(sums + products + square)

        return Gram(
            self.weight,
            self.now + moved,
            self.before + moved,
            second(self.gram, self.now),
            second(self.cross, self.before),
            centre,
        )

    @property
    def mean_now(self) -> np.ndarray:
        """(groups, in): the weighted mean of a'."""
        return np.asarray(self.centre + self.now / self._weight[:, None])

    @property
    def mean_before(self) -> np.ndarray:
        """(groups, in): the weighted mean of a."""
        return np.asarray(self.centre + self.before / self._weight[:, None])

    @property
    def covariance(self) -> np.ndarray:
        """(groups, in, in): E[s (a' - mean)(a' - mean)^T] / E[s]."""
        constant = ~self._varies
        found = self._centred(self.gram, self.now)
        found[constant[:, :, None] | constant[:, None, :]] = 0.0
        return found

    @property
    def second_moments(self) -> np.ndarray:
        """(groups, in, in): E[s a' a'^T] / E[s]."""
        mean = self.mean_now
        return self.covariance + mean[:, :, None] * mean[:, None, :]

    @property
    def cross_covariance(self) -> np.ndarray:
        """(groups, in, in): E[s (a - mean)(a' - mean)^T] / E[s]."""
        found = self._centred(self.cross, self.before)
        found[np.broadcast_to(~self._varies[:, None, :], found.shape)] = 0.0
        return found

    @property
    def _varies(self) -> np.ndarray:
        """(groups, in): whether a' does. A variance that is all rounding may be negative."""
        w = self._weight[:, None]
        square = np.diagonal(self.gram, axis1=1, axis2=2) / w
        return np.asarray(square - (self.now / w) ** 2 > ROUNDING * square)

    def _centred(self, second: np.ndarray, first: np.ndarray) -> np.ndarray:
        w = self._weight[:, None, None]
        return np.asarray(second / w - first[:, :, None] * self.now[:, None, :] / w**2)

    @property
    def _weight(self) -> np.ndarray:
        return np.where(self.weight > 0, self.weight, 1.0)


def mean_shift(gram: Gram, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Shift (out,) that makes the weighted means of both versions of the layer equal."""
    before, now = (per_row(x, len(target)) for x in (gram.mean_before, gram.mean_now))
    return np.asarray((target * before - weight * now).sum(axis=1))


def outputs(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(groups, rows, out per group): W a of rows (groups, rows, in) for W (out, in), in their type.

    That is at least float32.
    """
    kind = np.promote_types(rows.dtype, np.float32)
    per_group = weight.reshape(len(rows), -1, rows.shape[2]).astype(kind)
    return np.asarray(rows.astype(kind, copy=False) @ per_group.swapaxes(1, 2))


def squared_errors(off: np.ndarray, s: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """(k,) float64: sums of ``s (w a' + d - W a)^2`` over rows and units, for k shifts d.

    Args:
        off: w a' - W a, (groups, rows, out per group).
        s: weight of every row (groups, rows).
        shifts: (k, out).
    """
    residuals = (off + shift.reshape(len(off), 1, -1) for shift in shifts)
    return np.array([(s * np.einsum("gro,gro->gr", r, r)).sum() for r in residuals])


def _rows(target: np.ndarray, groups: int) -> list[slice]:
    """The rows of W that belong to each group."""
    out = len(target) // groups
    return [slice(g * out, (g + 1) * out) for g in range(groups)]
