"""OpenVINO on the CPU: int8 MatMul with AMX, its weights packed."""

from __future__ import annotations

import onnx

from onnx_ecp.evaluation.targets.target import Target, each
from onnx_ecp.layers import Layer


def refusal(layer: Layer) -> str:
    """Why the weights of a layer are not packed; empty where they may be."""
    if layer.op not in ("Gemm", "MatMul"):
        return f"op: {layer.op}, only the weights of MatMul and Gemm are packed"
    return ""


def advice(layer: Layer) -> str:
    """What it takes."""
    return "once it is int8, on a CPU with AMX"


OPENVINO = Target(
    title="OpenVINO",
    gains="zeros of int8 MatMul weights on CPUs with AMX, packed where their share is "
    "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE or more; elsewhere whole units (--speedup)",
    evidence="its documentation of the CPU device; floats measured without a gain: "
    "docs/benchmarks/targets.md; no CPU with AMX was at hand",
    next_step="the same with --quantize int8, or quantize {model} by nncf.quantize; compile that "
    "with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=0.75, and time it with benchmark_app",
    after_int8="compile {model} with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=0.75, and time it with "
    "benchmark_app",
    refusals=each(refusal),
    sparsity="0.8",
    scope="layer",
    least=0.75,
    advice=advice,
    types=(onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16),
    formats=("dense", "packed"),
    standard=False,
)
