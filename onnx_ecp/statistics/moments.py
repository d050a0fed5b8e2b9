"""Sums over samples that importance and compensation are computed from. All float64; they add up.

For a layer ``z = W a + b`` with adjoints ``g = v dy/dz`` (arXiv:2602.20467):

    bb_i = E[(dy/db_i)^2]    wb_ij = E[dy/dW_ij dy/db_i]    ww_ij = E[(dy/dW_ij)^2]

Activations enter as ``a - c`` with a constant c per input. The importance does not depend on c, but
without it ``ww - wb^2 / bb`` cancels to nothing when activations have a large mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from onnx_ecp.linalg.rows import per_row

POSITIONS = ("expand", "reduce")
# Rows that are centred, squared and multiplied at a time: float64 copies of all the patches of a
# convolution would not fit a cache. From 1024 to 4096 it makes little difference.
BLOCK = 2048


@dataclass(frozen=True)
class Moments:
    """Sums over rows of one layer. ``first + second`` are the moments of both sets of rows.

    Args:
        count: number of samples summed; a sample has one row per position.
        centre: (groups, in), the constant c.
        bb: (out,), sum of (dy/db)^2.
        wb: (out, in), sum of dy/dW dy/db, at a - c.
        ww: (out, in), sum of (dy/dW)^2, at a - c; None where nobody asked for it.
        gradient: (P, out, in), sum of dy/dW at a itself, one for each probe.
        rows: number of rows summed.
        a: (groups, in), sum of a - c over rows.
        aa: (groups, in), sum of (a - c)^2 over rows.
    """

    count: int
    centre: np.ndarray
    bb: np.ndarray
    wb: np.ndarray
    ww: np.ndarray | None
    gradient: np.ndarray | None
    rows: int
    a: np.ndarray
    aa: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets; they must have the same centre, see ``recentred``."""
        other = other.recentred(self.centre)
        return Moments(
            self.count + other.count,
            self.centre,
            self.bb + other.bb,
            self.wb + other.wb,
            _both(self.ww, other.ww),
            _both(self.gradient, other.gradient),
            self.rows + other.rows,
            self.a + other.a,
            self.aa + other.aa,
        )

    def recentred(self, centre: np.ndarray) -> Moments:
        """The same moments about another constant."""
        if centre is self.centre or np.array_equal(centre, self.centre):
            return self
        d = self.centre - centre  # a - centre = (a - self.centre) + d
        rows, ww = self.per_row(d), self.ww
        if ww is not None:
            ww = ww + 2 * rows * self.wb + self.bb[:, None] * rows**2
        return replace(
            self,
            centre=centre,
            wb=self.wb + self.bb[:, None] * rows,
            ww=ww,
            a=self.a + self.rows * d,
            aa=self.aa + 2 * d * self.a + self.rows * d**2,
        )

    def per_row(self, x: np.ndarray) -> np.ndarray:
        """(groups, in) values repeated for the rows of W: (out, in)."""
        return per_row(x, len(self.bb))

    @property
    def mean(self) -> np.ndarray:
        """(groups, in): the mean of every input over all rows."""
        return np.asarray(self.centre + self.a / self.rows)

    @property
    def norms(self) -> np.ndarray:
        """(groups, in): the l2 norm of every input over all rows."""
        return np.sqrt(
            np.maximum(self.aa + self.centre * (2 * self.a + self.rows * self.centre), 0)
        )

    @property
    def spread(self) -> np.ndarray:
        """(groups, in): the variance of every input over all rows."""
        return np.maximum(self.aa / self.rows - (self.a / self.rows) ** 2, 0)

    @property
    def gain(self) -> np.ndarray:
        """(out, in): the bias shift per unit of removed weight that compensates best, db*/W.

        0 where the bias has no influence: there is nothing to compensate with.
        """
        safe = self._responsive
        return np.where(
            safe[:, None],
            self.per_row(self.centre) + self.wb / np.where(safe, self.bb, 1)[:, None],
            0.0,
        )

    @property
    def variance(self) -> np.ndarray:
        """(out, in): ``(ww - wb^2 / bb) / count``, what a removed unit weight costs after gain."""
        safe = self._responsive
        explained = np.where(safe[:, None], self.wb**2 / np.where(safe, self.bb, 1)[:, None], 0.0)
        # Cauchy-Schwarz makes the difference >= 0; rounding may not.
        return np.maximum(self.squares - explained, 0) / self.count

    @property
    def squares(self) -> np.ndarray:
        """(out, in): ww, of a method that said it needs sensitivities of weights."""
        assert self.ww is not None, "the method's `needs` must name what it reads"
        return self.ww

    @property
    def _responsive(self) -> np.ndarray:
        """(out,) bool: the bias moves the outputs at all (docs/method.md, section 1).

        bb may vanish while ww does not: attention keys in ``reduce`` mode, where the softmax does
        not feel a shift. Both are compared in units in which every input has a mean square, about
        its constant c, of one. Where positions are not reduced ``bb > 0`` says the same.
        """
        if self.ww is None:
            return np.asarray(self.bb > 0)
        square = self.per_row(self.aa / self.rows)
        weights = np.divide(self.ww, square, out=np.zeros_like(self.ww), where=square > 0)
        return np.asarray(self.bb > 1e-10 * weights.max(axis=1, initial=0.0))

    def shrunk(self, q: float) -> Moments:
        """Moments as if every sensitivity were ``(1 - q) s + q mean(s)`` of its unit.

        A few samples near a decision boundary otherwise carry all the weight (docs/method.md).
        Defined for one position per row, so for ``expand``.
        """
        mean = q * self.bb[:, None] / self.rows
        return replace(
            self,
            wb=(1 - q) * self.wb + mean * self.per_row(self.a),
            ww=None if self.ww is None else (1 - q) * self.ww + mean * self.per_row(self.aa),
        )


