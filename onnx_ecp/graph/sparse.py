"""Sparse tensors checked and made dense: graphsurgeon reads most of their spellings wrongly."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import SparseTensorProto, TensorProto, numpy_helper

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.external import is_external
from onnx_ecp.graph.packed import packed_tensors, unpack
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import Body, bodies
from onnx_ecp.graph.tensors import byte_size, check_tensor, clear_values
from onnx_ecp.runtime.limits import free_memory

# Everything in a model that is sparse must fit into one protobuf message when it is dense.
LARGEST_DENSE = 2**31 - 2**24
# Less is no danger, however few bytes stand for it.
_HARMLESS = 2**26
# A tensor of which one in 3,000 is not zero takes a thousandth; nobody trains a sparser one.
_MOST_ZEROS = 1000
# How often a dense tensor is in memory at most while it is made: array, bytes, copies of the model.
_COPIES = 5
_DAMAGED = "The model is damaged: export it again, with dense initializers if you can."


def check_sparse(found: Iterable[tuple[str, SparseTensorProto]]) -> None:
    """Refuse sparse tensors whose indices are not sorted, unique and inside the shape.

    Args:
        found: sparse tensors with names to show.

    Raises:
        ModelError: one is malformed, or all of them take over 2 GB when made dense.
    """
    total = 0
    for label, sparse in found:
        try:
            dense = byte_size(_dense_shell(sparse))
            total += dense
            if total > LARGEST_DENSE:
                raise ModelError(
                    f"takes too much memory when made dense: over {LARGEST_DENSE} bytes.",
                    hint="Give the model with dense initializers in an external data file.",
                )
            if dense > max(_HARMLESS, _MOST_ZEROS * sparse.ByteSize()):
                raise ModelError(
                    f"{sparse.ByteSize()} bytes stand for {dense} when made dense.", hint=_DAMAGED
                )
            if total * _COPIES > free_memory():
                raise ModelError(
                    f"takes too much memory when made dense: {total} bytes, {_COPIES} times for a "
                    f"while, of {free_memory()} that are free.",
                    hint="Free some memory, or give the model with dense initializers in an "
                    "external data file.",
                )
            linear_indices(sparse)
        except ModelError as error:
            raise ModelError(
                f"sparse tensor '{printable(label)}': {error.message}", hint=error.hint
            ) from error


def linear_indices(sparse: SparseTensorProto) -> np.ndarray:
    """Positions (nonzeros,) int64 of the stored values in the flattened dense tensor.

    Raises:
        ModelError: values or indices are malformed, out of range, unsorted or duplicated.
    """
    for tensor in (sparse.values, sparse.indices):
        if is_external(tensor) or tensor.data_type == TensorProto.STRING:
            raise ModelError("its parts must be numbers stored in the model.", hint=_DAMAGED)
        check_tensor(tensor, None)
    if sparse.indices.data_type != TensorProto.INT64 or len(sparse.values.dims) != 1:
        raise ModelError("indices must be int64 and values a vector.", hint=_DAMAGED)
    count, rank = sparse.values.dims[0], len(sparse.dims)
    indices = numpy_helper.to_array(sparse.indices)
    if indices.shape == (count, rank):
        if count and ((indices < 0).any() or (indices >= np.array(sparse.dims)).any()):
            raise ModelError("an index is out of range.", hint=_DAMAGED)
        strides = [math.prod(sparse.dims[axis + 1 :]) for axis in range(rank)]
        linear = indices @ np.array(strides, np.int64)
    elif indices.shape == (count,):
        linear = indices
    else:
        raise ModelError(
            f"{count} values, but indices of shape {list(indices.shape)}.", hint=_DAMAGED
        )
    if linear.size and (linear.min() < 0 or linear.max() >= _elements(sparse)):
        raise ModelError("an index is out of range.", hint=_DAMAGED)
    if (np.diff(linear) <= 0).any():
        raise ModelError("indices are not sorted, or not unique.", hint=_DAMAGED)
    return linear


def _elements(sparse: SparseTensorProto) -> int:
    return math.prod(sparse.dims)


def _dense_shell(sparse: SparseTensorProto) -> TensorProto:
    """The dense tensor without its values."""
    return TensorProto(name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims)


def decode_sparse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A validated model in which every sparse or packed tensor has become dense; not to be changed.

    It is the model itself where there is none. Sparse initializers are appended to the dense ones,
    and so are tensors in the packed form of ``encodings``; a Constant's ``sparse_value`` becomes
    its ``value``. Nothing else changes.
    """
    sparse = any(_sparse_in(body) for body in bodies(proto))
    if not sparse and not packed_tensors(proto, LARGEST_DENSE):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for body in bodies(copy):
        if isinstance(body, onnx.GraphProto):
            body.initializer.extend(_dense(sparse) for sparse in body.sparse_initializer)
            body.ClearField("sparse_initializer")
        for node in body.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                if attribute.HasField("sparse_tensor"):
                    dense = _dense(attribute.sparse_tensor)
                    attribute.Clear()
                    attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                    attribute.t.CopyFrom(dense)
    if found := packed_tensors(copy, LARGEST_DENSE):
        unpack(copy, found.values())
    return copy


def _sparse_in(body: Body) -> bool:
    if isinstance(body, onnx.GraphProto) and body.sparse_initializer:
        return True
    constants = (node for node in body.node if node.op_type == "Constant")
    return any(a.HasField("sparse_tensor") for node in constants for a in node.attribute)


def _dense(sparse: SparseTensorProto) -> TensorProto:
    stored = numpy_helper.to_array(sparse.values)
    flat = np.zeros(_elements(sparse), stored.dtype)
    flat[linear_indices(sparse)] = stored
    dense = TensorProto()
    dense.CopyFrom(sparse.values)
    clear_values(dense)
    dense.dims[:] = sparse.dims
    dense.raw_data = numpy_helper.from_array(flat).raw_data
    return dense
