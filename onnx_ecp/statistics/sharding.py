"""Walks along the layers, here or by workers that each hold parts of the samples on their way."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import numpy as np

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.gradients.cotangents import SQUARED
from onnx_ecp.layers import Layer
from onnx_ecp.runtime.digest import digest
from onnx_ecp.runtime.lazy import LazyArrays
from onnx_ecp.runtime.workers import Crew, Held, Job, crew, held_here, hold, release
from onnx_ecp.statistics.drawing import Rows, drawn
from onnx_ecp.statistics.forward import Segment
from onnx_ecp.statistics.gram import Gram
from onnx_ecp.statistics.layerwise import LayerwiseForward, Network
from onnx_ecp.statistics.observer import Observer, State
from onnx_ecp.statistics.parts import (
    held_observer,
    held_part,
    held_state,
    parts_of,
    without_masks,
)


def walk(
    network: Network, data: Calibration, *, with_original: bool = True
) -> LayerwiseForward | ShardedForward:
    """A walk along the layers with some samples, by workers where there are any.

    Samples that differ in shape are walked with here: their rows could not be told apart.

    Args:
        network: whose layers are visited.
        data: the samples.
        with_original: see ``LayerwiseForward``.
    """
    workers = crew()
    if workers is None or data.uneven:
        return LayerwiseForward(network, data, with_original=with_original)
    return ShardedForward(network, data, workers, with_original=with_original)


def plain_grams(network: Network, names: Collection[str]) -> dict[str, Gram]:
    """By layer name, sums of the original inputs of some layers, all rows weighing alike."""
    found = grams_of(network, network.train, network.original, names)
    return {layer.name: gram for layer, gram in found}


def grams_of(
    network: Network,
    data: Calibration,
    state: State,
    names: Collection[str],
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    shrink: float = 0.0,
    with_original: bool = False,
) -> Iterator[tuple[Layer, Gram]]:
    """Some layers in graph order, each with the sums of its inputs in one state.

    Args:
        network: whose layers they are.
        data: the samples.
        state: the same all along the walk.
        names: of the layers.
        weights: by layer name, of the rows; where there are none all rows weigh alike.
        shrink: share of the mean weight that every row gets.
        with_original: whether the inputs in the original network are looked at, too.
    """
    run = walk(network, data, with_original=with_original)
    for segment in run.stops(state, names):
        layer = segment.layer
        yield layer, run.gram(segment, state, (weights or {}).get(layer.name), shrink)


@dataclass
class _Walk:
    """A walk along one part of the data, as a worker holds it.

    Args:
        state: of the network, as far as it has been solved.
        run: None at the beginning.
        position: how many segments it is through.
    """

    state: State
    run: LayerwiseForward | None = None
    position: int = 0


@dataclass(frozen=True)
class _Change:
    """What a state has that the one before had not: weights and shifts by name."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    shifts: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def between(before: State, after: State) -> _Change:
        """From one state to the next."""
        weights = {
            name: after.weights[name]
            for name in after.weights
            if not _is_same(before.weights, after.weights, name)
        }
        shifts = {n: s for n, s in after.shifts.items() if s is not before.shifts.get(n)}
        return _Change(weights, shifts)

    def of(self, state: State) -> State:
        """The next state."""
        weights = state.weights
        for name, values in self.weights.items():
            weights = weights.replaced(name, values)
        return State(weights, {**state.shifts, **self.shifts}, held=state.held)


def _is_same(before: LazyArrays, after: LazyArrays, name: str) -> bool:
    """Whether a stored tensor is the same array; one that is computed may be another."""
    if before is after:
        return True
    return before.knows(name) and after.knows(name) and before[name] is after[name]


