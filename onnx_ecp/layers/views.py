"""Views: operators that only move, reshape or convert the values of their first input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from onnx_ecp.layers.layer import Reshape, Step, Transpose

# The attribute, an input in newer opsets, that holds the integers of a view.
_INTEGERS = {"Reshape": "shape", "Squeeze": "axes", "Unsqueeze": "axes"}
_VIEWS = ("Identity", "Cast", "Transpose", "Flatten", *_INTEGERS)


def operator(node: gs.Node) -> tuple[str, str]:
    """(domain, operator type), with "" for the standard domain, which has two spellings."""
    domain = node.domain or ""
    return "" if domain == "ai.onnx" else domain, node.op


def is_view(node: gs.Node) -> bool:
    """Whether the values of a node are those of its first input."""
    domain, op = operator(node)
    return not domain and op in _VIEWS and len(node.inputs) > 0


def attribute_of_integers(node: gs.Node) -> str:
    """Where an old opset keeps the target shape or the axes; empty for views without any."""
    return _INTEGERS.get(node.op, "")


def step(node: gs.Node, shape: tuple[int, ...], integers: Sequence[int] | None) -> Step | None:
    """What a view does to a tensor of this shape; None where that cannot be told.

    Args:
        node: the view.
        shape: shape of its first input.
        integers: the target shape or the axes; None where there are none, or not known.
    """
    if node.op == "Transpose":
        perm = tuple(node.attrs.get("perm", range(len(shape))[::-1]))
        return Transpose(perm) if sorted(perm) == list(range(len(shape))) else None
    target = _target(node, shape, integers)
    return Reshape(target) if target is not None and size(target) == size(shape) else None


def _target(
    node: gs.Node, shape: tuple[int, ...], integers: Sequence[int] | None
) -> tuple[int, ...] | None:
    match node.op:
        case "Identity" | "Cast":
            return shape
        case "Flatten":
            axis = node.attrs.get("axis", 1)
            return size(shape[:axis]), size(shape[axis:])
        case "Squeeze" if integers is None and len(node.inputs) == 1:
            return tuple(length for length in shape if length != 1)
        case "Squeeze" if integers is not None:
            return _squeezed(shape, integers)
        case "Unsqueeze" if integers is not None:
            return _unsqueezed(shape, integers)
        case "Reshape" if integers is not None:
            return _resolved(shape, integers, allow_zero=bool(node.attrs.get("allowzero", 0)))
    return None


def _squeezed(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    gone = {axis + len(shape) if axis < 0 else axis for axis in axes}
    return tuple(length for axis, length in enumerate(shape) if axis not in gone)


def _unsqueezed(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    rank = len(shape) + len(axes)
    target = list(shape)
    for axis in sorted(axis + rank if axis < 0 else axis for axis in axes):
        target.insert(axis, 1)
    return tuple(target)


def _resolved(
    shape: tuple[int, ...], target: Sequence[int], *, allow_zero: bool
) -> tuple[int, ...]:
    """The shape that Reshape gives, with 0 (as it was) and -1 (what is left) filled in."""
    if not allow_zero:
        kept = [*shape, *[0] * len(target)]
        target = [kept[i] if length == 0 else length for i, length in enumerate(target)]
    rest = size(shape) // max(size(length for length in target if length != -1), 1)
    return tuple(rest if length == -1 else length for length in target)


def size(shape: Iterable[int]) -> int:
    """Number of elements, in Python integers."""
    product = 1
    for length in shape:
        product *= length
    return product


def simplify(shape: tuple[int, ...], steps: Iterable[Step]) -> tuple[Step, ...]:
    """Join neighbours and drop steps that do nothing, so that equal views compare equal.

    >>> simplify((2, 3), (Transpose((1, 0)), Transpose((1, 0))))
    ()
    >>> simplify((2, 3), (Reshape((6,)), Reshape((3, 2))))
    (Reshape(shape=(3, 2)),)
    """
    kept: list[tuple[Step, tuple[int, ...]]] = []  # each with the shape in front of it
    for following in steps:
        step = following
        if kept and type(kept[-1][0]) is type(step):
            previous, shape = kept.pop()
            step = _join(previous, step)
        after = shape_behind(step, shape)
        if not _does_nothing(step, shape):
            kept.append((step, shape))
        shape = after
    return tuple(step for step, _ in kept)


def shape_behind(step: Step, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a step gives."""
    if isinstance(step, Reshape):
        return step.shape
    return tuple(shape[axis] for axis in step.perm)


def _join(first: Step, second: Step) -> Step:
    if isinstance(first, Transpose) and isinstance(second, Transpose):
        return Transpose(tuple(first.perm[axis] for axis in second.perm))
    return second  # of two reshapes the last one counts


def _does_nothing(step: Step, shape: tuple[int, ...]) -> bool:
    if isinstance(step, Reshape):
        return step.shape == shape
    return step.perm == tuple(range(len(shape)))
