"""Axes of the pictures: from values to pixels, and round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """From values to pixels.

    Args:
        low: value at pixel ``start``.
        high: value at pixel ``end``.
        start: pixel.
        end: pixel.
        log: whether equal ratios are equally long.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, x = ((math.log(v) if self.log else v) for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (x - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        """Round values between the ends."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def linear(
    values: Sequence[float],
    start: float,
    end: float,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Axis:
    """An axis around these values that does not leave ``within``, as they do not."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return Axis(max(low - margin, within[0]), min(high + margin, within[1]), start, end)


def logarithmic(values: Sequence[float], start: float, end: float) -> Axis:
    """A logarithmic axis around these values, which are greater than 0."""
    return Axis(min(values) / 1.3, max(values) * 1.3, start, end, log=True)


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade; of many decades the powers of ten alone."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(decades) <= 5 else (1,)
    every = max(1, len(decades) // 8)
    ticks = [d * 10.0**k for k in decades if k % every == 0 for d in digits]
    return [tick for tick in ticks if low <= tick <= high]
