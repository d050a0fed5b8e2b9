"""Two models in turns: other work on the machine meets both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime


def ratio_in_turns(
    sessions: Sequence[onnxruntime.InferenceSession],
    feeds: Mapping[str, np.ndarray],
    repeats: int,
    warm_up: int,
) -> float:
    """Time of the second session to that of the first: the median of the ratios of neighbours.

    Args:
        sessions: two of them.
        feeds: inputs of both.
        repeats: turns.
        warm_up: how many of them do not count.
    """
    times = np.zeros((repeats, 2))
    for turn in times:
        for i, session in enumerate(sessions):
            began = time.perf_counter()
            session.run(None, feeds)
            turn[i] = time.perf_counter() - began
    return float(np.median(times[warm_up:, 1] / times[warm_up:, 0]))
