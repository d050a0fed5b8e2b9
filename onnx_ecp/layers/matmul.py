"""MatMul: z = a W on the last axis, or z = W a on the second last; the bias is added behind it.

W is a matrix, a vector, or a batch of matrices on the third last axis.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.batched import Batched
from onnx_ecp.layers.bias import bias_behind
from onnx_ecp.layers.dense import Dense, Dot, dense_units
from onnx_ecp.layers.layer import Reshape, Skip, Transpose
from onnx_ecp.layers.trace import Scope, Traced


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
    if not seen.seen_shape:
        return scope.skip(node, "its weight is a single number, not a matrix")
    shape = _without_leading_ones(seen.seen_shape)
    reason = _refusal(node, side, shape, scope.rank(a))
    if reason:
        return scope.skip(node, reason)
    if len(shape) != 2:
        return (_dot if len(shape) == 1 else _batched)(scope, node, side, seen)
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


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix, or of a batch that has more axes than ones in front."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _dot(scope: Scope, node: gs.Node, side: int, seen: Traced) -> Dot:
    """A product with a stored vector."""
    operands, name, z = scope.operands(node), scope.names[id(node)], node.outputs[0]
    width = seen.seen_shape[0]
    weight = seen.weight(Reshape((1, width)), scale=float(node.attrs.get("alpha", 1.0)))
    bias = bias_behind(scope, node, (1,), seen.seen_dtype)
    axis = -2 if side == 0 else -1
    return Dot(name, node.op, operands[1 - side].name, z.name, weight, (1, width), bias, axis)


def _batched(scope: Scope, node: gs.Node, side: int, seen: Traced) -> Batched:
    """A product with a stored batch of matrices: (groups, in, out), or (groups, out, in)."""
    operands, name, z = scope.operands(node), scope.names[id(node)], node.outputs[0]
    transposed = bool(node.attrs.get("transA" if side == 0 else "transB", 0))
    swapped = transposed == (side == 0)
    groups, *matrix = seen.seen_shape[-3:]
    out, width = matrix[::-1] if swapped else matrix
    weight = seen.weight(
        Reshape(seen.seen_shape[-3:]),
        *((Transpose((0, 2, 1)),) if swapped else ()),
        Reshape((groups * out, width)),
        scale=float(node.attrs.get("alpha", 1.0)),
    )
    units = (groups, 1, out) if side == 1 else (groups, out, 1)
    bias = bias_behind(scope, node, units, seen.seen_dtype)
    data, axis = operands[1 - side].name, -1 if side == 1 else -2
    shape = (groups * out, width)
    return Batched(name, node.op, data, z.name, weight, shape, bias, axis, groups=groups)


def _refusal(node: gs.Node, side: int, shape: tuple[int, ...], rank: int | None) -> str:
    """Why a constant operand on this side is not pruned; empty if it is.

    Args:
        node: the product.
        side: of the operand.
        shape: of the operand, without ones in front.
        rank: of the other operand; None where it is not known.
    """
    if len(shape) > 3:
        return f"its weight {shape} is a batch of matrices along several axes; one is pruned"
    if len(shape) == 1 and (rank is None or rank < 2):
        return "its weight is a vector, and its input is not known to have an axis of samples"
    if len(shape) == 3 and (rank is None or rank < 4):
        return (
            f"its weight {shape} is a batch of matrices, and its input is not known to have an "
            "axis of samples in front of that of the batch"
        )
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        return "transBatchA or transBatchB: its batch axes are transposed"
    other = "transB" if side == 0 else "transA"
    if node.attrs.get(other, 0):
        return f"{other}: its input is transposed, so samples are not rows"
    if float(node.attrs.get("alpha", 1.0)) == 0:
        return "alpha is 0: its weight has no effect"
    return ""
