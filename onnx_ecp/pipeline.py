"""The whole way, from a file to a smaller one and a report."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from onnx_ecp import bounds, doctor, evaluate
from onnx_ecp import calibration as calibrating
from onnx_ecp import model as modelling
from onnx_ecp.arrays import npz_names, read_npz
from onnx_ecp.calibration import Batch, Calibration
from onnx_ecp.errors import (
    CalibrationError,
    ModelError,
    QualityError,
    TargetError,
    UsageError,
    did_you_mean,
)
from onnx_ecp.evaluate import Comparison, ModelFacts
from onnx_ecp.gradients.observer import Observer, State, original_state
from onnx_ecp.layers import Layer, Skip, find_layers
from onnx_ecp.measurement import Progress, batch_size, silent
from onnx_ecp.model import Model
from onnx_ecp.options import Options
from onnx_ecp.pruning import Network, Plan, Pruned, importances, observe, polished, prune, stage
from onnx_ecp.report import (
    SYNTHETIC_WARNING,
    UNSTRUCTURED_SPEED,
    CalibrationFacts,
    LayerRow,
    Recipe,
    Report,
)
from onnx_ecp.runtime import deadline, free_memory, threads_of
from onnx_ecp.selection import NM, Group, Sparsity
from onnx_ecp.shelf import Computed
from onnx_ecp.structure import Structure
from onnx_ecp.structure.latency import Watch
from onnx_ecp.structure.outcome import Speedup
from onnx_ecp.structure.smaller import (
    Smaller,
    cleaned,
    smaller,
    units_of,
    with_order,
    with_turned_heads,
)
from onnx_ecp.structure.units import Goal, PrunedUnits, UnitStep, too_slow
from onnx_ecp.targets import Judge, Point, seek
from onnx_ecp.tensorrt import sparse_kernels

# Shares of the calibration samples that are set aside, and how many at most: to judge refits, and
# to measure the error that the report states. Neither is used for anything else.
HELD_OUT, HELD_OUT_MOST = 0.1, 512
# How often a model that is not fast enough yet is pruned further.
ATTEMPTS = 5
# Seconds for which a model that seems to miss its target is measured once more.
LONGER = 3.0
# Below this effective sample size the user is warned that few samples carry all the weight.
FEW_SAMPLES = 32


@dataclass(frozen=True)
class Result:
    """What ``optimize`` gives back.

    Args:
        model: the pruned model; in memory also where it was written.
        report: what was done and what it did.
        masks: by stored tensor, True where the weight stays, in the stored layout; of heads in the
            bases that they were turned to, unless ``masks`` was asked for.
    """

    model: onnx.ModelProto
    report: Report
    masks: dict[str, np.ndarray]


@dataclass(frozen=True)
class Data:
    """The calibration samples, with their labels if any, and what each part of them is for.

    Of two samples one is ``fit`` and ``guard`` at once, a single one is all three parts.

    Args:
        fit: importances and compensations are computed on them.
        guard: they judge whether a refit is kept.
        held_out: the error that the report states is measured on them.
    """

    fit: Calibration
    guard: Calibration
    held_out: Calibration

    @property
    def facts(self) -> CalibrationFacts:
        """What the report says about them."""
        used = len(self.fit) + (0 if self.guard is self.fit else len(self.guard))
        held_out = 0 if self.held_out is self.fit else len(self.held_out)
        rows = evaluate.expected_rows(self.fit) // len(self.fit)
        return CalibrationFacts(self.fit.source, used, held_out, self.fit.synthetic, rows)

    @property
    def warning(self) -> str:
        """What the user must know about samples that play several parts; empty where none does."""
        if self.held_out is self.fit:
            return (
                "there is one sample only: the error is measured on the very sample that all else "
                "was computed from and says nothing about others; give more calibration data."
            )
        if self.guard is self.fit:
            return (
                "there are two samples only: all that was not measured on one of them was computed "
                "from the other, refits and their judgement alike; give more calibration data."
            )
        return ""


def optimize(
    model: str | Path | onnx.ModelProto,
    calibration: Any = None,
    *,
    output: str | Path | None = None,
    progress: Progress = silent,
    **choices: Any,
) -> Result:
    """Prune a model, let what stays make good for what went, verify, and write the result.

    Args:
        model: path or proto; a proto is not changed.
        calibration: see ``calibration.load``; None takes MODEL.npz beside the model, else made-up
            inputs, which the report warns of.
        output: where to write; None writes nothing.
        progress: called with (what, done, of) as work goes on.
        choices: fields of ``Options``, such as ``method="ecp", sparsity=0.8``.

    Raises:
        OnnxEcpError: one subclass per exit code of the command line; nothing was written.
    """
    began = time.monotonic()
    options = Options.of(**choices)
    with ExitStack() as running:
        running.enter_context(deadline(options.timeout))
        running.enter_context(threads_of(options.threads))
        source = given = load(model)
        check_outputs(source, output, options)
        layers, skips = choose_layers(source, options)
        data = gather(source, calibration, options)
        remarks: dict[str, str] = {}
        if options.permute:
            source, remarks = reordered(given, layers, data, options)
            layers, skips = choose_layers(source, options)
        network, blocked = observe_network(source, layers, data, options)
        if options.granularity == "unit" and options.masks is None:  # masks are of the bases given
            turned = in_own_bases(source, network, options)
            if turned is not source:
                network.observer.close()
                source, (layers, skips) = turned, choose_layers(turned, options)
                network, blocked = observe_network(source, layers, data, options)
        plan = make_plan(network.layers, options)
        step = None
        if options.granularity == "unit":
            step = unit_step(source, network, data, options, progress)
        pruned, curve = prune_within(network, plan, data, options, step, progress)
        made = finished(source, network, step, pruned, options)
        speedup = None
        if step is not None and step.goal.target == "latency":
            pruned, made, speedup = fast_enough(
                source, network, plan, step, pruned, made, data, options, progress
            )
        predicted = predicted_error(network, plan, pruned)
        network.observer.close()
        result, created = made.model, made.created
        original = evaluate.model_facts(given)  # now: the output may be the same file
        if output is not None and not options.dry_run:
            result = save(result, source, network.layers, output, options)
        elif result.late:
            folder = running.enter_context(TemporaryDirectory(prefix="onnx-ecp-"))
            result = save(result, source, network.layers, Path(folder, "result.onnx"), options)
        # The weights are in the result; what is told of the state are its masks and shifts.
        made = replace(made, model=result)
        pruned = replace(pruned, state=replace(pruned.state, weights=network.original.weights))
        comparison = compare(given, result, data, options, original)
        bounded = bound(given, result, data, options) if options.bound else None
        kernels = tuple(sparse_kernels(result)) if options.patterns else ()
        masks = stored_masks(network.layers, pruned.state)
        if options.masks is not None and not options.dry_run:
            save_masks(masks, options.masks)
        if output is None or options.dry_run:
            result = held(result)
    report = Report(
        original=original,
        result=comparison.b,
        versions=doctor.versions(),
        recipe=recipe_of(options),
        options=options.as_json(),
        seed=options.seed,
        calibration=data.facts,
        layers=tuple(layer_rows(network, pruned, created, remarks)),
        skips=(*skips, *blocked, *(() if step is None else step.structure.refusals)),
        predicted_error=predicted,
        gap=comparison.gap,
        curve=curve,
        bounds=bounded,
        seconds=time.monotonic() - began,
        warnings=(
            *warnings(data, network, pruned, comparison),
            *target_warnings(data, options, curve),
            *made.warnings,
        ),
        units=made.rows,
        work_before=made.before,
        work_after=made.after,
        speed=speed_of(made, comparison, speedup),
        speedup=speedup,
        sparse_kernels=kernels,
    )
    return Result(result.proto, report, masks)


def importance(
    model: str | Path | onnx.ModelProto, calibration: Any = None, **choices: Any
) -> dict[str, np.ndarray]:
    """Importance of every weight of the prunable layers, by layer name, (out, in), float64 >= 0.

    Args:
        model: path or proto.
        calibration: as for ``optimize``.
        choices: fields of ``Options``, such as ``method="ecp"``.

    Raises:
        OnnxEcpError: as ``optimize`` does.
    """
    options = Options.of(**choices)
    with deadline(options.timeout), threads_of(options.threads):
        source = load(model)
        layers, _ = choose_layers(source, options)
        data = gather(source, calibration, options)
        network, _ = observe_network(source, layers, data, options)
        plan = make_plan(network.layers, options)
        measured = observe(network, plan, network.original)
        return dict(importances(network, plan, network.original, measured))


def load(model: str | Path | onnx.ModelProto) -> Model:
    """A validated model that the installed ONNX Runtime takes.

    Raises:
        ModelError: it is not valid, or too new.
    """
    source = modelling.load(model)
    refusal = modelling.runtime_support(source.proto)
    if refusal is not None:
        raise ModelError(
            f"{_label(source)}: {refusal}",
            hint="Install a newer onnxruntime, or export the model for an older opset.",
        )
    return source


def check_outputs(source: Model, output: str | Path | None, options: Options) -> None:
    """Find out before the long work what cannot be written in the end.

    Raises:
        OutputError: a file cannot be written.
    """
    for path in (output, options.masks):
        if path is not None and not options.dry_run:
            modelling.check_output(path, force=options.force, source=source.path)


def _label(source: Model) -> str:
    return modelling.printable(source.path or "model")


def choose_layers(source: Model, options: Options) -> tuple[list[Layer], list[Skip]]:
    """The layers that the user wants pruned, and all others with the reason.

    Raises:
        TargetError: no layer is left.
    """
    found = find_layers(modelling.decode_sparse(source.proto))
    layers, skips = [], list(found.skips)
    for layer in found.layers:
        reason = _unwanted_weight(layer, found.layers, options)
        if reason and options.granularity == "weight":
            skips.append(Skip(layer.name, layer.op, reason))
        else:
            layers.append(layer)
    if not layers:
        raise nothing_to_prune(skips)
    return layers, skips


def nothing_to_prune(skips: Sequence[Skip]) -> TargetError:
    """The error that names every candidate with its reason."""
    listed = [f"{modelling.printable(s.name)} ({s.op}): {s.reason}" for s in skips]
    return TargetError(
        "no layer can be pruned" + (": " + "; ".join(listed) if listed else "."),
        hint="`onnx-ecp inspect MODEL` shows every candidate."
        if listed
        else "The model has no Gemm, MatMul or Conv with constant weights.",
    )


def _unwanted_weight(layer: Layer, layers: Sequence[Layer], options: Options) -> str:
    """Why a layer stays as it is; a shared weight stays if one of its layers must."""
    own = _unwanted(layer.name, options)
    if own:
        return own
    for other in layers:
        if other.weight.tensor == layer.weight.tensor and (why := _unwanted(other.name, options)):
            return f"it shares its weight with {modelling.printable(other.name)}, which is {why}"
    return ""


def _unwanted(name: str, options: Options) -> str:
    if options.include and not any(re.search(p, name) for p in options.include):
        return "not matched by --include"
    excluded = next((p for p in options.exclude if re.search(p, name)), None)
    return f"matched by --exclude {excluded}" if excluded is not None else ""


def gather(source: Model, calibration: Any, options: Options) -> Data:
    """Load the samples and set some aside.

    Raises:
        CalibrationError: they do not fit the model, or are none.
    """
    inputs = modelling.signature(source.proto)
    if calibration is None and source.path is not None:
        calibration = calibrating.sidecar(source.path)
    if isinstance(calibration, Calibration):
        everything = calibration
    elif calibration is not None:
        everything = calibrating.load(
            calibration, inputs, samples=_most(calibration, options), seed=options.seed
        )
    else:
        everything = calibrating.synthetic(
            source.proto,
            inputs,
            samples=options.samples or 128,
            seed=options.seed,
            shapes=options.input_shapes,
        )
    if not everything.synthetic:
        calibrating.check_shapes(everything, inputs, options.input_shapes)
    if options.labels is not None:
        if calibrating.is_stream(calibration):  # it was read as far as there may be labels
            rows = evaluate.expected_rows(everything) // len(everything)
            enough = calibrating.count_labels(options.labels) // rows
            everything = everything.take(np.arange(min(len(everything), max(enough, 1))))
        labels = calibrating.load_labels(options.labels, evaluate.expected_rows(everything))
        by_sample = labels.reshape(len(everything), -1, *labels.shape[1:])
        everything = replace(everything, labels=by_sample)
    return Data(*_parts(everything, options))


def _most(calibration: Any, options: Options) -> int | None:
    """How many samples to read, None for all.

    Labels are counted against all samples, so with labels those to use are chosen afterwards; of a
    stream, which may be endless, there can be no more than labels.
    """
    if options.labels is None:
        return options.samples
    return calibrating.count_labels(options.labels) if calibrating.is_stream(calibration) else None


def _parts(
    everything: Calibration, options: Options
) -> tuple[Calibration, Calibration, Calibration]:
    """The samples to use as (fit, guard, held out)."""
    everything = everything.limit(options.samples or len(everything), options.seed)
    rest, held_out = everything.split(_share(len(everything)), options.seed)
    return (*rest.split(_share(len(rest)), options.seed + 1), held_out)


def _share(samples: int) -> float:
    return min(HELD_OUT, HELD_OUT_MOST / samples)


def observe_network(
    source: Model, layers: Sequence[Layer], data: Data, options: Options
) -> tuple[Network, list[Skip]]:
    """The network under observation; layers without a sensitivity that is needed are skipped.

    Raises:
        TargetError: no layer is left.
    """
    dense = replace(source, proto=modelling.decode_sparse(source.proto))

    def observing(chosen: Sequence[Layer]) -> Observer:
        return Observer(
            dense,
            chosen,
            next(data.fit.batches(2)),
            engine=options.gradients,
            metric=options.resolved_metric,
            probes=options.resolved_probes,
            seed=options.seed,
            provider=options.provider,
            threads=options.threads,
            reverse=options.recipe.measures not in ("nothing", "activations")
            or options.finetune_steps > 0,
            statistics=options.statistics,
        )

    observer = observing(layers)
    skips = [
        Skip(x.name, x.op, f"its sensitivity is not available: {observer.blocked[x.name]}")
        for x in layers
        if x.name in observer.blocked
    ]
    if skips:
        rest = [x for x in layers if x.name not in observer.blocked]
        if not rest:
            raise nothing_to_prune(skips)
        observer = observing(rest)
    original = original_state(dense, observer.layers)
    size = batch_size(observer, original, data.fit, options.batch_size, options.positions)
    observer.normalise_outputs(original, data.fit.batches(size))
    memory = options.max_memory or free_memory() // 2
    return Network(observer, original, data.fit, data.guard, size, memory), skips


def make_plan(layers: Sequence[Layer], options: Options) -> Plan:
    """Which tensors are ranked together, and how sparse each is to become.

    Raises:
        UsageError: a --layer-sparsity that no layer matches, or N:M that does not fit a layer.
    """
    by_tensor = {layer.weight.tensor: layer for layer in layers}
    own: dict[str, Sparsity] = {}
    for pattern, value in options.layer_sparsity.items():
        matched = [x.weight.tensor for x in layers if re.search(pattern, x.name)]
        if not matched:
            raise UsageError(
                f"--layer-sparsity {pattern!r} matches no prunable layer.",
                hint=did_you_mean(pattern, [layer.name for layer in layers]),
            )
        own |= dict.fromkeys(matched, value)
    pooled = [t for t in by_tensor if t not in own]
    if options.resolved_scope == "layer" or isinstance(options.end, NM):
        own |= dict.fromkeys(pooled, options.end)
        pooled = []
    groups = [_group((t,), by_tensor, sparsity) for t, sparsity in own.items()]
    if pooled:
        groups.insert(0, _group(tuple(pooled), by_tensor, options.end))
    if options.apply_masks is not None:
        masks = load_masks(options.apply_masks, by_tensor)
        groups = [replace(g, masks={n: masks[n] for n in g.tensors}) for g in groups]
    return Plan(
        options.recipe,
        tuple(groups),
        options.positions,
        options.damping,
        options.seed,
        options.finetune_steps,
        options.blocks,
    )


def load_masks(path: str | Path, layers: Mapping[str, Layer]) -> dict[str, np.ndarray]:
    """Keep masks (out, in) from a file that ``save_masks`` wrote; a layer it leaves out stays.

    Args:
        path: .npz of bool arrays, by stored tensor, in the stored layout.
        layers: by stored tensor.

    Raises:
        UsageError: a name, a shape or a type does not fit.
        CalibrationError: the file cannot be read.
    """
    stored = read_npz(Path(path), npz_names(Path(path)))
    masks = {name: np.ones(layer.shape, np.bool_) for name, layer in layers.items()}
    for name, mask in stored.items():
        if name not in layers:
            raise UsageError(
                f"{path}: {modelling.printable(name)} is no prunable weight of the model.",
                hint=did_you_mean(name, layers),
            )
        weight = layers[name].weight
        if mask.dtype != np.bool_ or mask.shape != weight.shape:
            raise UsageError(
                f"{path}: the mask of {modelling.printable(name)} is {mask.dtype} {mask.shape}; "
                f"bool {weight.shape} expected."
            )
        masks[name] = replace(weight, scale=1.0).matrix(mask)
    return masks


def reordered(
    given: Model, layers: Sequence[Layer], data: Data, options: Options
) -> tuple[Model, dict[str, str]]:
    """The model with its units in an order that suits the pattern, and remarks by layer name.

    Raises:
        UsageError: N:M does not fit a layer.
    """
    network, _ = observe_network(given, layers, data, options)
    plan = make_plan(network.layers, options)
    patterns = {
        layer.name: group.sparsity
        for group in plan.groups
        for layer in network.layers
        if layer.weight.tensor in group.tensors and isinstance(group.sparsity, NM)
    }
    measured = observe(network, plan, network.original)
    scores = importances(network, plan, network.original, measured)
    return with_order(given, network, patterns, scores, options.session)


def find_units(source: Model, network: Network, options: Options) -> Structure:
    """The units that may go; a layer that is not wanted keeps its own.

    Raises:
        TargetError: no unit can be removed.
    """
    frozen = {x.name: r for x in network.layers if (r := _unwanted(x.name, options))}
    return units_of(source, network, frozen, options.session)


def in_own_bases(source: Model, network: Network, options: Options) -> Model:
    """The model with its attention heads in bases that suit removing dimensions of them.

    Raises:
        TargetError: no unit can be removed.
    """
    structure = find_units(source, network, options)
    return with_turned_heads(source, network, structure, options.session)


def unit_step(
    source: Model, network: Network, data: Data, options: Options, progress: Progress
) -> UnitStep:
    """What a stage does when whole units go.

    Raises:
        TargetError: no unit can be removed.
    """
    structure = find_units(source, network, options)
    share, target = options.end, "params"
    if options.speedup is not None:
        share = 1 - 1 / options.speedup
        target = "latency" if options.cost == "latency" else "flops"
    assert not isinstance(share, NM), "Options refuses N:M of units"
    required = options.limit is None or options.sparsity is not None
    goal = Goal(share, target, options.cost, options.unit_multiple, required)
    watch = None
    if options.cost == "latency":
        watch = Watch(
            replace(source, proto=modelling.decode_sparse(source.proto)),
            structure,
            network.layers,
            timed_batch(data, options),
            (next(data.fit.batches(1)), next(data.fit.batches(2))),
            options.session,
            progress=progress,
        )
    return UnitStep(network, structure, goal, watch)


def timed_batch(data: Data, options: Options) -> Batch:
    """What models are fed when their latency is measured."""
    return next(data.held_out.batches(options.batch_size or evaluate.fitting(data.held_out)))


def fast_enough(
    source: Model,
    network: Network,
    plan: Plan,
    step: UnitStep,
    pruned: Pruned,
    made: Smaller,
    data: Data,
    options: Options,
    progress: Progress,
) -> tuple[Pruned, Smaller, Speedup]:
    """Measure what was made, and prune on until it is as fast as was asked for.

    What an error target ended earlier is measured only.

    Raises:
        TargetError: it is not, after ATTEMPTS.
    """
    assert options.speedup is not None, "the target of the step"
    wanted, closest = 1 / options.speedup, 1.0
    for _ in range(ATTEMPTS):
        assert isinstance(pruned, PrunedUnits), "a UnitStep gives them"
        batch = timed_batch(data, options)
        latency = evaluate.measure_latency(source, made.model, batch, **options.session)
        if latency.ratio > wanted:  # before more goes: was it other work on the machine?
            latency = evaluate.measure_latency(
                source, made.model, batch, seconds=LONGER, **options.session
            )
        if latency.ratio <= wanted or options.limit is not None:
            return pruned, made, Speedup(options.speedup, step.predicted(pruned.keep), latency)
        closest = min(closest, latency.ratio)
        step = step.with_more(latency.ratio)
        again = step(network, plan, pruned, 1.0, progress)
        pruned = polished(network, plan, again, progress)
        made = finished(source, network, step, pruned, options)
    raise too_slow(options.speedup, closest)


def finished(
    source: Model, network: Network, step: UnitStep | None, pruned: Pruned, options: Options
) -> Smaller:
    """The model that the pruned network makes: cut where units went, cleaned up where they died.

    Raises:
        TargetError: fewer units could go than were to.
    """
    large = modelling.stored_size(source.proto) > modelling.LARGEST_FILE
    cleans = step is None and options.cleans and _any_dead(network, pruned.state)
    late = step is None and options.format == "dense"
    masked, created = stored(source, network, pruned.state, late=late)
    if step is not None:
        assert isinstance(pruned, PrunedUnits), "a UnitStep gives them"
        step.check_reached(pruned.keep)
        return smaller(source, masked, network, step.structure, pruned, options.session)
    if cleans and large:
        why = ("units without weights were left in: the model takes more than 2 GB.",)
        return Smaller(masked, created, warnings=why)
    if not cleans:
        return Smaller(masked, created)
    return cleaned(source, masked, created, network, options.unread_inputs, options.session)


def _any_dead(network: Network, state: State) -> bool:
    """Whether pruning left any row or column of a layer without a weight."""
    return any(
        not np.array_equal(keep, network.original.keep[name])
        and not (keep.any(axis=0).all() and keep.any(axis=1).all())
        for name, keep in state.keep.items()
    )


def prune_within(
    network: Network,
    plan: Plan,
    data: Data,
    options: Options,
    step: UnitStep | None,
    progress: Progress,
) -> tuple[Pruned, tuple[Point, ...]]:
    """Prune to the sparsity asked for, or as far as the limit allows; and the points on the way.

    Raises:
        TargetError: no sparsity meets the limit.
        QualityError: the sparsity asked for does not meet it.
    """
    limit = options.limit
    if limit is None:
        return prune(network, plan, progress, step=step), ()
    parts = (data.guard, data.held_out)
    try:
        judge = Judge(network.observer, network.original, parts, network.size)
    except CalibrationError as error:
        raise CalibrationError(f"{options.labels}: {error.message}", hint=error.hint) from error
    if options.sparsity is None and options.apply_masks is None:
        return seek(network, plan, limit, judge, progress, step=step or stage)
    pruned = prune(network, plan, progress, step=step)
    point = judge.point(pruned.state)
    if not limit.allows(point):
        raise QualityError(
            f"the result misses the target: {point.described}.",
            hint="Nothing was written. Lower --sparsity, or leave it out to have it found.",
        )
    return pruned, (replace(point, within=True),)


def _group(tensors: tuple[str, ...], layers: Mapping[str, Layer], sparsity: Sparsity) -> Group:
    for name in tensors:
        layer = layers[name]
        if isinstance(sparsity, NM) and layer.reduction % sparsity.m:
            raise UsageError(
                f"{sparsity} does not fit layer {layer.name!r}: its reduction axis has length "
                f"{layer.reduction}, which {sparsity.m} does not divide.",
                hint=f"Leave it out with --exclude '^{re.escape(layer.name)}$'.",
            )
    return Group(tensors, sparsity, {name: layers[name].nm_order() for name in tensors})


def stored(
    source: Model, network: Network, state: State, *, late: bool = False
) -> tuple[Model, frozenset[str]]:
    """A copy of the model in which the new weights and biases stand, and who got a new bias.

    With ``late``, new values of external initializers do not enter the copy: see ``Model.late``.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(modelling.decode_sparse(source.proto))
    external = {t.name for t in proto.graph.initializer if late and modelling.is_external(t)}
    created, written, renewed = set(), set(), []
    for layer in network.layers:
        tensor = layer.weight.tensor
        changed = tensor not in written and not np.array_equal(
            state.weights[tensor], network.original.weights[tensor]
        )
        written.add(tensor)
        weight = state.weights[tensor] if changed and tensor not in external else None
        if changed and tensor in external:
            renewed.append(tensor)
        if layer.store(proto, weight, state.shifts[layer.name], source.base):
            created.add(layer.name)
    values = Computed(renewed, state.weights.__getitem__)
    return Model(proto, None, source.base, values), frozenset(created)