def _both(x: np.ndarray | None, y: np.ndarray | None) -> np.ndarray | None:
    return None if x is None or y is None else x + y


def total(parts: Iterable[Moments]) -> Moments:
    """The sum of at least one."""
    return reduce(add, parts)


def expand(
    a: np.ndarray,
    g: np.ndarray,
    centre: np.ndarray,
    *,
    samples: int | None = None,
    s: np.ndarray | None = None,
    with_squares: bool = True,
    with_gradient: bool = False,
) -> Moments:
    """Moments in which the positions of a sample count as if they were independent.

    Their squares are summed, so a weight that is used at many positions costs that much more.

    Args:
        a: input rows (groups, rows, in).
        g: adjoint rows (P, groups, rows, out per group).
        centre: (groups, in).
        samples: how many samples the rows come from; None: one per row.
        s: ``sensitivities(g)`` where the caller has them already.
        with_squares: whether to sum (dy/dW)^2.
        with_gradient: also sum dy/dW per probe.
    """
    s = sensitivities(g) if s is None else s
    blocks = (slice(first, first + BLOCK) for first in range(0, a.shape[1], BLOCK))
    parts = (
        _weighted(a[:, rows], s[:, rows], centre, with_squares=with_squares) for rows in blocks
    )
    first, second, wb, *ww = reduce(lambda x, y: tuple(map(add, x, y)), parts)
    return Moments(
        count=a.shape[1] if samples is None else samples,
        centre=centre,
        bb=s.sum(axis=1).reshape(-1),
        wb=wb,
        ww=ww[0] if with_squares else None,
        gradient=_gradients(g, a.astype(np.float64)) if with_gradient else None,
        rows=a.shape[1],
        a=first,
        aa=second,
    )


def _weighted(
    a: np.ndarray, s: np.ndarray, centre: np.ndarray, *, with_squares: bool
) -> tuple[np.ndarray, ...]:
    """a, aa, wb and ww of rows (groups, rows, in) with sensitivities (groups, rows, out)."""
    x = np.subtract(a, centre[:, None, :], dtype=np.float64)
    wb, first = _products(s, x), x.sum(axis=1)
    np.square(x, out=x)
    ww = (_products(s, x),) if with_squares else ()
    return first, x.sum(axis=1), wb, *ww


def reduce_positions(
    a: np.ndarray,
    g: np.ndarray,
    centre: np.ndarray,
    samples: int,
    *,
    with_gradient: bool = False,
) -> Moments:
    """Moments of the whole layer per sample: dy/dW is summed over positions before it is squared.

    Args:
        a: input rows (groups, rows, in), the positions of a sample next to each other.
        g: adjoint rows (P, groups, rows, out per group).
        centre: (groups, in).
        samples: rows is a multiple of it.
        with_gradient: also sum dy/dW per probe.
    """
    a, g = a.astype(np.float64), g.astype(np.float64)
    shifted = a - centre[:, None, :]
    groups, rows, columns = a.shape
    positions = rows // samples
    x = shifted.reshape(groups, samples, positions, columns)
    bb = np.zeros(groups * g.shape[3])
    wb = np.zeros((len(bb), columns))
    ww = np.zeros_like(wb)
    for probe in g.reshape(len(g), groups, samples, positions, -1):
        for sample in range(samples):
            by_bias = probe[:, sample].sum(axis=1).reshape(-1)
            by_weight = _products(probe[:, sample], x[:, sample])
            bb += by_bias**2
            wb += by_weight * by_bias[:, None]
            ww += by_weight**2
    gradient = _gradients(g, a) if with_gradient else None
    a1, a2 = shifted.sum(axis=1), (shifted**2).sum(axis=1)
    return Moments(samples, centre, bb, wb, ww, gradient, rows, a1, a2)


def sensitivities(g: np.ndarray) -> np.ndarray:
    """``s = sum_p g_p^2``: adjoints (P, groups, rows, out) to (groups, rows, out), float64."""
    s = np.square(g[0], dtype=np.float64)
    for probe in g[1:]:  # one probe at a time: float64 copies of all of them would not fit a cache
        s += np.square(probe, dtype=np.float64)
    return s


def _products(s: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Sum over rows of s_i a_j: (groups, rows, out) and (groups, rows, in) to (all out, in)."""
    return np.asarray(s.swapaxes(1, 2) @ a).reshape(-1, a.shape[2])


def _gradients(g: np.ndarray, a: np.ndarray) -> np.ndarray:
    return np.stack([_products(probe, a) for probe in g.astype(np.float64)])
