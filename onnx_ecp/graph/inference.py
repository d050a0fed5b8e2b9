"""Shape inference of ONNX, without the work that functions calling functions would make of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from onnx_ecp.graph.proto import Body, nested

# Functions that would become more nodes than these stay functions, and nothing looks into them.
MOST_NODES = 200_000

Key = tuple[str, str, str]
"""Domain, name and overload of a function."""


def inferred(proto: onnx.ModelProto, *, data_prop: bool = False) -> onnx.GraphProto | None:
    """The graph with the shapes that ONNX shape inference tells.

    Functions are looked into at every call, each of which may call others: where that would be
    too much, what they give stays unknown.

    Args:
        proto: a model; it is not changed.
        data_prop: whether the values of small integers are followed too.

    Returns:
        None where the model contradicts itself or is too large to be serialized.
    """
    try:
        return onnx.shape_inference.infer_shapes(_bounded(proto), data_prop=data_prop).graph
    except (onnx.shape_inference.InferenceError, EncodeError, ValueError):
        return None


def _bounded(proto: onnx.ModelProto) -> onnx.ModelProto:
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    if expanded(proto.graph, functions) <= MOST_NODES:
        return proto
    bounded = onnx.ModelProto()
    bounded.CopyFrom(proto)
    del bounded.functions[:]
    return bounded


def expanded(body: Body, functions: Mapping[Key, onnx.FunctionProto]) -> float:
    """How many nodes a body becomes; infinite where functions call each other in a circle."""
    return _expanded(body, functions, {})


def _expanded(
    body: Body, functions: Mapping[Key, onnx.FunctionProto], sizes: dict[Key, float]
) -> float:
    total = 0.0
    for node in (n for graph in nested(body) for n in graph.node):
        key = (node.domain, node.op_type, node.overload)
        if key in functions and key not in sizes:
            sizes[key] = np.inf  # as long as it is looked at
            sizes[key] = _expanded(functions[key], functions, sizes)
        total += sizes.get(key, 1)
    return total
