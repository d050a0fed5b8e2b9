"""Tensors with as many rows as the data select: behind NonZero, Compress and their like.

Two versions of a network then have different numbers of rows, and nothing can be compared row by
row. Which tensors these are is tried out: the model runs beside one with smaller weights left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import Model, constants
from onnx_ecp.graph.sparse import decode_sparse
from onnx_ecp.graph.tensors import read_tensor
from onnx_ecp.runtime.session import Session

SELECTING = frozenset(("Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"))
# What makes a condition of numbers.
COMPARING = frozenset(
    ("And", "Cast", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor")
)
# Of a weight so many are left out, to see whether other rows are selected then.
LEFT_OUT = 0.5


def rows_that_depend(
    model: Model,
    tensors: Iterable[str],
    weights: Iterable[str],
    samples: Sequence[Mapping[str, np.ndarray]],
    **settings: Any,
) -> dict[str, onnx.NodeProto]:
    """By name, the tensors whose shape depends on values, with the node that selects.

    Args:
        model: its sparse initializers may be encoded.
        tensors: names of what is asked for.
        weights: names of stored tensors that pruning changes.
        samples: what the model takes, a run each.
        settings: of the ``Session``.
    """
    selected = selecting_nodes(model.proto)
    suspects = {t: selected[t] for t in tensors if t in selected}
    if not suspects:
        return {}
    plain = decode_sparse(model.proto)
    stored = Model(plain, None, model.base)
    others = (_changed(stored, weights, change) for change in (_without_the_small, np.negative))
    sessions = [
        Session(_with_outputs(proto, suspects), base=model.base, **settings)
        for proto in (plain, *others)
    ]
    seen: dict[tuple[str, tuple[tuple[int, ...], ...]], set[tuple[int, ...]]] = {}
    for feeds in samples:
        given = tuple(np.shape(x) for x in feeds.values())
        for session in sessions:
            for name, value in session.run(dict(feeds), list(suspects)).items():
                seen.setdefault((name, given), set()).add(np.shape(value))
    uncertain = {name for (name, _), shapes in seen.items() if len(shapes) > 1}
    return {name: node for name, node in suspects.items() if name in uncertain}


def selecting_node(proto: onnx.ModelProto, tensor: str) -> onnx.NodeProto | None:
    """The nearest node upstream of a tensor that selects rows by values."""
    return selecting_nodes(proto).get(tensor)


def selecting_nodes(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The same for all tensors that have one; the nodes that select are followed all at once."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    waiting: deque[tuple[onnx.NodeProto, onnx.NodeProto]] = deque()
    for node in proto.graph.node:
        for x in dict.fromkeys(node.input):
            readers.setdefault(x, []).append(node)
        if node.op_type in SELECTING:
            waiting.append((node, node))
    found: dict[str, onnx.NodeProto] = {}
    while waiting:
        node, by = waiting.popleft()
        for y in node.output:
            if y and y not in found:
                found[y] = by
                waiting += [(reader, by) for reader in readers.get(y, ())]
    return found


def decided_by(proto: onnx.ModelProto, node: onnx.NodeProto) -> list[str]:
    """The numbers that a selecting node decides by, and those it selects: what is worth an output.

    Comparisons in between are passed.
    """
    producers = {y: n for n in proto.graph.node for y in n.output if y}
    found: dict[str, None] = {}
    waiting = [x for x in node.input if x in producers]
    while waiting:
        name = waiting.pop(0)
        before = producers[name]
        if before.op_type in COMPARING:
            waiting += [x for x in before.input if x in producers]
        elif before.op_type != "Constant":
            found[name] = None
    return list(found)


def cut_hint(proto: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """What to do about a node that selects rows."""
    names = ", ".join(repr(printable(x)) for x in decided_by(proto, node)) or "what it reads"
    return (
        f"Cut the model there, with onnx.utils.extract_model: with {names} as outputs, what comes "
        "before can be pruned."
    )


def named(node: onnx.NodeProto) -> str:
    """Operator type and name of a node."""
    return f"{node.op_type} {printable(node.name or node.output[0])!r}"


def _changed(
    model: Model, weights: Iterable[str], change: Callable[[np.ndarray], np.ndarray]
) -> onnx.ModelProto:
    """A copy with other values of some initializers."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    stored, wanted = constants(model.proto), set(weights)
    for tensor in proto.graph.initializer:
        if tensor.name not in wanted:
            continue
        values = read_tensor(model, stored[tensor.name])
        if values.dtype.kind == "f":
            tensor.CopyFrom(numpy_helper.from_array(change(values), tensor.name))
    return proto


def _without_the_small(values: np.ndarray) -> np.ndarray:
    least = np.quantile(np.abs(values).astype(np.float64), LEFT_OUT)
    return np.where(np.abs(values) > least, values, 0).astype(values.dtype)


def _with_outputs(proto: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    known = {y.name for y in found.graph.output}
    found.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    return found
