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
from onnx_ecp.destinations import Named, check_destinations, same_file
from onnx_ecp.errors import (
    CalibrationError,
    ModelError,
    QualityError,
    TargetError,
    UsageError,
    did_you_mean,
)
from onnx_ecp.evaluate import Comparison, Gap, ModelFacts
from onnx_ecp.gradients.observer import Observer, State, original_state
from onnx_ecp.layers import Layer, Skip, find_layers
from onnx_ecp.measurement import Progress, batch_size, silent
from onnx_ecp.model import Model
from onnx_ecp.network import Network, Plan
from onnx_ecp.options import Options
from onnx_ecp.pruning import Pruned, importances, observe, polished, prune, stage
from onnx_ecp.report import (
    PATTERN_SPEED,
    SYNTHETIC_WARNING,
    UNSTRUCTURED_SPEED,
    CalibrationFacts,
    LayerRow,
    Recipe,
    Report,
    check_target,
    counted,
)
from onnx_ecp.runtime import deadline, free_memory, threads_of
from onnx_ecp.selection import NM, Group, Sparsity
from onnx_ecp.shelf import Computed
from onnx_ecp.structure import Structure
from onnx_ecp.structure.bases import heads_of
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
# So many candidates are listed in an error.
_MOST_LISTED = 3
# From this relative error on little of the network is left: outputs of zeros have 1.
DESTROYED = 0.9
# An error beyond so many times the predicted one is told, if it is no trifle.
FAR_BEYOND, TRIFLE = 2.0, 0.01
# Below this effective sample size the user is warned that few samples carry all the weight.
FEW_SAMPLES = 32


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
    report: str | Path | Sequence[str | Path] = (),
    progress: Progress = silent,
    **choices: Any,
) -> Result:
    """Prune a model, let what stays make good for what went, verify, and write the result.

    Args:
        model: path or proto; a proto is not changed.
        calibration: see ``calibration.load``; None takes MODEL.npz beside the model, else made-up
            inputs, which the report warns of.
        output: where to write; None writes nothing.
        report: where to write the report, .json or .html; one path or several.
        progress: called with (what, done, of) as work goes on.
        choices: fields of ``Options``, such as ``method="ecp", sparsity=0.8``.

    Raises:
        OnnxEcpError: one subclass per exit code of the command line; nothing was written.
    """
    began = time.monotonic()
    options = Options.of(**choices)
    reports = [report] if isinstance(report, str | Path) else list(report)
    with ExitStack() as running:
        running.enter_context(deadline(options.timeout))
        running.enter_context(threads_of(options.threads))
        source = given = load(model)
        check_outputs(source, calibration, output, reports, options)
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
        judge = judge_of(network, data, options)
        pruned, curve = prune_within(network, plan, judge, options, step, progress)
        made = finished(source, network, step, pruned, options)
        speedup = None
        if step is not None and step.goal.target == "latency":
            pruned, made, speedup = fast_enough(
                source, network, plan, step, pruned, made, data, options, progress
            )
        curve = curve or gate(pruned, judge, options)
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
    told = Report(
        original=original,
        result=comparison.b,
        versions=doctor.versions(),
        recipe=recipe_of(options, network.observer.logits),
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
            *prediction_warning(predicted, comparison.gap),
            *misfit_warnings(skips),
            *mask_warnings(network, step, options),
            *target_warnings(data, options, curve),
            *made.warnings,
            *replaced(given, output, options),
        ),
        units=made.rows,
        work_before=made.before,
        work_after=made.after,
        speed=speed_of(made, comparison, speedup, options),
        speedup=speedup,
        sparse_kernels=kernels,
        latency=comparison.latency if speedup is None else speedup.measured,
    )
    for path in reports:
        told.save(path)
    return Result(result.proto, told, masks if source is given else None)


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
    source = evaluate.model_of(model)
    refusal = modelling.runtime_support(source.proto)
    if refusal is not None:
        raise ModelError(
            f"{_label(source)}: {refusal}",
            hint="Install a newer onnxruntime, or export the model for an older opset.",
        )
    return source