def held(result: Model) -> Model:
    """A model whose values are all in memory: its files, if it has any, may go."""
    if result.path is None:
        return result
    proto = onnx.ModelProto()
    proto.CopyFrom(result.proto)
    onnx.load_external_data_for_model(proto, str(result.base))
    return replace(result, proto=proto, path=None, base=None)


def stored_masks(layers: Sequence[Layer], state: State) -> dict[str, np.ndarray]:
    """Keep masks by stored tensor, in its own layout."""
    by_tensor = {layer.weight.tensor: layer.weight for layer in layers}
    return {name: weight.layout(state.keep[name]) for name, weight in by_tensor.items()}


def save(
    result: Model, source: Model, layers: Sequence[Layer], output: str | Path, options: Options
) -> Model:
    """Write the result and read it back.

    Raises:
        OutputError: it cannot be written.
    """
    names = {layer.name for layer in layers}
    modelling.save(
        result.proto,
        output,
        base=source.base,
        late=result.late,
        encoding=options.format,
        # Not the tensors of the layers as they were: a cut may have given one a copy of its own.
        pruned={x.weight.tensor for x in find_layers(result.proto).layers if x.name in names},
        force=options.force,
        source=source.path,
    )
    return modelling.load(output)


def save_masks(masks: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Write keep masks as .npz, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **masks)
    modelling.write_whole(path, buffer.getvalue())


