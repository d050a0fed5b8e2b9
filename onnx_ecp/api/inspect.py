"""What of a model is prunable, what is not and why.

Works for models that are newer than the installed ONNX Runtime, or where there is none: only what
the sensitivities of the layers can be had by needs a run, and is then not told; units are then
followed as far as shape inference goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_ecp.api.options import one_of
from onnx_ecp.api.target import foreseen
from onnx_ecp.data import calibration as calibrating
from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.errors import CalibrationError, OnnxEcpError, ProviderError, UsageError
from onnx_ecp.evaluation.batching import as_taken
from onnx_ecp.evaluation.facts import model_of
from onnx_ecp.evaluation.targets import TARGETS, storage
from onnx_ecp.gradients.reverse import NO_OUTPUT
from onnx_ecp.graph import (
    InputSpec,
    Model,
    constants,
    decode_sparse,
    read_tensor,
    runtime_support,
    signature,
)
from onnx_ecp.graph.shapes import Shapes
from onnx_ecp.layers import Layer, find_layers
from onnx_ecp.layers.versions import one_look_each
from onnx_ecp.report.inspection import Inspection, Prunable
from onnx_ecp.runtime.limits import check_deadline, deadline
from onnx_ecp.statistics.observer import Observer
from onnx_ecp.units import find_structure, inferred_shapes, shapes_of_a_run
from onnx_ecp.units.rows import unit_groups

# Sensitivities are looked for in models of so many weights, and for so many seconds.
MOST_WEIGHTS = 200_000_000
PATIENCE = 60.0


@one_look_each()
def inspect(
    model: str | Path | onnx.ModelProto,
    calibration: Any = None,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    target: str | None = None,
) -> Inspection:
    """Find the layers of a model that can be pruned, and the units that can be removed.

    Args:
        model: path or proto; it is not changed. Where it is not too large, it is run on two
            samples to find out about sensitivities and about the shapes that units are followed
            by, as ``optimize`` does.
        calibration: the samples, like those of ``optimize``; when None, those beside the model,
            else made-up ones.
        input_shapes: whole shapes of inputs with free dimensions, by name, for made-up samples.
        target: name in ``TARGETS`` of a runtime: which layers it would gain from.

    Raises:
        ModelError: the model is unreadable or invalid.
        CalibrationError: the calibration data do not fit the model.
        UsageError: ``input_shapes`` names no input or contradicts the model; no such target.

    Example:
        >>> onnx_ecp.inspect("model.onnx", "calibration.npz").unit_groups  # doctest: +SKIP
    """
    if target is not None:
        one_of("target", target, TARGETS)
    given = model_of(model)
    dense = Model(decode_sparse(given.proto), given.path, given.base)
    found = find_layers(dense.proto)
    stored = constants(dense.proto)
    forms = storage(given.proto)
    by_tensorrt = TARGETS["tensorrt"].refused(dense.proto, found.layers)
    layers = tuple(
        _prunable(
            layer,
            read_tensor(dense, stored[layer.weight.tensor]),
            forms.get(layer.weight.tensor, "dense"),
            by_tensorrt[layer.name],
        )
        for layer in found.layers
    )
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    if calibration is None and given.path is not None:
        calibration = calibrating.sidecar(given.path)
    samples = None if calibration is None else _given(dense, calibration, shapes)
    layers = _with_sensitivities(layers, dense, found.layers, samples, shapes)
    seen = _shapes(dense, samples, shapes, sum(row.weights for row in layers))
    structure = find_structure(dense.proto, found.layers, seen)
    by_tensor = {layer.tensor: layer for layer in layers}.values()
    return Inspection(
        path=None if given.path is None else str(given.path),
        ir_version=given.proto.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in given.proto.opset_import},
        inputs=signature(given.proto),
        outputs=_outputs(given.proto),
        layers=layers,
        skips=found.skips,
        unit_groups=unit_groups(structure),
        unit_refusals=structure.refusals,
        weights=sum(layer.weights for layer in by_tensor),
        zeros=sum(layer.zeros for layer in by_tensor),
        warnings=_warnings(given.proto),
        target=None if target is None else foreseen(given, target, structure),
    )


def _given(model: Model, calibration: Any, shapes: Mapping[str, tuple[int, ...]]) -> Calibration:
    """Two samples of the user's; they fit the model and the shapes."""
    inputs = signature(model.proto)
    samples = calibrating.load(calibration, inputs, samples=2)
    calibrating.check_shapes(samples, inputs, shapes)
    return as_taken(model, samples)


