"""Shapes of all tensors of a model: from one run, or, without running it, from shape inference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnx_ecp.graph import Model
from onnx_ecp.graph.inference import inferred
from onnx_ecp.runtime.session import Session

Shapes = dict[str, tuple[int, ...]]

# What a free axis is taken to be where nothing runs: any size above 1 will do.
_FREE = 2


def shapes_of_a_run(model: Model, feeds: Mapping[str, np.ndarray], **settings: object) -> Shapes:
    """Shapes of all tensors of the main graph in one run of the model.

    Args:
        model: what is run.
        feeds: its inputs, with a batch of at least two where it is free.
        settings: of the ``Session``.

    Raises:
        ProviderError: it cannot be run.
    """
    return shapes_of(model, values_of_a_run(model, feeds, **settings))


def shapes_of(model: Model, values: Mapping[str, np.ndarray]) -> Shapes:
    """Shapes of all tensors of the main graph, given the values of all that are computed."""
    return {name: np.shape(value) for name, value in values.items()} | _stored(model.proto)


def values_of_a_run(
    model: Model, feeds: Mapping[str, np.ndarray], **settings: object
) -> dict[str, np.ndarray]:
    """Values of all tensors of the main graph that are given or computed, in one run of the model.

    Args:
        model: what is run.
        feeds: its inputs, with a batch of at least two where it is free.
        settings: of the ``Session``.

    Raises:
        ProviderError: it cannot be run.
    """
    probed = onnx.ModelProto()
    probed.CopyFrom(model.proto)
    graph = probed.graph
    have = {y.name for y in graph.output}
    names = dict.fromkeys(y for node in graph.node for y in node.output if y)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in have)
    values = Session(probed, base=model.base, **settings).run(feeds)  # type: ignore[arg-type]
    return {n: v for n, v in values.items() if isinstance(v, np.ndarray)} | dict(feeds)


def inferred_shapes(proto: onnx.ModelProto) -> Shapes:
    """Shapes as far as ONNX shape inference tells them, with 2 in the place of free sizes."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for value in fixed.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = _FREE
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = inferred(fixed, data_prop=True)
    if graph is None:
        return _stored(proto)
    infos = [*graph.input, *graph.value_info, *graph.output]
    known = {
        info.name: tuple(int(dim.dim_value) for dim in info.type.tensor_type.shape.dim)
        for info in infos
        if info.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in info.type.tensor_type.shape.dim)
    }
    return known | _stored(proto)


def _stored(proto: onnx.ModelProto) -> Shapes:
    return {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
