"""What a report says of a run: rows, words and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnx_ecp import graph as modelling
from onnx_ecp.api.gain import Gain
from onnx_ecp.api.options import Options
from onnx_ecp.api.output_paths import same_file
from onnx_ecp.api.preparation import NO_FIT, Data, Job
from onnx_ecp.api.target import for_target
from onnx_ecp.data.untrusted import npz_names
from onnx_ecp.evaluation.bounds import Bounds
from onnx_ecp.evaluation.compare import ROUNDED, Comparison, Gap
from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.gradients.cotangents import SQUARED
from onnx_ecp.gradients.selections import Selection
from onnx_ecp.graph import Model
from onnx_ecp.layers import Skip
from onnx_ecp.pruning.loop import Pruned
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.pruning.search import Point
from onnx_ecp.quantising.rows import Int8
from onnx_ecp.report import (
    INT8_SPEED,
    PATTERN_SPEED,
    SYNTHETIC_WARNING,
    UNSTRUCTURED_SPEED,
    LayerRow,
    Recipe,
    Report,
    counted,
)
from onnx_ecp.report.evidence import Evidence
from onnx_ecp.runtime.cache import cache_warnings
from onnx_ecp.runtime.versions import versions
from onnx_ecp.statistics.layerwise import Network
from onnx_ecp.units.head_rotation import heads_of
from onnx_ecp.units.rows import Speedup
from onnx_ecp.units.shrink import Smaller
from onnx_ecp.units.stages import UnitStep

# From this relative error on little of the network is left: constant outputs have 1.
DESTROYED = 0.9
# Errors are told to be larger elsewhere from so many times the held-out one on.
BEYOND_HELD_OUT = 1.5
# An error beyond so many times the predicted one is told, if it is no trifle.
FAR_BEYOND, TRIFLE = 2.0, 0.01
# Below this effective sample size the user is warned that few samples carry all the weight.
FEW_SAMPLES = 32


def build_report(
    given: Model,
    ready: Job,
    skips: Sequence[Skip],
    data: Data,
    pruned: Pruned,
    made: Smaller,
    comparison: Comparison,
    options: Options,
    *,
    floats: Model,
    output: str | Path | None,
    predicted: float | None,
    worth: Gain,
    learnt: float | None,
    speedup: Speedup | None,
    curve: tuple[Point, ...],
    bounded: Bounds | None,
    int8: Int8 | None,
    budget: str,
    evidence: Evidence | None,
    command: str,
    seconds: float,
) -> Report:
    """The report of a run.

    Args:
        given: the model.
        ready: what was pruned, and how.
        skips: layers that were not wanted.
        data: the samples.
        pruned: where pruning ended.
        made: the model that it made, as it was written.
        comparison: of both models.
        options: what was asked for.
        floats: the result before anything became int8.
        output: the file that was written, if any.
        predicted: relative output error that the importances expect, if they expect one.
        worth: multiplications and latency of both models.
        learnt: relative output error on samples that the result was computed from.
        speedup: what was measured where latency was the target.
        curve: points of a search, or of a gate.
        bounded: bounds on the gap, where asked for.
        int8: what int8 took away and gave, where asked for.
        budget: what a time budget allowed, where there was one.
        evidence: for pictures, where they are wanted.
        command: what repeats it, where a command can.
        seconds: that all took.
    """
    network, step = ready.network, ready.step
    return Report(
        original=comparison.a,
        result=comparison.b,
        versions=versions(),
        recipe=recipe_of(options, network.observer.logits, budget),
        options=options.as_json(),
        seed=options.seed,
        calibration=data.facts,
        layers=tuple(layer_rows(network, pruned, made.created, ready.remarks)),
        skips=(*skips, *ready.skips),
        predicted_error=predicted,
        gap=comparison.gap,
        learnt_error=learnt,
        curve=curve,
        bounds=bounded,
        int8=int8,
        seconds=seconds,
        warnings=(
            *given.notes,
            *warnings(data, network, pruned, comparison),
            *prediction_warning(predicted, comparison.gap),
            *learnt_warning(learnt, comparison.gap),
            *misfit_warnings(skips),
            *mask_warnings(network, step, options),
            *target_warnings(data, options, curve),
            *made.warnings,
            *int8_warnings(int8, options),
            *replaced(given, output, options),
            *cache_warnings(),
        ),
        units=made.rows,
        work_before=worth.before,
        work_after=worth.after,
        speed=INT8_SPEED if int8 else speed_of(made, speedup, worth.latency, options),
        speedup=speedup,
        target=for_target(made, floats, given, (*skips, *ready.skips), output, options),
        latency=worth.latency,
        operators=worth.operators,
        advice=worth.advice,
        evidence=evidence,
        command=command,
    )


def layer_rows(
    network: Network, pruned: Pruned, created: frozenset[str], remarks: Mapping[str, str]
) -> Iterator[LayerRow]:
    """What happened to every layer."""
    for layer in network.layers:
        tensor = layer.weight.tensor
        before, after = network.original.keep[tensor], pruned.state.keep[tensor]
        yield LayerRow(
            name=layer.name,
            op=layer.op,
            tensor=tensor,
            shape=layer.shape,
            weights=after.size,
            zeros_before=int(before.size - np.count_nonzero(before)),
            zeros_after=int(after.size - np.count_nonzero(after)),
            importance_removed=pruned.removed.get(layer.name),
            largest_shift=float(np.abs(pruned.state.shifts[layer.name]).max(initial=0.0)),
            bias_created=layer.name in created,
            ess=pruned.ess.get(layer.name),
            note="; ".join(x[layer.name] for x in (remarks, pruned.notes) if layer.name in x),
        )


def recipe_of(options: Options, logits: Sequence[str] = (), budget: str = "") -> Recipe:
    """What was done in the end, defaults resolved; ``logits`` as an Observer has them."""
    method = options.recipe
    place = f"; taken at the logits of {modelling.printable(', '.join(logits))}" if logits else ""
    return Recipe(
        method=options.method,
        importance=_ranking(options),
        compensation=method.compensation,
        metric=options.resolved_metric,
        metric_reason=options.metric_reason + place,
        damping=options.damping or method.repair.damping,
        positions=options.positions,
        gradients=options.gradients,
        stages=method.stages,
        support=method.support,
        effort=options.resolved_effort,
        budget=budget,
    )


def _ranking(options: Options) -> str:
    """What decided which weights go."""
    if options.apply_masks is not None:
        return f"none, the masks of {Path(options.apply_masks).name} were given"
    return options.ranking or options.method


def predicted_error(network: Network, plan: Plan, pruned: Pruned) -> float | None:
    """Relative output error that the removed importances add up to; only one-shot runs have one.

    The sum leaves out how removals act together, so it is the method's own, linearised expectation.
    """
    summable = plan.method.in_output_units and plan.method.stages == 1
    if not summable or network.observer.metric not in SQUARED:
        return None
    energy = network.observer.output_energy
    return float(np.sqrt(sum(pruned.removed.values()) / energy)) if energy else None


def speed_of(
    made: Smaller, speedup: Speedup | None, measured: Latency | None, options: Options
) -> str:
    """What to expect of the result for latency, in words; how near it came to a target.

    Args:
        made: the result.
        speedup: what was asked for and measured, where latency was the target.
        measured: the latency of both models, where it was measured: what it denies is not said.
        options: of the run.
    """
    if speedup is None:
        known = measured.verdict if measured is not None and options.by_units else None
        return made.speed(known) or (PATTERN_SPEED if options.patterns else UNSTRUCTURED_SPEED)
    latency = speedup.measured
    runs = (
        f"{latency.conditions} "
        f"({1e3 * latency.seconds_a:.3g} ms, {1e3 * latency.seconds_b:.3g} ms)."
    )
    return (
        f"{speedup.asked:g} times as fast was asked for; {speedup.predicted:.2f} times is what the "
        f"layers that lost units promise, timed one by one; {speedup.reached:.2f} times was "
        f"measured, {runs}"
    )


def warnings(data: Data, network: Network, pruned: Pruned, comparison: Comparison) -> Iterator[str]:
    """What the user must know, one sentence each."""
    if data.train.synthetic:
        yield SYNTHETIC_WARNING
    if data.warning:
        yield data.warning
    few = [name for name, ess in pruned.ess.items() if ess < FEW_SAMPLES]
    if few:
        layers = f"{counted(len(few), 'layer')}, such as {modelling.printable(few[0])},"
        yield (
            f"the sensitivities of {layers} rest on few samples (of tokens and patches: positions),"
            f" as if there were fewer than {FEW_SAMPLES} of equal weight; give more calibration "
            "data."
        )
    for name in network.observer.probabilities:
        yield (
            f"--metric {network.observer.metric} takes outputs as logits, but the values of "
            f"{modelling.printable(name)!r} look like probabilities: give the model before "
            "its softmax or sigmoid, or use --metric l2."
        )
    for selection in network.observer.selections:
        yield selected(selection)
    if not any(keep.any() for keep in pruned.state.keep.values()):
        yield "no weight is left in any of these layers: the outputs no longer depend on them."
    elif comparison.gap.relative_error >= DESTROYED:
        yield (
            "the outputs are hardly nearer to the original's than constants would be, or further "
            f"away (a relative error of {DESTROYED:g} or more; constants have 1): ask for a lower "
            "sparsity, or name a limit with --max-error."
        )
    yield from pruned.warnings
    yield from comparison.gap.warnings


def selected(selection: Selection) -> str:
    """What the user must know of layers that act through a selection alone."""
    layers = sorted(selection.layers)
    tensor = modelling.printable(selection.tensor)
    return (
        f"{counted(len(layers), 'layer')}, such as {modelling.printable(layers[0])}, reach the "
        f"outputs through {selection.op} ({modelling.printable(selection.node)}) alone, which no "
        f"gradient passes: they are ranked by what they do to {tensor}, which it reads. The "
        f"error of the outputs counts what is selected, not how closely; make {tensor} an output "
        "of the model to have it measured."
    )


def prediction_warning(predicted: float | None, gap: Gap) -> Iterator[str]:
    """Says so where the sum of the importances tells nothing of the error."""
    if predicted is not None and gap.relative_error > max(FAR_BEYOND * predicted, TRIFLE):
        yield (
            f"the error is more than {FAR_BEYOND:g} times what the importances add up to "
            f"({gap.relative_error:.3g}, not {predicted:.3g}): at this sparsity the linearisation "
            "behind them does not hold; more --stages, or --method ecp-refit, look again on the "
            "way."
        )


def learnt_warning(learnt: float | None, gap: Gap) -> Iterator[str]:
    """Says so where the held-out samples lack what makes the error of others."""
    high = gap.relative_error if gap.certainty is None else gap.certainty.high
    if learnt is not None and learnt > max(BEYOND_HELD_OUT * gap.relative_error, high, ROUNDED):
        yield (
            f"on the samples that the result was computed from the error is {learnt:.3g}, on those "
            f"held out it is {gap.relative_error:.3g}: samples that matter are rare, and those held"
            " out have too few of them. Expect the larger error, and give more samples, best such "
            "that the model was not trained on."
        )


def misfit_warnings(skips: Sequence[Skip]) -> Iterator[str]:
    """Says so where layers stayed dense because a pattern does not fit them."""
    dense = [skip for skip in skips if NO_FIT in skip.reason]
    if dense:
        first = modelling.printable(dense[0].name)
        yield (
            f"{counted(len(dense), 'layer')}, such as {first}, stayed dense: the pattern does not "
            "fit; the table of what was not pruned says why."
        )


def mask_warnings(network: Network, step: UnitStep | None, options: Options) -> Iterator[str]:
    """Says so where a file of masks leaves out layers, or to write one changes the result."""
    if options.masks is not None and step is not None and heads_of(step.structure, network.layers):
        yield (
            "--masks are of the heads given, so these were pruned in their own bases; without it "
            "the result is another one."
        )
    if options.apply_masks is None:
        return
    named = set(npz_names(Path(options.apply_masks)))
    bare = [x for x in network.layers if x.weight.tensor not in named]
    if bare:
        yield (
            f"{Path(options.apply_masks).name} has no mask for {len(bare)} of "
            f"{counted(len(network.layers), 'layer')}, such as "
            f"{modelling.printable(bare[0].name)}: they stayed as they were."
        )


def target_warnings(data: Data, options: Options, curve: Sequence[Point]) -> Iterator[str]:
    """What the user must know about the target that was asked for, one sentence each."""
    if options.max_accuracy_drop is not None:
        known = [part.row_labels for part in (data.validation, data.test)]
        samples = min(len(labels) for labels in known if labels is not None)
        if 100 / samples > (options.max_accuracy_drop or 1.0):
            yield (
                f"accuracy was judged on {samples} samples at a time, of which one is "
                f"{100 / samples:.2g} percentage points: --max-accuracy-drop "
                f"{options.max_accuracy_drop:g} needs more labelled samples to mean something."
            )
    yield from limit_warning(options, curve)
    if options.searches and all(point.within for point in curve):
        yield (
            "every step of the search was within the target: it ended where almost nothing is left "
            "to remove, not at the target."
        )


def int8_warnings(int8: Int8 | None, options: Options) -> Iterator[str]:
    """What the user must know of the layers in int8, one sentence each."""
    if int8 is None:
        return
    if not int8.compensated:
        yield (
            "the compensation of int8 was rejected: on the validation samples the nearest integers "
            "were better."
        )
    if options.patterns:
        yield (
            "TensorRT takes N:M in int8 without Q/DQ nodes only, and no zero points; this result "
            "has both: for its sparse kernels leave --quantize out and let it calibrate."
        )


def limit_warning(options: Options, curve: Sequence[Point]) -> Iterator[str]:
    """Says so where the error is within the limit and its interval is not."""
    held = [point for point in curve if point.within]
    limit = None if options.limit is None else options.limit.error
    if not held or limit is None:
        return
    last = max(held, key=lambda point: point.sparsity)
    if last.high is not None and last.high > limit:
        yield (
            f"the measured error {last.error:.3g} is within --max-error {limit:g}, but so few "
            f"samples tell it that it may be up to {last.high:.3g} (upper end of its 95 % "
            "interval): give more samples, or a smaller limit."
        )


def replaced(given: Model, output: str | Path | None, options: Options) -> Iterator[str]:
    """Says so where the result stands in the place of the model."""
    written = None if options.dry_run else output
    if given.path is not None and written is not None and same_file(given.path, written):
        yield "OUTPUT is MODEL: the result has replaced the model, as --force allows."
