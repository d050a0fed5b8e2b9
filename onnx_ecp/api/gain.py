"""What a result is worth on this machine: multiplications, latency, and what would be faster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnx_ecp import graph as modelling
from onnx_ecp.api.options import Options
from onnx_ecp.api.preparation import Data, timed_batch
from onnx_ecp.errors import ProviderError
from onnx_ecp.evaluation.latency import Latency, brief_latency, measure_latency
from onnx_ecp.evaluation.operator_times import OperatorTime, operator_times
from onnx_ecp.evaluation.targets import TARGETS
from onnx_ecp.evaluation.targets.onnxruntime import ONNXRUNTIME
from onnx_ecp.evaluation.work import Work, samples_of, work
from onnx_ecp.graph import Model
from onnx_ecp.graph.shapes import shapes_of_a_run
from onnx_ecp.layers import find_layers
from onnx_ecp.runtime.session import OutOfMemory
from onnx_ecp.units import find_structure
from onnx_ecp.units.estimate import half_of_the_units
from onnx_ecp.units.shrink import Smaller


@dataclass(frozen=True)
class Gain:
    """What a result is worth.

    Args:
        before: what the layers of the given model take; None where it cannot be told.
        after: what those of the result take.
        latency: of both, where it was measured.
        operators: seconds by type of operator, where they are to be drawn.
        advice: what would be faster, where the result is not; else empty.
    """

    before: Work | None
    after: Work | None
    latency: Latency | None
    operators: tuple[OperatorTime, ...]
    advice: str


def gain(
    given: Model,
    made: Smaller,
    data: Data,
    options: Options,
    *,
    measured: Latency | None,
    drawn: bool,
    began: float,
) -> Gain:
    """Count, and time both models, unless ``--no-measure`` was said.

    Args:
        given: the model.
        made: the result, as it was written.
        data: the samples.
        options: what was asked for.
        measured: what is known already, where latency was the target.
        drawn: whether pictures are made of it.
        began: when all began, by ``time.monotonic``.
    """
    feeds = next(data.train.batches(2)).feeds
    before = made.before or _work(given, feeds, options)
    latency = measured or _latency(given, made.model, data, options, began)
    late = latency is not None and latency.verdict != "faster"
    advice = _advice(given, feeds, options) if late else ""
    operators: tuple[OperatorTime, ...] = ()
    if drawn and latency is not None:
        batch = next(data.test.batches(latency.batch))
        operators = operator_times(given, made.model, batch, **options.session)
    after = made.after or before  # cut shapes are counted in ``made``
    return Gain(before, after, latency, operators, advice)


def _work(model: Model, feeds: Mapping[str, np.ndarray], options: Options) -> Work | None:
    """What the layers take; None where the shapes of all tensors cannot be had in one run."""
    try:
        return work(model, feeds, options.session)
    except ProviderError:
        return None


def _latency(
    given: Model, result: Model, data: Data, options: Options, began: float
) -> Latency | None:
    """Of both models: as long as needed where it was asked for, else briefly.

    Two more copies of very large weights in memory are for those who ask for them. Where memory
    does not suffice for a batch, half of it is tried; what nobody asked for ends no run.
    """
    large = modelling.stored_size(given.proto) > modelling.LARGEST_FILE
    if options.measure is False or (large and not options.measure):
        return None
    so_far, batch = time.monotonic() - began, timed_batch(data, options)
    while True:
        try:
            if options.measure:
                return measure_latency(given, result, batch, **options.session)
            return brief_latency(given, result, batch, so_far=so_far, **options.session)
        except (OutOfMemory, MemoryError):
            if batch.samples > 1:
                batch = next(data.test.batches(batch.samples // 2))
            elif options.measure:
                raise
            else:
                return None


def _advice(given: Model, feeds: Mapping[str, np.ndarray], options: Options) -> str:
    """What would be faster than a result that is not."""
    aim = TARGETS.get(options.target or "onnxruntime", ONNXRUNTIME)
    if not options.by_units and aim is not ONNXRUNTIME:
        return f"{aim.title}, which the file is for: see below. ONNX Runtime multiplies zeros too."
    if options.by_units:
        if options.cost == "latency":
            return "a larger --speedup, or a measurement on a machine with nothing else to do."
        return (
            "units chosen by this machine's clock: --speedup 2 --cost latency. --unit-multiple 16 "
            "alone keeps sizes that all kernels like."
        )
    try:
        whole, left = _half(given, feeds, options)
    except ProviderError:
        whole = left = 0
    if left == whole:
        return "a runtime that skips zeros: --target. No unit of this model can be removed."
    times = min(2.0, int(10 * whole / left) / 10)
    return (
        f"whole units: half of them would leave {left:,} of {whole:,} multiplications a sample, "
        f"x{left / whole:.2f} of the latency where those take most of it: --speedup {times:g}. "
        "Or a runtime that skips zeros: --target."
    )


def _half(given: Model, feeds: Mapping[str, np.ndarray], options: Options) -> tuple[int, int]:
    """Multiplications a sample: of all layers, and with half of the units."""
    dense = replace(given, proto=modelling.decode_sparse(given.proto))
    layers = find_layers(dense.proto).layers
    shapes = shapes_of_a_run(dense, feeds, **options.session)
    found = half_of_the_units(find_structure(dense.proto, layers, shapes), layers, shapes)
    whole, left = (count // samples_of(feeds) for count in found)
    return whole, left
