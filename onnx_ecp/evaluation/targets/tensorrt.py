"""NVIDIA TensorRT: 2:4 along the reduction axis.

From its documentation ("Structured Sparsity" in the developer guide: weights [K, C, R, S], of which
4 divides C and at most two of every four input channels are not zero; SPARSE_WEIGHTS and FP16 or
INT8 set) and what its maintainers say: grouped convolutions get no sparse kernels (NVIDIA/TensorRT
issue 4054), and a sparse kernel is chosen only where it is faster, which takes about 256 channels
on both sides (issues 3849 and 4065). No engine was built here: this says what is possible, not what
is chosen.
"""

from __future__ import annotations

import numpy as np
import onnx

from onnx_ecp.evaluation.targets.target import (
    STANDARD,
    Target,
    each,
    in_groups,
    most_in_groups,
    other_operator,
)
from onnx_ecp.layers import Layer

# Below so many inputs or outputs dense kernels are mostly faster.
LARGE = 256


def refusal(layer: Layer) -> str:
    """Why there is no 2:4 kernel for a layer, one clause; empty where there may be one."""
    if layer.op not in STANDARD:
        return other_operator(layer)
    if layer.groups > 1:
        return in_groups(layer)
    if layer.dtype not in TENSORRT.types:
        return f"precision: {onnx.TensorProto.DataType.Name(layer.dtype)}"
    if layer.reduction % 4:
        return f"axis: 4 does not divide {layer.reduction}"
    return ""


def pattern(layer: Layer, weight: np.ndarray) -> str:
    """Why the zeros of W are none that the kernels skip."""
    if most_in_groups(layer, weight, 2, 4):
        return ""
    return "pattern: more than two of four neighbours along the input axis are not zero"


def advice(layer: Layer) -> str:
    """What the kernels take, or what speaks against them, for a layer that may have one."""
    said = []
    if layer.dtype == onnx.TensorProto.FLOAT:
        said.append("weights are float32: build the engine with FP16 or INT8")
    least = min(layer.shape[0], layer.reduction)
    if least < LARGE:
        said.append(f"a dense kernel may be faster: {least} channels, {LARGE} wanted")
    return "; ".join(said)


TENSORRT = Target(
    title="TensorRT",
    gains="2:4 along the input axis, in fp16, or in int8 without Q/DQ nodes, from about 256 "
    "channels on; about 15 % of the latency",
    evidence="NVIDIA's developer guide and maintainers (TensorRT issues 2310, 3849, 4054, 4065, "
    "4694); no engine was built here",
    next_step="polygraphy inspect sparsity {model} && "
    "trtexec --onnx={model} --fp16 --sparsity=enable",
    refuses_int8="it takes no activations with a zero point, and zeros only without Q/DQ nodes: "
    "let it calibrate the pruned model itself",
    refusals=each(refusal),
    sparsity="2:4",
    pattern=pattern,
    advice=advice,
    types=(onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16),
    opset=25,
)