def compare(
    source: Model, result: Model, data: Data, options: Options, original: ModelFacts
) -> Comparison:
    """Original against result, through ONNX Runtime, on samples that nothing else has seen."""
    gap = evaluate.measure_gap(
        source,
        result,
        data.held_out,
        data.held_out.row_labels,
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
    )
    latency = None
    if options.measure:
        latency = evaluate.measure_latency(
            source, result, timed_batch(data, options), **options.session
        )
    return Comparison(original, evaluate.model_facts(result), gap, latency)


def speed_of(made: Smaller, comparison: Comparison, speedup: Speedup | None) -> str:
    """What the result does for latency, in words, and in numbers where they were asked for."""
    expected = made.speed or UNSTRUCTURED_SPEED
    latency = comparison.latency if speedup is None else speedup.measured
    if latency is None:
        return expected
    threads = "all threads" if latency.threads is None else f"{latency.threads} threads"
    runs = (
        f"batch {latency.batch}, {threads} "
        f"({1e3 * latency.seconds_a:.3g} ms, {1e3 * latency.seconds_b:.3g} ms)."
    )
    if speedup is None:
        return f"{expected} Measured: x{latency.ratio:.3f} of the latency, {runs}"
    return (
        f"{speedup.asked:g} times as fast was asked for; {speedup.predicted:.2f} times is what the "
        f"layers that lost units promise, timed one by one; {speedup.reached:.2f} times was "
        f"measured, {runs}"
    )


