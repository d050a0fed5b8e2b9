"""Elementwise operators: ``g * f'(x)``, summed over what broadcasting repeated.

Arguments of a derivative: builder ``op``, adjoint ``g`` of the output ``y``, inputs, ``y``, and the
node's attributes with their defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.registry import (
    Rule,
    Unsupported,
    constant,
    known,
    only,
    optional_input,
    rule,
)
from onnx_ecp.graph.builder import Builder
from onnx_ecp.graph.operators import OPERATORS, SELU_ALPHA, SELU_GAMMA

Derivative = Callable[..., gs.Tensor]

SQRT_2 = math.sqrt(2.0)
SQRT_PI = math.sqrt(math.pi)
# The constants that ONNX fixes for the tanh form of Gelu.
GELU_SCALE, GELU_CUBIC = math.sqrt(2.0 / math.pi), 0.044715


def _square(op: Builder, x: gs.Tensor) -> Any:
    return op.Mul(x, x)


def _choose(op: Builder, condition: gs.Tensor, a: Any, b: Any, x: gs.Tensor) -> Any:
    """Where, with numbers taken in the dtype of x."""
    return op.Where(condition, a, b, dtype=op.dtype(x))


def _hardswish(op: Builder, g: gs.Tensor, x: gs.Tensor, y: gs.Tensor) -> Any:
    middle = op.Add(op.Div(x, 3.0), 0.5)
    rising = _choose(op, op.Greater(x, 3.0), 1.0, middle, x)
    return op.Mul(g, _choose(op, op.Less(x, -3.0), 0.0, rising, x))


def _hardsigmoid(
    op: Builder, g: gs.Tensor, x: gs.Tensor, y: gs.Tensor, alpha: float = 0.2, beta: float = 0.5
) -> Any:
    inside = op.And(op.Greater(y, 0.0), op.Less(y, 1.0))
    return op.Mul(g, _choose(op, inside, float(alpha), 0.0, x))


def _mish(op: Builder, g: gs.Tensor, x: gs.Tensor, y: gs.Tensor) -> Any:
    # y = x t with t = tanh(softplus(x)), so t' = (1 - t^2) sigmoid(x).
    t = op.Tanh(op.Softplus(x))
    slope = op.Mul(op.Sub(1.0, _square(op, t)), op.Sigmoid(x))
    return op.Mul(g, op.Add(t, op.Mul(x, slope)))


def _swish(op: Builder, g: gs.Tensor, x: gs.Tensor, y: gs.Tensor, alpha: float = 1.0) -> Any:
    # y = x s with s = sigmoid(alpha x): y' = s + alpha y (1 - s).
    s = op.Sigmoid(op.Mul(x, float(alpha)))
    return op.Mul(g, op.Add(s, op.Mul(op.Mul(y, float(alpha)), op.Sub(1.0, s))))


def _gelu(op: Builder, g: gs.Tensor, x: gs.Tensor, y: gs.Tensor, approximate: str = "none") -> Any:
    if approximate == "tanh":
        square = _square(op, x)
        t = op.Tanh(op.Mul(op.Mul(x, GELU_SCALE), op.Add(op.Mul(square, GELU_CUBIC), 1.0)))
        inner = op.Mul(op.Add(op.Mul(square, 3.0 * GELU_CUBIC), 1.0), 0.5 * GELU_SCALE)
        slope = op.Mul(op.Mul(x, op.Sub(1.0, _square(op, t))), inner)
        return op.Mul(g, op.Add(op.Mul(op.Add(t, 1.0), 0.5), slope))
    # y = x Phi(x) with Phi the normal distribution function and phi its density.
    distribution = op.Mul(op.Add(op.Erf(op.Mul(x, 1.0 / SQRT_2)), 1.0), 0.5)
    density = op.Mul(op.Exp(op.Mul(_square(op, x), -0.5)), 1.0 / (SQRT_2 * SQRT_PI))
    return op.Mul(g, op.Add(distribution, op.Mul(x, density)))


UNARY: dict[str, Derivative] = {
    "Abs": lambda op, g, x, y: op.Mul(g, op.Sign(x)),
    "Acos": lambda op, g, x, y: op.Neg(op.Div(g, op.Sqrt(op.Sub(1.0, _square(op, x))))),
    "Acosh": lambda op, g, x, y: op.Div(g, op.Sqrt(op.Sub(_square(op, x), 1.0))),
    "Asin": lambda op, g, x, y: op.Div(g, op.Sqrt(op.Sub(1.0, _square(op, x)))),
    "Asinh": lambda op, g, x, y: op.Div(g, op.Sqrt(op.Add(_square(op, x), 1.0))),
    "Atan": lambda op, g, x, y: op.Div(g, op.Add(_square(op, x), 1.0)),
    "Atanh": lambda op, g, x, y: op.Div(g, op.Sub(1.0, _square(op, x))),
    "Celu": lambda op, g, x, y, alpha=1.0: op.Mul(
        g, op.Add(_choose(op, op.Greater(x, 0.0), 0.0, op.Div(y, float(alpha)), x), 1.0)
    ),
    "Cos": lambda op, g, x, y: op.Neg(op.Mul(g, op.Sin(x))),
    "Cosh": lambda op, g, x, y: op.Mul(g, op.Sinh(x)),
    "Elu": lambda op, g, x, y, alpha=1.0: op.Mul(
        g, _choose(op, op.Greater(x, 0.0), 1.0, op.Add(y, float(alpha)), x)
    ),
    "Erf": lambda op, g, x, y: op.Mul(g, op.Mul(op.Exp(op.Neg(_square(op, x))), 2.0 / SQRT_PI)),
    "Exp": lambda op, g, x, y: op.Mul(g, y),
    "Gelu": _gelu,
    "HardSigmoid": _hardsigmoid,
    "HardSwish": _hardswish,
    "Identity": lambda op, g, x, y: g,
    "LeakyRelu": lambda op, g, x, y, alpha=0.01: op.Mul(
        g, _choose(op, op.Greater(x, 0.0), 1.0, float(alpha), x)
    ),
    "Log": lambda op, g, x, y: op.Div(g, x),
    "Mish": _mish,
    "Neg": lambda op, g, x, y: op.Neg(g),
    "Reciprocal": lambda op, g, x, y: op.Neg(op.Mul(g, _square(op, y))),
    # y >= 0, so its sign is the derivative.
    "Relu": lambda op, g, x, y: op.Mul(g, op.Sign(y)),
    "Selu": lambda op, g, x, y, alpha=SELU_ALPHA, gamma=SELU_GAMMA: op.Mul(
        g, _choose(op, op.Greater(x, 0.0), float(gamma), op.Add(y, float(alpha * gamma)), x)
    ),
    "Shrink": lambda op, g, x, y, lambd=0.5, bias=0.0: op.Mul(
        g, _choose(op, op.Greater(op.Abs(x), float(lambd)), 1.0, 0.0, x)
    ),
    "Sigmoid": lambda op, g, x, y: op.Mul(g, op.Mul(y, op.Sub(1.0, y))),
    "Sin": lambda op, g, x, y: op.Mul(g, op.Cos(x)),
    "Sinh": lambda op, g, x, y: op.Mul(g, op.Cosh(x)),
    "Softplus": lambda op, g, x, y: op.Mul(g, op.Sigmoid(x)),
    "Softsign": lambda op, g, x, y: op.Div(g, _square(op, op.Add(op.Abs(x), 1.0))),
    "Sqrt": lambda op, g, x, y: op.Div(g, op.Mul(y, 2.0)),
    "Swish": _swish,
    "Tan": lambda op, g, x, y: op.Mul(g, op.Add(_square(op, y), 1.0)),
    "Tanh": lambda op, g, x, y: op.Mul(g, op.Sub(1.0, _square(op, y))),
    "ThresholdedRelu": lambda op, g, x, y, alpha=1.0: op.Mul(
        g, _choose(op, op.Greater(x, float(alpha)), 1.0, 0.0, x)
    ),
}


def _pow_base(op: Builder, g: gs.Tensor, a: gs.Tensor, b: gs.Tensor, y: gs.Tensor) -> Any:
    exponent, b = constant(b), op.cast(b, op.dtype(a))
    lower = op.Sub(b, 1.0)
    if exponent is None or (exponent == 0).any():
        lower = op.Where(op.Equal(b, 0.0), 0.0, lower)  # 0 * 0^-1 is not a number, 0 * 0^0 is
    return op.Mul(g, op.Mul(b, op.Pow(a, lower)))


def _pow_exponent(op: Builder, g: gs.Tensor, a: gs.Tensor, b: gs.Tensor, y: gs.Tensor) -> Any:
    # Where the base is not positive, y has no derivative in b, or a zero one.
    return op.Mul(g, op.Where(op.Greater(a, 0.0), op.Mul(y, op.Log(a)), 0.0))


def _mod(op: Builder, g: gs.Tensor, a: gs.Tensor, b: gs.Tensor, y: gs.Tensor, fmod: int = 0) -> Any:
    # y = a - b q with q a whole number that is locally constant.
    return op.Neg(op.Mul(g, op.Round(op.Div(op.Sub(a, y), b))))


BINARY: dict[str, tuple[Derivative, Derivative]] = {
    "Add": (lambda op, g, a, b, y: g, lambda op, g, a, b, y: g),
    "Sub": (lambda op, g, a, b, y: g, lambda op, g, a, b, y: op.Neg(g)),
    "Mul": (lambda op, g, a, b, y: op.Mul(g, b), lambda op, g, a, b, y: op.Mul(g, a)),
    "Div": (
        lambda op, g, a, b, y: op.Div(g, b),
        lambda op, g, a, b, y: op.Neg(op.Mul(g, op.Div(y, b))),
    ),
    "Mod": (lambda op, g, a, b, y, fmod=0: g, _mod),
    "Pow": (_pow_base, _pow_exponent),
    "PRelu": (
        lambda op, g, x, slope, y: op.Mul(g, _choose(op, op.Greater(x, 0.0), 1.0, slope, x)),
        lambda op, g, x, slope, y: op.Mul(g, op.Min(x, 0.0)),
    ),
}


def _unary(derivative: Derivative) -> Rule:
    def apply(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
        return derivative(op, only(node, g, i, 0), node.inputs[0], node.outputs[0], **node.attrs)

    return apply


def _binary(derivatives: tuple[Derivative, Derivative]) -> Rule:
    def apply(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
        (y,) = node.outputs
        term = derivatives[i](op, g[0], *node.inputs, y, **node.attrs)
        return op.unbroadcast(term, node.inputs[i], of=y)

    return apply


for _name, _derivative in UNARY.items():
    rule(_name)(_unary(_derivative))
for _name, _derivatives in BINARY.items():
    rule(_name)(_binary(_derivatives))


@rule(*(op for (domain, op), row in OPERATORS.items() if row.flat and not domain and op != "Round"))
def _step(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    return None


@rule("Round")
def _straight_through(
    op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int
) -> gs.Tensor | None:
    # Rounding is what quantisation does to a value that is to be kept (arXiv:1308.3432); its true
    # derivative, zero, says that nothing in front of it matters.
    return g[0]


@rule("Sum")
def _sum(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    return op.unbroadcast(g[0], node.inputs[i], of=node.outputs[0])


@rule("Mean")
def _mean(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    share = op.Div(g[0], float(len(node.inputs)))
    return op.unbroadcast(share, node.inputs[i], of=node.outputs[0])


@rule("Max", "Min")
def _extreme(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """The first of the inputs that equal the output gets the adjoint."""
    (y,) = node.outputs
    taken = op.Equal(node.inputs[i], y)
    for earlier in node.inputs[:i]:
        taken = op.And(taken, op.Not(op.Equal(earlier, y)))
    return op.unbroadcast(op.Where(taken, g[0], 0.0), node.inputs[i], of=y)


@rule("Clip")
def _clip(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    x, y = node.inputs[0], node.outputs[0]
    if i == 0:
        return op.Where(op.Equal(x, y), g[0], 0.0)
    at_bound = op.And(op.Equal(node.inputs[i], y), op.Not(op.Equal(x, y)))
    return op.unbroadcast(op.Where(at_bound, g[0], 0.0), node.inputs[i], of=y)


@rule("Where")
def _where(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    condition = node.inputs[0]
    chosen = op.Where(condition, g[0], 0.0) if i == 1 else op.Where(condition, 0.0, g[0])
    return op.unbroadcast(chosen, node.inputs[i], of=node.outputs[0])


@rule("Cast", "CastLike")
def _cast(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    # CastLike only looks at the type of its second input.
    return op.cast(g[0], op.dtype(node.inputs[0])) if i == 0 else None


@rule("Dropout")
def _dropout(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    training = optional_input(node, 2)
    if training is not None and known(training, "training mode").any():
        raise Unsupported("training mode")
    return only(node, g, i, 0)
