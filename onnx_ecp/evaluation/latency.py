"""How long two models take, measured in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from onnx_ecp.data.calibration import Batch
from onnx_ecp.graph import (
    Model,
)
from onnx_ecp.runtime.limits import workers
from onnx_ecp.runtime.session import Session

# A difference below this share is none: two copies of one model differ as much.
TRIFLE = 0.03
# So many runs of each at least, before two models are told apart.
TURNS = 8
# Of the seconds that all took so far, the share that a measurement nobody asked for takes, within
# these bounds; where TURNS take longer, it may go on for LONGEST, or for its share.
SHARE, LEAST, ENOUGH, LONGEST = 0.05, 0.05, 0.5, 0.25


@dataclass(frozen=True)
class Latency:
    """Seconds of one run of both models, measured in turns.

    The ratio is that of the least of many runs: on an idle machine all are alike, on a busy one
    other work makes most of them longer and none shorter. Medians far above say that it was busy.

    Args:
        seconds_a: of model a, the least.
        seconds_b: of model b, the least.
        ratio: seconds_b / seconds_a; below 1 when b is faster.
        threads: threads within an operator.
        batch: samples a run.
        median_a: median of the seconds of model a.
        median_b: median of those of model b.
        spread: between which ratios of neighbouring runs, b over a, most lie: (low, high), see
            ``spread_of``; None for too few runs.
    """

    seconds_a: float
    seconds_b: float
    ratio: float
    threads: int
    batch: int
    median_a: float | None = None
    median_b: float | None = None
    spread: tuple[float, ...] | None = None

    @property
    def verdict(self) -> str:
        """Whether model b is "faster", "slower", or "no faster": apart by no more than the spread.

        Most ratios of neighbouring runs must be on one side, and so must those of the medians and
        of the least of all runs, by more than a trifle: what holds of one alone is no difference.
        """
        if self.range is None:
            return "no faster"
        low, high = self.range
        if high < 1 - TRIFLE:
            return "faster"
        return "slower" if low > 1 + TRIFLE else "no faster"

    @property
    def range(self) -> tuple[float, float] | None:
        """Between which ratios the truth lies: of neighbouring runs, of medians, of the least.

        On a machine with other work they differ. None for too few runs.
        """
        if self.spread is None:
            return None
        ratios = (*self.spread, self.ratio, self.median_ratio)
        return min(ratios), max(ratios)

    @property
    def median_ratio(self) -> float:
        """Median of model b over that of model a; the ratio of the least where there is none."""
        if self.median_a is None or self.median_b is None:
            return self.ratio
        return self.median_b / self.median_a

    @property
    def conditions(self) -> str:
        """How it was measured, for people."""
        return f"batch {self.batch}, {self.threads} thread{'s' * (self.threads != 1)}"


def measure_latency(
    a: Model,
    b: Model,
    batch: Batch,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    turns: int = 50,
    seconds: float = 1.0,
    most: float = math.inf,
) -> Latency:
    """Time of one run of both models, in turns, so that other work meets both.

    Args:
        a: the original model.
        b: a model with the same inputs.
        batch: what both are fed.
        provider: execution provider.
        threads: threads within an operator; None takes one per core.
        turns: so many at least.
        seconds: for so long at least.
        most: no turn after the first begins after so many seconds, whatever else is said.
    """
    used = threads or workers()  # said, not left to ONNX Runtime, which would not tell
    sessions = [
        Session(m.proto, provider=provider, threads=used, base=m.base, packed=True) for m in (a, b)
    ]
    began = time.monotonic()
    for turn in range(3):  # the first runs allocate
        if turn and time.monotonic() - began > most / 4:
            break
        for session in sessions:
            session.seconds(batch.feeds)
    times: tuple[list[float], list[float]] = ([], [])
    timing = time.monotonic()
    while len(times[0]) < turns or time.monotonic() - timing < seconds:
        if times[0] and time.monotonic() - began > most:
            break
        for session, taken in zip(sessions, times, strict=True):
            taken.append(session.seconds(batch.feeds))
    return latency_of(times, used, batch.samples)


def brief_latency(
    a: Model,
    b: Model,
    batch: Batch,
    *,
    so_far: float,
    provider: str = "cpu",
    threads: int | None = None,
) -> Latency:
    """The same in a small share of the seconds that all took ``so_far``."""
    share = SHARE * so_far
    return measure_latency(
        a,
        b,
        batch,
        provider=provider,
        threads=threads,
        turns=TURNS,
        seconds=min(max(share, LEAST), ENOUGH),
        most=max(share, LONGEST),
    )


def latency_of(times: Sequence[Sequence[float]], threads: int, batch: int) -> Latency:
    """What is known of two models, given the seconds of their runs, turn by turn.

    Args:
        times: of model a and of model b.
        threads: threads within an operator.
        batch: samples a run.
    """
    least, medians = [min(x) for x in times], [statistics.median(x) for x in times]
    ratios = [y / x for x, y in zip(*times, strict=True)]
    return Latency(
        seconds_a=least[0],
        seconds_b=least[1],
        ratio=least[1] / least[0],
        threads=threads,
        batch=batch,
        median_a=medians[0],
        median_b=medians[1],
        spread=spread_of(ratios),
    )


def spread_of(ratios: Sequence[float]) -> tuple[float, ...] | None:
    """Between which most of the ratios lie: (low, high); None for fewer than TURNS.

    Of many it is the middle half. Of fewer it is wider, all of the fewest: otherwise two models
    that take the same would too often seem apart.

    >>> spread_of([7.0, 1.0, 2.0, 8.0, 6.0, 3.0, 5.0, 4.0]), spread_of(list(range(28)))
    ((1.0, 8.0), (5, 22))
    """
    if len(ratios) < TURNS:
        return None
    left_out = (len(ratios) - TURNS) // 4
    ordered = sorted(ratios)
    return ordered[left_out], ordered[-1 - left_out]
