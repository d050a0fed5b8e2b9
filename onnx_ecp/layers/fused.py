"""Operators that ONNX Runtime's optimizer fuses: a layer with its activation, or one not pruned.

FusedMatMul is matched by ``matmul``; biases inside BiasGelu and the like are found by ``bias``.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_graphsurgeon as gs

from onnx_ecp.layers import conv, gemm
from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.bias import AddBehind
from onnx_ecp.layers.layer import Skip
from onnx_ecp.layers.trace import Scope


def preactivation(output: str) -> str:
    """The name that lowering gives to z, inside an operator whose output is ``output``.

    >>> preactivation("fc1_out")
    'fc1_out/preactivation'
    """
    return f"{output}/preactivation"


def match_gemm(node: gs.Node, scope: Scope) -> Affine | Skip | None:
    """FusedGemm: a Gemm and its activation."""
    return _before_activation(node, scope, gemm.match(node, scope))


def match_conv(node: gs.Node, scope: Scope) -> Affine | Skip | None:
    """FusedConv: a Conv, a tensor that is added to it (Z), and the activation of the sum."""
    return _before_activation(node, scope, conv.match(node, scope))


def _before_activation(
    node: gs.Node, scope: Scope, answer: Affine | Skip | None
) -> Affine | Skip | None:
    if not isinstance(answer, Affine) or not node.attrs.get("activation"):
        return answer
    if isinstance(answer.bias, AddBehind):
        return scope.skip(node, "its activation is fused and its bias is not a constant it uses")
    return replace(answer, output=preactivation(answer.output))
