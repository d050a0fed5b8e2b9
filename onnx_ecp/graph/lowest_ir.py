"""The oldest IR version that can say what a model says, and the model in an older one."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

# By element type, the IR version that brought it; older ones have all others.
_TYPES = {
    "FLOAT8E4M3FN": 9,
    "FLOAT8E4M3FNUZ": 9,
    "FLOAT8E5M2": 9,
    "FLOAT8E5M2FNUZ": 9,
    "UINT4": 10,
    "INT4": 10,
    "FLOAT4E2M1": 11,
    "FLOAT8E8M0": 12,
    "UINT2": 13,
    "INT2": 13,
}
# Before this version only whole models have metadata.
_METADATA = 10


def lowest_ir(proto: onnx.ModelProto) -> tuple[int, str]:
    """The oldest IR version that can say what a model says, and what needs it.

    Metadata of nodes and tensors, which older versions have no place for, do not count: they
    change nothing that is computed.

    Example:
        >>> lowest_ir(onnx.parser.parse_model(
        ...     '<ir_version: 10, opset_import: ["": 17]> g (float[1] x) => (float[1] y) '
        ...     '{ y = Relu(x) }'))
        (8, 'opset 17')
    """
    return max(_needs(proto), key=lambda found: found[0])


def _needs(proto: onnx.ModelProto) -> Iterator[tuple[int, str]]:
    yield 4, "initializers that are no inputs"
    opsets = [*proto.opset_import, *(o for f in proto.functions for o in f.opset_import)]
    for opset in opsets:
        if opset.domain in ("", "ai.onnx"):
            least = onnx.helper.find_min_ir_version_for(
                [onnx.helper.make_opsetid("", opset.version)], ignore_unknown=True
            )
            yield least, f"opset {opset.version}"
    if proto.functions:
        yield 8, "local functions"
    if any(function.overload for function in proto.functions):
        yield 10, "overloaded functions"
    known = {onnx.TensorProto.DataType.Value(n): (v, n) for n, v in _known_types()}
    for kind in _kinds(proto.graph):
        if kind in known:
            yield known[kind]


def _known_types() -> Iterator[tuple[str, int]]:
    """The types that the installed onnx has."""
    names = onnx.TensorProto.DataType.keys()
    return ((name, version) for name, version in _TYPES.items() if name in names)


def _kinds(graph: onnx.GraphProto) -> Iterator[int]:
    """Element types of all tensors of a graph and those inside it."""
    for tensor in graph.initializer:
        yield tensor.data_type
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.type.tensor_type.elem_type
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _kinds(attribute.g)
            if attribute.HasField("t"):
                yield attribute.t.data_type
            yield from (kind for body in attribute.graphs for kind in _kinds(body))
            if attribute.name == "to":  # of Cast
                yield attribute.i


def lowered(proto: onnx.ModelProto, most: int) -> onnx.ModelProto:
    """A copy of a model in an older IR version, at least ``lowest_ir``.

    Args:
        proto: the model.
        most: the version.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.ir_version = most
    if most < _METADATA:
        _without_metadata(copy.graph)
        for function in copy.functions:
            del function.metadata_props[:]
            for node in function.node:
                _plain(node)
    return copy


def _without_metadata(graph: onnx.GraphProto) -> None:
    """Take away what says something of parts of a model, but nothing that is computed."""
    del graph.metadata_props[:]
    for part in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
    for node in graph.node:
        _plain(node)


def _plain(node: onnx.NodeProto) -> None:
    del node.metadata_props[:]
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            _without_metadata(body)