def check_outputs(
    source: Model,
    calibration: Any,
    output: str | Path | None,
    reports: Sequence[str | Path],
    options: Options,
) -> None:
    """Find out before the long work what cannot, or must not, be written in the end.

    Raises:
        UsageError: a file would replace another, or what is read; a report has no known format.
        OutputError: a file cannot be written.
    """
    named = (("OUTPUT", output), ("--masks", options.masks), *(("--report", x) for x in reports))
    results = [(what, path) for what, path in named if path is not None]
    check_destinations(results, sources_of(source, calibration, output, options))
    for path in (output, options.masks):
        if path is not None and not options.dry_run:
            modelling.check_output(path, force=options.force, source=source.path)
    for path in reports:
        check_target(path, force=options.force)


def sources_of(
    source: Model, calibration: Any, output: str | Path | None, options: Options
) -> Iterator[Named]:
    """The files that are read; not the model where OUTPUT is to replace it, which --force allows.

    Masks and reports must not replace it, whatever is said, nor may anything its external data.
    """
    if source.path is not None:
        if output is None or not same_file(output, source.path):
            yield "the model", source.path
        for file in modelling.data_files(source.proto, source.path.parent):
            yield "external data of the model", file
        if calibration is None:
            calibration = calibrating.sidecar(source.path)
    if isinstance(calibration, str | Path):
        yield "the calibration data", calibrating.file_of(calibration)
    if isinstance(options.labels, str | Path):
        yield "the labels", options.labels
    if options.apply_masks is not None:
        yield "the masks to apply", options.apply_masks


def _label(source: Model) -> str:
    return modelling.printable(source.path or "model")


def choose_layers(source: Model, options: Options) -> tuple[list[Layer], list[Skip]]:
    """The layers that will be pruned, and all others with the reason.

    Raises:
        UsageError: a regular expression matches no layer.
        TargetError: no layer is left.
    """
    layers, skips = wanted_layers(source, options)
    dense = misfits(layers, options)
    skips += dense.values()
    layers = [layer for layer in layers if layer.name not in dense]
    if not layers:
        raise nothing_to_prune(skips)
    return layers, skips


def wanted_layers(source: Model, options: Options) -> tuple[list[Layer], list[Skip]]:
    """The layers that the user wants pruned, and all others with the reason.

    Raises:
        UsageError: an --include or --exclude matches nothing.
        TargetError: no layer is left.
    """
    found = find_layers(modelling.decode_sparse(source.proto))
    if found.layers:
        names = [x.name for x in found.layers] + [x.name for x in found.skips]
        _check_matches(options, names)
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


def _check_matches(options: Options, names: Sequence[str]) -> None:
    """A pattern without a match is a slip that would prune what it was to protect."""
    for flag in ("include", "exclude"):
        for pattern in getattr(options, flag):
            if not any(re.search(pattern, name) for name in names):
                raise UsageError(
                    f"--{flag} {pattern!r} matches no layer.", hint=did_you_mean(pattern, names)
                )


def own_sparsities(layers: Sequence[Layer], options: Options) -> dict[str, Sparsity]:
    """By stored tensor, the sparsities that --layer-sparsity gives; the last match wins.

    A weight that several layers share has that of any of them.
    """
    return {
        layer.weight.tensor: sparsity
        for pattern, sparsity in options.layer_sparsity.items()
        for layer in layers
        if re.search(pattern, layer.name)
    }


# What the reason says where N:M is not for a layer.
_NO_FIT = "does not fit it"


def misfits(layers: Sequence[Layer], options: Options) -> dict[str, Skip]:
    """By name, the layers that cannot have the N:M that they are to get, with the reason.

    Raises:
        UsageError: a --layer-sparsity that no layer matches.
    """
    for pattern in options.layer_sparsity:
        if not any(re.search(pattern, layer.name) for layer in layers):
            raise UsageError(
                f"--layer-sparsity {pattern!r} matches no prunable layer.",
                hint=did_you_mean(pattern, [layer.name for layer in layers]),
            )
    own, found = own_sparsities(layers, options), {}
    for layer in layers:
        wanted = own.get(layer.weight.tensor, options.end)
        if isinstance(wanted, NM) and layer.reduction % wanted.m:
            length = f"{wanted.m} does not divide the {layer.reduction} of its reduction axis"
            found[layer.name] = Skip(layer.name, layer.op, f"{wanted} {_NO_FIT}: {length}")
    return found


