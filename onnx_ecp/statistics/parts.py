"""Parts of the data, and what workers make of them one by one; see ``runtime.workers``.

The parts follow from the data alone, and the order of the sums from their number: the same for any
number of workers, and for one that was replaced in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.runtime.digest import digest
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.runtime.workers import PARTS, Crew, Held, Job
from onnx_ecp.statistics.observer import Observer, State

# How many samples a part has at least.
LEAST = 8


def parts_of(data: Calibration) -> list[Calibration]:
    """The parts of some data, in order."""
    number = int(np.clip(len(data) // LEAST, 1, PARTS))
    return [data.shard(which) for which in np.array_split(np.arange(len(data)), number)]


def held_observer(observer: Observer, crew: Crew) -> Held:
    """An observer as workers hold it: with the threads that they use."""
    other = observer.with_threads(crew.threads)
    return Held(digest("observer", other.identity), other)


def held_state(state: State) -> Held:
    """A state as workers hold it."""
    return Held(digest("state", state.weights, state.shifts, state.held), without_masks(state))


def without_masks(state: State) -> State:
    """What can be observed of a state."""
    return State(state.weights, state.shifts, held=state.held)


def held_part(part: Calibration) -> Held:
    """A part of the data as workers hold it."""
    return Held(digest("part", part.identity), part)


def over_parts(
    crew: Crew,
    function: Callable[..., Any],
    observer: Observer,
    state: State,
    data: Calibration,
    given: Mapping[str, Any],
    plus: Callable[[Any, Any], Any],
    progress: Progress = silent,
    what: str = "",
) -> Any:
    """The sum of ``function(observer, state, part, given)`` over all parts.

    Args:
        crew: the workers.
        function: of a module.
        observer: of the network.
        state: what is observed.
        data: all samples.
        given: its keywords.
        plus: see ``Crew.total``.
        progress: called after every sum of a worker.
        what: for progress.
    """
    held = held_observer(observer, crew), held_state(state)
    jobs = [Job((held_part(part),), (dict(given),)) for part in parts_of(data)]
    return crew.total(function, held, jobs, plus, progress, what)
