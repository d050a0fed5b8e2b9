"""ONNX Runtime's Attention: queries, keys and values by one merged weight inside the operator."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.bias import AddBehind, operator_bias
from onnx_ecp.layers.dense import Dense
from onnx_ecp.layers.fused import preactivation
from onnx_ecp.layers.layer import Skip, Transpose
from onnx_ecp.layers.trace import Scope


@dataclass(frozen=True)
class Attention(Dense):
    """The merged projection of queries, keys and values."""

    @property
    def units_refusal(self) -> str:
        """Rows of three kinds, whose heads the operator itself takes apart."""
        return "its heads are not followed"


# Ranks of a padding mask that lowering understands.
_MASKS = (1, 2, 3)


def match(node: gs.Node, scope: Scope) -> Affine | Skip | None:
    """An Attention as the layer that computes its queries, keys and values, or why it is none.

    Its rows are those of the queries, then the keys, then the values; z is inside the operator, so
    only configurations that ``gradients.lowering`` takes apart are layers.
    """
    a, w = scope.operands(node)
    seen = scope.weight(w)
    if seen is None:
        return scope.skip(node, "its weight is computed from the inputs of the model")
    if isinstance(seen, str):
        return scope.skip(node, seen)
    reason = _refusal(node, scope, seen.seen_shape)
    if reason:
        return scope.skip(node, f"its weights are inside Attention {reason}")
    width, out = seen.seen_shape
    bias = operator_bias(scope, node, 2, out=out, units_behind=(out,), dtype=seen.seen_dtype)
    if isinstance(bias, AddBehind):
        return scope.skip(node, "its bias is computed from the inputs of the model")
    name, z = scope.names[id(node)], preactivation(node.outputs[0].name)
    return Attention(name, node.op, a.name, z, seen.weight(Transpose((1, 0))), (out, width), bias)


def _refusal(node: gs.Node, scope: Scope, shape: tuple[int, ...]) -> str:
    """What about an Attention cannot be taken apart; empty if it can."""
    given = dict(enumerate(node.inputs))
    mask, past = (given.get(k) for k in (3, 4))
    if len(shape) != 2:
        return f"and no matrix {shape}"
    if past is not None and past.name:
        return "with keys and values of the past"
    if node.attrs.get("do_rotary", 0):
        return "with rotary positions"
    if any(y.name for y in node.outputs[1:]):
        return "whose keys and values are outputs"
    if mask is not None and mask.name and _rank(mask, scope) not in _MASKS:
        return "with a mask whose rank is not known to be 1, 2 or 3"
    return ""


def _rank(mask: gs.Tensor, scope: Scope) -> int | None:
    """Rank of a mask; shape inference does not know the operator that most often makes one."""
    if mask.inputs and mask.inputs[0].op == "EmbedLayerNormalization":
        return 1
    return scope.rank(mask)
