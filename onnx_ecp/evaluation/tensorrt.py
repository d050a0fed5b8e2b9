"""Which layers NVIDIA TensorRT may run by its 2:4 kernels, and why not the others.

From its documentation ("Structured Sparsity" in the developer guide: weights [K, C, R, S], of which
4 divides C and at most two of every four input channels are not zero; SPARSE_WEIGHTS and FP16 or
INT8 set) and what its maintainers say: grouped convolutions get no sparse kernels (NVIDIA/TensorRT
issue 4054), and a sparse kernel is chosen only where it is faster, which takes about 256 channels
on both sides (issues 3849 and 4065). No engine was built here: this says what is possible, not what
is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_ecp.graph import (
    LARGEST_DENSE,
    Model,
    constants,
    decode_sparse,
    packed_tensors,
    read_tensor,
    sparse_tensors,
)
from onnx_ecp.layers import Layer, find_layers

# Below so many inputs or outputs dense kernels are mostly faster.
LARGE = 256
_PRECISIONS = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "FLOAT16",
    onnx.TensorProto.BFLOAT16: "BFLOAT16",
}


@dataclass(frozen=True)
class SparseKernel:
    """Whether TensorRT may run a layer by a 2:4 kernel.

    Args:
        name: of the layer.
        op: operator type.
        refused: why it cannot; empty where it may.
        advice: what it takes, or speaks against it, where it may.
    """

    name: str
    op: str
    refused: str
    advice: str = ""


def refusal(layer: Layer, storage: str = "dense", weight: np.ndarray | None = None) -> str:
    """Why TensorRT has no 2:4 kernel for a layer, one clause; empty where it may have one.

    Args:
        layer: of a model.
        storage: of its weight, see ``storage``.
        weight: W (out, in); None where it is only to be pruned.
    """
    if layer.op not in ("Gemm", "MatMul", "Conv"):
        return f"op: {layer.op} is ONNX Runtime's own"
    if layer.groups > 1:
        what = "convolution" if layer.op == "Conv" else "product"
        return f"op: a {what} of {layer.groups} groups"
    if layer.dtype not in _PRECISIONS:
        return f"precision: {onnx.TensorProto.DataType.Name(layer.dtype)}"
    if layer.reduction % 4:
        return f"axis: 4 does not divide {layer.reduction}"
    if storage != "dense":
        return f"format: the weight is stored {storage}"
    if weight is not None and not follows(layer, weight):
        return "pattern: more than two of four neighbours along the input axis are not zero"
    return ""


def follows(layer: Layer, weight: np.ndarray) -> bool:
    """Whether at most two of every four weights along the reduction axis of W are not zero."""
    order = layer.nm_order()
    used = (weight if order is None else weight[:, order]) != 0
    return bool((used.reshape(-1, 4).sum(axis=1) <= 2).all())


def advice(layer: Layer) -> str:
    """What the kernels take, or what speaks against them, for a layer that may have one."""
    said = []
    if layer.dtype == onnx.TensorProto.FLOAT:
        said.append("weights are float32: build the engine with FP16 or INT8")
    least = min(layer.shape[0], layer.reduction)
    if least < LARGE:
        said.append(f"a dense kernel may be faster: {least} channels, {LARGE} wanted")
    return "; ".join(said)


def storage(proto: onnx.ModelProto) -> dict[str, str]:
    """By name, how the stored tensors are stored that are not dense: "sparse" or "packed"."""
    sparse = dict.fromkeys((name for name, _ in sparse_tensors(proto)), "sparse")
    return sparse | dict.fromkeys(packed_tensors(proto, LARGEST_DENSE), "packed")


def sparse_kernels(model: Model) -> Iterable[SparseKernel]:
    """All layers of a model as it is, in graph order."""
    dense = replace(model, proto=decode_sparse(model.proto))
    stored, forms = constants(dense.proto), storage(model.proto)
    for layer in find_layers(dense.proto).layers:
        tensor = layer.weight.tensor
        weight = layer.weight.matrix(read_tensor(dense, stored[tensor]))
        refused = refusal(layer, forms.get(tensor, "dense"), weight)
        yield SparseKernel(layer.name, layer.op, refused, "" if refused else advice(layer))
