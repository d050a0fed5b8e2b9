"""Gradient rules, one entry per operator of the standard domain."""

from onnx_ecp.gradients.rules import (  # noqa: F401  (each fills the table)
    convolution,
    elementwise,
    linear,
    movement,
    normalization,
    pooling,
    recurrent,
    reduction,
    resize,
)
from onnx_ecp.gradients.rules.registry import RULES, Rule, Unsupported, rule

__all__ = ["RULES", "Rule", "Unsupported", "rule"]
