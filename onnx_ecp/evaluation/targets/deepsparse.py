"""DeepSparse 1.8.0: scattered zeros, stored densely."""

from __future__ import annotations

from onnx_ecp.evaluation.targets.target import STANDARD, Target, each, in_groups, other_operator
from onnx_ecp.layers import Layer


def refusal(layer: Layer) -> str:
    """Why no sparse kernel takes a layer; empty where one may."""
    if layer.op not in STANDARD:
        return other_operator(layer)
    if layer.groups > 1:
        return in_groups(layer)
    return ""


def advice(layer: Layer) -> str:
    """What speaks against a layer that may gain."""
    return "" if min(layer.shape) >= SMALL else f"little to save: {min(layer.shape)} channels"


# Layers with fewer inputs or outputs take little of the time of any network.
SMALL = 16

DEEPSPARSE = Target(
    title="DeepSparse",
    gains="scattered zeros, about 80 % and more of a layer, stored densely; for batches: single "
    "samples may be slower",
    evidence="measured with 1.8.0: docs/benchmarks/targets.md",
    next_step="onnx-ecp compare MODEL {model} -d DATA --runtime deepsparse",
    refusals=each(refusal),
    sparsity="0.8",
    least=0.7,
    advice=advice,
    ir=9,
    opset=19,
)
