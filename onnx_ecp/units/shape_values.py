"""Numbers of units among the integers that a model computes from shapes, entry by entry.

A Shape of a tensor with units holds how many there are, and shrinks with them. Where such a number
goes is followed through what exporters put between a Shape and the target of a Reshape; wherever
else it enters, the values of the model would change with the number of units, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.units.propagation import NotFollowed, Sizes, Walk

Rule = Callable[[Walk, gs.Node], Sizes]

_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def of_shape(walk: Walk, node: gs.Node) -> Sizes:
    """What a Shape holds: the number of units at the place of their axis."""
    axis, rank = walk.axis(node.inputs[0]), len(walk.shape(node.inputs[0]))
    assert axis is not None, "asked where there are units"
    entries = [axis.marks if i == axis.index else None for i in range(rank)]
    return tuple(entries[node.attrs.get("start", 0) : node.attrs.get("end", rank)])


# What may compute with integers; where its result goes is followed as far as bounds of a Slice.
_COMPUTES = frozenset(
    (
        *("Add", "Cast", "Concat", "Div", "Floor", "Gather", "Identity", "Max", "Min", "Mod"),
        *("Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"),
    )
)


def computes_integers(node: gs.Node) -> bool:
    """Whether a node makes integers of integers."""
    if node.domain or node.op not in _COMPUTES or len(node.outputs) != 1:
        return False
    return node.op != "Cast" or int(node.attrs["to"]) in _INTEGERS


def known_values(walk: Walk, tensor: gs.Tensor) -> list[int | None]:
    """The integers of a tensor that is computed from shapes; None for those of unknown value.

    Sizes of the first axis are unknown: they count samples, of which a run has any number.
    """
    done: dict[int, list[int | None]] = {}
    pending = [tensor]
    while pending:
        current = pending[-1]
        missing = [x for x in _sources(walk, current) if id(x) not in done]
        if missing:
            pending += missing
        else:
            done[id(current)] = _known(walk, pending.pop(), done)
    return done[id(tensor)]


_MOVED = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def _sources(walk: Walk, tensor: gs.Tensor) -> list[gs.Tensor]:
    """The tensors from whose values those of a tensor follow."""
    if walk.integers(tensor) is not None or not tensor.inputs or tensor.inputs[0].domain:
        return []
    if int(np.prod(walk.shape(tensor))) > _MOST_ENTRIES:
        return []
    node = tensor.inputs[0]
    if node.op in _MOVED or node.op == "Gather":
        return [node.inputs[0]]
    if node.op == "Concat" or (node.op in _ARITHMETIC and len(node.inputs) == 2):
        return list(node.inputs)
    return []


def _known(walk: Walk, tensor: gs.Tensor, done: Mapping[int, list[int | None]]) -> list[int | None]:
    """The integers of a tensor, given those of its sources by ``id``."""
    numbers = walk.integers(tensor)
    if numbers is not None:
        return list(numbers)
    unknown: list[int | None] = [None] * min(int(np.prod(walk.shape(tensor))), _MOST_ENTRIES + 1)
    node = tensor.inputs[0] if tensor.inputs else None
    if node is not None and node.op == "Shape" and not node.domain:
        shape: list[int | None] = [None, *walk.shape(node.inputs[0])[1:]]
        return shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]
    parts = [done[id(x)] for x in _sources(walk, tensor)]
    if node is None or not parts or not all(parts):
        return unknown
    if node.op in _MOVED:
        return parts[0]
    if node.op == "Concat":
        return [x for part in parts for x in part]
    if node.op == "Gather":
        chosen, values = walk.integers(node.inputs[1]), parts[0]
        there = chosen is not None and all(-len(values) <= i < len(values) for i in chosen)
        return [values[i] for i in chosen] if chosen is not None and there else unknown
    a, b = parts
    size = max(len(a), len(b))
    if size % len(a) or size % len(b):
        return unknown
    pairs = zip(a * (size // len(a)), b * (size // len(b)), strict=True)
    return [None if None in pair else _ARITHMETIC[node.op](*pair) for pair in pairs]


_MOST_ENTRIES = 16
_ARITHMETIC: dict[str, Callable[..., int | None]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: int(a / b) if b else None,
    "Min": min,
    "Max": max,
}


def follow_sizes(walk: Walk, node: gs.Node) -> dict[str, Sizes]:
    """Numbers of units in the output of a node that reads some.

    Raises:
        Refused: it does something else with them than to name the size of a tensor.
    """
    rule = None if node.domain else _RULES.get(node.op)
    if rule is None or len(node.outputs) != 1:
        raise NotFollowed("it computes with the number of units")
    found = rule(walk, node)
    return {node.outputs[0].name: found} if any(x is not None for x in found) else {}


def entries_of(walk: Walk, tensor: gs.Tensor) -> Sizes:
    """Which entries of an integer tensor are, or are in proportion to, a number of units."""
    known = walk.sizes.get(tensor.name)
    return (None,) * int(np.prod(walk.shape(tensor))) if known is None else known


def _moved(walk: Walk, node: gs.Node) -> Sizes:
    """The same entries in the same order."""
    return entries_of(walk, node.inputs[0])


def _cast(walk: Walk, node: gs.Node) -> Sizes:
    if int(node.attrs["to"]) not in _INTEGERS:
        raise NotFollowed("it computes with the number of units")
    return _moved(walk, node)


def _gathered(walk: Walk, node: gs.Node) -> Sizes:
    chosen, entries = walk.integers(node.inputs[1]), entries_of(walk, node.inputs[0])
    if chosen is None or node.inputs[1].name in walk.sizes:
        raise NotFollowed("it picks by a number that is not a constant")
    if not all(-len(entries) <= i < len(entries) for i in chosen):
        raise NotFollowed("it picks what is not there")
    return tuple(entries[i] for i in chosen)


def _sliced(walk: Walk, node: gs.Node) -> Sizes:
    starts, ends = walk.numbers(node, "starts", 1), walk.numbers(node, "ends", 2)
    steps = walk.numbers(node, "steps", 4) if len(node.inputs) > 4 else [1]
    entries = entries_of(walk, node.inputs[0])
    if starts is None or ends is None or steps is None or len(starts) != 1:
        raise NotFollowed("it cuts at a number that is not a constant")
    return entries[slice(starts[0], ends[0], steps[0])]


def _concatenated(walk: Walk, node: gs.Node) -> Sizes:
    return tuple(entry for tensor in node.inputs for entry in entries_of(walk, tensor))


def _product(walk: Walk, node: gs.Node) -> Sizes:
    """A product of a number of units and others is in proportion to it."""
    parts = [entries_of(walk, tensor) for tensor in node.inputs]
    size = max(len(part) for part in parts)
    return tuple(map(_only, zip(*(p * (size // len(p)) for p in parts), strict=True)))


def _quotient(walk: Walk, node: gs.Node) -> Sizes:
    if node.inputs[1].name in walk.sizes:
        raise NotFollowed("it divides by the number of units")
    return _product(walk, node)


def _whole_product(walk: Walk, node: gs.Node) -> Sizes:
    return (_only(entries_of(walk, node.inputs[0])),)


def _only(factors: tuple[np.ndarray | None, ...]) -> np.ndarray | None:
    """The one factor that is a number of units, if one is."""
    found = [x for x in factors if x is not None]
    if len(found) > 1:
        raise NotFollowed("it multiplies numbers of units")
    return found[0] if found else None


_RULES: dict[str, Rule] = {
    "Identity": _moved,
    "Squeeze": _moved,
    "Unsqueeze": _moved,
    "Reshape": _moved,
    "Cast": _cast,
    "Gather": _gathered,
    "Slice": _sliced,
    "Concat": _concatenated,
    "Mul": _product,
    "Div": _quotient,
    "ReduceProd": _whole_product,
}
