"""How pruned tensors are written: dense, as sparse initializers, or packed as indices and values.

Dense is the only form that every tool reads. Sparse initializers are read by ONNX Runtime and few
others, the packed form (ConstantOfShape and ScatterElements, folded when loaded) nearly everywhere.
A tensor is encoded only where that makes the file smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from onnx_ecp.errors import UsageError
from onnx_ecp.graph.proto import bodies, constants, opset_of, tensors
from onnx_ecp.graph.tensors import byte_size, values

Encoding = Callable[[onnx.ModelProto, Collection[str], Path | None], onnx.ModelProto]
"""(proto, names of pruned tensors, directory of external data) -> proto to write."""

_SPARSE_CONSTANT_OPSET = 11  # the first whose Constant takes a sparse_value
_PACKED_OPSET = 11  # the first with ScatterElements
_PACKED_IR = 4  # the first whose initializers need not be listed as inputs
_BFLOAT16_OPSET = 20  # the first whose ConstantOfShape makes bfloat16


def _dense(proto: onnx.ModelProto, pruned: Collection[str], base: Path | None) -> onnx.ModelProto:
    """The proto itself: it is written as it is."""
    return proto


def _sparse(proto: onnx.ModelProto, pruned: Collection[str], base: Path | None) -> onnx.ModelProto:
    """A copy whose pruned tensors are SparseTensorProto with one sorted linear index a nonzero."""
    copy = _copy(proto)
    graph, outputs = copy.graph, {value.name for value in copy.graph.output}
    for name, tensor in _stored(copy, pruned).items():
        sparse, at = _sparse_tensor(tensor, base), _constant_node(graph, name)
        if name in outputs or sparse.ByteSize() >= byte_size(tensor):
            continue
        if at is None:
            graph.sparse_initializer.append(sparse)
            _drop_initializer(graph, name)
        elif opset_of(proto) >= _SPARSE_CONSTANT_OPSET:
            node = graph.node[at]
            del node.attribute[:]
            node.attribute.add(
                name="sparse_value", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse
            )
    return copy


def _sparse_tensor(tensor: TensorProto, base: Path | None) -> SparseTensorProto:
    indices, nonzero = _nonzeros(tensor, base)
    sparse = SparseTensorProto(dims=tensor.dims)
    # Lists of varints take a third less than raw int64; graphsurgeon and others read only lists.
    sparse.indices.data_type = TensorProto.INT64
    sparse.indices.dims[:] = [len(indices)]
    sparse.indices.int64_data.extend(indices.tolist())
    sparse.values.CopyFrom(_described(tensor))
    sparse.values.dims[:] = [len(indices)]
    if tensor.data_type == TensorProto.FLOAT:
        sparse.values.float_data.extend(nonzero.tolist())
    else:
        sparse.values.raw_data = numpy_helper.from_array(nonzero).raw_data
    return sparse


def _packed(proto: onnx.ModelProto, pruned: Collection[str], base: Path | None) -> onnx.ModelProto:
    """A copy in which nodes scatter the nonzeros of each pruned tensor into zeros.

    The nodes of an initializer stand at the start of the graph, those of a Constant in its place.
    Initializers that are listed as graph inputs stay dense: a caller may replace them.

    Raises:
        UsageError: the model's opset has no ScatterElements.
    """
    opset = opset_of(proto)
    if opset < _PACKED_OPSET or proto.ir_version < _PACKED_IR:
        raise UsageError(
            f"format packed needs opset {_PACKED_OPSET} and IR version {_PACKED_IR} or later; "
            f"the model has opset {opset} and IR version {proto.ir_version}.",
            hint="Use --format dense, or sparse for ONNX Runtime alone.",
        )
    copy = _copy(proto)
    graph, taken = copy.graph, _all_names(copy)
    inputs = {value.name for value in graph.input}
    start: list[NodeProto] = []
    for name, tensor in _stored(copy, pruned).items():
        if name in inputs or (tensor.data_type == TensorProto.BFLOAT16 and opset < _BFLOAT16_OPSET):
            continue
        nodes, parts = _scatter(tensor, name, base, taken)
        size = sum(n.ByteSize() for n in nodes) + sum(p.ByteSize() for p in parts)
        if size >= byte_size(tensor):
            continue
        graph.initializer.extend(parts)
        if (at := _constant_node(graph, name)) is None:
            _drop_initializer(graph, name)
            start += nodes
        else:
            _set_nodes(graph, [*graph.node[:at], *nodes, *graph.node[at + 1 :]])
    _set_nodes(graph, [*start, *graph.node])
    return copy


def _scatter(
    tensor: TensorProto, name: str, base: Path | None, taken: set[str]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes that compute the tensor called ``name``, and the initializers that they read."""
    indices, nonzero = _nonzeros(tensor, base)
    count = math.prod(tensor.dims)
    narrow = np.int32 if count < 2**31 else np.int64
    size, where, what, shape, zeros, flat = (
        _fresh(f"{name}/{part}", taken)
        for part in ("size", "indices", "values", "shape", "zeros", "flat")
    )
    parts = [
        numpy_helper.from_array(np.array([count], np.int64), size),
        numpy_helper.from_array(indices.astype(narrow), where),
        numpy_helper.from_array(nonzero, what),
        numpy_helper.from_array(np.array(tensor.dims, np.int64), shape),
    ]
    zero = numpy_helper.from_array(np.zeros(1, nonzero.dtype))
    nodes = [
        helper.make_node("ConstantOfShape", [size], [zeros], zeros, value=zero),
        helper.make_node("ScatterElements", [zeros, where, what], [flat], flat, axis=0),
        helper.make_node("Reshape", [flat, shape], [name], _fresh(f"{name}/reshape", taken)),
    ]
    return nodes, parts


