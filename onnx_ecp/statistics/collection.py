"""Stream calibration data through the observer and add up what every layer needs to know."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.errors import UsageError, did_you_mean
from onnx_ecp.runtime.lazy import LazyArrays, Spill
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.runtime.session import OutOfMemory
from onnx_ecp.runtime.workers import crew
from onnx_ecp.statistics.columns import Spread
from onnx_ecp.statistics.curvature import Curvature
from onnx_ecp.statistics.moments import (
    POSITIONS,
    Moments,
    expand,
    reduce_positions,
    sensitivities,
)
from onnx_ecp.statistics.observer import GraphSums, Observation, Observer, State
from onnx_ecp.statistics.parts import over_parts

Visit = Callable[[Observation, Mapping[str, Moments]], None]


@runtime_checkable
class Joining(Protocol):
    """A visitor of parts of the data by themselves: what two have seen can be put together."""

    def __call__(self, seen: Observation, moments: Mapping[str, Moments]) -> None:
        """Take in one batch."""

    def join(self, other: Self) -> None:
        """Take in what another one has seen of the samples that follow."""


# What all observed arrays of a batch may take together, unless the user chooses the batch size.
BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Measured:
    """What a look at the calibration data told.

    Args:
        moments: by layer name; read from a temporary file where they do not fit in memory.
        weights: by layer name, the sensitivity of every row, averaged over the units:
            (groups, rows), in the order of the samples; read from a temporary file likewise.
        curvature: in the weights, block by block, where it was asked for.
        known: by layer name, the effective sample sizes, where they were kept without the
            sensitivities of rows.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    curvature: tuple[Curvature, ...] = ()
    known: Mapping[str, float] = field(default_factory=dict)

    @property
    def sample_sizes(self) -> dict[str, float]:
        """By layer name, the effective sample size."""
        found = {name: effective_sample_size(rows) for name, rows in self.weights.items()}
        return {**self.known, **found}

    def __add__(self, other: Measured) -> Measured:
        """What both sets of samples tell; the samples of the first come first.

        A curvature is that of all rows at once and does not add up.
        """
        assert not self.curvature, "no curvature is looked at in shards"
        assert not other.curvature, "no curvature is looked at in shards"
        both = {n: self.moments[n] + other.moments[n] for n in self.moments}
        rows = {
            n: np.concatenate([self.weights[n], other.weights[n]], axis=1) for n in self.weights
        }
        return Measured(both, rows)


class SpilledMoments(Mapping[str, Moments]):
    """Moments whose large sums lie in a temporary file."""

    LARGE = ("wb", "ww", "gradient")

    def __init__(self) -> None:
        self._small: dict[str, Moments] = {}
        self._shelf = Spill(0)

    def put(self, moments: Mapping[str, Moments]) -> None:
        """Add those of some layers."""
        for name, sums in moments.items():
            parts = {part: getattr(sums, part) for part in self.LARGE}
            for part, values in parts.items():
                if values is not None:
                    self._shelf[name, part] = values
            nothing: dict[str, Any] = dict.fromkeys(parts)
            self._small[name] = replace(sums, **nothing)

    def __getitem__(self, name: str) -> Moments:
        """Those of one layer, read back."""
        parts: dict[str, Any] = {p: self._shelf.get((name, p)) for p in self.LARGE}
        return replace(self._small[name], **parts)

    def __iter__(self) -> Iterator[str]:
        """The layers in order."""
        return iter(self._small)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._small)


class Recording:
    """Observations whose tensors lie in a temporary file, to be looked at again."""

    def __init__(self) -> None:
        self._seen: list[Observation] = []
        self._shelf = Spill(0)  # by number of the batch and name

    def add(self, seen: Observation) -> None:
        """Record one batch."""
        number = len(self._seen)
        for name, tensor in seen.tensors.items():
            self._shelf[number, name] = tensor
        tensors = LazyArrays(seen.tensors, lambda name: self._shelf[number, name])
        self._seen.append(replace(seen, tensors=tensors))

    def __iter__(self) -> Iterator[Observation]:
        """The batches in order."""
        return iter(self._seen)

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._seen)


