"""MatMul: z = a W on the last axis, or z = W a on the second last; the bias is added behind it."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.bias import bias_behind
from onnx_ecp.layers.dense import Dense, dense_units
from onnx_ecp.layers.layer import Reshape, Skip, Transpose
from onnx_ecp.layers.trace import Scope


def match(node: gs.Node, scope: Scope) -> Affine | Skip | None:
    """A MatMul as a layer, or why it is none; None for a product of two activations.

    FusedMatMul is the same with attributes: alpha, transA, transB, transBatchA, transBatchB.
    """
    operands = scope.operands(node)
    sides = [scope.weight(tensor) for tensor in operands]
    if sides == [None, None]:
        return None
    if None not in sides:
        return scope.skip(node, "both operands are constant: it does not depend on the inputs")
    side = 0 if sides[1] is None else 1
    seen, a = sides[side], operands[1 - side]
    assert seen is not None  # one side is None, this is the other
    if isinstance(seen, str):
        return scope.skip(node, seen)
    if scope.is_of_shapes(a):
        return scope.skip(node, "its input is the same for all samples: only their shape matters")
    reason = _refusal(node, side, seen.seen_shape)
    if reason:
        return scope.skip(node, reason)
    rank = scope.rank(a) if side == 0 else None
    if side == 0 and rank is None:
        return scope.skip(node, "its weight is on the left and the rank of its input is not known")

    # Stored is (in, out) on the right and (out, in) on the left, unless the operator transposes.
    transposed = bool(node.attrs.get("transA" if side == 0 else "transB", 0))
    turned = (Transpose((1, 0)),) if transposed == (side == 0) else ()
    matrix = Reshape(seen.seen_shape[-2:])
    out, width = matrix.shape[::-1] if turned else matrix.shape
    weight = seen.weight(matrix, *turned, scale=float(node.attrs.get("alpha", 1.0)))
    # W times a vector is a vector: its units lie on its only axis.
    axis = -2 if side == 0 and rank != 1 else -1
    bias = bias_behind(scope, node, dense_units(out, axis), seen.seen_dtype)
    name, z = scope.names[id(node)], node.outputs[0].name
    return Dense(name, node.op, a.name, z, weight, (out, width), bias, axis)


def _refusal(node: gs.Node, side: int, shape: tuple[int, ...]) -> str:
    """Why a constant operand on this side is not pruned; empty if it is."""
    if len(shape) < 2:
        return f"its weight is a vector {shape}: there is no unit to prune"
    if any(size != 1 for size in shape[:-2]):
        return f"its weight {shape} is a batch of matrices; only one matrix per node is pruned"
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        return "transBatchA or transBatchB: its batch axes are transposed"
    other = "transB" if side == 0 else "transA"
    if node.attrs.get(other, 0):
        return f"{other}: its input is transposed, so samples are not rows"
    if float(node.attrs.get("alpha", 1.0)) == 0:
        return "alpha is 0: its weight has no effect"
    return ""
