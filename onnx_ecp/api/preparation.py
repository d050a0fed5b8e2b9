"""Everything before the first number: what is pruned, on what data, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_ecp import graph as modelling
from onnx_ecp.api.options import Options
from onnx_ecp.data import calibration as calibrating
from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.data.untrusted import npz_names, read_npz
from onnx_ecp.errors import ModelError, TargetError, UsageError, did_you_mean
from onnx_ecp.evaluation import compare as evaluate
from onnx_ecp.evaluation.batching import as_taken
from onnx_ecp.evaluation.facts import model_of
from onnx_ecp.evaluation.targets import TARGETS
from onnx_ecp.graph import Model
from onnx_ecp.graph.free_batch import PROBED, free_batch
from onnx_ecp.graph.randomness import refuse_random
from onnx_ecp.graph.selected_rows import cut_hint, named, rows_that_depend
from onnx_ecp.layers import Layer, Skip, find_layers
from onnx_ecp.methods import FORWARD, METHODS
from onnx_ecp.pruning.loop import importances, observe
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.pruning.selection import NM, RankingGroup, Sparsity
from onnx_ecp.report import CalibrationFacts
from onnx_ecp.runtime.cache import recalled
from onnx_ecp.runtime.limits import free_memory, workers
from onnx_ecp.runtime.progress import Progress
from onnx_ecp.statistics.collection import batch_size
from onnx_ecp.statistics.collection import spreads as spreads_of
from onnx_ecp.statistics.columns import Spread
from onnx_ecp.statistics.layerwise import GRANTED, Network
from onnx_ecp.statistics.observer import Observer, State, original_state
from onnx_ecp.units import Structure
from onnx_ecp.units.kernels import block_of_convolutions
from onnx_ecp.units.latency import Watch
from onnx_ecp.units.shrink import biases_of, units_of, with_order, with_turned_heads
from onnx_ecp.units.stages import Goal, UnitStep

# Shares of the calibration samples that are set aside, and how many at most: to judge refits, and
# to measure the error that the report states. Importances and solutions see neither; the first also
# says where a joint refit or fine-tuning stops, both how far an error target lets a run go.
HELD_OUT, HELD_OUT_MOST = 0.1, 512
# Where that is less than ENOUGH, an error is measured on so many, a share of FEW_SHARE at most:
# with 51 of 512 samples of digits the 95 % interval went up to 1.2 to 1.9 times the error, with 102
# up to 1.1 to 1.4, and the result was as good.
FEW_SHARE, ENOUGH = 0.2, 128
# So many samples tell whether the number of rows depends on the data.
LOOKED_AT = 8
# So many candidates are listed in an error.
_MOST_LISTED = 3
# What the reason says where N:M is not for a layer.
NO_FIT = "does not fit it"
# Where the reverse graph does not reach a layer.
NO_SENSITIVITY = "its sensitivity is not available"


@dataclass(frozen=True)
class Data:
    """The calibration samples, with their labels if any, and what each part of them is for.

    Of two samples one is ``train`` and ``validation`` at once, a single one is all three parts.

    Args:
        train: importances and compensations are computed on them.
        validation: they judge whether a refit is kept.
        test: the error that the report states is measured on them.
    """

    train: Calibration
    validation: Calibration
    test: Calibration

    @property
    def seen(self) -> tuple[Calibration, ...]:
        """All samples but those held out."""
        return (self.train,) if self.validation is self.train else (self.train, self.validation)

    @property
    def identity(self) -> tuple[str, str]:
        """Digests of all samples but those held out."""
        return self.train.identity, self.validation.identity

    @property
    def facts(self) -> CalibrationFacts:
        """What the report says about them."""
        used = len(self.train) + (0 if self.validation is self.train else len(self.validation))
        held_out = 0 if self.test is self.train else len(self.test)
        rows = evaluate.expected_rows(self.train) // len(self.train)
        return CalibrationFacts(self.train.source, used, held_out, self.train.synthetic, rows)

    @property
    def warning(self) -> str:
        """What the user must know about samples that play several parts; empty where none does."""
        if self.test is self.train:
            return (
                "there is one sample only: the error is measured on the very sample that all else "
                "was computed from and says nothing about others; give more calibration data."
            )
        if self.validation is self.train:
            return (
                "there are two samples only: all that was not measured on one of them was computed "
                "from the other, refits and their judgement alike; give more calibration data."
            )
        return ""


@dataclass(frozen=True)
class Job:
    """A network that can be observed, and what is to be done with it.

    Args:
        source: the model that is pruned: as given, or with its inputs in another order
            (``--permute``) or its heads in other bases (units).
        network: its layers and the samples.
        plan: how it is pruned.
        step: what a stage does where whole units go; None for single weights.
        skips: the layers that are left alone, with the reason.
        remarks: by layer name, what was done to it before pruning.
    """

    source: Model
    network: Network
    plan: Plan
    step: UnitStep | None = None
    skips: tuple[Skip, ...] = ()
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def by_clock(self) -> bool:
        """Whether a latency is the target."""
        return self.step is not None and self.step.goal.target == "latency"


def prepare(
    given: Model, layers: Sequence[Layer], data: Data, options: Options, progress: Progress
) -> Job:
    """Build the observation graph of the model that is to be pruned, and the plan.

    Args:
        given: the model.
        layers: that are wanted.
        data: the samples.
        options: what was asked for.
        progress: called while units are timed.

    Raises:
        TargetError: nothing is left to prune.
    """
    source, remarks = given, dict[str, str]()
    if options.permute:
        source, remarks = reordered(given, layers, data, options)
        layers, _ = choose_layers(source, options)
    network, blocked = observe_network(source, layers, data, options)
    if options.by_units and options.masks is None:  # masks are of the bases given
        turned = in_own_bases(source, network, options)
        if turned is not source:
            network.observer.close()
            source, (layers, _) = turned, choose_layers(turned, options)
            network, blocked = observe_network(source, layers, data, options)
    plan, step = make_plan(network.layers, options), None
    if options.by_units:
        step = unit_step(source, network, data, options, progress)
        blocked = [*blocked, *step.structure.refusals]
    return Job(source, network, plan, step, tuple(blocked), remarks)


def load(model: str | Path | onnx.ModelProto) -> Model:
    """A validated model that the installed ONNX Runtime takes.

    Raises:
        ModelError: it is not valid, too new, or its outputs are random.
    """
    source = model_of(model)
    refusal = modelling.runtime_support(source.proto)
    if refusal is not None:
        raise ModelError(
            f"{_label(source)}: {refusal}",
            hint="Install a newer onnxruntime, or export the model for an older opset.",
        )
    refuse_random(source)
    return source


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
    useless = no_gain(source, found.layers, options)
    for layer in found.layers:
        reason = _unwanted_weight(layer, found.layers, options) or useless.get(layer.name, "")
        if reason and not options.by_units:
            skips.append(Skip(layer.name, layer.op, reason))
        else:
            layers.append(layer)
    if not layers:
        raise nothing_to_prune(skips)
    return layers, skips


def no_gain(source: Model, layers: Sequence[Layer], options: Options) -> dict[str, str]:
    """By name, the layers whose zeros the target cannot use, with the reason.

    A weight that several layers share is pruned where one of them gains.
    """
    if options.target is None or TARGETS[options.target].granularity == "unit":
        return {}
    proto = modelling.decode_sparse(source.proto)
    refused = TARGETS[options.target].refused(proto, layers)
    gaining = {layer.weight.tensor for layer in layers if not refused[layer.name]}
    return {
        layer.name: f"--target {options.target} gains nothing: {refused[layer.name]}"
        for layer in layers
        if layer.weight.tensor not in gaining
    }


def _check_matches(options: Options, names: Sequence[str]) -> None:
    """A pattern without a match is a slip that would prune what it was to protect."""
    for flag in ("include", "exclude"):
        for pattern in getattr(options, flag):
            if not any(re.search(pattern, name) for name in names):
                raise UsageError(
                    f"--{flag} {modelling.printable(pattern, 100)!r} matches no layer.",
                    hint=did_you_mean(pattern, names),
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


def misfits(layers: Sequence[Layer], options: Options) -> dict[str, Skip]:
    """By name, the layers that cannot have the N:M that they are to get, with the reason.

    Raises:
        UsageError: a --layer-sparsity that no layer matches.
    """
    for pattern in options.layer_sparsity:
        if not any(re.search(pattern, layer.name) for layer in layers):
            shown = modelling.printable(pattern, 100)
            raise UsageError(
                f"--layer-sparsity {shown!r} matches no prunable layer.",
                hint=did_you_mean(pattern, [layer.name for layer in layers]),
            )
    own, found = own_sparsities(layers, options), {}
    for layer in layers:
        wanted = own.get(layer.weight.tensor, options.end)
        if isinstance(wanted, NM) and layer.reduction % wanted.m:
            length = f"{wanted.m} does not divide the {layer.reduction} of its reduction axis"
            found[layer.name] = Skip(layer.name, layer.op, f"{wanted} {NO_FIT}: {length}")
    return found


def nothing_to_prune(skips: Sequence[Skip]) -> TargetError:
    """The error that names the first candidates, each with its reason."""
    listed = [f"{modelling.printable(s.name)} ({s.op}): {s.reason}" for s in skips[:_MOST_LISTED]]
    more = f"; and {len(skips) - len(listed)} more" if len(skips) > len(listed) else ""
    return TargetError(
        "no layer can be pruned" + (f": {'; '.join(listed)}{more}" if listed else "."),
        hint=_other_ways(skips)
        if listed
        else "The model has no Gemm, MatMul or Conv with constant weights.",
    )


def _other_ways(skips: Sequence[Skip]) -> str:
    """What may work where no layer can be pruned as was asked."""
    every = "`onnx-ecp inspect MODEL` lists every candidate."
    if not any(NO_SENSITIVITY in skip.reason for skip in skips):
        return every
    forward = [n for n, m in METHODS.items() if m.measures in FORWARD and n != "random"]
    return (
        f"Methods that look forward need no sensitivity: --method {', '.join(forward)}. "
        f"--gradients numeric takes any operator, with many runs. {every}"
    )


def _unwanted_weight(layer: Layer, layers: Sequence[Layer], options: Options) -> str:
    """Why a layer stays as it is; a shared weight stays if one of its layers must."""
    own = unwanted(layer.name, options)
    if own or not (options.include or options.exclude):
        return own
    for other in layers:
        if other.weight.tensor == layer.weight.tensor and (why := unwanted(other.name, options)):
            return f"it shares its weight with {modelling.printable(other.name)}, which is {why}"
    return ""


def unwanted(name: str, options: Options) -> str:
    """Why --include and --exclude leave a layer alone; empty where they do not."""
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
    everything = as_taken(source, everything, **options.session)
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
    everything = everything.limit(options.samples or len(everything), options.seed).grouped()
    samples = len(everything)
    share = max(_share(samples), min(FEW_SHARE, ENOUGH / samples))
    rest, held_out = everything.split(share, options.seed)
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
    layers, uncounted = with_known_rows(dense, layers, data, options)
    if not layers:
        raise nothing_to_prune(uncounted)
    dense, data = with_free_batch(dense, data, options)

    def observing(chosen: Sequence[Layer]) -> Observer:
        return Observer(
            dense,
            chosen,
            next(data.train.batches(2)),
            engine=options.gradients,
            metric=options.resolved_metric,
            probes=options.resolved_probes,
            seed=options.seed,
            provider=options.provider,
            threads=options.threads,
            reverse=options.recipe.measures not in FORWARD or options.finetune_steps > 0,
            statistics=options.statistics,
            other=data.train.another(),
        )

    observer = observing(layers)
    skips = [
        Skip(x.name, x.op, f"{NO_SENSITIVITY}: {observer.blocked[x.name]}")
        for x in layers
        if x.name in observer.blocked
    ]
    skips = [*uncounted, *skips]
    if observer.blocked:
        rest = [x for x in layers if x.name not in observer.blocked]
        if not rest:
            raise nothing_to_prune(skips)
        observer = observing(rest)
    original = original_state(dense, observer.layers)
    size = size_of_batches(observer, original, data, options)
    spreads = recalled(
        ("the spread of the outputs", lambda: (observer.identity, original, *data.identity, size)),
        lambda: spreads_of(observer, original, data.seen, size),
        (Spread,),
    )
    observer.normalise_by(spreads, options.output_weights)
    memory = options.max_memory or free_memory() // 2
    granted = options.max_memory or GRANTED
    train, validation = data.train, data.validation
    return Network(observer, original, train, validation, size, memory, granted), skips


def size_of_batches(observer: Observer, original: State, data: Data, options: Options) -> int:
    """Samples per run: those asked for, or as many as fit."""
    wanted, positions = options.batch_size, options.positions
    return recalled(
        (
            "how many samples fit",
            lambda: (observer.identity, original, data.train.identity, wanted, positions),
        ),
        lambda: batch_size(observer, original, data.train, wanted, positions),
        fits=lambda size: isinstance(size, int) and size > 0,
    )


def with_known_rows(
    dense: Model, layers: Sequence[Layer], data: Data, options: Options
) -> tuple[list[Layer], list[Skip]]:
    """The layers whose rows are as many whatever the weights are, and those that are left alone.

    Raises:
        ModelError: an output has as many rows as the data select.
    """
    produced = {y for node in dense.proto.graph.node for y in node.output}
    outputs = [y.name for y in dense.proto.graph.output]
    read = [layer.input for layer in layers if layer.input in produced]
    weights = [layer.weight.tensor for layer in layers]
    few = data.train.take(np.arange(min(len(data.train), LOOKED_AT)))
    samples = [batch.feeds for batch in few.batches(1)]
    found = rows_that_depend(dense, [*outputs, *read], weights, samples, **options.session)
    lost = next((name for name in outputs if name in found), None)
    if lost is not None:
        node = found[lost]
        raise ModelError(
            f"{_label(dense)}: output {modelling.printable(lost)!r} has as many rows as "
            f"{named(node)} selects from the data: two versions of the model cannot be compared "
            "row by row.",
            hint=cut_hint(dense.proto, node),
        )
    why = "it works on as many rows as {} selects from the data"
    skips = [
        Skip(x.name, x.op, why.format(named(found[x.input]))) for x in layers if x.input in found
    ]
    return [x for x in layers if x.input not in found], skips


def with_free_batch(dense: Model, data: Data, options: Options) -> tuple[Model, Data]:
    """A copy of a model of batch one that takes many samples a run, and the samples put together.

    Both are as they were where the batch is free, or where no such copy computes the same.
    """
    names, train = data.train.of_one, data.train
    alike = [i for i in range(len(train)) if train.shapes(i) == train.shapes(0)][:PROBED]
    if len(alike) < 2 or names != train.arrays.keys():
        return dense, data
    few, other = [batch.feeds for batch in train.take(alike).batches(1)], train.another()
    others = () if other is None else (other.feeds,)
    copy = free_batch(dense, few, names, others, **options.session)
    if copy is None:
        return dense, data
    train = data.train.together()
    validation = train if data.validation is data.train else data.validation.together()
    return replace(dense, proto=copy), replace(data, train=train, validation=validation)


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


def _group(
    tensors: tuple[str, ...], layers: Mapping[str, Layer], sparsity: Sparsity
) -> RankingGroup:
    return RankingGroup(tensors, sparsity, {name: layers[name].nm_order() for name in tensors})


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
    frozen = {x.name: r for x in network.layers if (r := unwanted(x.name, options))}
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
    kernels = options.speedup is not None or options.cost == "latency"
    multiple = options.unit_multiple or (None if kernels else 1)
    goal = Goal(share, target, options.cost, multiple, not options.searches)
    if multiple is None and target == "flops" and options.provider == "cpu":
        goal = replace(goal, block=block_of_convolutions())
    watch = None
    if options.cost == "latency":
        watch = Watch(
            replace(source, proto=modelling.decode_sparse(source.proto)),
            structure,
            network.layers,
            timed_batch(data, options),
            (next(data.train.batches(1)), next(data.train.batches(2))),
            options.session | {"threads": workers()},  # as the result is measured in the end
            progress=progress,
        )
    biases = biases_of(source, network, structure)
    return UnitStep(network, structure, goal, watch, biases=biases)


def timed_batch(data: Data, options: Options) -> Batch:
    """What models are fed when their latency is measured."""
    return next(data.test.batches(options.batch_size or evaluate.fitting(data.test)))
