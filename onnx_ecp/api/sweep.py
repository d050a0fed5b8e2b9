"""Many methods and sparsities on one network: loaded, observed and judged alike.

The points share the network's sessions, and every point of a method that asks for the same
measurements shares the pass over the calibration data that they come from: for one-shot methods
that is all the observation there is, for staged ones it is the first stage's. A point is, bit by
bit, what ``optimize`` makes with the same options.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import onnx

from onnx_ecp.api.build_report import warnings
from onnx_ecp.api.choices import CommonChoices
from onnx_ecp.api.metric import settle_metrics
from onnx_ecp.api.options import Options
from onnx_ecp.api.output import finished
from onnx_ecp.api.output_paths import check_output_paths
from onnx_ecp.api.preparation import (
    Data,
    Job,
    gather,
    load,
    make_plan,
    misfits,
    observe_network,
    wanted_layers,
)
from onnx_ecp.data import calibration as calibrating
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.errors import UsageError, did_you_mean
from onnx_ecp.evaluation.compare import Comparison, expected_rows, measure_gap
from onnx_ecp.evaluation.facts import ModelFacts, model_facts
from onnx_ecp.graph import Model, signature
from onnx_ecp.layers import Layer
from onnx_ecp.layers.versions import one_look_each
from onnx_ecp.methods import FORWARD, NEEDS
from onnx_ecp.pruning.control import not_behind_magnitude
from onnx_ecp.pruning.loop import observe, prune, reads_rows
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.report import counted
from onnx_ecp.report.sweep import EvaluationFacts, Sweep, SweepPoint
from onnx_ecp.runtime.cache import cache_warnings, caching
from onnx_ecp.runtime.limits import deadline, threads_of
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.runtime.versions import versions
from onnx_ecp.runtime.workers import working
from onnx_ecp.statistics.collection import Measured
from onnx_ecp.statistics.layerwise import Network

METHODS_SWEPT = ("ecp-refit", "ecp", "wanda", "magnitude")
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# The options of ``optimize`` that hold for all points. The others say what one run is to make.
COMMON = tuple(CommonChoices.__annotations__)


def sweep(
    model: str | Path | onnx.ModelProto,
    calibration: Any = None,
    *,
    methods: str | Sequence[str] = METHODS_SWEPT,
    sparsities: str | Sequence[Any] = SPARSITIES,
    evaluation: Any = None,
    labels: str | Path | np.ndarray | None = None,
    calibration_labels: str | Path | np.ndarray | None = None,
    progress: Progress = silent,
    executor: Executor | Sequence[Executor] | None = None,
    **choices: Unpack[CommonChoices],
) -> Sweep:
    """Prune a model with several methods to several sparsities and compare what comes out.

    Args:
        model: path or proto; a proto is not changed, and nothing is written.
        calibration: as for ``optimize``.
        methods: names, or one text with commas between them.
        sparsities: numbers or N:M, or one text with commas between them.
        evaluation: samples to judge on, any source that ``calibration.load`` reads; None takes the
            held-out part of the calibration data.
        labels: of the evaluation samples, a path or an array; without ``evaluation``, of all
            calibration samples.
        calibration_labels: the same of the calibration samples, for methods that look
            at the loss; without ``evaluation``, ``labels`` are these.
        progress: called with (what, done, of) as work goes on.
        executor: see ``optimize``.
        choices: see ``CommonChoices``; they hold for all points.

    Raises:
        UsageError: an unknown method or option, or a sparsity that is none.
        OnnxEcpError: as ``optimize`` does.
    """
    began = time.monotonic()
    if evaluation is None and calibration_labels is not None:
        raise UsageError("without samples to evaluate on, --labels are those of the calibration.")
    known = labels if evaluation is None else calibration_labels
    grid = grid_of(methods, sparsities, choices, labels=known)
    first = grid[0]
    with (
        deadline(first.timeout),
        threads_of(first.threads),
        one_look_each(),
        working(first.workers, first.dask, executor, first.threads),
        caching(first.cache, first.cache_limit),
    ):
        shared = prepare(model, calibration, grid, evaluation, labels, progress)
        prepared = time.monotonic()
        runs: list[PointRun] = []
        for options, plan in zip(shared.grid, shared.plans, strict=True):
            progress("points", len(runs), len(grid))
            runs.append(run(shared, options, plan, progress))
        progress("points", len(grid), len(grid))
        of_cache = cache_warnings()
    scores = {score.metric: score.a for score in runs[0].comparison.gap.scores}
    return Sweep(
        original=shared.facts,
        accuracy=scores.get("accuracy"),
        r2=scores.get("r2"),
        calibration=shared.data.facts,
        evaluation=shared.judge.facts,
        points=tuple(run.point for run in runs),
        options={**common(shared.grid[0]), "blocks": choices.get("blocks", "network")},
        versions=versions(),
        shared_seconds=prepared - began,
        seconds=time.monotonic() - began,
        warnings=(*uneven(shared.networks), *merged(runs), *of_cache),
    )


def common(options: Options) -> dict[str, Any]:
    """What all points have in common: JSON values by name."""
    return {name: value for name, value in options.as_json().items() if name in COMMON}


def check_outputs(
    model: str | Path, read: Mapping[str, str | Path | None], outputs: Sequence[str | Path]
) -> None:
    """Refuse files of points that would overwrite each other, or what is read.

    Args:
        model: path of the model.
        read: paths of data and labels by what they are; without calibration data, what lies beside
            the model is read.
        outputs: paths of the files of points.

    Raises:
        UsageError: two are one file.
    """
    data = {**read, "calibration": read["calibration"] or calibrating.sidecar(model)}
    sources = [
        (f"the {what.replace('_', ' ')}", calibrating.file_of(path))
        for what, path in {"model": model, **data}.items()
        if path is not None
    ]
    check_output_paths([("--output", path) for path in outputs], sources)


def grid_of(
    methods: str | Sequence[str],
    sparsities: str | Sequence[Any],
    choices: Mapping[str, Any],
    labels: str | Path | np.ndarray | None = None,
) -> list[Options]:
    """The options of every point, method by method; what is named twice is run once.

    Raises:
        UsageError: an unknown name, a value out of range, or nothing to do.
    """
    for name in choices:
        if name not in COMMON:
            raise UsageError(f"a sweep has no option {name!r}.", hint=did_you_mean(name, COMMON))
    listed = _listed("methods", methods)
    plain = {name: value for name, value in choices.items() if name != "blocks"}

    def looks_at_it(method: str) -> bool:
        recipe = Options.of(method=method, labels=labels, **plain).recipe
        return recipe.measures == "curvature"

    looks = [method for method in listed if looks_at_it(method)]
    # Blocks are for methods that look at the curvature; where there is none, they are refused.
    grid = [
        Options.of(
            method=method,
            sparsity=sparsity,
            labels=labels,
            **(choices if method in looks or not looks else plain),
        )
        for method in listed
        for sparsity in _listed("sparsities", sparsities)
    ]
    return list({(o.method, o.sparsity): o for o in grid}.values())


def _listed(what: str, values: str | Sequence[Any]) -> list[Any]:
    """The items of a list, or of a text with commas."""
    items = [v.strip() for v in values.split(",")] if isinstance(values, str) else list(values)
    if not items or "" in items:
        raise UsageError(
            f"--{what} {values!r} has an empty item.", hint="Put commas between items only."
        )
    return items


@dataclass(frozen=True)
class Evaluation:
    """The samples that points are judged on, with their labels."""

    samples: Calibration
    labels: np.ndarray | None
    facts: EvaluationFacts


@dataclass(frozen=True)
class Shared:
    """What all points share.

    Args:
        source: the given model.
        facts: its sizes.
        data: calibration samples.
        judge: evaluation samples.
        networks: by what is measured (see ``methods.NEEDS``): mostly one for all.
        grid: the options of every point, with their metric settled.
        plans: one per point.
        measured: of the original network, by what ``first_look`` says.
    """

    source: Model
    facts: ModelFacts
    data: Data
    judge: Evaluation
    networks: Mapping[str, Network]
    grid: tuple[Options, ...]
    plans: tuple[Plan, ...]
    measured: Mapping[tuple[str, bool], Measured]


def prepare(
    model: str | Path | onnx.ModelProto,
    calibration: Any,
    grid: Sequence[Options],
    evaluation: Any,
    labels: str | Path | np.ndarray | None,
    progress: Progress = silent,
) -> Shared:
    """Do once what all points need; whatever could be refused is refused here."""
    source = load(model)
    layers = layers_of(source, grid)
    data = gather(source, calibration, grid[0])
    grid = settle_metrics(source, layers, data, grid, progress)
    judge = judge_of(source, data, evaluation, labels)
    networks = networks_of(source, layers, data, grid)
    # As those of ``optimize``: what is kept of a point serves it too.
    plans = tuple(
        replace(make_plan(networks[o.recipe.measures].layers, o), with_levels=o.cache is not None)
        for o in grid
    )
    one_each = {first_look(plan, networks): plan for plan in plans}
    rows = any(map(reads_rows, plans))
    for last in (False, True):
        if ("sensitivities", last) in one_each:
            one_each.pop(("means", last), None)  # which are among them
    measured = {
        (needs, last): observe(
            networks[needs],
            replace(plan, last=last),
            networks[needs].original,
            progress,
            rows=rows,
        )
        for (needs, last), plan in one_each.items()
    }
    for last in (False, True):
        if ("sensitivities", last) in measured:
            measured["means", last] = measured["sensitivities", last]
    return Shared(source, model_facts(source), data, judge, networks, tuple(grid), plans, measured)


def first_look(plan: Plan, networks: Mapping[str, Network]) -> tuple[str, bool]:
    """What is measured of the original, and whether as of a last stage: the first may be rough."""
    needs = plan.method.measures
    observer = networks[needs].observer
    return needs, plan.method.stages == 1 or observer.rough is observer


def layers_of(source: Model, grid: Sequence[Options]) -> list[Layer]:
    """The layers that all points prune.

    Raises:
        UsageError: a pattern does not fit all: points would prune different layers.
    """
    layers, _ = wanted_layers(source, grid[0])
    for options in grid:
        names = [re.escape(name) for name in misfits(layers, options)]
        if names:
            raise UsageError(
                f"{options.sparsity} does not fit {counted(len(names), 'layer')}, and all points "
                "are to prune the same.",
                hint=f"Leave them out with --exclude '^({'|'.join(names)})$'.",
            )
    return layers


def judge_of(
    source: Model, data: Data, evaluation: Any, labels: str | Path | np.ndarray | None
) -> Evaluation:
    """The evaluation samples: those given, else the held-out part of the calibration data.

    Raises:
        CalibrationError: samples or labels do not fit the model.
    """
    named = None if labels is None else calibrating.labels_name(labels)
    if evaluation is None:
        held_out = data.test
        facts = EvaluationFacts(held_out.source, len(held_out), True, named)
        return Evaluation(held_out, held_out.row_labels, facts)
    samples = calibrating.load(evaluation, signature(source.proto))
    values = None if labels is None else calibrating.load_labels(labels, expected_rows(samples))
    if samples.stacked and not data.train.stacked:  # the model takes one at a time
        samples = samples.alone
    return Evaluation(samples, values, EvaluationFacts(samples.source, len(samples), False, named))


def networks_of(
    source: Model, layers: Sequence[Layer], data: Data, grid: Sequence[Options]
) -> dict[str, Network]:
    """By what is measured, the network under observation.

    A network that can tell sensitivities can tell all that others need; but it leaves out layers
    without one, which methods that need none do prune: then these have their own network. So have
    methods that look at the curvature: their seeds are others.
    """
    by_needs = {options.recipe.measures: options for options in grid}
    curved = by_needs.pop("curvature", None)
    if curved is not None:
        network, _ = observe_network(source, layers, data, curved)
        rest = [options for options in grid if options.recipe.measures != "curvature"]
        return {"curvature": network} | (networks_of(source, layers, data, rest) if rest else {})
    most = max(by_needs, key=NEEDS.index)
    network, blocked = observe_network(source, layers, data, by_needs[most])
    if not blocked:
        return dict.fromkeys(by_needs, network)
    return {
        needs: network
        if needs == most or needs not in FORWARD
        else observe_network(source, layers, data, options)[0]
        for needs, options in by_needs.items()
    }


@dataclass(frozen=True)
class PointRun:
    """A point with what the summary needs besides."""

    point: SweepPoint
    comparison: Comparison
    warnings: tuple[str, ...]


def run(shared: Shared, options: Options, plan: Plan, progress: Progress = silent) -> PointRun:
    """Prune to one point and judge it."""
    began = time.monotonic()
    look = first_look(plan, shared.networks)
    network = shared.networks[look[0]]
    pruned = prune(network, plan, progress, measured=shared.measured[look])
    if options.is_controlled:
        pruned = not_behind_magnitude(network, plan, pruned, progress)
    seconds = time.monotonic() - began
    result = finished(Job(shared.source, network, plan), pruned, options).model
    gap = measure_gap(
        shared.source,
        result,
        shared.judge.samples,
        shared.judge.labels,
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
        progress=progress,
        measure=network.observer.measure if shared.judge.facts.held_out else None,
        output_weights=options.output_weights,
        seed=options.seed,
    )
    comparison = Comparison(shared.facts, model_facts(result), gap)
    scores = {score.metric: score.b for score in gap.scores}
    masks = pruned.state.keep.values()
    weights = sum(keep.size for keep in masks)
    zeros = weights - sum(int(np.count_nonzero(keep)) for keep in masks)
    point = SweepPoint(
        method=options.method,
        target=str(options.sparsity),
        sparsity=zeros / weights,
        zeros=zeros,
        weights=weights,
        relative_error=gap.relative_error,
        agreement=gap.agreement,
        accuracy=scores.get("accuracy"),
        r2=scores.get("r2"),
        compressed_bytes=comparison.b.compressed_bytes,
        seconds=seconds,
    )
    return PointRun(point, comparison, tuple(warnings(shared.data, network, pruned, comparison)))


def uneven(networks: Mapping[str, Network]) -> Iterator[str]:
    """A warning where the methods do not prune the same layers."""
    # What several needs share is named after the most of them.
    named = {id(networks[needs]): needs for needs in sorted(networks, key=NEEDS.index)}
    counts = {needs: len(networks[needs].layers) for needs in named.values()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} layers with {needs}" for needs, count in counts.items())
        yield (
            f"some layers have no sensitivity, and methods that need none prune them too ({listed} "
            "measured): their sparsities are not shares of the same weights."
        )


def merged(runs: Sequence[PointRun]) -> Iterator[str]:
    """Every warning once, with the points that have it unless all do."""
    where: dict[str, list[str]] = {}
    for run in runs:
        for text in run.warnings:
            where.setdefault(text, []).append(f"{run.point.method} {run.point.target}")
    for text, points in where.items():
        more = f" and {len(points) - 1} more" if len(points) > 1 else ""
        yield text if len(points) == len(runs) else f"{points[0]}{more}: {text}"
