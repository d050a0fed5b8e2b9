"""Reductions: the adjoint is given back the axes that were reduced, then times the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.registry import Rule, known, nonnegative, only, optional_input, rule
from onnx_ecp.graph.builder import Builder

# (builder, g, x, y, axes) to the adjoint of x; g and y have the reduced axes with size 1.
Derivative = Callable[[Builder, Any, Any, Any, Any], Any]


def _sum(op: Builder, g: Any, x: Any, y: Any, axes: Any) -> Any:
    return op.Expand(g, op.adjoint_shape(g, x))


def mean(op: Builder, g: Any, x: Any, y: Any, axes: Any) -> Any:
    """Every element of x gets an equal share of the adjoint g of its mean y."""
    count = op.cast(op.Div(op.Size(x), op.Size(y)), op.dtype(g))
    return _sum(op, op.Div(g, count), x, y, axes)


def extreme(op: Builder, g: Any, x: Any, y: Any, axes: Any) -> Any:
    """The elements of x that equal the maximum or minimum y share its adjoint g."""
    taken = op.cast(op.Equal(x, y), op.dtype(x))
    return op.Mul(g, op.Div(taken, op.ReduceSum(taken, axes, keepdims=1)))


def _prod(op: Builder, g: Any, x: Any, y: Any, axes: Any) -> Any:
    # The product of the others is 0 if one of the others is 0, else the product of all factors
    # but zeros, divided by the own factor.
    is_zero = op.Equal(x, 0.0)
    factors = op.Where(is_zero, 1.0, x)
    zeros = op.cast(is_zero, op.dtype(x))
    other_zeros = op.Sub(op.ReduceSum(zeros, axes, keepdims=1), zeros)
    others = op.Div(op.ReduceProd(factors, axes, keepdims=1), factors)
    return op.Mul(g, op.Where(op.Greater(other_zeros, 0.0), 0.0, others))


def _norm(op: Builder, g: Any, x: Any, y: Any, axes: Any) -> Any:
    # A norm of 0 has the subgradient 0.
    return op.Mul(g, op.Div(x, op.Where(op.Equal(y, 0.0), 1.0, y)))


REDUCTIONS: dict[str, Derivative] = {
    "ReduceL1": lambda op, g, x, y, axes: op.Mul(g, op.Sign(x)),
    "ReduceL2": _norm,
    "ReduceLogSum": lambda op, g, x, y, axes: _sum(op, op.Div(g, op.Exp(y)), x, y, axes),
    "ReduceLogSumExp": lambda op, g, x, y, axes: op.Mul(g, op.Exp(op.Sub(x, y))),
    "ReduceMax": extreme,
    "ReduceMean": mean,
    "ReduceMin": extreme,
    "ReduceProd": _prod,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda op, g, x, y, axes: op.Mul(g, op.Mul(x, 2.0)),
}


def _reduction(derivative: Derivative) -> Rule:
    def apply(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
        x, y, adjoint = node.inputs[0], node.outputs[0], only(node, g, i, 0)
        axes = _axes(op, node)
        if not node.attrs.get("keepdims", 1) and axes.size:
            adjoint, y = op.Unsqueeze(adjoint, axes + 1), op.Unsqueeze(y, axes)
        return derivative(op, adjoint, x, y, axes)

    return apply


def _axes(op: Builder, node: gs.Node) -> np.ndarray:
    """The axes that the node reduces, counted from the front."""
    rank = op.rank(node.inputs[0])
    given = optional_input(node, 1)
    axes = known(given, "axes").ravel() if given is not None else np.empty(0, np.int64)
    if axes.size == 0 and not node.attrs.get("noop_with_empty_axes", 0):
        axes = np.arange(rank)
    return np.array([nonnegative(int(a), rank) for a in axes], np.int64)


for _name, _derivative in REDUCTIONS.items():
    rule(_name)(_reduction(_derivative))