def misfit_warnings(skips: Sequence[Skip]) -> Iterator[str]:
    """Says so where layers stayed dense because a pattern does not fit them."""
    dense = [skip for skip in skips if _NO_FIT in skip.reason]
    if dense:
        first = modelling.printable(dense[0].name)
        yield (
            f"{counted(len(dense), 'layer')}, such as {first}, stayed dense: the pattern does not "
            "fit; the table of what was not pruned says why."
        )


def nothing_to_prune(skips: Sequence[Skip]) -> TargetError:
    """The error that names the first candidates, each with its reason."""
    listed = [f"{modelling.printable(s.name)} ({s.op}): {s.reason}" for s in skips[:_MOST_LISTED]]
    more = f"; and {len(skips) - len(listed)} more" if len(skips) > len(listed) else ""
    return TargetError(
        "no layer can be pruned" + (f": {'; '.join(listed)}{more}" if listed else "."),
        hint="`onnx-ecp inspect MODEL` lists every candidate."
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
    """Which tensors are ranked together, and how sparse each is to become."""
    by_tensor = {layer.weight.tensor: layer for layer in layers}
    own = own_sparsities(layers, options)
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


def reordered(
    given: Model, layers: Sequence[Layer], data: Data, options: Options
) -> tuple[Model, dict[str, str]]:
    """The model with its units in an order that suits the pattern, and remarks by layer name."""
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
    goal = Goal(share, target, options.cost, options.unit_multiple, not options.searches)
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
        if latency.ratio <= wanted:
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
    judge: Judge | None,
    options: Options,
    step: UnitStep | None,
    progress: Progress,
) -> tuple[Pruned, tuple[Point, ...]]:
    """Prune to what was asked for, or as far as the limit allows; and the points of that search.

    Raises:
        TargetError: no sparsity meets the limit.
    """
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
    parts = (data.guard, data.held_out)
    try:
        return Judge(network.observer, network.original, parts, network.size)
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


def _group(tensors: tuple[str, ...], layers: Mapping[str, Layer], sparsity: Sparsity) -> Group:
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


def speed_of(
    made: Smaller, comparison: Comparison, speedup: Speedup | None, options: Options
) -> str:
    """What the result does for latency, in words, and in numbers where they were asked for."""
    expected = made.speed or (PATTERN_SPEED if options.patterns else UNSTRUCTURED_SPEED)
    latency = comparison.latency if speedup is None else speedup.measured
    if latency is None:
        return expected
    runs = (
        f"{latency.conditions} "
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


def recipe_of(options: Options, logits: Sequence[str] = ()) -> Recipe:
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


def prediction_warning(predicted: float | None, gap: Gap) -> Iterator[str]:
    """Says so where the sum of the importances tells nothing of the error."""
    if predicted is not None and gap.relative_error > max(FAR_BEYOND * predicted, TRIFLE):
        yield (
            f"the error is more than {FAR_BEYOND:g} times what the importances add up to "
            f"({gap.relative_error:.3g}, not {predicted:.3g}): at this sparsity the linearisation "
            "behind them does not hold; more --stages, or --method ecp-refit, look again on the "
            "way."
        )


def warnings(data: Data, network: Network, pruned: Pruned, comparison: Comparison) -> Iterator[str]:
    """What the user must know, one sentence each."""
    if data.fit.synthetic:
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
    if not any(keep.any() for keep in pruned.state.keep.values()):
        yield "no weight is left in any of these layers: the outputs no longer depend on them."
    elif comparison.gap.relative_error >= DESTROYED:
        yield (
            "the outputs are hardly nearer to the original's than zeros would be, or further away "
            f"(a relative error of {DESTROYED:g} or more; zeros have 1): ask for a lower sparsity, "
            "or name a limit with --max-error."
        )
    yield from pruned.warnings
    yield from comparison.gap.warnings


def replaced(given: Model, output: str | Path | None, options: Options) -> Iterator[str]:
    """Says so where the result stands in the place of the model."""
    written = None if options.dry_run else output
    if given.path is not None and written is not None and same_file(given.path, written):
        yield "OUTPUT is MODEL: the result has replaced the model, as --force allows."


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
    if options.searches and all(point.within for point in curve):
        yield (
            "every step of the search was within the target: it ended where almost nothing is left "
            "to remove, not at the target."
        )
