"""Stream calibration data through the observer and add up what every layer needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_ecp.calibration import Batch, Calibration
from onnx_ecp.curvature import Curvature
from onnx_ecp.errors import UsageError, did_you_mean
from onnx_ecp.gradients.observer import Observation, Observer, State
from onnx_ecp.runtime import OutOfMemory
from onnx_ecp.statistics import POSITIONS, Moments, expand, reduce_positions, sensitivities

Progress = Callable[[str, int, int], None]
Visit = Callable[[Observation, Mapping[str, Moments]], None]

# What all observed arrays of a batch may take together, unless the user chooses the batch size.
BATCH_BYTES = 256 * 2**20


def silent(what: str, done: int, of: int) -> None:
    """The progress of those who do not want to see any."""


@dataclass(frozen=True)
class Measured:
    """What a pass over the calibration data told.

    Args:
        moments: by layer name.
        weights: by layer name, the sensitivity of every row, averaged over the units:
            (groups, rows), in the order of the samples.
        curvature: in the weights, block by block, where it was asked for.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    curvature: tuple[Curvature, ...] = ()


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
    with_gradient: bool = False,
    visit: Visit | None = None,
    progress: Progress = silent,
) -> Measured:
    """Moments and row sensitivities of all layers in one state of the network.

    Args:
        observer: of the network.
        state: what is observed.
        data: calibration samples.
        size: batch size.
        positions: "expand" (every position is a sample) or "reduce" (exact per sample).
        with_gradient: also sum the gradients that gradient-magnitude ranks by; all samples are
            then probed in the same random directions, or their gradients would cancel.
        visit: called with every observation and the moments so far.
        progress: called after every batch.

    Raises:
        UsageError: an unknown ``positions``.
    """
    if positions not in POSITIONS:
        raise UsageError(
            f"unknown positions {positions!r}.", hint=did_you_mean(positions, POSITIONS)
        )
    if _one_by_one(observer, positions):
        size = 1
    moments: dict[str, Moments] = {}
    weights: dict[str, list[np.ndarray]] = {}
    for seen in observations(observer, state, data, size, progress, common=with_gradient):
        for name, a in seen.inputs.items():
            g = seen.adjoints[name]
            before = moments.get(name)
            centre = a.mean(axis=1, dtype=np.float64) if before is None else before.centre
            s = sensitivities(g)
            if positions == "expand":
                part = expand(a, g, centre, samples=seen.samples, s=s, with_gradient=with_gradient)
            else:
                part = reduce_positions(a, g, centre, seen.samples, with_gradient=with_gradient)
            moments[name] = part if before is None else before + part
            weights.setdefault(name, []).append(s.mean(axis=2))
        if visit is not None:
            visit(seen, moments)
    return Measured(moments, {n: np.concatenate(w, axis=1) for n, w in weights.items()})


def measure_activations(
    observer: Observer, state: State, data: Calibration, *, size: int, progress: Progress = silent
) -> Measured:
    """Like ``measure``, forward only: moments of the inputs, without any output unit."""
    moments: dict[str, Moments] = {}
    for batch in data.batches(size):
        for name, a in observer.activations(state, batch).items():
            before = moments.get(name)
            centre = a.mean(axis=1, dtype=np.float64) if before is None else before.centre
            part = expand(a, np.zeros((1, *a.shape[:2], 0)), centre)
            moments[name] = part if before is None else before + part
        progress("activations", batch.start + batch.samples, len(data))
    return Measured(moments)


def row_sensitivities(
    observer: Observer, state: State, data: Calibration, *, size: int
) -> dict[str, np.ndarray]:
    """By layer name, the sensitivity of every row, averaged over the units: (groups, rows)."""
    weights: dict[str, list[np.ndarray]] = {}
    for seen in observations(observer, state, data, size):
        for name, g in seen.adjoints.items():
            weights.setdefault(name, []).append(sensitivities(g).mean(axis=2))
    return {name: np.concatenate(parts, axis=1) for name, parts in weights.items()}
