"""ONNX Runtime: whole units only."""

from __future__ import annotations

import onnx

from onnx_ecp.evaluation.targets.target import Target, each
from onnx_ecp.graph import ENCODINGS
from onnx_ecp.layers import Layer


def refusal(layer: Layer) -> str:
    """Zeros are no reason for any layer to be faster."""
    return "zeros are multiplied like other numbers"


ONNXRUNTIME = Target(
    title="ONNX Runtime",
    gains="whole units that are gone: latency follows the multiplications; zeros are multiplied "
    "like other numbers",
    evidence="measured: docs/benchmarks/latency-of-units.md, twice-as-fast.md",
    next_step="onnx-ecp compare MODEL {model} -d DATA --measure",
    refusals=each(refusal),
    granularity="unit",
    types=(
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    ),
    formats=tuple(ENCODINGS),
    standard=False,
)
