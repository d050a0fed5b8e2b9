"""Edits of a ModelProto that leave everything else as it was, field by field.

Nodes are addressed by their first output, which is unique in a graph; names are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx

from onnx_ecp.graph.proto import constant_value, nested, opset_of
from onnx_ecp.graph.tensors import renewed, values, write_tensor

# Before IR version 4 an initializer had to be listed as a graph input, too.
_FREE_INITIALIZERS = 4
# Types that a Constant may have in every opset, and the first opset in which it may have any.
_FIRST_CONSTANTS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
)
_ANY_CONSTANT = 9


def read(model: onnx.ModelProto, name: str, base: Path | None) -> np.ndarray:
    """The values of a stored tensor, in its own type; ``base`` holds external data."""
    return values(stored(model, name), base)


def write(model: onnx.ModelProto, name: str, array: np.ndarray, base: Path | None) -> None:
    """Give a stored tensor new values; those that are equal keep their bits (-0.0 stays -0.0)."""
    tensor = stored(model, name)
    new = renewed(tensor, array, base)
    if not np.array_equal(new, values(tensor, base)):
        write_tensor(tensor, new)


def add_constant(
    model: onnx.ModelProto, stem: str, array: np.ndarray, dtype: int, *, before: str
) -> str:
    """A new stored tensor under a fresh name: an initializer, or a Constant node in old models.

    Before opset 9 a Constant holds floats alone: anything else is an initializer there, too, and
    listed as a graph input, as those of that time are.

    Args:
        model: what is edited.
        stem: the name that it should have.
        array: its values, rounded once to ``dtype``.
        dtype: ONNX element type.
        before: first output of the node that will read it.

    Returns:
        Its name.
    """
    name = fresh_name(model, stem)
    tensor = _rounded(name, array, dtype)
    if model.ir_version >= _FREE_INITIALIZERS:
        model.graph.initializer.append(tensor)
    elif dtype in _FIRST_CONSTANTS or opset_of(model) >= _ANY_CONSTANT:
        constant = onnx.helper.make_node("Constant", [], [name], name=name, value=tensor)
        model.graph.node.insert(node_index(model, before), constant)
    else:
        model.graph.initializer.append(tensor)
        value = onnx.helper.make_tensor_value_info(name, dtype, tensor.dims)
        model.graph.input.append(value)
    return name


def node_index(model: onnx.ModelProto, output: str) -> int:
    """Position of the node whose first output has this name."""
    return next(i for i, n in enumerate(model.graph.node) if n.output and n.output[0] == output)


def set_input(model: onnx.ModelProto, output: str, index: int, name: str) -> None:
    """Let one input of a node read another tensor; omitted inputs before it stay omitted."""
    node = model.graph.node[node_index(model, output)]
    old = node.input[index] if index < len(node.input) else ""
    node.input.extend([""] * (index + 1 - len(node.input)))
    node.input[index] = name
    if old:
        _drop_unread(model, old)


def fresh_name(model: onnx.ModelProto, stem: str) -> str:
    """``stem``, or ``stem`` with a number behind it, whatever no tensor and no node is called."""
    taken = set(_all_names(model.graph))
    if stem not in taken:
        return stem
    return next(name for i in range(2, len(taken) + 3) if (name := f"{stem}_{i}") not in taken)


def _rounded(name: str, array: np.ndarray, dtype: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=dtype)
    write_tensor(tensor, array)
    return tensor


def stored(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """The tensor in place, to write to. A Constant's ``value_floats`` becomes a ``value`` first."""
    tensor: onnx.TensorProto
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return tensor
    attribute = model.graph.node[node_index(model, name)].attribute[0]
    if attribute.name != "value":
        attribute.CopyFrom(onnx.helper.make_attribute("value", constant_value(attribute)))
    value: onnx.TensorProto = attribute.t
    return value


def _drop_unread(model: onnx.ModelProto, name: str) -> None:
    """Remove a tensor that nothing reads any longer, and what was computed for it alone."""
    graph = model.graph
    given, times = {info.name for info in graph.input}, Counter(_read_names(graph))
    makers = {node.output[0]: node for node in graph.node if len(node.output) == 1}
    pending = [name]
    while pending:
        name = pending.pop()
        if name in given or times[name]:
            continue
        _remove(graph.initializer, name)
        _remove(graph.value_info, name)
        if name in makers:
            pending += makers[name].input
            times.subtract(makers[name].input)
            graph.node.remove(makers.pop(name))


def drop_unread_tensors(model: onnx.ModelProto) -> None:
    """Remove the initializers that nothing reads; inputs that have one stay."""
    graph = model.graph
    read = {info.name for info in graph.input} | set(_read_names(graph))
    for name in [tensor.name for tensor in graph.initializer if tensor.name not in read]:
        _remove(graph.initializer, name)


def _remove(protos: Iterable, name: str) -> None:
    for proto in [proto for proto in protos if proto.name == name]:
        protos.remove(proto)  # type: ignore[attr-defined]


def _read_names(root: onnx.GraphProto) -> Iterator[str]:
    """Names of the tensors that nodes read or bodies give back, those in bodies included."""
    for body in nested(root):
        for node in body.node:
            yield from node.input
        yield from (info.name for info in body.output)


def _all_names(root: onnx.GraphProto) -> Iterator[str]:
    for graph in nested(root):
        for infos in (graph.input, graph.output, graph.value_info, graph.initializer):
            yield from (info.name for info in infos)
        for node in graph.node:
            yield from (node.name, *node.input, *node.output)
