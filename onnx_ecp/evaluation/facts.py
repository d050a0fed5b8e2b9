"""What a file is: its size, parameters, zeros."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_ecp.errors import UsageError
from onnx_ecp.graph import (
    LARGEST_DENSE,
    Model,
    compressed_size,
    constants,
    data_files,
    digest,
    load,
    packed_tensors,
    read_tensor,
)
from onnx_ecp.runtime.cache import recalled

if TYPE_CHECKING:
    pass

_FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)


@dataclass(frozen=True)
class ModelFacts:
    """What a model weighs.

    Args:
        path: its file, or None for a model in memory.
        sha256: of the file (of the serialised proto for a model in memory).
        bytes: size, external data included.
        compressed_bytes: size after gzip.
        parameters: elements of all stored floating-point tensors; a sparse, packed or quantised one
            counts as the dense tensor that it stands for.
        zeros: how many of them are zero.
    """

    path: str | None
    sha256: str
    bytes: int
    compressed_bytes: int
    parameters: int
    zeros: int


def model_facts(model: Model) -> ModelFacts:
    """Sizes, hash, and how many of the stored values are zero."""
    packed = packed_tensors(model.proto, LARGEST_DENSE).values()
    parts = {name for p in packed for name in p.parts}
    found = {n: t for n, t in constants(model.proto).items() if n not in parts}
    stored = [t for t in found.values() if t.data_type in _FLOATS]
    arrays = (read_tensor(model, tensor) for tensor in stored)
    counts = [(array.size, int(np.count_nonzero(array))) for array in arrays]
    counts += [
        (math.prod(sparse.dims), math.prod(sparse.values.dims))
        for sparse in model.proto.graph.sparse_initializer
        if sparse.values.data_type in _FLOATS
    ]
    counts += _quantised(model, found)
    counts += [
        (p.elements, math.prod(p.values.dims)) for p in packed if p.values.data_type in _FLOATS
    ]
    own = digest(model)
    return ModelFacts(
        path=None if model.path is None else str(model.path),
        sha256=own,
        bytes=_size(model),
        compressed_bytes=recalled(
            ("a compressed size", lambda: (own,)),
            lambda: compressed_size(model.path or model.proto.SerializeToString()),
            fits=lambda size: isinstance(size, int),
        ),
        parameters=sum(size for size, _ in counts),
        zeros=sum(size - nonzero for size, nonzero in counts),
    )


def _quantised(model: Model, stored: Mapping[str, onnx.TensorProto]) -> list[tuple[int, int]]:
    """Elements, and those that are not zero, of the stored tensors that are dequantised."""
    read = {n.input[0]: n for n in model.proto.graph.node if n.op_type == "DequantizeLinear"}
    counts = []
    for name, node in read.items():
        if name in stored:
            q = read_tensor(model, stored[name]).astype(np.int64)
            counts.append((q.size, int(np.count_nonzero(q - _zero(model, node, stored, q)))))
    return counts


def _zero(
    model: Model, node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], q: np.ndarray
) -> np.ndarray:
    """The integers that stand for zero, in a shape that meets q."""
    if len(node.input) < 3 or node.input[2] not in stored:
        return np.zeros((), np.int64)
    zero = read_tensor(model, stored[node.input[2]]).astype(np.int64)
    numbers = {a.name: a.i for a in node.attribute}
    axis = numbers.get("axis", 1)
    if zero.ndim == 1 and q.ndim > 1 and zero.size > 1:
        return zero.reshape([-1 if k == axis % q.ndim else 1 for k in range(q.ndim)])
    if block := numbers.get("block_size", 0):
        return np.repeat(zero, block, axis).take(range(q.shape[axis]), axis)
    return zero


def _size(model: Model) -> int:
    if model.path is None:
        return int(model.proto.ByteSize())
    files = [model.path, *data_files(model.proto, model.path.parent)]
    return sum(file.stat().st_size for file in files)


def model_of(given: str | Path | onnx.ModelProto | Model) -> Model:
    """A validated model of whatever stands for one.

    Raises:
        UsageError: nothing that does.
        ModelError: the model is unreadable or invalid.
    """
    if isinstance(given, Model):
        return given
    if not isinstance(given, str | os.PathLike | onnx.ModelProto):
        raise UsageError(
            f"a model cannot be {reprlib.repr(given)}.",
            hint="Give the path of a file, or an onnx.ModelProto: of bytes, onnx.load_from_string.",
        )
    return load(Path(given) if isinstance(given, os.PathLike) else given)