class ShardedForward:
    """``LayerwiseForward`` by workers: each holds the live tensors of its parts.

    What is solved is sent layer by layer. A part whose worker is gone begins anew elsewhere, with
    all that was solved since.

    Args:
        network: whose layers are visited.
        data: the samples, all of one shape.
        crew: the workers.
        with_original: see ``LayerwiseForward``.
    """

    def __init__(
        self, network: Network, data: Calibration, crew: Crew, *, with_original: bool = True
    ) -> None:
        self._network, self._crew, self._with_original = network, crew, with_original
        self._parts = parts_of(data)
        self._ends = np.cumsum([len(part) for part in self._parts])[:-1] / len(data)
        self._samples, self._skips = len(data), network.observer.metric in SQUARED
        self._common = held_observer(network.observer, crew), held_state(network.original)
        self._held = [held_part(part) for part in self._parts]
        self._index = {segment.layer.name: i for i, segment in enumerate(network.segments)}
        self._name, self._turn = f"walk {uuid4().hex}", 0
        self._state: State | None = None

    def stops(self, state: State, names: Collection[str]) -> Iterator[Segment]:
        """See ``LayerwiseForward``; what lies between two stops is walked on the way to one."""
        for segment in self._network.segments:
            if segment.layer.name in names:
                yield segment

    def gram(
        self, segment: Segment, state: State, weights: np.ndarray | None, shrink: float
    ) -> Gram:
        """See ``LayerwiseForward``."""
        found: list[Gram] = self._visited(segment, state, weights, shrink, "gram", ())
        return found[0]

    def errors(
        self,
        segment: Segment,
        state: State,
        weights: np.ndarray | None,
        shrink: float,
        candidates: Sequence[tuple[np.ndarray, np.ndarray]],
        units: np.ndarray | None = None,
    ) -> tuple[float, list[np.ndarray]]:
        """See ``LayerwiseForward``."""
        more = (list(candidates), units)
        energy, *errors = self._visited(segment, state, weights, shrink, "errors", more)
        return energy, errors

    def _visited(
        self,
        segment: Segment,
        state: State,
        weights: np.ndarray | None,
        shrink: float,
        what: str,
        more: tuple[Any, ...],
    ) -> list[Any]:
        """What ``LayerwiseForward`` tells of all parts together; see ``_visit``."""
        before = self._state or state
        change = _Change.between(before, state)
        index, network = self._index[segment.layer.name], self._network
        how = {
            "size": network.size,
            "memory": None if network.memory is None else network.memory // len(self._parts),
            "with_original": self._with_original,
        }
        jobs, rows = [], self._rows(segment, weights, shrink)
        fresh = _Walk(without_masks(before))
        for number, (part, own) in enumerate(zip(self._held, rows, strict=True)):
            keys = [f"{self._name} {number} {turn}" for turn in (self._turn, self._turn + 1)]
            walk = Held(keys[0], fresh)
            given = (keys, index, change, how, what, (own, *more))
            jobs.append(Job((part, walk), given))
        self._state, self._turn = state, self._turn + 1
        return self._crew.total(_visit, self._common, jobs, _plus)  # type: ignore[no-any-return]

    def _rows(
        self, segment: Segment, weights: np.ndarray | None, shrink: float
    ) -> list[Rows | None]:
        """By part, the rows that are looked at, numbered within it."""
        if weights is None:
            return [None] * len(self._parts)
        padded = self._skips and weights.shape[1] > self._samples
        some = drawn(weights, shrink, segment.layer.shape[1], skip_unread=padded)
        ends = np.rint(self._ends * weights.shape[1]).astype(int)
        if some.at is None:
            return [Rows(None, part) for part in np.split(some.weights, ends, axis=1)]
        cuts = np.searchsorted(some.at, ends)
        first = np.split(some.at, cuts), np.split(some.weights, cuts, axis=1), (0, *ends)
        return [Rows(at - start, part) for at, part, start in zip(*first, strict=True)]


def _plus(a: list[Any], b: list[Any]) -> list[Any]:
    """What two parts tell together."""
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else a or b


def _visit(
    observer: Observer,
    original: State,
    part: Calibration,
    walk: _Walk,
    keys: Sequence[str],
    index: int,
    change: _Change,
    how: Mapping[str, Any],
    what: str,
    given: tuple[Any, ...],
) -> list[Any]:
    """Go on to a segment and look at it, on a worker.

    Returns:
        The Gram sums, or none where none of the rows is looked at; or the energy and the errors of
        the candidates.
    """
    now, then = keys
    release(now)  # half-way on it could not be gone on with
    state = change.of(walk.state)
    run, network = (
        walk.run,
        held_here(
            f"network {digest(observer.identity, how['size'])}",
            lambda: Network(observer, original, part, part, how["size"]),
        ),
    )
    if run is None:
        own = replace(network, original=original, train=part, memory=how["memory"])
        own.__dict__["segments"] = network.segments  # with their sessions
        run = LayerwiseForward(own, part, with_original=how["with_original"])
    segments = network.segments
    for segment in segments[walk.position : index]:
        run.skip(segment, state)
    found: list[Any]
    if what == "gram":
        sums = run.gram_of(segments[index], state, *given)
        found = [] if sums is None else [sums]
    else:
        energy, errors = run.errors_of(segments[index], state, *given)
        found = [energy, *errors]
    size = sum(array.nbytes for array in part.arrays.values())
    hold(then, _Walk(state, run, index + 1), size)
    return found
