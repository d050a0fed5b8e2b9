"""Gemm: z = alpha * A W + beta * C, the weight as the second operand."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.bias import operator_bias
from onnx_ecp.layers.dense import Dense
from onnx_ecp.layers.layer import Skip, Transpose
from onnx_ecp.layers.trace import Scope


def match(node: gs.Node, scope: Scope) -> Affine | Skip | None:
    """A Gemm as a layer, or why it is none; FusedGemm has the same attributes."""
    a, b = scope.operands(node)
    seen = scope.weight(b)
    if seen is None:
        return scope.skip(node, _no_weight(scope, a))
    if isinstance(seen, str):
        return scope.skip(node, seen)
    if len(seen.seen_shape) != 2:
        return scope.skip(node, f"its weight {seen.seen_shape} is not a matrix")
    if scope.is_constant(a):
        return scope.skip(node, "both operands are constant: it does not depend on the inputs")
    if node.attrs.get("transA", 0):
        return scope.skip(node, "transA: its input is transposed, so samples are not rows")
    alpha = float(node.attrs.get("alpha", 1.0))
    if alpha == 0:
        return scope.skip(node, "alpha is 0: its weight has no effect")
    turned = () if node.attrs.get("transB", 0) else (Transpose((1, 0)),)
    out, width = seen.seen_shape if not turned else seen.seen_shape[::-1]
    bias = operator_bias(
        scope,
        node,
        2,
        out=out,
        units_behind=(out,),
        dtype=seen.seen_dtype,
        scale=float(node.attrs.get("beta", 1.0)),
    )
    name, z = scope.names[id(node)], node.outputs[0].name
    weight = seen.weight(*turned, scale=alpha)
    return Dense(name, node.op, a.name, z, weight, (out, width), bias)


def _no_weight(scope: Scope, a: gs.Tensor) -> str:
    if scope.is_constant(a):
        return "its weight is the first operand (A); only weights in the place of B are pruned"
    return "its weight is computed from the inputs of the model: nothing is stored that is pruned"
