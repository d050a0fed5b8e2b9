"""Core ML: weights stored as bit masks."""

from __future__ import annotations

import math

import numpy as np
import onnx

from onnx_ecp.evaluation.targets.target import (
    STANDARD,
    Target,
    each,
    most_in_groups,
    other_operator,
)
from onnx_ecp.layers import Layer

# coremltools leaves weights of so many elements and less dense unless told otherwise.
SMALL = 2048
# The Neural Engine skips runs of zeros from this share on; CPUs take n:m from one half on, m a
# divisor of 16.
SHARE, GROUPS = 0.75, (4, 8, 16)


def refusal(layer: Layer) -> str:
    """Why the weights of a layer stay dense; empty where they may not."""
    if layer.op not in STANDARD:
        return other_operator(layer)
    elements = math.prod(layer.shape)
    if elements <= SMALL:
        return f"size: {elements:,} weights, more than {SMALL:,} wanted (weight_threshold)"
    return ""


def pattern(layer: Layer, weight: np.ndarray) -> str:
    """Why neither the Neural Engine nor the CPU gains by the zeros of W."""
    zeros = 1 - np.count_nonzero(weight) / max(weight.size, 1)
    if zeros >= SHARE or any(most_in_groups(layer, weight, m // 2, m) for m in GROUPS):
        return ""
    return f"zeros: {100 * zeros:.0f} %, {100 * SHARE:.0f} % wanted, or N:M with M = 4, 8 or 16"


COREML = Target(
    title="Core ML",
    gains="bit masks: 75 % zeros on the Neural Engine; on CPUs N:M along the input with M = 4, 8 "
    "or 16 and at least half zeros (1:4, 1:8, 2:16)",
    evidence="the coremltools guide (pruning, performance); no Apple device was at hand",
    next_step="take the weights of {model} back to the network that it was exported from "
    "(coremltools reads no ONNX), convert that, then coremltools.optimize.coreml.prune_weights "
    "with OpThresholdPrunerConfig(threshold=1e-12)",
    refusals=each(refusal),
    sparsity="0.8",
    scope="layer",
    pattern=pattern,
    types=(onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16),
)
