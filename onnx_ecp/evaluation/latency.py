"""How long two models take, measured in turns."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx_ecp.data.calibration import Batch
from onnx_ecp.graph import (
    Model,
)
from onnx_ecp.runtime.limits import workers
from onnx_ecp.runtime.session import Session

if TYPE_CHECKING:
    pass


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
    """

    seconds_a: float
    seconds_b: float
    ratio: float
    threads: int
    batch: int
    median_a: float | None = None
    median_b: float | None = None

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
    """
    used = threads or workers()  # said, not left to ONNX Runtime, which would not tell
    sessions = [
        Session(m.proto, provider=provider, threads=used, base=m.base, packed=True) for m in (a, b)
    ]
    for _ in range(3):  # the first runs allocate
        for session in sessions:
            session.seconds(batch.feeds)
    times: tuple[list[float], list[float]] = ([], [])
    began = time.monotonic()
    while len(times[0]) < turns or time.monotonic() - began < seconds:
        for session, taken in zip(sessions, times, strict=True):
            taken.append(session.seconds(batch.feeds))
    seconds_a, seconds_b = map(min, times)
    medians = map(statistics.median, times)
    return Latency(seconds_a, seconds_b, seconds_b / seconds_a, used, batch.samples, *medians)
