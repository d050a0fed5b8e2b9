"""Two models in turns: other work on the machine meets both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnxruntime


def in_turns(
    runs: Sequence[Callable[[], Any]],
    turns: int,
    warm_up: int,
    seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Seconds (turns, runs) of functions that take turns.

    Args:
        runs: what is timed.
        turns: so many at least.
        warm_up: further turns in front that do not count.
        seconds: for so long at least.
        clock: what tells the time of a run.
    """
    taken: list[list[float]] = []
    began = time.perf_counter()
    while len(taken) < turns + warm_up or time.perf_counter() - began < seconds:
        taken.append([_timed(run, clock) for run in runs])
    return np.array(taken[warm_up:])


def _timed(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    run()
    return clock() - began


def of_neighbours(times: np.ndarray) -> float:
    """Time of the second to that of the first: the median of the ratios of neighbours."""
    return float(np.median(times[:, 1] / times[:, 0]))


def ratio_in_turns(
    sessions: Sequence[onnxruntime.InferenceSession],
    feeds: Mapping[str, np.ndarray],
    repeats: int,
    warm_up: int,
) -> float:
    """``of_neighbours`` of two sessions.

    Args:
        sessions: two of them.
        feeds: inputs of both.
        repeats: turns that count.
        warm_up: turns in front of them.
    """
    runs = [partial(session.run, None, feeds) for session in sessions]
    return of_neighbours(in_turns(runs, repeats, warm_up))
