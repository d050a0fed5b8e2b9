"""Quantised activations written in floating point, so that gradients pass them straight through.

    QuantizeLinear     q = clip(round(x / scale) + zero point)
    DequantizeLinear   y = (q - zero point) * scale

The integers of 8 and 16 bits are floats too, so the values are the same ones. Round passes a
gradient as it is and Clip where it does not saturate: the straight-through rule of
quantisation-aware training (arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.reverse import names_read
from onnx_ecp.gradients.rules.registry import nonnegative, optional_input
from onnx_ecp.graph.builder import Builder, Fact

_INTEGERS = ("int8", "uint8", "int16", "uint16")
# Operators that treat integers as they would treat floats, with how many inputs are values.
_MOVES = {
    **dict.fromkeys(("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"), 1),
    **dict.fromkeys(("DepthToSpace", "Expand", "Gather", "MaxPool", "Slice", "SpaceToDepth"), 1),
    "Split": 1,
    "Concat": None,
}


def quantised(graph: gs.Graph, names: Collection[str]) -> bool:
    """Whether anything is quantised behind the tensors of these names."""
    down, found = set(names), False
    for node in graph.nodes:
        if names_read(node) & down:
            down.update(y.name for y in node.outputs)
            found = found or node.op == "QuantizeLinear"
    return found


def in_floats(graph: gs.Graph, names: Collection[str], facts: Mapping[str, Fact]) -> None:
    """Write what is quantised and dequantised behind the named tensors in floats, in place.

    Integers that anything else reads (QLinearConv, an output) stay integers.

    Args:
        graph: topologically sorted.
        names: of tensors.
        facts: shapes and dtypes by tensor name.
    """
    chosen = _representable(graph, names, facts)
    op = Builder(gs.Graph(opset=graph.opset), facts, prefix="ecp/quantised")
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        op.graph.nodes = []
        y = _rewritten(op, node, chosen)
        nodes += [node] if y is None else op.graph.nodes
    graph.nodes = nodes
    for name, tensor in graph.tensors().items():
        if name in chosen:
            tensor.dtype = np.float32


def _rewritten(op: Builder, node: gs.Node, chosen: Collection[str]) -> gs.Tensor | None:
    """What computes the result of a node in floats; None where the node stays as it is."""
    if node.op == "QuantizeLinear" and node.outputs[0].name in chosen:
        result = _quantise(op, node)
    elif node.op == "DequantizeLinear" and node.inputs[0].name in chosen:
        result = _dequantise(op, node)
    else:
        return None
    [y] = node.outputs
    node.inputs.clear()
    node.outputs.clear()
    op.graph.nodes.append(gs.Node("Identity", op.fresh("output"), inputs=[result], outputs=[y]))
    return result


def _quantise(op: Builder, node: gs.Node) -> Any:
    x, q = node.inputs[0], node.outputs[0]
    scale, zero = _parameters(op, node, op.rank(x))
    rounded = op.Round(op.Div(x, scale))
    limits = np.iinfo(op.dtype(q))
    shifted = rounded if zero is None else op.Add(rounded, zero)
    return op.Clip(shifted, float(limits.min), float(limits.max))


def _dequantise(op: Builder, node: gs.Node) -> Any:
    q = node.inputs[0]
    scale, zero = _parameters(op, node, op.rank(q))
    return op.Mul(q if zero is None else op.Sub(q, zero), scale)


def _parameters(op: Builder, node: gs.Node, rank: int) -> tuple[Any, Any]:
    """Scale and zero point as floats that meet the axis they belong to; None for no zero point."""
    scale, zero = node.inputs[1], optional_input(node, 2)
    dtype = op.dtype(scale)
    places = [1] * rank
    if op.rank(scale) and op.shape(scale)[0] != 1:
        places[nonnegative(node.attrs.get("axis", 1), rank)] = -1
    shape = np.array(places, np.int64)
    found = [scale] if zero is None else [scale, op.cast(zero, dtype)]
    shaped = [op.Reshape(x, shape) if rank else x for x in found]
    return shaped[0], shaped[1] if zero is not None else None


def _representable(
    graph: gs.Graph, names: Collection[str], facts: Mapping[str, Fact]
) -> frozenset[str]:
    """Names of integer tensors behind the named ones that only moves and DequantizeLinear read."""
    down, chosen = set(names), set[str]()
    for node in graph.nodes:
        if names_read(node) & down:
            down.update(y.name for y in node.outputs)
            if _is_plain(node, "QuantizeLinear") or _moves(node, chosen):
                chosen.update(y.name for y in node.outputs if _is_integer(facts, y))
    refused = {y.name for y in graph.outputs} & chosen
    for node in graph.nodes:
        if not _is_plain(node, "DequantizeLinear") and not _moves(node, chosen):
            refused |= names_read(node) & chosen
    return _without(graph.nodes, chosen, refused)


def _is_plain(node: gs.Node, op: str) -> bool:
    """Whether the node is this operator with one scale, or one for every entry of an axis."""
    return bool(node.op == op and not node.attrs.get("block_size", 0))


def _moves(node: gs.Node, chosen: Collection[str]) -> bool:
    """Whether a node moves the chosen integers, and nothing else."""
    return node.op in _MOVES and all(x.name in chosen for x in _moved(node))


def _without(nodes: Iterable[gs.Node], chosen: set[str], refused: set[str]) -> frozenset[str]:
    """What is left of the chosen when nothing is joined to a refused one by a move."""
    nodes = [node for node in nodes if node.op in _MOVES]
    while refused:
        chosen = chosen - refused
        refused = set()
        for node in nodes:
            joined = {x.name for x in _moved(node)} | {node.outputs[0].name}
            if joined & chosen and not joined <= chosen:
                refused |= joined & chosen
    return frozenset(chosen)


def _moved(node: gs.Node) -> list[gs.Tensor]:
    """The inputs whose values the node moves."""
    return list(node.inputs[: _MOVES[node.op]])


def _is_integer(facts: Mapping[str, Fact], tensor: gs.Tensor) -> bool:
    return tensor.name in facts and str(facts[tensor.name].dtype) in _INTEGERS