class RowWeights(Mapping[str, np.ndarray]):
    """Sensitivities of rows by layer name, (groups, rows), put together from those of batches.

    Args:
        limit: bytes that may stay in memory, None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self._parts: dict[str, int] = {}
        self._shelf = Spill(limit)  # by layer name and number of the batch

    def add(self, weights: Mapping[str, np.ndarray]) -> None:
        """Add those of the next batch."""
        for name, rows in weights.items():
            number = self._parts.get(name, 0)
            self._shelf[name, number] = rows
            self._parts[name] = number + 1

    def __getitem__(self, name: str) -> np.ndarray:
        """Those of all batches."""
        return np.concatenate([self._shelf[name, i] for i in range(self._parts[name])], axis=1)

    def __iter__(self) -> Iterator[str]:
        """The layers in order."""
        return iter(self._parts)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._parts)


def effective_sample_size(weights: np.ndarray) -> float:
    """``(sum s)^2 / sum s^2``: how many rows of equal weight would tell as much."""
    square = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / square if square else 0.0


def batch_size(
    observer: Observer,
    state: State,
    data: Calibration,
    wanted: int | None,
    positions: str = "expand",
) -> int:
    """The batch size asked for, or one whose observed arrays fit in BATCH_BYTES.

    Either is halved until a first batch can be run. With ``positions`` "reduce" it is 1 unless rows
    are samples: the positions of one sample are then all rows of its batch, wherever its axis is.

    Raises:
        OutOfMemory: not even one sample can.
    """
    if _one_by_one(observer, positions):
        wanted = 1
    size = wanted or int(np.clip(BATCH_BYTES // max(observer.bytes_per_sample, 1), 1, 256))
    batch = next(data.batches(size))
    while True:
        try:
            observer.rehearse(state, batch)
        except (OutOfMemory, MemoryError) as error:
            batch = _halves(batch, error)[0]
            size = batch.samples
        else:
            return size


def _one_by_one(observer: Observer, positions: str) -> bool:
    """Whether samples must be observed one at a time for their rows to be told apart."""
    return positions == "reduce" and not observer.one_position


def _halves(batch: Batch, error: Exception) -> tuple[Batch, Batch]:
    """What is left to try of a batch that does not fit in memory."""
    if batch.samples == 1:
        raise OutOfMemory(
            "one sample does not fit in memory.",
            hint="Use a machine with more memory, or shorter inputs.",
        ) from error
    return batch.halves()


def observations(
    observer: Observer,
    state: State,
    data: Calibration,
    size: int,
    progress: Progress = silent,
    *,
    common: bool = False,
) -> Iterator[Observation]:
    """Observe all samples; a batch that does not fit in memory is halved until it does."""
    for batch in data.batches(size):
        yield from _observe(observer, state, batch, common)
        progress("sensitivities", batch.start + batch.samples, len(data))


def _observe(observer: Observer, state: State, batch: Batch, common: bool) -> Iterator[Observation]:
    try:
        seen = observer.observe(state, batch, common=common)
    except (OutOfMemory, MemoryError) as error:
        for half in _halves(batch, error):
            yield from _observe(observer, state, half, common)
    else:
        yield seen


def measure(
    observer: Observer,
    state: State,
    data: Calibration,
    *,
    size: int,
    positions: str = "expand",
    with_squares: bool = True,
    with_gradient: bool = False,
    visit: Visit | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Measured:
    """Moments and row sensitivities of all layers in one state of the network.

    Moments that do not fit in memory together are summed in groups of layers. Each group takes its
    own pass over the data, unless what one pass sees takes less space in a temporary file than the
    moments do: then the other groups look at that. The result is the same, bit by bit.

    Where there are workers, they look at parts of the data, unless somebody visits; see ``parts``.

    Args:
        observer: of the network.
        state: what is observed.
        data: calibration samples.
        size: batch size.
        positions: "expand" (every position is a sample) or "reduce" (exact per sample).
        with_squares: whether to sum the squares of gradients in weights; reduced positions always
            do.
        with_gradient: also sum the gradients that gradient-magnitude ranks by; all samples are
            then probed in the same random directions, or their gradients would cancel.
        visit: called with every observation and the moments so far of the layers in turn: once a
            batch for each group of layers.
        memory: bytes that moments (three quarters of it) and row sensitivities may take, None for
            any number.
        progress: called after every batch.

    Raises:
        UsageError: an unknown ``positions``.
    """
    workers = crew()
    if workers is not None and (visit is None or isinstance(visit, Joining)):
        given = {
            "visit": visit,
            "size": size,
            "positions": positions,
            "with_squares": with_squares,
            "with_gradient": with_gradient,
            "memory": memory,
        }
        plus = partial(both, memory=memory)
        measured, visited = over_parts(
            workers, measure_part, observer, state, data, given, plus, progress, "sensitivities"
        )
        if isinstance(visit, Joining):
            visit.join(visited)
        return measured
    if positions not in POSITIONS:
        raise UsageError(
            f"unknown positions {positions!r}.", hint=did_you_mean(positions, POSITIONS)
        )
    if _one_by_one(observer, positions):
        size = 1
        with_squares = True  # reduced positions need them to tell what moves anything
    in_graph = _in_graph(observer, positions, visit)
    for_rows = None if memory is None else memory // 4
    for_moments = None if memory is None else memory - memory // 4
    sums = {"with_squares": with_squares, "with_gradient": with_gradient}
    groups = layer_groups(observer, for_moments, **sums, twice=in_graph)
    weights = RowWeights(for_rows)
    if in_graph:
        turns = _turns_in_graph(observer, state, data, size, groups, weights, progress, **sums)
    else:
        fits = observer.tensor_bytes_per_sample * len(data) <= sum(sum(g.values()) for g in groups)
        passes = _Passes(
            lambda advance: observations(
                observer, state, data, size, advance, common=with_gradient
            ),
            len(groups),
            Recording() if len(groups) > 1 and fits else None,
            progress,
        )
        turns = _turns_on_host(passes, groups, weights, positions, visit, **sums)
    if len(groups) == 1:
        return Measured(next(turns), weights)
    shelved = SpilledMoments()
    for moments in turns:
        shelved.put(moments)
    return Measured(shelved, weights)


def measure_part(
    observer: Observer, state: State, part: Calibration, given: Mapping[str, Any]
) -> tuple[Measured, Visit | None]:
    """``measure`` of a part of the data, on a worker, and the visitor, who has seen it."""
    visit = copy.deepcopy(given["visit"])  # in one process with the driver it is the driver's
    return measure(observer, state, part, **{**given, "visit": visit}), visit


def both(
    a: tuple[Measured, Visit | None], b: tuple[Measured, Visit | None], memory: int | None = None
) -> tuple[Measured, Visit | None]:
    """What two parts told, and a visitor who has seen both."""
    (first, visit), (second, other) = a, b
    if isinstance(visit, Joining) and isinstance(other, Joining):
        visit.join(other)
    return added(first, second, memory), visit


def added(a: Measured, b: Measured, memory: int | None = None) -> Measured:
    """What two parts told together; the samples of the first come first.

    Args:
        a: of the first.
        b: of the second.
        memory: see ``measure``.
    """
    shelved, moments = SpilledMoments(), dict[str, Moments]()
    spills = isinstance(a.moments, SpilledMoments) or isinstance(b.moments, SpilledMoments)
    for name in a.moments:
        found = {name: a.moments[name] + b.moments[name]}
        if spills:
            shelved.put(found)
        else:
            moments |= found
    rows = rows_together(a.weights, b.weights, None if memory is None else memory // 4)
    return Measured(shelved if spills else moments, rows)


def rows_together(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], memory: int | None = None
) -> RowWeights:
    """The sensitivities of the rows of two parts, one after the other."""
    rows = RowWeights(memory)
    for name in a:
        rows.add({name: a[name]})
        rows.add({name: b[name]})
    return rows


def _in_graph(observer: Observer, positions: str = "expand", visit: Visit | None = None) -> bool:
    """Whether the sums are taken in the graph.

    Raises:
        UsageError: they are wanted there, but cannot be.
    """
    able = observer.summable and visit is None and not _one_by_one(observer, positions)
    if observer.statistics == "graph" and not able:
        raise UsageError(
            "--statistics graph does not go with finite differences, units, woodfisher, cbs, nor "
            "positions that are reduced: they need every row; nor with samples that differ in "
            "shape.",
            hint="Leave it out.",
        )
    return able and observer.sums_in_graph


def _summed_in_graph(
    observer: Observer,
    sums: GraphSums,
    state: State,
    data: Calibration,
    size: int,
    weights: RowWeights | None = None,
    progress: Progress = silent,
) -> GraphSums:
    """The sums with all samples; nothing but sensitivities of rows comes out before the end."""
    for batch in data.batches(size):
        sums = _added(observer, sums, state, batch, weights)
        what = "sensitivities" if sums.graph.weights else "activations"
        progress(what, batch.start + batch.samples, len(data))
    return sums


def _added(
    observer: Observer, sums: GraphSums, state: State, batch: Batch, weights: RowWeights | None
) -> GraphSums:
    """The sums with one more batch, which is halved until it fits in memory."""
    try:
        sums, rows = observer.add(sums, state, batch)
    except (OutOfMemory, MemoryError) as error:
        for half in _halves(batch, error):
            sums = _added(observer, sums, state, half, weights)
    else:
        if weights is not None:
            weights.add(rows)
    return sums


def _turns_in_graph(
    observer: Observer,
    state: State,
    data: Calibration,
    size: int,
    groups: Sequence[Collection[str]],
    weights: RowWeights,
    progress: Progress,
    *,
    with_squares: bool,
    with_gradient: bool,
) -> Iterator[dict[str, Moments]]:
    """Moments of one group of layers after the other; the first pass gives row sensitivities."""
    for turn, group in enumerate(groups):
        sums = observer.nothing_summed(
            group, with_squares=with_squares, with_gradient=with_gradient
        )
        wanted, advance = None if turn else weights, _in_turn(progress, turn, len(groups))
        yield _summed_in_graph(observer, sums, state, data, size, wanted, advance).moments()


def _turns_on_host(
    passes: _Passes,
    groups: Sequence[Collection[str]],
    weights: RowWeights,
    positions: str,
    visit: Visit | None,
    *,
    with_squares: bool,
    with_gradient: bool,
) -> Iterator[dict[str, Moments]]:
    """The same from rows that come out of the graph."""
    for turn, (group, observed) in enumerate(zip(groups, passes, strict=True)):
        moments: dict[str, Moments] = {}
        for seen in observed:
            for name in group if turn else seen.layers:
                g = seen.adjoints[name]
                s = sensitivities(g)
                if not turn:
                    weights.add({name: s.mean(axis=2)})
                if name not in group:
                    continue
                a = seen.inputs[name]
                before = moments.get(name)
                centre = a.mean(axis=1, dtype=np.float64) if before is None else before.centre
                if positions == "expand":
                    part = expand(
                        a,
                        g,
                        centre,
                        samples=seen.samples,
                        s=s,
                        with_squares=with_squares,
                        with_gradient=with_gradient,
                    )
                else:
                    part = reduce_positions(a, g, centre, seen.samples, with_gradient=with_gradient)
                moments[name] = part if before is None else before + part
            if visit is not None:
                visit(seen, moments)
        yield moments


def _in_turn(progress: Progress, turn: int, turns: int) -> Progress:
    """The progress of one of several passes as that of them all."""
    return lambda what, done, of: progress(what, turn * of + done, turns * of)


@dataclass(frozen=True)
class _Passes:
    """All observations, once for each group of layers.

    Args:
        observe: one pass over the data.
        turns: number of groups.
        recording: where the first pass is recorded for the other groups; None: each has its own.
        progress: called after every batch.
    """

    observe: Callable[[Progress], Iterator[Observation]]
    turns: int
    recording: Recording | None
    progress: Progress

    def __iter__(self) -> Iterator[Iterator[Observation]]:
        """The observations of one group after the other, to be used up in this order."""
        if self.recording is None:
            for turn in range(self.turns):
                yield self.observe(_in_turn(self.progress, turn, self.turns))
        else:
            yield self._recorded(self.recording)
            yield from (self._replayed(self.recording, turn) for turn in range(1, self.turns))

    def _recorded(self, recording: Recording) -> Iterator[Observation]:
        for seen in self.observe(self.progress):
            recording.add(seen)
            yield seen

    def _replayed(self, recording: Recording, turn: int) -> Iterator[Observation]:
        of = (self.turns - 1) * len(recording)
        for done, seen in enumerate(recording, (turn - 1) * len(recording) + 1):
            yield seen
            self.progress("sums", done, of)


def layer_groups(
    observer: Observer,
    memory: int | None,
    *,
    with_squares: bool = True,
    with_gradient: bool = False,
    twice: bool = False,
) -> list[dict[str, int]]:
    """Layers with a sensitivity, in groups whose moments take ``memory`` at most.

    A group has at least one layer. The order is that of the layers.

    Args:
        observer: of the network.
        memory: bytes; None for any number.
        with_squares: whether there are sums of squares, too.
        with_gradient: whether there is also a sum for each probe.
        twice: whether old and new sums are there at the same time.

    Returns:
        For each group, the bytes of the moments by layer name.
    """
    products = 1 + with_squares + (observer.probes if with_gradient else 0)
    products *= 2 if twice else 1
    groups: list[dict[str, int]] = []
    group: dict[str, int] = {}
    for layer in observer.layers:
        if layer.name in observer.blocked:
            continue
        size = products * 8 * layer.shape[0] * layer.shape[1]
        if group and memory is not None and sum(group.values()) + size > memory:
            groups.append(group)
            group = {}
        group[layer.name] = size
    return [*groups, group]


def measure_activations(
    observer: Observer, state: State, data: Calibration, *, size: int, progress: Progress = silent
) -> Measured:
    """Like ``measure``, forward only: moments of the inputs, without any output unit."""
    workers = crew()
    if workers is not None:
        given = {"size": size}
        found: Measured = over_parts(
            workers,
            activations_of_part,
            observer,
            state,
            data,
            given,
            added,
            progress,
            "activations",
        )
        return found
    if _in_graph(observer):
        names = [layer.name for layer in observer.layers]
        sums = observer.nothing_summed(names, backward=False)
        sums = _summed_in_graph(observer, sums, state, data, size, progress=progress)
        return Measured(sums.moments())
    moments: dict[str, Moments] = {}
    for batch in data.batches(size):
        for name, a in observer.activations(state, batch).items():
            before = moments.get(name)
            centre = a.mean(axis=1, dtype=np.float64) if before is None else before.centre
            nothing = np.zeros((1, *a.shape[:2], 0))
            part = expand(a, nothing, centre, samples=batch.samples, with_squares=False)
            moments[name] = part if before is None else before + part
        progress("activations", batch.start + batch.samples, len(data))
    return Measured(moments)


def activations_of_part(
    observer: Observer, state: State, part: Calibration, given: Mapping[str, Any]
) -> Measured:
    """``measure_activations`` of a part of the data, on a worker."""
    return measure_activations(observer, state, part, **given)


def spreads(
    observer: Observer, state: State, data: Sequence[Calibration], size: int
) -> dict[str, Spread]:
    """What the outputs do over several sets of samples; see ``Observer.spreads``."""
    workers = crew()
    if workers is None:
        return observer.spreads(state, (batch for part in data for batch in part.batches(size)))
    given = {"size": size}
    found = (
        over_parts(workers, spreads_of_part, observer, state, samples, given, by_name)
        for samples in data
    )
    return reduce(by_name, found)


def by_name(a: dict[str, Spread], b: dict[str, Spread]) -> dict[str, Spread]:
    """The sum of spreads by name."""
    return {name: a[name] + b[name] for name in a}


def spreads_of_part(
    observer: Observer, state: State, part: Calibration, given: Mapping[str, Any]
) -> dict[str, Spread]:
    """``Observer.spreads`` of a part of the data, on a worker."""
    return observer.spreads(state, part.batches(given["size"]))


def row_sensitivities(
    observer: Observer, state: State, data: Calibration, *, size: int, memory: int | None = None
) -> RowWeights:
    """By layer name, the sensitivity of every row, averaged over the units: (groups, rows)."""
    weights = RowWeights(memory)
    workers = crew()
    if workers is not None:
        given = {"size": size, "memory": memory}
        plus = partial(rows_together, memory=memory)
        found: RowWeights = over_parts(
            workers, rows_of_part, observer, state, data, given, plus, what="sensitivities"
        )
        return found
    if _in_graph(observer):
        _summed_in_graph(observer, observer.nothing_summed(()), state, data, size, weights)
        return weights
    for seen in observations(observer, state, data, size):
        weights.add({n: sensitivities(g).mean(axis=2) for n, g in seen.adjoints.items()})
    return weights


def rows_of_part(
    observer: Observer, state: State, part: Calibration, given: Mapping[str, Any]
) -> RowWeights:
    """``row_sensitivities`` of a part of the data, on a worker."""
    return row_sensitivities(observer, state, part, **given)