def bound(source: Model, result: Model, data: Data, options: Options) -> bounds.Bounds:
    """How far the outputs can be apart on inputs like the held-out samples."""
    return bounds.bound(
        source,
        result,
        data.held_out,
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
    )


def _ranking(options: Options) -> str:
    """What decided which weights go."""
    if options.apply_masks is not None:
        return f"none, the masks of {Path(options.apply_masks).name} were given"
    return options.ranking or options.method


def recipe_of(options: Options) -> Recipe:
    """What was done in the end, defaults resolved."""
    method = options.recipe
    return Recipe(
        method=options.method,
        importance=_ranking(options),
        compensation=method.compensation,
        metric=options.resolved_metric,
        metric_reason=options.metric_reason,
        damping=options.damping or method.repair.damping,
        positions=options.positions,
        gradients=options.gradients,
        stages=method.stages,
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


def predicted_error(network: Network, plan: Plan, pruned: Pruned) -> float | None:
    """Relative output error that the removed importances add up to; only one-shot runs have one.

    The sum leaves out how removals act together, so it is the method's own, linearised expectation.
    """
    if not plan.method.in_output_units or plan.method.stages > 1 or network.observer.metric != "l2":
        return None
    energy = network.observer.output_energy(network.original, network.guard.batches(network.size))
    return float(np.sqrt(sum(pruned.removed.values()) / energy)) if energy else None


def warnings(data: Data, network: Network, pruned: Pruned, comparison: Comparison) -> Iterator[str]:
    """What the user must know, one sentence each."""
    if data.fit.synthetic:
        yield SYNTHETIC_WARNING
    if data.warning:
        yield data.warning
    few = [name for name, ess in pruned.ess.items() if ess < FEW_SAMPLES]
    if few:
        yield (
            f"the sensitivities of {len(few)} layers, such as {modelling.printable(few[0])}, rest "
            f"on fewer than {FEW_SAMPLES} effective samples; give more calibration data."
        )
    for name in network.observer.probabilities:
        yield (
            f"--metric {network.observer.metric} takes outputs as logits, but the values of "
            f"{modelling.printable(name)!r} look like probabilities: give the model before "
            "its softmax, or use --metric l2."
        )
    yield from pruned.warnings
    yield from comparison.gap.warnings


def target_warnings(data: Data, options: Options, curve: Sequence[Point]) -> Iterator[str]:
    """What the user must know about the target that was asked for, one sentence each."""
    if options.max_accuracy_drop is not None:
        known = [part.row_labels for part in (data.guard, data.held_out)]
        samples = min(len(labels) for labels in known if labels is not None)
        if 100 / samples > (options.max_accuracy_drop or 1.0):
            yield (
                f"accuracy was judged on {samples} samples at a time, of which one is "
                f"{100 / samples:.2g} percentage points: --max-accuracy-drop "
                f"{options.max_accuracy_drop:g} needs more labelled samples to mean something."
            )
    if curve and options.sparsity is None and all(point.within for point in curve):
        yield (
            "every step of the search was within the target: it ended where almost nothing is left "
            "to remove, not at the target."
        )
