"""Attributes and calls that every reader of a model must understand alike.

The official checker lets these pass; ONNX Runtime refuses some of them, and of others takes what it
likes: the first of two values, zero for what a function was to fill in. What is pruned must be what
runs, so they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import Body, bodies, constants, known_type, nested
from onnx_ecp.graph.tensors import check_rank

_DAMAGED = "The model is damaged: export or download it again."
_WINDOWS = ("kernel_shape", "strides", "dilations")
# Operators that move a window, with the input that is the kernel, if it is one.
_WINDOWED: Mapping[str, int | None] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "FusedConv", "DeformConv"), 1),
    "QLinearConv": 3,
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "MaxUnpool"), None),
}
# The forms in which a Constant node has its value.
_VALUES = frozenset(
    {
        *("value", "sparse_value", "value_float", "value_floats", "value_int", "value_ints"),
        *("value_string", "value_strings"),
    }
)

_Key = tuple[str, str, str]


def check_agreement(proto: onnx.ModelProto) -> None:
    """Refuse what readers of a model understand differently, or cannot hold.

    Args:
        proto: a model whose functions do not call each other in circles.

    Raises:
        ModelError: with the node and the attribute.
    """
    for body in nested(proto.graph):
        for node in body.node:
            _check_references(node)
    _check_declared(proto)
    functions = {_key(f.domain, f.name, f.overload): f for f in proto.functions}
    ranks = {name: len(tensor.dims) for name, tensor in constants(proto).items()}
    for root in (proto.graph, *proto.functions):
        inside = isinstance(root, onnx.FunctionProto)
        for node in _nodes(root):
            if _key(node.domain, node.op_type, "")[:2] == ("", "Constant"):
                _check_constant(node)
            function = functions.get(_key(node.domain, node.op_type, node.overload))
            if function is not None:
                _check_call(node, function)
            elif node.op_type in _WINDOWED:
                _check_window(node, {} if inside else ranks)


def _check_declared(proto: onnx.ModelProto) -> None:
    """Element types are known, where they are given, and arrays can have as many axes."""
    for body in bodies(proto):
        if isinstance(body, onnx.FunctionProto):
            continue
        for value in (*body.input, *body.output, *body.value_info):
            kind = value.type.tensor_type
            check_rank(value.name, len(kind.shape.dim))
            if kind.elem_type and not known_type(kind.elem_type):
                raise ModelError(
                    f"tensor '{printable(value.name)}' has the unknown element type "
                    f"{kind.elem_type}.",
                    hint=_DAMAGED,
                )


def _key(domain: str, name: str, overload: str) -> _Key:
    return ("" if domain == "ai.onnx" else domain, name, overload)


def _nodes(root: Body) -> Iterator[onnx.NodeProto]:
    return (node for body in nested(root) for node in body.node)


def _shown(node: onnx.NodeProto) -> str:
    name = node.name or next((y for y in node.output if y), "")
    return f"{printable(node.op_type)} node '{printable(name)}'"


def _check_references(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            raise ModelError(
                f"{_shown(node)}: its attribute '{printable(attribute.name)}' refers to "
                f"'{printable(attribute.ref_attr_name)}' of a function, but it is in none.",
                hint="The model is damaged: inline its functions again, or export it again.",
            )


def _check_constant(node: onnx.NodeProto) -> None:
    given = [a.name for a in node.attribute if a.name in _VALUES]
    if len(given) != 1:
        what = " and ".join(map(repr, given[:3])) if given else "no value"
        raise ModelError(f"{_shown(node)} has {what}; exactly one is expected.", hint=_DAMAGED)


def _check_call(node: onnx.NodeProto, function: onnx.FunctionProto) -> None:
    for kind, passed, known in (
        ("inputs", node.input, function.input),
        ("outputs", node.output, function.output),
    ):
        if len(passed) > len(known):
            raise ModelError(
                f"{_shown(node)} has {len(passed)} {kind}, but the local function "
                f"'{printable(function.name)}' has {len(known)}.",
                hint=_DAMAGED,
            )


def _check_window(node: onnx.NodeProto, ranks: Mapping[str, int]) -> None:
    """Sizes, steps and pads are given for the same number of axes: those of the kernel."""
    given = {a.name: a.ints for a in node.attribute if a.type == onnx.AttributeProto.INTS}
    lengths = {name: len(given[name]) for name in _WINDOWS if given.get(name)}
    if given.get("pads"):
        lengths["pads"], odd = divmod(len(given["pads"]), 2)
        if odd:
            raise ModelError(
                f"{_shown(node)}: {len(given['pads'])} pads; two per axis are expected.",
                hint=_DAMAGED,
            )
    place = _WINDOWED[node.op_type]
    if place is not None and len(node.input) > place and node.input[place] in ranks:
        lengths["the kernel"] = ranks[node.input[place]] - 2
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ModelError(f"{_shown(node)}: the numbers of axes differ: {told}.", hint=_DAMAGED)
    for name in _WINDOWS:
        if any(value < 1 for value in given.get(name, ())):
            raise ModelError(
                f"{_shown(node)}: {name} {list(given[name])[:8]} must be positive.", hint=_DAMAGED
            )
