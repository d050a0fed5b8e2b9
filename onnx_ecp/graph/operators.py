"""What operators do to the entries of their inputs: one table for everything that follows a graph.

Gradients, units, bounds, constant channels and finite differences read it, so that an operator is
described once. What an operator is not said to do, it may do or not. ``tests/test_operators.py``
runs every row and compares.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

import onnx

Attributes = Mapping[str, Any]
"""Values of a node's attributes by name; those that are missing have ONNX's defaults."""

MICROSOFT = "com.microsoft"
VARIADIC = sys.maxsize
"""As a number of inputs: all of them."""

T = TypeVar("T")


class Moves(Enum):
    """How an operator moves entries without changing them."""

    IN_ORDER = "all entries of its first input, in their order"
    REORDERED = "all entries of its first input"
    PICKED = "some entries of its first input"
    REPEATED = "entries of its first input, some of them more than once"
    JOINED = "all entries of all inputs"


@dataclass(frozen=True)
class Operator:
    """What is known of one operator.

    Args:
        elementwise: this many inputs, from the first on, meet entry by entry, with broadcasting;
            further ones hold numbers for all entries alike.
        moves: how entries move, where the operator computes nothing.
        flat: whether its derivative is zero wherever it has one.
        kinked: whether it jumps, or its slope does, for these attributes; a truth value has no
            slope, so a comparison does not count.
        monotone: 1 where the output grows with every entry of the input or stays as it is, -1
            where it falls or stays, 0 where neither is known.
        lipschitz: a bound on the slope of an operator of one input, in the L2 norm of all entries;
            None where there is none or it is not known.
        image: least and largest value of the output, or a bound on them.
        zeros: inputs of which a single one that is zero makes the output zero.
        averages: whether a channel that is one number at all positions is that number behind it
            (BatchNormalization: one number).
        axes: the attribute that holds axes, and the input that holds them in newer opsets.
        together: the axes whose entries are read together, given attributes, rank and opset; all
            others pass independently of each other.
    """

    elementwise: int = 0
    moves: Moves | None = None
    flat: bool = False
    kinked: Callable[[Attributes], bool] = lambda attributes: False
    monotone: Callable[[Attributes], int] = lambda attributes: 0
    lipschitz: Callable[[Attributes], float | None] = lambda attributes: None
    image: tuple[float, float] | None = None
    zeros: tuple[int, ...] = ()
    averages: Callable[[Attributes], bool] = lambda attributes: False
    axes: tuple[str, int] | None = None
    together: Callable[[Attributes, int, int], frozenset[int]] | None = None


def _always(value: T) -> Callable[[Attributes], T]:
    return lambda attributes: value


def _number(attributes: Attributes, name: str, default: float) -> float:
    return float(attributes.get(name, default))


# Functions of one input.


def _function(
    monotone: int | Callable[[Attributes], int] = 0,
    lipschitz: float | Callable[[Attributes], float | None] | None = None,
    *,
    zero: bool = False,
    kinked: bool | Callable[[Attributes], bool] = False,
    flat: bool = False,
    image: tuple[float, float] | None = None,
    elementwise: int = 1,
) -> Operator:
    """An operator that maps every entry on its own."""
    return Operator(
        elementwise,
        flat=flat,
        kinked=kinked if callable(kinked) else _always(kinked),
        monotone=monotone if callable(monotone) else _always(monotone),
        lipschitz=lipschitz if callable(lipschitz) else _always(lipschitz),
        image=image,
        zeros=(0,) if zero else (),
    )


def _rises_if(attribute: str, default: float) -> Callable[[Attributes], int]:
    """Monotone as long as an attribute, such as the slope on one side, is not negative."""
    return lambda attributes: int(_number(attributes, attribute, default) >= 0)


def _at_least_one(attribute: str, default: float) -> Callable[[Attributes], float]:
    """Slope 1 on one side, at most that of the attribute on the other."""
    return lambda attributes: max(1.0, abs(_number(attributes, attribute, default)))


def _celu_slope(attributes: Attributes) -> float | None:
    return 1.0 if _number(attributes, "alpha", 1.0) > 0 else None


def _hardsigmoid_sign(attributes: Attributes) -> int:
    alpha = _number(attributes, "alpha", 0.2)
    return (alpha > 0) - (alpha < 0)


# The constants that ONNX fixes for Selu.
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def _selu_rises(attributes: Attributes) -> int:
    parts = _number(attributes, "gamma", SELU_GAMMA), _number(attributes, "alpha", SELU_ALPHA)
    return int(min(parts) >= 0)


def _selu_slope(attributes: Attributes) -> float:
    gamma = abs(_number(attributes, "gamma", SELU_GAMMA))
    return gamma * max(1.0, abs(_number(attributes, "alpha", SELU_ALPHA)))


def _shrink_rises(attributes: Attributes) -> int:
    # It jumps from 0 to lambd - bias.
    return int(_number(attributes, "lambd", 0.5) >= max(_number(attributes, "bias", 0.0), 0))


def _elu_kink(attributes: Attributes) -> bool:
    return _number(attributes, "alpha", 1.0) != 1


# Largest slopes, rounded up: Gelu 1.12890 (both forms), Mish 1.08850, x sigmoid(alpha x) 1.09984
# for any alpha, HardSwish 1.5.
_GELU, _MISH, _SWISH, _HARDSWISH = 1.13, 1.0886, 1.1, 1.5

_FUNCTIONS = {
    "Abs": _function(0, 1.0, zero=True, kinked=True),
    "Acos": _function(-1),
    "Acosh": _function(1),
    "Asin": _function(1, zero=True),
    "Asinh": _function(1, 1.0, zero=True),
    "Atan": _function(1, 1.0, zero=True),
    "Atanh": _function(1, zero=True),
    "Ceil": _function(1, zero=True, kinked=True, flat=True),
    "Celu": _function(1, _celu_slope, zero=True),
    "Clip": _function(1, 1.0, kinked=True),
    "Cos": _function(0, 1.0, image=(-1.0, 1.0)),
    "Cosh": _function(0),
    "Elu": _function(
        _rises_if("alpha", 1.0), _at_least_one("alpha", 1.0), zero=True, kinked=_elu_kink
    ),
    "Erf": _function(1, 2 / math.sqrt(math.pi), zero=True, image=(-1.0, 1.0)),
    "Exp": _function(1),
    "Floor": _function(1, zero=True, kinked=True, flat=True),
    "Gelu": _function(0, _GELU, zero=True),
    "HardSigmoid": _function(
        _hardsigmoid_sign,
        lambda attributes: abs(_number(attributes, "alpha", 0.2)),
        kinked=True,
        image=(0.0, 1.0),
    ),
    "HardSwish": _function(0, _HARDSWISH, zero=True, kinked=True),
    "LeakyRelu": _function(
        _rises_if("alpha", 0.01), _at_least_one("alpha", 0.01), zero=True, kinked=True
    ),
    "Log": _function(1),
    "Mish": _function(0, _MISH, zero=True),
    "Neg": _function(-1, 1.0, zero=True),
    "Reciprocal": _function(0),
    "Relu": _function(1, 1.0, zero=True, kinked=True),
    "Round": _function(1, zero=True, kinked=True, flat=True),
    "Selu": _function(_selu_rises, _selu_slope, zero=True, kinked=True),
    "Shrink": _function(_shrink_rises, kinked=True),
    "Sigmoid": _function(1, 0.25, image=(0.0, 1.0)),
    "Sign": _function(1, zero=True, kinked=True, flat=True, image=(-1.0, 1.0)),
    "Sin": _function(0, 1.0, zero=True, image=(-1.0, 1.0)),
    "Sinh": _function(1, zero=True),
    "Softplus": _function(1, 1.0),
    "Softsign": _function(1, 1.0, zero=True, image=(-1.0, 1.0)),
    "Sqrt": _function(1, zero=True),
    "Swish": _function(0, _SWISH, zero=True),
    "Tan": _function(0, zero=True),
    "Tanh": _function(1, 1.0, zero=True, image=(-1.0, 1.0)),
    "ThresholdedRelu": _function(_rises_if("alpha", 1.0), zero=True, kinked=True),
}

# Functions of several inputs, and those of one that make or take no numbers with a slope.

_KINK = _always(value=True)
_SEVERAL = {
    "Add": Operator(2),
    "Div": Operator(2),
    "Max": Operator(VARIADIC, kinked=_KINK),
    "Mean": Operator(VARIADIC),
    "Min": Operator(VARIADIC, kinked=_KINK),
    "Mod": Operator(2, kinked=_KINK),
    "Mul": Operator(2, zeros=(0, 1)),
    "PRelu": Operator(2, kinked=_KINK, zeros=(0,)),
    "Pow": Operator(2),
    "Sub": Operator(2),
    "Sum": Operator(VARIADIC),
    "Where": Operator(3, kinked=_KINK),
    **dict.fromkeys(
        ("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or", "Xor"),
        Operator(2, flat=True),
    ),
    **dict.fromkeys(("IsInf", "IsNaN", "Not"), Operator(1, flat=True)),
}

_RUNTIMES_OWN = {
    "BiasGelu": _function(0, elementwise=2),
    "FastGelu": _function(0, elementwise=2),
    "Gelu": _function(0, _GELU, zero=True),
    "QuickGelu": _function(0, _SWISH, zero=True),
}

# What moves entries.


def _move(moves: Moves, axes: tuple[str, int] | None = None, *, elementwise: int = 0) -> Operator:
    in_place = moves in (Moves.IN_ORDER, Moves.REORDERED)
    return Operator(
        elementwise,
        moves,
        monotone=_always(1),
        lipschitz=_always(1.0 if in_place or moves is Moves.PICKED else None),
        zeros=() if moves is Moves.JOINED else (0,),
        averages=_always(moves is not Moves.JOINED),
        axes=axes,
    )


_MOVES = {
    "Cast": _move(Moves.IN_ORDER, elementwise=1),
    "CastLike": _move(Moves.IN_ORDER, elementwise=1),
    "Dropout": _move(Moves.IN_ORDER, elementwise=1),
    "Flatten": _move(Moves.IN_ORDER),
    "Identity": _move(Moves.IN_ORDER, elementwise=1),
    "Reshape": _move(Moves.IN_ORDER),
    "Squeeze": _move(Moves.IN_ORDER, ("axes", 1)),
    "Unsqueeze": _move(Moves.IN_ORDER, ("axes", 1)),
    "DepthToSpace": replace(_move(Moves.REORDERED), averages=_always(value=False)),
    "SpaceToDepth": replace(_move(Moves.REORDERED), averages=_always(value=False)),
    "Transpose": _move(Moves.REORDERED),
    "Gather": _move(Moves.REPEATED),
    "GatherElements": _move(Moves.REPEATED),
    "GatherND": _move(Moves.REPEATED),
    "Slice": _move(Moves.PICKED, ("axes", 3)),
    "Split": _move(Moves.PICKED),
    "Expand": _move(Moves.REPEATED),
    "Tile": _move(Moves.REPEATED),
    "Concat": _move(Moves.JOINED),
}

# What reads some axes together: normalisations, reductions and windows.

# Softmax is one of the last axis alone, by default, from this opset on; before, of axis 1 and all
# axes behind it.
_SOFTMAX_OF_LAST = 13


def _softmax_axes(attributes: Attributes, rank: int, opset: int) -> frozenset[int]:
    if opset < _SOFTMAX_OF_LAST:
        return frozenset(range(_axis(attributes, 1, rank), rank))
    return frozenset([_axis(attributes, -1, rank)])


def _axes_from(attributes: Attributes, rank: int, opset: int) -> frozenset[int]:
    return frozenset(range(_axis(attributes, -1, rank), rank))


def _axis(attributes: Attributes, default: int, rank: int) -> int:
    return int(attributes.get("axis", default)) % rank


def _spatial(attributes: Attributes, rank: int, opset: int) -> frozenset[int]:
    return frozenset(range(2, rank))


def _averages_no_border(attributes: Attributes) -> bool:
    """An AveragePool that counts no border: the mean of one number is that number."""
    counts = is_padded(attributes) and attributes.get("count_include_pad", 0)
    return not counts and not attributes.get("ceil_mode", 0)


def _interpolates(attributes: Attributes) -> bool:
    """A Resize that takes means of neighbours and nothing from beyond the border."""
    crops = attributes.get("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    return not crops and attributes.get("mode", "nearest") in ("nearest", "linear")


def is_padded(attributes: Attributes) -> bool:
    """Whether a window of an operator reaches beyond the border, where another value is."""
    free = attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID", b"NOTSET", b"VALID")
    return not free or any(attributes.get("pads", ()))


_AXES = ("axes", 1)
_TOGETHER = {
    "Softmax": Operator(together=_softmax_axes, lipschitz=_always(1.0), image=(0.0, 1.0)),
    "LogSoftmax": Operator(together=_softmax_axes),
    "Hardmax": Operator(together=_softmax_axes, flat=True, kinked=_KINK, image=(0.0, 1.0)),
    "LayerNormalization": Operator(together=_axes_from),
    "RMSNormalization": Operator(together=_axes_from),
    "BatchNormalization": Operator(averages=_always(value=True)),
    "InstanceNormalization": Operator(together=_spatial),
    "ReduceMax": Operator(kinked=_KINK, monotone=_always(1), lipschitz=_always(1.0), zeros=(0,),
                          averages=_always(value=True), axes=_AXES),
    "ReduceMean": Operator(monotone=_always(1), zeros=(0,), averages=_always(value=True),
                           axes=_AXES),
    "ReduceMin": Operator(kinked=_KINK, monotone=_always(1), lipschitz=_always(1.0), zeros=(0,),
                          averages=_always(value=True), axes=_AXES),
    "ReduceL1": Operator(kinked=_KINK, zeros=(0,), axes=_AXES),
    "ReduceL2": Operator(lipschitz=_always(1.0), zeros=(0,), axes=_AXES),
    "ReduceLogSum": Operator(axes=_AXES),
    "ReduceLogSumExp": Operator(monotone=_always(1), lipschitz=_always(1.0), axes=_AXES),
    "ReduceProd": Operator(zeros=(0,), axes=_AXES),
    "ReduceSum": Operator(monotone=_always(1), zeros=(0,), axes=_AXES),
    "ReduceSumSquare": Operator(zeros=(0,), axes=_AXES),
    "AveragePool": Operator(monotone=_always(1), zeros=(0,), averages=_averages_no_border,
                            together=_spatial),
    "LpPool": Operator(zeros=(0,), together=_spatial),
    "MaxPool": Operator(kinked=_KINK, monotone=_always(1), zeros=(0,),
                        averages=_always(value=True), together=_spatial),
    "MaxRoiPool": Operator(kinked=_KINK),
    "GlobalAveragePool": Operator(monotone=_always(1), zeros=(0,), averages=_always(value=True),
                                  together=_spatial),
    "GlobalLpPool": Operator(zeros=(0,), together=_spatial),
    "GlobalMaxPool": Operator(kinked=_KINK, monotone=_always(1), lipschitz=_always(1.0),
                              zeros=(0,), averages=_always(value=True), together=_spatial),
    "Resize": Operator(averages=_interpolates),
    "Upsample": Operator(averages=_interpolates),
    "TopK": Operator(kinked=_KINK),
    "EyeLike": Operator(flat=True),
    "MatMul": Operator(zeros=(0, 1)),
}  # fmt: skip

OPERATORS: dict[tuple[str, str], Operator] = {
    **{("", name): row for name, row in (_FUNCTIONS | _SEVERAL | _MOVES | _TOGETHER).items()},
    **{(MICROSOFT, name): row for name, row in _RUNTIMES_OWN.items()},
}
"""By domain ("" for the standard one) and operator type."""

UNKNOWN = Operator()
"""An operator of which the table says nothing."""


def find(domain: str | None, op: str) -> Operator:
    """What is known of an operator; the standard domain is spelled None, "" or "ai.onnx".

    >>> find("ai.onnx", "Relu").zeros, find("", "Sparkle") is UNKNOWN
    ((0,), True)
    """
    return OPERATORS.get(("" if domain in (None, "ai.onnx") else str(domain), op), UNKNOWN)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Values of a node's attributes by name; strings are text."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: x.decode() if isinstance(x, bytes) else x for name, x in values.items()}


def moving(*how: Moves) -> frozenset[str]:
    """Names of the standard operators that move entries in one of these ways.

    >>> sorted(moving(Moves.JOINED))
    ['Concat']
    """
    rows = OPERATORS.items()
    return frozenset(op for (domain, op), row in rows if not domain and row.moves in how)
