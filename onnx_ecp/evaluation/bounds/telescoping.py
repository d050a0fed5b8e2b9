"""The deterministic bound on the gap: layer by layer, for given inputs or a whole box of inputs.

With W', b' the weights of the pruned model, dW = W' - W, db = b' - b, a the activations of the
original and L the Lipschitz constants of the activation functions,

    ||F(x) - f(x)|| <= sum_l  ||dW_l a_{l-1} + db_l||  prod_{m > l} L_m ||W'_m||

It is computed by following the graph. Every tensor t has a *reference*, which is what the pruned
linear operators since the last activation function make of the original's values:

    original value      in  centre +- radius            elementwise; radius 0 for given inputs
    reference - original in shift +- slack               elementwise
    ||pruned - reference|| <= error                      for every sample

A linear operator maps the first two exactly and stretches the error by its norm; an activation
function turns all of the shift into error and starts anew from the original's value. Sums of
branches add up, so residual networks are followed too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_ecp.errors import OnnxEcpError
from onnx_ecp.evaluation.bounds.norms import Kernel, convolution_norm, matrix_norm
from onnx_ecp.evaluation.bounds.pair import LayerStep, Pair
from onnx_ecp.graph.operators import OPERATORS, Moves, attributes_of, find, moving

EXACT = "exact arithmetic: rounding, about 1e-6 of the outputs in float32, is not included"


class CannotFollow(OnnxEcpError):
    """The bound does not know an operator."""

    exit_code = 3


@dataclass(frozen=True)
class Stretch:
    """How the last linear operator made the error, so that scales of its columns are taken in.

    The norm of diag(s) W is no larger than max |s| ||W||, and mostly much smaller.

    Args:
        error: (samples,), that of its input.
        weight: columns on axis 0.
        axis: of the columns in the tensor, from its end.
        norm: of such a weight.
    """

    error: np.ndarray
    weight: np.ndarray
    axis: int
    norm: Callable[[np.ndarray], float]

    def scaled(self, scale: np.ndarray, rank: int) -> Stretch | None:
        """Behind a scale that broadcasts with the tensor; None where it is not one per column."""
        shape = (1,) * (rank - scale.ndim) + scale.shape
        if scale.size > 1 and shape[self.axis] != scale.size:
            return None
        return replace(self, weight=self.weight * scale.reshape(-1, *(1,) * (self.weight.ndim - 1)))


@dataclass(frozen=True)
class Reach:
    """Where a tensor can be in both models; arrays have the tensor's shape, axis 0 = samples.

    Args:
        centre: of the original's values.
        radius: how far the original can be from it, elementwise.
        shift: centre of reference - original.
        slack: how far reference - original can be from it, elementwise.
        error: (samples,), ||pruned - reference||_2 at most.
        stretch: what made that error; None where no single linear operator did.
    """

    centre: np.ndarray
    radius: np.ndarray
    shift: np.ndarray
    slack: np.ndarray
    error: np.ndarray
    stretch: Stretch | None = None

    @staticmethod
    def of(centre: np.ndarray, radius: np.ndarray) -> Reach:
        """An input: the same in both models."""
        zero = np.zeros_like(centre)
        return Reach(centre, radius, zero, zero, np.zeros(len(centre)))

    @property
    def gap(self) -> np.ndarray:
        """(samples,): ||pruned - original||_2 at most."""
        distance = np.abs(self.shift.astype(np.float64)) + self.slack
        return np.linalg.norm(distance.reshape(len(distance), -1), axis=1) + self.error

    def mapped(self, linear: Callable[[np.ndarray], np.ndarray], norm: float) -> Reach:
        """Behind an operator that is linear, the same in both models, and nonnegative."""
        return Reach(
            linear(self.centre),
            linear(self.radius),
            linear(self.shift),
            linear(self.slack),
            self.error * norm,
        )

    def error_scaled(self, scale: np.ndarray) -> tuple[np.ndarray, Stretch | None]:
        """Error, and what made it, behind an elementwise scale."""
        error = self.error * float(np.abs(scale).max(initial=0.0))
        stretch = None if self.stretch is None else self.stretch.scaled(scale, self.centre.ndim)
        if stretch is not None and np.ptp(np.abs(scale)) > 0:
            error = np.minimum(error, stretch.error * stretch.norm(stretch.weight))
        return error, stretch

    def in_units(self, factor: np.ndarray) -> Reach:
        """The same tensor times positive factors, in both models."""
        error, stretch = self.error_scaled(factor)
        return Reach(
            factor * self.centre.astype(np.float64),
            factor * self.radius.astype(np.float64),
            factor * self.shift.astype(np.float64),
            factor * self.slack.astype(np.float64),
            error,
            stretch,
        )

    @property
    def is_point(self) -> bool:
        """Whether the original's values are known exactly."""
        return not self.radius.any()