ENCODINGS: dict[str, Encoding] = {"dense": _dense, "sparse": _sparse, "packed": _packed}


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def _stored(proto: onnx.ModelProto, pruned: Collection[str]) -> dict[str, TensorProto]:
    """The pruned tensors in the order of the model, so that equal input gives equal bytes."""
    known, wanted = constants(proto), set(pruned)
    assert wanted <= known.keys(), "only tensors stored in the main graph are pruned"
    return {name: tensor for name, tensor in known.items() if name in wanted}


def _nonzeros(tensor: TensorProto, base: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Linear indices (nonzeros,) int64, sorted, and the values there."""
    flat = np.asarray(values(tensor, base)).reshape(-1)
    indices = np.flatnonzero(flat)
    return indices, flat[indices]


def _described(tensor: TensorProto) -> TensorProto:
    """Name, element type, doc string and metadata of a tensor."""
    described = TensorProto(
        name=tensor.name, data_type=tensor.data_type, metadata_props=tensor.metadata_props
    )
    if tensor.HasField("doc_string"):
        described.doc_string = tensor.doc_string
    return described


def _constant_node(graph: onnx.GraphProto, name: str) -> int | None:
    """Index of the Constant node that makes a tensor; None where an initializer does."""
    nodes = enumerate(graph.node)
    return next((i for i, n in nodes if n.op_type == "Constant" and n.output[0] == name), None)


def _drop_initializer(graph: onnx.GraphProto, name: str) -> None:
    del graph.initializer[next(i for i, t in enumerate(graph.initializer) if t.name == name)]


def _set_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    graph.ClearField("node")
    graph.node.extend(nodes)


def _all_names(proto: onnx.ModelProto) -> set[str]:
    """Names of all nodes and tensors, inner graphs included."""
    found = {label for label, _ in tensors(proto)} | {value.name for value in proto.graph.input}
    for body in bodies(proto):
        for node in body.node:
            found.update((node.name, *node.input, *node.output))
    return found


def _fresh(name: str, taken: set[str]) -> str:
    """``name``, or with a number behind it where something has that name already; now taken."""
    fresh, count = name, 0
    while fresh in taken:
        count += 1
        fresh = f"{name}_{count}"
    taken.add(fresh)
    return fresh
