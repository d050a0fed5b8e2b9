"""Softmax and the normalizations: each is a short formula in its own output or statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.registry import Unsupported, nonnegative, only, rule
from onnx_ecp.graph.builder import Builder


@rule("Softmax")
def _softmax(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    (y,) = node.outputs
    axis = nonnegative(node.attrs.get("axis", -1), op.rank(y)) + 1
    if _is_repaired(y):
        y = op.Where(op.IsNaN(y), 0.0, y)
    weighted = op.Mul(g[0], y)
    return op.Sub(weighted, op.Mul(y, op.ReduceSum(weighted, [axis], keepdims=1)))


def _is_repaired(y: gs.Tensor) -> bool:
    """Whether the model replaces rows that are masked out wholly (0/0); their adjoint is 0."""
    consumers = {consumer.op: consumer for consumer in y.outputs}
    behind = [consumers[name].outputs[0] for name in ("Cast", "Identity") if name in consumers]
    return bool({"IsNaN", "Where"} & consumers.keys()) or any(map(_is_repaired, behind))


@rule("LogSoftmax")
def _logsoftmax(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    (y,) = node.outputs
    axis = nonnegative(node.attrs.get("axis", -1), op.rank(y)) + 1
    return op.Sub(g[0], op.Mul(op.Exp(y), op.ReduceSum(g[0], [axis], keepdims=1)))


def _standardize(
    op: Builder, h: Any, x: Any, axes: Sequence[int], epsilon: float, *, centered: bool = True
) -> Any:
    """The adjoint of x from the adjoint h of (x - mean) / sqrt(variance + epsilon).

    Without centering: of x / sqrt(mean square + epsilon). ``axes`` are those of x.
    """
    own, shifted = np.array(axes, np.int64), np.array(axes, np.int64) + 1
    if centered:
        x = op.Sub(x, op.ReduceMean(x, own, keepdims=1))
    power = op.ReduceMean(op.Mul(x, x), own, keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Add(power, float(epsilon))))
    unit = op.Mul(x, inverse)
    projection = op.ReduceMean(op.Mul(h, unit), shifted, keepdims=1)
    rest = op.Sub(h, op.Mul(unit, projection))
    if centered:
        rest = op.Sub(rest, op.ReduceMean(h, shifted, keepdims=1))
    return op.Mul(rest, inverse)


@rule("LayerNormalization", "RMSNormalization")
def _layernorm(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    x, scale = node.inputs[:2]
    first = nonnegative(node.attrs.get("axis", -1), op.rank(x))
    h = op.Mul(only(node, g, i, 0), scale)
    epsilon, centered = node.attrs.get("epsilon", 1e-5), node.op == "LayerNormalization"
    return _standardize(op, h, x, range(first, op.rank(x)), epsilon, centered=centered)


@rule("InstanceNormalization")
def _instancenorm(
    op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int
) -> gs.Tensor | None:
    x, scale = node.inputs[:2]
    h = op.Mul(only(node, g, i, 0), _per_channel(op, scale, x))
    return _standardize(op, h, x, range(2, op.rank(x)), node.attrs.get("epsilon", 1e-5))


@rule("GroupNormalization")
def _groupnorm(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    x, scale = node.inputs[:2]
    groups = node.attrs["num_groups"]
    h = only(node, g, i, 0)
    if op.shape(scale)[0] == op.shape(x)[1]:
        h = op.Mul(h, _per_channel(op, scale, x))
    in_groups = op.Reshape(x, [0, groups, -1])
    h = op.Reshape(h, [0, 0, groups, -1])
    if op.shape(scale)[0] != op.shape(x)[1]:
        h = op.Mul(h, op.Reshape(scale, [-1, 1]))
    out = _standardize(op, h, in_groups, [2], node.attrs.get("epsilon", 1e-5))
    return op.reshape_like(out, h, x)


@rule("BatchNormalization")
def _batchnorm(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    if node.attrs.get("training_mode", 0):
        raise Unsupported("training mode")
    x, scale, _, _, variance = node.inputs
    spread = op.Sqrt(op.Add(variance, float(node.attrs.get("epsilon", 1e-5))))
    return op.Mul(only(node, g, i, 0), _per_channel(op, op.Div(scale, spread), x))


def _per_channel(op: Builder, vector: Any, x: gs.Tensor) -> Any:
    """A vector (C,) in a shape that broadcasts against x (N, C, ...)."""
    return op.Reshape(vector, [-1, *[1] * (op.rank(x) - 2)])


@rule("LpNormalization")
def _lpnorm(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """With n = |x|_p and y = x / n: (g - n' sum(g y)) / n, where n' is y or sign(x)."""
    (x,), (y,), p = node.inputs, node.outputs, node.attrs.get("p", 2)
    axis = nonnegative(node.attrs.get("axis", -1), op.rank(x))
    norm = op.op(f"ReduceL{p}", x, [axis], keepdims=1)
    slope = y if p == 2 else op.Sign(x)
    along = op.ReduceSum(op.Mul(g[0], y), [axis + 1], keepdims=1)
    return op.Div(op.Sub(g[0], op.Mul(slope, along)), op.Where(op.Equal(norm, 0.0), 1.0, norm))


@rule("LRN")
def _lrn(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """With y = x s^-beta and s = bias + alpha/n sum_window x^2, windows along the channels."""
    (x,), (y,), size = node.inputs, node.outputs, node.attrs["size"]
    alpha, beta = float(node.attrs.get("alpha", 1e-4)), float(node.attrs.get("beta", 0.75))
    before = (size - 1) // 2
    squares = _window_sum(op, op.Mul(x, x), op.rank(x), 1, before, size)
    s = op.Add(op.Mul(squares, alpha / size), float(node.attrs.get("bias", 1.0)))
    errors = op.Mul(g[0], op.Div(y, s))
    back = _window_sum(op, errors, op.rank(x) + 1, 2, size - 1 - before, size)
    direct = op.Mul(g[0], op.Pow(s, -beta))
    return op.Sub(direct, op.Mul(op.Mul(x, 2.0 * alpha * beta / size), back))


def _window_sum(op: Builder, x: Any, rank: int, axis: int, before: int, size: int) -> Any:
    """Sums of ``size`` neighbours along an axis, ``before`` of them ahead, zeros outside."""
    padded = op.pad(x, rank, [axis], np.array([before, size - 1 - before]))
    width = op.Shape(x, start=axis, end=axis + 1)
    shifted = [op.Slice(padded, [k], op.Add(width, k), [axis]) for k in range(size)]
    return op.Sum(*shifted)