Inputs = Mapping[int, Reach]
Rule = Callable[[LayerStep, Inputs], Reach]


def telescope(
    pair: Pair, inputs: Mapping[str, Reach], factors: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """(samples,): a bound on the L2 distance of all floating-point outputs.

    Args:
        pair: the models.
        inputs: by name; one entry of axis 0 per sample, in all tensors of the graph.
        factors: by output, what it is multiplied by before; 1 where there is none.

    Raises:
        CannotFollow: an operator is not known; it is named.
    """
    reached = dict(inputs)
    for step in pair.steps:
        rule = RULES.get(step.node.op_type)
        if rule is None or step.node.domain not in ("", "ai.onnx"):
            raise CannotFollow(f"the bound cannot follow {step.name}.", hint=_HINT)
        given = {i: reached[x] for i, x in step.data.items()}
        found = rule(step, given)
        samples = {len(x.centre) for x in given.values()}
        if {found.centre.shape[0]} != samples:
            raise _refused(step, "it changes the first axis, which must count samples")
        reached[step.node.output[0]] = found
    ends = []
    for name in pair.outputs:
        if name in reached:
            factor = np.ones(1) if factors is None else factors.get(name, np.ones(1))
            ends.append(reached[name].in_units(factor).gap)
    return np.asarray(np.sqrt(np.square(ends).sum(axis=0)))


def check_known(proto: onnx.ModelProto) -> None:
    """CannotFollow for the first operator that has no rule, Constant nodes aside."""
    for node in proto.graph.node:
        rule = RULES.get(node.op_type)
        if node.op_type == "Constant" or (rule is not None and not isinstance(rule, Activation)):
            continue
        slope = find(node.domain, node.op_type).lipschitz(attributes_of(node))
        if rule is None or (rule.lipschitz is None and slope is None):
            raise _refused(LayerStep(node, {}, {}, []), "it has no known Lipschitz constant")


_HINT = "The other bounds hold for any model."


def _refused(step: LayerStep, why: str) -> CannotFollow:
    return CannotFollow(f"the bound cannot follow {step.name}: {why}.", hint=_HINT)


def _only(step: LayerStep, inputs: Inputs, place: int | None = 0) -> Reach:
    """The one computed input."""
    if len(inputs) != 1:
        raise _refused(step, "it combines several computed tensors")
    (index,) = inputs
    if place is not None and index != place:
        raise _refused(step, "its computed input is not where it is expected")
    return inputs[index]


def _weighted(step: LayerStep, inputs: Inputs) -> Reach:
    """Operators in ``WEIGHTED``: W a + b with other W and b in the pruned model."""
    x = _only(step, inputs, None if step.node.op_type == "MatMul" else 0)
    (at,) = inputs
    place = 1 - at if step.node.op_type == "MatMul" else 1
    w, v = step.a[place], step.b[place]
    bias_a, bias_b = (known.get(2) for known in (step.a, step.b))
    if step.attributes.get("transA", 0) or (at == 1 and x.centre.ndim == 2):
        raise _refused(step, "the first axis of its input does not count samples")

    def run(a: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        feeds = {at: a, place: weight.astype(a.dtype)}
        if bias is not None:
            feeds[2] = bias.astype(a.dtype)
        elif step.node.op_type == "Gemm":
            feeds[2] = np.zeros(1, a.dtype)  # before opset 11 it cannot be left out
        return step.run(feeds)

    # A negative alpha of Gemm turns nonnegative sums around.
    radius = slack = None
    if not x.is_point or x.slack.any():
        radius = np.abs(run(x.radius, np.abs(w)))
        slack = np.abs(run(x.radius, np.abs(v - w))) + np.abs(run(x.slack, np.abs(v)))
    centre = run(x.centre, w, bias_a)
    shift = run(x.centre, v - w, _difference(bias_b, bias_a)) + run(x.shift, v)
    zero = np.zeros_like(centre)
    of = WEIGHTED[step.node.op_type]
    columns, axis = of.columns(step, at, v)
    stretch = Stretch(x.error, columns, axis, lambda m: of.norm(step, m, x.centre.shape))
    return Reach(
        centre,
        zero if radius is None else radius,
        shift,
        zero if slack is None else slack,
        x.error * stretch.norm(columns),
        stretch,
    )


def _of_conv(step: LayerStep, at: int, w: np.ndarray) -> tuple[np.ndarray, int]:
    return w, -(w.ndim - 1)


def _of_transposed(step: LayerStep, at: int, w: np.ndarray) -> tuple[np.ndarray, int]:
    """(in, out per group, *kernel) as (out, in per group, *kernel)."""
    return _exchanged(w, int(step.attributes.get("group", 1))), -(w.ndim - 1)


def _exchanged(w: np.ndarray, groups: int) -> np.ndarray:
    """The first two axes of the kernel of a convolution exchanged, group by group."""
    by_group = w.reshape(groups, len(w) // groups, *w.shape[1:]).swapaxes(1, 2)
    return by_group.reshape(-1, *by_group.shape[2:])


def _of_matrix(step: LayerStep, at: int, w: np.ndarray) -> tuple[np.ndarray, int]:
    if w.ndim != 2:
        raise _refused(step, "its weight is not a matrix")
    if step.node.op_type == "MatMul" and at == 1:
        return w, -2
    return (w if step.attributes.get("transB", 0) else w.T), -1


def _difference(b: np.ndarray | None, a: np.ndarray | None) -> np.ndarray | None:
    if a is None or b is None:
        return b if a is None else -a
    return np.asarray(b - a)


def _convolution_norm(step: LayerStep, w: np.ndarray, shape: tuple[int, ...]) -> float:
    return convolution_norm(w, Kernel.of(step.attributes, w.shape[2:]), shape[2:])


def _transposed_norm(step: LayerStep, w: np.ndarray, shape: tuple[int, ...]) -> float:
    """That of its adjoint: a Conv with the same kernel, which reads what is covered."""
    kernel = Kernel.of(step.attributes, w.shape[2:])
    covered = [
        (size - 1) * stride + (taps - 1) * dilation + 1
        for size, stride, taps, dilation in zip(
            shape[2:], kernel.strides, kernel.size, kernel.dilations, strict=True
        )
    ]
    return convolution_norm(_exchanged(w, kernel.groups), kernel, covered)


def _matrix_norm(step: LayerStep, w: np.ndarray, shape: tuple[int, ...]) -> float:
    return abs(step.attributes.get("alpha", 1.0)) * matrix_norm(w)


def _elementwise(step: LayerStep, inputs: Inputs) -> Reach:
    """Add, Sub, Mul, Div: of two computed tensors a sum, with a constant a scale and an offset."""
    if len(inputs) == 2:
        return _sum(step, inputs)
    (at,) = inputs
    a, b = (_scale_and_offset(step, at, known[1 - at]) for known in (step.a, step.b))
    return _diagonal(step, inputs[at], a, b)


def _scale_and_offset(step: LayerStep, at: int, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one, zero = np.ones_like(c), np.zeros_like(c)
    match step.node.op_type, at:
        case "Add", _:
            return one, c
        case "Sub", 0:
            return one, -c
        case "Sub", _:
            return -one, c
        case "Mul", _:
            return c, zero
        case "Div", 0:
            return 1 / c, zero
    raise _refused(step, "it divides by a computed tensor")


def _diagonal(
    step: LayerStep,
    x: Reach,
    a: tuple[np.ndarray, np.ndarray],
    b: tuple[np.ndarray, np.ndarray],
) -> Reach:
    """An elementwise x -> scale x + offset, in both models."""
    (scale_a, offset_a), (scale_b, offset_b) = a, b
    centre = scale_a * x.centre + offset_a
    if centre.shape != x.centre.shape:
        raise _refused(step, "its constant is larger than the computed tensor")
    scale, offset = scale_b - scale_a, offset_b - offset_a
    error, stretch = x.error_scaled(scale_b)
    return Reach(
        centre,
        np.abs(scale_a) * x.radius,
        scale_b * x.shift + scale * x.centre + offset,
        np.abs(scale_b) * x.slack + np.abs(scale) * x.radius,
        error,
        stretch,
    )


def _normalised(step: LayerStep, inputs: Inputs) -> Reach:
    """BatchNormalization with fixed statistics."""
    x = _only(step, inputs)
    epsilon = step.attributes.get("epsilon", 1e-5)

    def parts(known: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        shape = (-1,) + (1,) * (x.centre.ndim - 2)
        scale = known[1] / np.sqrt(known[4] + epsilon)
        return scale.reshape(shape), (known[2] - known[3] * scale).reshape(shape)

    return _diagonal(step, x, parts(step.a), parts(step.b))


def _sum(step: LayerStep, inputs: Inputs) -> Reach:
    x, y = inputs[0], inputs[1]
    if step.node.op_type not in ("Add", "Sub"):
        raise _refused(step, "it multiplies computed tensors")
    if x.centre.shape != y.centre.shape:
        raise _refused(step, "its inputs differ in shape")
    sign = 1 if step.node.op_type == "Add" else -1
    return Reach(
        x.centre + sign * y.centre,
        x.radius + y.radius,
        x.shift + sign * y.shift,
        x.slack + y.slack,
        x.error + y.error,
    )


def _moved(step: LayerStep, inputs: Inputs) -> Reach:
    """Operators that only move values."""
    x = _only(step, inputs)
    _check_same(step)
    if step.attributes.get("perm", [0])[0] != 0 or (
        step.node.op_type == "Transpose" and "perm" not in step.attributes
    ):
        raise _refused(step, "it moves the first axis, which must count samples")
    found = x.mapped(lambda a: step.run({0: a, **step.a}), 1.0)
    if found.centre.dtype.kind != "f":
        raise _refused(step, "it makes integers")
    return found


def _joined(step: LayerStep, inputs: Inputs) -> Reach:
    parts = [inputs[i] for i in sorted(inputs)]
    if step.a or step.attributes["axis"] % parts[0].centre.ndim == 0:
        raise _refused(step, "it adds constants, or joins samples")

    def join(name: str) -> np.ndarray:
        return step.run({i: getattr(x, name) for i, x in enumerate(parts)})

    error = np.sqrt(np.square([x.error for x in parts]).sum(axis=0))
    return Reach(join("centre"), join("radius"), join("shift"), join("slack"), error)


def _averaged(step: LayerStep, inputs: Inputs) -> Reach:
    """Means over disjoint or overlapping sets of elements: ||mean of n|| <= ||x|| / sqrt(n)."""
    x = _only(step, inputs)
    _check_same(step)
    norm = 1.0
    if step.node.op_type == "AveragePool":
        kernel = Kernel.of(step.attributes, step.attributes["kernel_shape"])
        norm = math.sqrt(kernel.overlap)
    found = x.mapped(lambda a: step.run({0: a, **step.a}), norm)
    if step.node.op_type == "AveragePool":
        return found
    return replace(found, error=x.error * math.sqrt(found.centre.size / x.centre.size))


Lipschitz = Callable[[LayerStep, tuple[int, ...]], float]


@dataclass(frozen=True)
class Activation:
    """A function that is no linear one; what is known of it stands in ``graph.operators``.

    Args:
        lipschitz: from a step and the input's shape to a Lipschitz constant in the L2 norm, where
            that depends on more than attributes.
    """

    lipschitz: Lipschitz | None = None

    def __call__(self, step: LayerStep, inputs: Inputs) -> Reach:
        """The rule of this function."""
        x = _only(step, inputs)
        _check_same(step)
        known = find(step.node.domain, step.node.op_type)
        if self.lipschitz is None:
            slope = known.lipschitz(step.attributes)
        else:
            slope = self.lipschitz(step, x.centre.shape)
        if slope is None:
            raise _refused(step, "its slope has no bound")

        def run(a: np.ndarray) -> np.ndarray:
            return step.run({0: a, **step.a})

        if x.is_point:
            centre, radius = run(x.centre), None
        elif known.monotone(step.attributes):
            ends = run(x.centre - x.radius), run(x.centre + x.radius)
            centre, radius = (ends[0] + ends[1]) / 2, np.abs(ends[1] - ends[0]) / 2
        elif known.image is not None:
            low, high = (np.full_like(x.centre, end) for end in known.image)
            centre, radius = (low + high) / 2, (high - low) / 2
        else:
            raise _refused(step, "it is not monotone; only given inputs can be followed")
        zero = np.zeros_like(centre)
        return Reach(centre, zero if radius is None else radius, zero, zero, slope * x.gap)


def _check_same(step: LayerStep) -> None:
    if not step.same:
        raise _refused(step, "its constants differ between the models")


def _pooling(step: LayerStep, shape: tuple[int, ...]) -> float:
    """Disjoint windows do not lengthen a difference; an element counts in each one it lies in."""
    return math.sqrt(Kernel.of(step.attributes, step.attributes["kernel_shape"]).overlap)


def _softmax(step: LayerStep, shape: tuple[int, ...]) -> float:
    _check_axis(step, shape)
    return 1.0


def _log_softmax(step: LayerStep, shape: tuple[int, ...]) -> float:
    """The Jacobian I - 1 p^T projects along 1, so its norm is that of 1 p^T: at most sqrt(K)."""
    return math.sqrt(shape[_check_axis(step, shape)])


def _check_axis(step: LayerStep, shape: tuple[int, ...]) -> int:
    axis = int(step.attributes.get("axis", -1)) % len(shape)
    if axis == 0:
        raise _refused(step, "it works along the first axis, which must count samples")
    return axis


@dataclass(frozen=True)
class Weighted:
    """What is known of a linear operator with weights; one row for each.

    Args:
        columns: from a step, the place of the computed input and W as the operator sees it, W with
            the columns of the operator's output first, and their axis in the output, from the end.
        norm: from a step, W in that layout and the shape of the input, the factor by which W may
            lengthen a vector.
    """

    columns: Callable[[LayerStep, int, np.ndarray], tuple[np.ndarray, int]]
    norm: Callable[[LayerStep, np.ndarray, tuple[int, ...]], float]


WEIGHTED: dict[str, Weighted] = {
    "Conv": Weighted(_of_conv, _convolution_norm),
    "ConvTranspose": Weighted(_of_transposed, _transposed_norm),
    "Gemm": Weighted(_of_matrix, _matrix_norm),
    "MatMul": Weighted(_of_matrix, _matrix_norm),
}
# Functions of one input, entry by entry.
_FUNCTIONS = tuple(
    op
    for (domain, op), row in OPERATORS.items()
    if not domain and row.elementwise == 1 and row.moves is None and not row.flat
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(WEIGHTED, _weighted),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _elementwise),
    **dict.fromkeys(moving(Moves.IN_ORDER) - {"CastLike"} | {"Transpose"}, _moved),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), _averaged),
    "BatchNormalization": _normalised,
    "Concat": _joined,
    **dict.fromkeys((*_FUNCTIONS, "GlobalMaxPool"), Activation()),
    "Softmax": Activation(_softmax),
    "LogSoftmax": Activation(_log_softmax),
    "MaxPool": Activation(_pooling),
}