def _few(model: Model, samples: Calibration | None, shapes: Mapping[str, tuple[int, ...]]) -> Batch:
    """Two samples: the given ones, else made-up ones."""
    if samples is None:
        inputs = signature(model.proto)
        samples = calibrating.synthetic(model.proto, inputs, samples=2, shapes=shapes)
        samples = as_taken(model, samples)
    return next(samples.batches(2))


def _shapes(
    model: Model,
    samples: Calibration | None,
    shapes: Mapping[str, tuple[int, ...]],
    weights: int,
) -> Shapes:
    """Shapes of all tensors: of a run where that is possible, else as far as inference goes."""
    if weights <= MOST_WEIGHTS:
        try:
            with deadline(PATIENCE, soft=True):
                return shapes_of_a_run(model, _few(model, samples, shapes).feeds)
        except UsageError:
            raise
        except OnnxEcpError:
            check_deadline()  # the caller's own limit; else the rows say why it does not run
    return inferred_shapes(model.proto)


def _with_sensitivities(
    rows: tuple[Prunable, ...],
    model: Model,
    layers: Sequence[Layer],
    samples: Calibration | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Prunable, ...]:
    """The rows with what an attempt to observe the layers on a few samples tells."""
    if not layers:
        return rows
    if sum(row.weights for row in rows) > MOST_WEIGHTS:
        return tuple(replace(row, blocked="the model is too large to try it") for row in rows)
    try:
        with deadline(PATIENCE, soft=True):
            observer = Observer(model, layers, _few(model, samples, shapes))
    except UsageError:
        raise
    except (ProviderError, CalibrationError) as error:  # made-up inputs may be at fault
        check_deadline()
        return tuple(replace(row, blocked=error.message) for row in rows)
    except OnnxEcpError as error:
        return tuple(replace(row, sensitivity="none", blocked=error.message) for row in rows)
    ways = (_way(observer, row.name) for row in rows)
    return tuple(
        replace(row, sensitivity=way, blocked=reason)
        for row, (way, reason) in zip(rows, ways, strict=True)
    )


def _way(observer: Observer, name: str) -> tuple[str, str]:
    """How the sensitivity of a layer can be had, and why not otherwise."""
    if name in observer.blocked:
        reason = observer.blocked[name]
        return "none" if reason == NO_OUTPUT else "differences", reason
    if name in observer.numeric:
        return "numeric", f"no gradient rule for {observer.numeric[name]}"
    return "reverse graph", ""


def _prunable(layer: Layer, stored: np.ndarray, form: str, tensorrt: str) -> Prunable:
    return Prunable(
        name=layer.name,
        op=layer.op,
        tensor=layer.weight.tensor,
        shape=layer.shape,
        weights=stored.size,
        zeros=stored.size - int(np.count_nonzero(stored)),
        two_four="" if layer.reduction % 4 == 0 else f"4 does not divide {layer.reduction}",
        tensorrt=tensorrt,
        storage=form,
    )


def _outputs(proto: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The outputs, described as inputs are: by a graph that has them as inputs."""
    return signature(onnx.ModelProto(graph=onnx.GraphProto(input=proto.graph.output)))


def _warnings(proto: onnx.ModelProto) -> tuple[str, ...]:
    try:
        problem = runtime_support(proto)
    except ProviderError as error:
        problem = error.message
    return () if problem is None else (f"only `inspect` works on this model here: {problem}",)
