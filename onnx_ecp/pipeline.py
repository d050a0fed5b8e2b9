"""The whole way, from a file to a smaller one and a report."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_ecp import calibration as calibrating
from onnx_ecp import model as modelling
from onnx_ecp.calibration import Batch, Calibration
from onnx_ecp.errors import CalibrationError, TargetError, UsageError, did_you_mean
from onnx_ecp.evaluate import Gap, ModelFacts, measure_gap, model_facts
from onnx_ecp.gradients.observer import Observer, State, original_state
from onnx_ecp.layers import Layer, Skip, find_layers
from onnx_ecp.measurement import Progress, batch_size, silent
from onnx_ecp.model import Model
from onnx_ecp.options import Options
from onnx_ecp.pruning import Network, Plan, Pruned, importances, observe, prune
from onnx_ecp.report import (
    SYNTHETIC_WARNING,
    CalibrationFacts,
    LayerRow,
    Recipe,
    Report,
    installed_versions,
)
from onnx_ecp.runtime import deadline
from onnx_ecp.selection import NM, Group, Sparsity

# Shares of the calibration samples that are set aside, and how many at most: to judge refits, and
# to measure the error that the report states. Neither is used for anything else.
HELD_OUT, HELD_OUT_MOST = 0.1, 512


@dataclass(frozen=True)
class Result:
    """What ``optimize`` gives back.

    Args:
        model: the pruned model; in memory also where it was written.
        report: what was done and what it did.
        masks: by stored tensor, True where the weight stays, in the stored layout.
    """

    model: onnx.ModelProto
    report: Report
    masks: dict[str, np.ndarray]


@dataclass(frozen=True)
class Data:
    """The calibration samples and what each part of them is for."""

    fit: Calibration
    guard: Calibration
    held_out: Calibration


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
    with deadline(options.timeout):
        source = modelling.load(model)
        if output is not None:
            modelling.check_output(output, force=options.force, source=source.path)
        layers, skips = choose_layers(source, options)
        data = gather(source, calibration, options)
        network, blocked = observe_network(source, layers, data, options)
        plan = make_plan(network.layers, options)
        pruned = prune(network, plan, progress)
        proto, created = stored(source, network, pruned.state)
        written = None
        if output is not None and not options.dry_run:
            written = save(source, proto, network.layers, output, options)
        gap = compare(source, proto, written, data.held_out, options)
    report = describe(
        source, proto, written, options, data, network, pruned, created,
        (*skips, *blocked), gap, time.monotonic() - began,
    )  # fmt: skip
    return Result(proto, report, stored_masks(network.layers, pruned.state))


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
    with deadline(options.timeout):
        source = modelling.load(model)
        layers, _ = choose_layers(source, options)
        data = gather(source, calibration, options)
        network, _ = observe_network(source, layers, data, options)
        plan = make_plan(network.layers, options)
        measured = observe(network, plan, network.original)
        return importances(network, plan, network.original, measured)


def choose_layers(source: Model, options: Options) -> tuple[list[Layer], list[Skip]]:
    """The layers that the user wants pruned, and all others with the reason.

    Raises:
        TargetError: no layer is left.
    """
    found = find_layers(modelling.decode_sparse(source.proto))
    layers, skips = [], list(found.skips)
    for layer in found.layers:
        reason = _unwanted(layer.name, options)
        if reason:
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
            calibration, inputs, samples=options.samples, seed=options.seed
        )
    else:
        everything = calibrating.synthetic(
            source.proto,
            inputs,
            samples=options.samples or 128,
            seed=options.seed,
            shapes=options.input_shapes,
        )
    rest, held_out = everything.split(_share(len(everything)), options.seed)
    fit, guard = rest.split(_share(len(rest)), options.seed + 1)
    return Data(fit, guard, held_out)


def _share(samples: int) -> float:
    return min(HELD_OUT, HELD_OUT_MOST / samples)


def observe_network(
    source: Model, layers: Sequence[Layer], data: Data, options: Options
) -> tuple[Network, list[Skip]]:
    """The network under observation; layers without a sensitivity that the method needs are skipped.

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
            metric=options.metric,
            probes=options.probes,
            seed=options.seed,
            provider=options.provider,
            threads=options.threads,
            reverse=options.recipe.measures in ("sensitivities", "gradients"),
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
    size = batch_size(observer, options.batch_size)
    original = original_state(dense, observer.layers)
    return Network(observer, original, data.fit, data.guard, size), skips


def make_plan(layers: Sequence[Layer], options: Options) -> Plan:
    """Which tensors are ranked together, and how sparse each is to become.

    Raises:
        UsageError: a --layer-sparsity that no layer matches, or N:M that does not fit a layer.
    """
    by_tensor = {layer.weight.tensor: layer for layer in layers}
    own: dict[str, Sparsity] = {}
    for pattern, value in options.layer_sparsity.items():
        matched = [t for t, layer in by_tensor.items() if re.search(pattern, layer.name)]
        if not matched:
            raise UsageError(
                f"--layer-sparsity {pattern!r} matches no prunable layer.",
                hint=did_you_mean(pattern, [layer.name for layer in layers]),
            )
        own |= dict.fromkeys(matched, value)
    pooled = [t for t in by_tensor if t not in own]
    if options.scope == "layer" or isinstance(options.sparsity, NM):
        own |= dict.fromkeys(pooled, options.sparsity)
        pooled = []
    groups = [_group((t,), by_tensor, sparsity) for t, sparsity in own.items()]
    if pooled:
        groups.insert(0, _group(tuple(pooled), by_tensor, options.sparsity))
    return Plan(options.recipe, tuple(groups), options.positions, options.damping, options.seed)


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
    source: Model, network: Network, state: State
) -> tuple[onnx.ModelProto, frozenset[str]]:
    """A copy of the model in which the new weights and biases stand, and who got a new bias."""
    proto = onnx.ModelProto()
    proto.CopyFrom(modelling.decode_sparse(source.proto))
    created, written = set(), set()
    for layer in network.layers:
        tensor = layer.weight.tensor
        changed = tensor not in written and not np.array_equal(
            state.weights[tensor], network.original.weights[tensor]
        )
        written.add(tensor)
        if layer.store(proto, state.weights[tensor] if changed else None, state.shifts[layer.name]):
            created.add(layer.name)
    return proto, frozenset(created)


def stored_masks(layers: Sequence[Layer], state: State) -> dict[str, np.ndarray]:
    """Keep masks by stored tensor, in its own layout."""
    by_tensor = {layer.weight.tensor: layer.weight for layer in layers}
    return {name: weight.layout(state.keep[name]) for name, weight in by_tensor.items()}
