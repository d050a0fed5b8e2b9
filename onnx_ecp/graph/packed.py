"""Tensors in the packed form of ``encodings``: found among the nodes, and made dense.

ConstantOfShape(size) -> ScatterElements(indices, values) -> Reshape(shape)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from onnx_ecp.graph.external import is_external
from onnx_ecp.graph.proto import constants, nested
from onnx_ecp.graph.tensors import clear_values

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_MOST_AXES = 8


@dataclass(frozen=True)
class Packed:
    """One packed tensor of the main graph.

    Args:
        nodes: the three that compute it.
        parts: names of the stored tensors that they read.
        dims: its shape.
        indices: where the values go in the flattened tensor.
        values: what goes there.
    """

    nodes: tuple[NodeProto, NodeProto, NodeProto]
    parts: tuple[str, str, str, str]
    dims: tuple[int, ...]
    indices: TensorProto
    values: TensorProto

    @property
    def elements(self) -> int:
        """Elements of the tensor, zeros included."""
        return math.prod(self.dims)

    def dense(self) -> TensorProto:
        """The tensor itself."""
        stored = numpy_helper.to_array(self.values)
        flat = np.zeros(self.elements, stored.dtype)
        flat[numpy_helper.to_array(self.indices)] = stored
        tensor = TensorProto()
        tensor.CopyFrom(self.values)
        clear_values(tensor)
        tensor.name = self.nodes[2].output[0]
        tensor.dims[:] = self.dims
        tensor.raw_data = numpy_helper.from_array(flat).raw_data
        return tensor


def packed_tensors(proto: onnx.ModelProto, largest: int) -> dict[str, Packed]:
    """The packed tensors of the main graph of a validated model, by name.

    What only looks like one (an index out of range, a tensor in an external file, parts that
    something else computes) is left to ONNX Runtime.

    Args:
        proto: the model.
        largest: bytes that all of them may take when dense; what is beyond stays packed.
    """
    if not any(node.op_type == "ScatterElements" for node in proto.graph.node):
        return {}
    makers = {node.output[0]: node for node in proto.graph.node if node.output}
    readers = Counter(_reads(proto))
    listed = {value.name for value in proto.graph.input}
    stored = {n: t for n, t in constants(proto).items() if n not in listed and not is_external(t)}
    found = {}
    for node in proto.graph.node:
        packed = _packed(node, makers, readers, stored)
        if packed is not None:
            largest -= packed.elements * numpy_helper.to_array(packed.values).itemsize
            if largest >= 0:
                found[node.output[0]] = packed
    return found


def _reads(proto: onnx.ModelProto) -> Iterator[str]:
    """Names that nodes read, those in bodies included, and names of outputs; once per use."""
    for body in nested(proto.graph):
        for node in body.node:
            yield from node.input
        yield from (value.name for value in body.output)


def _packed(
    last: NodeProto,
    makers: Mapping[str, NodeProto],
    readers: Mapping[str, int],
    stored: Mapping[str, TensorProto],
) -> Packed | None:
    """The packed tensor that ends in this node, if it is one."""
    if last.op_type != "Reshape" or len(last.input) != 2:
        return None
    scatter = makers.get(last.input[0])
    if scatter is None or scatter.op_type != "ScatterElements" or len(scatter.input) != 3:
        return None
    zeros = makers.get(scatter.input[0])
    if zeros is None or zeros.op_type != "ConstantOfShape" or len(zeros.input) != 1:
        return None
    inner = (scatter.output[0], zeros.output[0])
    parts = (zeros.input[0], scatter.input[1], scatter.input[2], last.input[1])
    if not all(part in stored for part in parts) or any(readers[name] != 1 for name in inner):
        return None
    size, indices, values, shape = (stored[part] for part in parts)
    integers = TensorProto.INT64
    if (size.data_type, shape.data_type) != (integers, integers) or not _plain(scatter, zeros):
        return None
    if indices.data_type not in (TensorProto.INT32, integers) or values.data_type not in _FLOATS:
        return None
    if len(size.dims) != 1 or len(shape.dims) != 1 or shape.dims[0] > _MOST_AXES:
        return None
    dims = tuple(map(int, numpy_helper.to_array(shape)))
    count = numpy_helper.to_array(size).tolist()
    if min(dims, default=1) <= 0 or count != [math.prod(dims)]:
        return None
    where = numpy_helper.to_array(indices)
    fits = where.ndim == 1 and len(values.dims) == 1 and len(where) == values.dims[0]
    if not fits or (where.size and not 0 <= where.min() <= where.max() < count[0]):
        return None
    return Packed((zeros, scatter, last), parts, dims, indices, values)


def _plain(scatter: NodeProto, zeros: NodeProto) -> bool:
    """Whether the values replace zeros along the only axis."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in scatter.attribute}
    fill = [a.t for a in zeros.attribute if a.name == "value"]
    return (
        values.get("axis", 0) == 0
        and values.get("reduction", b"none") == b"none"
        and not any(numpy_helper.to_array(tensor).any() for tensor in fill)
    )


def unpack(proto: onnx.ModelProto, found: Iterable[Packed]) -> None:
    """Put dense initializers in the place of packed tensors, in our own copy of a model."""
    graph, found = proto.graph, list(found)
    gone = {node.output[0] for packed in found for node in packed.nodes}
    nodes = [node for node in graph.node if not node.output or node.output[0] not in gone]
    dense = [packed.dense() for packed in found]
    others = Counter(_reads(proto))
    others.subtract(name for packed in found for node in packed.nodes for name in node.input)
    parts = {part for packed in found for part in packed.parts if not others[part]}
    nodes = [node for node in nodes if not node.output or node.output[0] not in parts]
    kept = [tensor for tensor in graph.initializer if tensor.name not in parts]
    for field, values in (("node", nodes), ("initializer", [*kept, *dense])):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        graph.ClearField(field)
        getattr(graph, field).extend(copies)
