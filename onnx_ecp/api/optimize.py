"""The whole way, from a file to a smaller one and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

import numpy as np
import onnx

from onnx_ecp.api import quantise
from onnx_ecp.api.build_report import build_report, predicted_error
from onnx_ecp.api.choices import Choices
from onnx_ecp.api.command import command_line
from onnx_ecp.api.effort import within_budget
from onnx_ecp.api.evidence import gather_evidence
from onnx_ecp.api.gain import gain
from onnx_ecp.api.metric import settle_metric
from onnx_ecp.api.options import Options
from onnx_ecp.api.output import (
    archived,
    check_outputs,
    finished,
    held,
    staged,
    stored_masks,
    written,
)
from onnx_ecp.api.preparation import (
    Data,
    Job,
    choose_layers,
    gather,
    load,
    make_plan,
    observe_network,
    prepare,
    timed_batch,
)
from onnx_ecp.data import calibration as calibrating
from onnx_ecp.errors import CalibrationError, QualityError
from onnx_ecp.evaluation import bounds
from onnx_ecp.evaluation import compare as evaluate
from onnx_ecp.evaluation.compare import Comparison
from onnx_ecp.evaluation.facts import ModelFacts, model_facts
from onnx_ecp.evaluation.latency import measure_latency
from onnx_ecp.evaluation.targets import check_taken, taken
from onnx_ecp.graph import Model, remove, stale_data
from onnx_ecp.graph.staging import Staging
from onnx_ecp.pruning.control import not_behind_magnitude
from onnx_ecp.pruning.loop import Pruned, importances, observe, polished, prune, stage
from onnx_ecp.pruning.search import Judge, Point, seek
from onnx_ecp.pruning.selection import NM
from onnx_ecp.report import Report, is_drawn, rendered
from onnx_ecp.runtime.cache import caching
from onnx_ecp.runtime.limits import deadline, threads_of
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.columns import Measure
from onnx_ecp.statistics.layerwise import Network
from onnx_ecp.units.rows import Speedup
from onnx_ecp.units.shrink import Smaller
from onnx_ecp.units.stages import PrunedUnits, too_slow
from onnx_ecp.units.zeros import with_zeros

# How often a model that is not fast enough yet is pruned further.
ATTEMPTS = 5
# Seconds for which a model that seems to miss its target is measured once more.
LONGER = 3.0
# So many of the samples that the result was computed from are looked at again.
LEARNT = 1024


@dataclass(frozen=True)
class Result:
    """What ``optimize`` gives back.

    Args:
        model: the pruned model; in memory also where it was written.
        report: what was done and what it did.
        masks: by stored tensor of the given model, True where the weight stays, in the stored
            layout. None where none would fit it: ``permute`` puts inputs in another order, and
            units are removed from heads in other bases, unless a file of ``masks`` is asked for.
    """

    model: onnx.ModelProto
    report: Report
    masks: dict[str, np.ndarray] | None


def optimize(
    model: str | Path | onnx.ModelProto,
    calibration: Any = None,
    *,
    output: str | Path | None = None,
    report: str | Path | Sequence[str | Path] = (),
    progress: Progress = silent,
    **choices: Unpack[Choices],
) -> Result:
    """Prune a model, let what stays make good for what went, verify, and write the result.

    Args:
        model: path or proto; a proto is not changed.
        calibration: see ``calibration.load``; None takes MODEL.npz beside the model, else made-up
            inputs, which the report warns of.
        output: where to write; None writes nothing.
        report: where to write the report, .json or .html; one path or several.
        progress: called with (what, done, of) as work goes on.
        choices: see ``Choices``, such as ``method="ecp", sparsity=0.8``.

    Raises:
        OnnxEcpError: one subclass per exit code of the command line; nothing was written.
    """
    began = time.monotonic()
    options = asked = Options.of(**choices)
    reports = [report] if isinstance(report, str | Path) else list(report)
    with ExitStack() as running:
        running.enter_context(deadline(options.timeout))
        running.enter_context(threads_of(options.threads))
        running.enter_context(caching(options.cache, options.cache_limit))
        given = load(model)
        check_outputs(given, calibration, output, reports, options)
        check_taken(given, options.target)
        layers, skips = choose_layers(given, options)
        data = gather(given, calibration, options)
        options = settle_metric(given, layers, data, options, progress)
        ready = prepare(given, layers, data, options, progress)
        drawn = any(is_drawn(path) for path in reports)
        # A stage that is kept serves runs with pictures and without.
        levels = drawn or options.cache is not None
        ready = replace(ready, plan=replace(ready.plan, with_levels=levels))
        network = ready.network
        judge = judge_of(network, data, options)
        budget, found = "", None
        if options.time_budget is not None:
            chosen = within_budget(ready, options, time.monotonic() - began, progress)
            options, ready = chosen.options, chosen.ready
            found, budget = chosen.found, chosen.told
        pruned, curve = (found, ()) if found else prune_within(ready, judge, options, progress)
        if options.is_controlled:
            pruned = not_behind_magnitude(network, ready.plan, pruned, progress, step=ready.step)
        made, speedup = finished(ready, pruned, options), None
        if ready.by_clock:
            pruned, made, speedup = fast_enough(ready, pruned, made, data, options, progress)
        if options.units_and_zeros:
            pruned = zeros_beside_units(ready, pruned, options, progress)
            made = finished(ready, pruned, options)
        curve = curve or gate(pruned, judge, options)
        predicted = predicted_error(network, ready.plan, pruned)
        evidence = None
        if drawn:
            took = time.monotonic() - began
            evidence = gather_evidence(
                network, ready.plan, pruned, data.test, seconds=took, progress=progress
            )
        network.observer.close()
        original = model_facts(given)  # now: the output may be the same file
        floats, measure = made.model, network.observer.measure
        result = floats
        in_int8 = None
        if options.quantize is not None:
            in_int8 = quantise.in_int8(given, result, data, options, measure, progress)
            result = in_int8.model
            curve = tuple(quantise.gate(given, result, p, data, options, measure) for p in curve)
        result = taken(result, options.target)
        staging, final = running.enter_context(Staging()), None
        stale: list[Path] = []
        if output is not None and not options.dry_run:
            final = Path(output)
            stale = stale_data(final, result.proto, ready.source.base, ready.source.path)
            result = staged(result, ready.source, network.layers, final, options, staging)
        elif result.late:
            folder = running.enter_context(TemporaryDirectory(prefix="onnx-ecp-"))
            aside, here = running.enter_context(Staging()), Path(folder, "r.onnx")
            result = staged(result, ready.source, network.layers, here, options, aside)
        # The weights are in the result; what is told of the state are its masks and shifts.
        made = replace(made, model=result)
        pruned = replace(pruned, state=replace(pruned.state, weights=network.original.weights))
        comparison = compare(given, result, data, options, original, measure)
        known = None if speedup is None else speedup.measured
        worth = gain(given, made, data, options, measured=known, drawn=drawn, began=began)
        place = None if final is None else str(final)
        comparison = replace(comparison, b=replace(comparison.b, path=place))
        learnt = learnt_error(given, result, data, options, measure)
        bounded = bound(given, result, data, options, measure) if options.bound else None
        masks = stored_masks(network.layers, pruned.state)
        account = build_report(
            given,
            ready,
            skips,
            data,
            pruned,
            made,
            comparison,
            options,
            floats=floats,
            output=output,
            predicted=predicted,
            worth=worth,
            learnt=learnt,
            speedup=speedup,
            curve=curve,
            bounded=bounded,
            int8=None
            if in_int8 is None
            else quantise.told(in_int8, comparison.gap, given, data, options, measure),
            budget=budget,
            evidence=evidence,
            command=command_line(model, calibration, output, asked),
            seconds=time.monotonic() - began,
        )
        if options.masks is not None:
            written(Path(options.masks), archived(masks), staging)
        for path in reports:
            written(Path(path), rendered(account, path), staging)
        if final is None:
            result = held(result)
        staging.commit()
        remove(stale)
        if final is not None:
            result = replace(result, path=final, base=final.parent)
    return Result(result.proto, account, masks if ready.source is given else None)


def importance(
    model: str | Path | onnx.ModelProto, calibration: Any = None, **choices: Unpack[Choices]
) -> dict[str, np.ndarray]:
    """Importance of every weight of the prunable layers, by layer name, (out, in), float64 >= 0.

    Args:
        model: path or proto.
        calibration: as for ``optimize``.
        choices: see ``Choices``, such as ``method="ecp"``.

    Raises:
        OnnxEcpError: as ``optimize`` does.
    """
    options = Options.of(**choices)
    with (
        deadline(options.timeout),
        threads_of(options.threads),
        caching(options.cache, options.cache_limit),
    ):
        source = load(model)
        layers, _ = choose_layers(source, options)
        data = gather(source, calibration, options)
        options = settle_metric(source, layers, data, options)
        network, _ = observe_network(source, layers, data, options)
        plan = make_plan(network.layers, options)
        measured = observe(network, plan, network.original)
        return dict(importances(network, plan, network.original, measured))


def prune_within(
    ready: Job, judge: Judge | None, options: Options, progress: Progress
) -> tuple[Pruned, tuple[Point, ...]]:
    """Prune to what was asked for, or as far as the limit allows; and the points of that search.

    Raises:
        TargetError: no sparsity meets the limit.
    """
    network, plan, step = ready.network, ready.plan, ready.step
    if not options.searches:
        return prune(network, plan, progress, step=step), ()
    assert judge is not None, "a search has a limit"
    assert options.limit is not None, "a search has a limit"
    return seek(network, plan, options.limit, judge, progress, step=step or stage)


def judge_of(network: Network, data: Data, options: Options) -> Judge | None:
    """What says how far a state is from the original; None where no limit was asked for.

    Raises:
        TargetError: the model has no output that an error could be measured at.
        CalibrationError: the labels fit no output.
    """
    if options.limit is None:
        return None
    parts = (data.validation, data.test)
    try:
        return Judge(network.observer, network.original, parts, network.size, options.seed)
    except CalibrationError as error:
        assert options.labels is not None, "they fit no output"
        name = calibrating.labels_name(options.labels)
        raise CalibrationError(f"{name}: {error.message}", hint=error.hint) from error


def gate(pruned: Pruned, judge: Judge | None, options: Options) -> tuple[Point, ...]:
    """The point where the result stands, where a limit goes with another target; else none.

    Raises:
        QualityError: it is beyond the limit.
    """
    if judge is None or options.limit is None or options.searches:
        return ()
    point = judge.point(pruned.state)
    if not options.limit.allows(point):
        target = "--sparsity" if options.speedup is None else "--speedup"
        raise QualityError(
            f"the result misses the target: {point.described}.",
            hint=f"Nothing was written. Lower {target}, or leave it out to go as far as the limit "
            "allows.",
        )
    return (replace(point, within=True),)


def fast_enough(
    ready: Job,
    pruned: Pruned,
    made: Smaller,
    data: Data,
    options: Options,
    progress: Progress,
) -> tuple[Pruned, Smaller, Speedup]:
    """Measure what was made, and prune on until it is as fast as was asked for.

    Raises:
        TargetError: it is not, after ATTEMPTS.
    """
    assert ready.step is not None, "a target in time is one of units"
    assert options.speedup is not None, "the target of the step"
    source, step = ready.source, ready.step
    wanted, closest = 1 / options.speedup, 1.0
    batch = timed_batch(data, options)
    for attempt in range(ATTEMPTS + 1):
        assert isinstance(pruned, PrunedUnits), "a UnitStep gives them"
        latency = measure_latency(source, made.model, batch, **options.session)
        if latency.ratio > wanted:  # before more goes: was it other work on the machine?
            latency = measure_latency(source, made.model, batch, seconds=LONGER, **options.session)
        if latency.ratio <= wanted:
            return pruned, made, Speedup(options.speedup, step.predicted(pruned.keep), latency)
        closest = min(closest, latency.ratio)
        if attempt == ATTEMPTS:
            break
        step = step.with_more(latency.ratio)
        again = step(ready.network, ready.plan, pruned, 1.0, progress)
        pruned = polished(ready.network, ready.plan, again, progress)
        made = finished(replace(ready, step=step), pruned, options)
    raise too_slow(options.speedup, closest)


def zeros_beside_units(
    ready: Job, pruned: Pruned, options: Options, progress: Progress
) -> PrunedUnits:
    """The network that lost units, with zeros in what stays; see ``units.zeros``."""
    assert ready.step is not None, "Options asks for a speedup"
    assert isinstance(pruned, PrunedUnits), "a UnitStep gives them"
    assert not isinstance(options.end, NM), "Options refuses N:M of units"
    return with_zeros(
        ready.network,
        ready.plan,
        ready.step.structure,
        pruned,
        options.end,
        progress,
        controlled=options.is_controlled,
    )


def compare(
    source: Model,
    result: Model,
    data: Data,
    options: Options,
    original: ModelFacts,
    measure: Measure,
) -> Comparison:
    """Original against result, through ONNX Runtime, on samples that nothing else has seen."""
    gap = evaluate.measure_gap(
        source,
        result,
        data.test,
        data.test.row_labels,
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
        measure=measure,
        seed=options.seed,
    )
    return Comparison(original, model_facts(result), gap)


def learnt_error(
    source: Model, result: Model, data: Data, options: Options, measure: Measure
) -> float | None:
    """The error on samples that the result was computed from, LEARNT at most.

    It is mostly smaller than the error of others. Where it is larger than the held-out samples
    allow, these lack what makes it. None where there is one sample only.
    """
    if data.test is data.train:
        return None
    gap = evaluate.measure_gap(
        source,
        result,
        data.train.limit(LEARNT, options.seed),
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
        measure=measure,
    )
    return gap.relative_error


def bound(
    source: Model, result: Model, data: Data, options: Options, measure: Measure
) -> bounds.Bounds:
    """How far the outputs can be apart on inputs like the held-out samples."""
    return bounds.bound(
        source,
        result,
        data.test,
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
        metric="l2-raw" if options.resolved_metric == "l2-raw" else "l2",
        measure=measure,
    )
