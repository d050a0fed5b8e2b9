"""How units pass through operators: one entry per operator, one function per kind.

A rule gets the walk and a node with at least one input that has units. It returns the axes of the
outputs that have units, notes stored tensors and counts that must shrink with them, joins units
that share their fate, or raises ``NotFollowed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.graph.operators import MICROSOFT, OPERATORS, Moves, find, moving
from onnx_ecp.layers import Skip, layer_of
from onnx_ecp.layers.views import operator
from onnx_ecp.units.propagation import Count, NotFollowed, Parts, Walk
from onnx_ecp.units.shape_values import entries_of, known_values, of_shape
from onnx_ecp.units.union_find import Axis

Outputs = dict[str, Axis]
Rule = Callable[[Walk, gs.Node], Outputs]

RULES: dict[tuple[str, str], Rule] = {}


def rule(*op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register a function as the rule of some operators."""

    def register(function: Rule) -> Rule:
        RULES.update({(domain, op): function for op in op_types})
        return function

    return register


def _followed(walk: Walk, node: gs.Node) -> list[tuple[gs.Tensor, Axis]]:
    """The inputs of a node that have units."""
    pairs = ((tensor, walk.axis(tensor)) for tensor in node.inputs)
    return [(tensor, axis) for tensor, axis in pairs if axis is not None]


def _data(walk: Walk, node: gs.Node) -> Axis:
    """The units of the first input of an operator that may have them in no other."""
    followed = _followed(walk, node)
    if len(followed) != 1 or followed[0][0] is not node.inputs[0]:
        raise NotFollowed("its parameters are computed from units")
    return followed[0][1]


@rule(*(op for (domain, op), row in OPERATORS.items() if row.elementwise and not domain))
@rule(
    *(op for (domain, op), row in OPERATORS.items() if row.elementwise and domain),
    domain=MICROSOFT,
)
def elementwise(walk: Walk, node: gs.Node) -> Outputs:
    """Entry by entry, with broadcasting: units that meet are joined."""
    out, entrywise = node.outputs[0], find(*operator(node)).elementwise
    if any(walk.axis(x) is not None for x in node.inputs[entrywise:]):
        raise NotFollowed("its parameters are computed from units")
    places = {axis.index - len(walk.shape(x)) for x, axis in _followed(walk, node)}
    if len(places) != 1:
        raise NotFollowed("it combines units of different axes")
    place, rank = places.pop(), len(walk.shape(out))
    marks = max((axis.marks for _, axis in _followed(walk, node)), key=len)
    if walk.shape(out)[place] != len(marks):
        raise NotFollowed("it repeats its units")
    for index, tensor in enumerate(node.inputs[:entrywise]):
        if tensor.name:
            walk.meet(node, index, place, marks)
    return {out.name: Axis(rank + place, marks)}


@rule("BatchNormalization", "InstanceNormalization")
def per_channel(walk: Walk, node: gs.Node) -> Outputs:
    """Parameters of one entry per channel, which is axis 1."""
    axis = _data(walk, node)
    if axis.index != 1 or len(node.outputs) > 1:
        raise NotFollowed("its channels are not the units, or it is in training mode")
    for index in range(1, len(node.inputs)):
        walk.slot(node, index, 0, axis.marks)
    return {node.outputs[0].name: axis}


@rule(
    *("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"),
    *("Resize", "Upsample"),
)
def spatial(walk: Walk, node: gs.Node) -> Outputs:
    """Every channel on its own."""
    axis = _data(walk, node)
    shape = walk.shape(node.outputs[0])
    if len(node.outputs) > 1 and _are_places(walk, node.outputs[1]):
        walk.axes[node.outputs[1].name] = axis
    elif len(node.outputs) > 1:
        readers = [f"{x.op} {walk.scope.names[id(x)]!r}" for x in node.outputs[1].outputs]
        by = f", read by {' and '.join(readers)}," if readers else ""
        raise NotFollowed(f"its indices{by} count all channels")
    if axis.index != 1 or shape[1] != len(axis.marks):
        raise NotFollowed("it moves over the axis of the units")
    if node.op == "Resize" and len(node.inputs) > 3 and node.inputs[3].name:
        named = [int(a) % len(shape) for a in node.attrs.get("axes", range(len(shape)))]
        if 1 in named:
            _note_size(walk, node, 3, named.index(1), axis.marks)
    return {node.outputs[0].name: axis}


def _are_places(walk: Walk, indices: gs.Tensor) -> bool:
    """Whether the indices of a MaxPool say nothing but where a MaxUnpool puts its channels."""
    places = [(x.op, i) for x in indices.outputs for i, y in enumerate(x.inputs) if y is indices]
    output = any(y is indices for y in walk.scope.graph.outputs)
    return not output and set(places) <= {("MaxUnpool", 1)}


@rule("MaxUnpool")
def unpools(walk: Walk, node: gs.Node) -> Outputs:
    """Puts every channel where the MaxPool of the same channel found it."""
    axis, places = walk.axis(node.inputs[0]), walk.axis(node.inputs[1])
    if axis is None or places is None or axis.index != 1 or len(axis.marks) != len(places.marks):
        raise NotFollowed("its indices count all channels")
    if len(node.inputs) > 2 and node.inputs[2].name:
        raise NotFollowed("its output has a size of its own")
    walk.marks.join(axis.marks, places.marks)
    return {node.outputs[0].name: axis}


def _note_size(walk: Walk, node: gs.Node, index: int, entry: int, marks: np.ndarray) -> None:
    """Remember that an input names sizes of the result, and one of them the number of units.

    Raises:
        NotFollowed: it names another size by a number of units.
    """
    sizes = node.inputs[index]
    counted = entries_of(walk, sizes)
    if sizes.name in walk.computed or any(
        x is not None for i, x in enumerate(counted) if i != entry
    ):
        raise NotFollowed("it computes a size from the number of units")
    follows = counted[entry]
    if follows is None or not _in_proportion(walk, follows, marks):
        numbers = (0,) * len(counted)
        walk.counts.append(Count(node.outputs[0].name, "part", entry, marks, numbers))


@rule("Expand")
def expand(walk: Walk, node: gs.Node) -> Outputs:
    """Repeats entries along other axes than the units'."""
    axis, out = _data(walk, node), walk.shape(node.outputs[0])
    place = axis.index - len(walk.shape(node.inputs[0]))
    if out[place] != len(axis.marks):
        raise NotFollowed("it repeats a unit")
    entries = int(np.prod(walk.shape(node.inputs[1])))
    if entries >= -place:
        numbers = walk.integers(node.inputs[1])
        if numbers is None or numbers[place] != 1:
            _note_size(walk, node, 1, entries + place, axis.marks)
    elif any(x is not None for x in entries_of(walk, node.inputs[1])):
        raise NotFollowed("it computes a size from the number of units")
    return {node.outputs[0].name: Axis(len(out) + place, axis.marks)}


@rule("GroupNormalization")
def normalises_groups(walk: Walk, node: gs.Node) -> Outputs:
    """Reads the channels of a group together: whole groups go."""
    axis, groups = _data(walk, node), int(node.attrs["num_groups"])
    if axis.index != 1:
        raise NotFollowed("its channels are not the units")
    members = axis.marks.reshape(groups, -1).T
    for other in members[1:]:
        walk.marks.join(members[0], other)
    for index in (1, 2):
        of_channels = walk.shape(node.inputs[index])[0] == len(axis.marks)
        walk.slot(node, index, 0, axis.marks if of_channels else members[0])
    walk.counts.append(Count(node.outputs[0].name, "num_groups", 0, members[0]))
    return {node.outputs[0].name: axis}


@rule("CumSum")
def sums_along(walk: Walk, node: gs.Node) -> Outputs:
    """Sums along an axis that is not the units'."""
    axis, along = _data(walk, node), walk.integers(node.inputs[1])
    if along is None or along[0] % len(walk.shape(node.inputs[0])) == axis.index:
        raise NotFollowed("it sums over units, or over an axis that is not a constant")
    return {node.outputs[0].name: axis}


@rule("DepthToSpace", "SpaceToDepth")
def depth_and_space(walk: Walk, node: gs.Node) -> Outputs:
    """Channels become blocks of pixels, which share a fate, or blocks channels."""
    axis, square = _data(walk, node), int(node.attrs["blocksize"]) ** 2
    if axis.index != 1:
        raise NotFollowed("its channels are not the units")
    if node.op == "SpaceToDepth":
        return {node.outputs[0].name: Axis(1, np.tile(axis.marks, square))}
    crd = node.attrs.get("mode", "DCR") in ("CRD", b"CRD")
    blocks = axis.marks.reshape((-1, square) if crd else (square, -1))
    first, *others = blocks.T if crd else blocks
    for other in others:
        walk.marks.join(first, other)
    return {node.outputs[0].name: Axis(1, first)}


@rule("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization")
def normalises_the_rest(walk: Walk, node: gs.Node) -> Outputs:
    """Reads all entries of some axes together; units on another one do not meet."""
    axis = _data(walk, node)
    if axis.index in _together(walk, node):
        raise NotFollowed("it normalises over units, so that each one acts on all")
    return {node.outputs[0].name: axis}


def _together(walk: Walk, node: gs.Node) -> frozenset[int]:
    """The axes that a normalising operator takes together."""
    imports = walk.scope.proto.opset_import
    opset = next(o.version for o in imports if o.domain in ("", "ai.onnx"))
    axes = find(*operator(node)).together
    assert axes is not None, "the table says so of all that normalise"
    return axes(node.attrs, len(walk.shape(node.inputs[0])), opset)


@rule(*(f"Reduce{kind}" for kind in ("Max", "Mean", "Min", "Prod", "Sum", "SumSquare", "L1", "L2")))
def reduction(walk: Walk, node: gs.Node) -> Outputs:
    """Over axes that are not the units'."""
    axis, rank = _data(walk, node), len(walk.shape(node.inputs[0]))
    axes = walk.numbers(node, "axes", 1)
    if axes is None:
        raise NotFollowed("it reduces over units, or over axes that are not constants")
    gone = {a % rank for a in axes}
    if axis.index in gone:
        return _summed(walk, node, axis)
    before = sum(a < axis.index for a in gone)
    shift = 0 if node.attrs.get("keepdims", 1) else before
    return {node.outputs[0].name: Axis(axis.index - shift, axis.marks)}


# Reductions to which an entry that is zero adds nothing.
_SUMS = frozenset(("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"))


def _summed(walk: Walk, node: gs.Node, axis: Axis) -> Outputs:
    """A sum over units reads them, as a layer does: one that is zero adds nothing to it."""
    if node.op not in _SUMS or walk.inside:
        raise NotFollowed("it reduces over units")
    if node.inputs[0].name not in walk.silent:
        raise NotFollowed("it sums over units that are not zero without their weights")
    walk.summed.append((axis.marks, f"{node.op} {walk.scope.names[id(node)]!r}"))
    return {}


# Operators that make zero of operands that are all zero, and are not in the table for one that is.
_OF_ZEROS = frozenset(("Add", "Concat", "Max", "Mean", "Min", "Sub", "Sum", "Where"))


def is_silent(walk: Walk, node: gs.Node) -> bool:
    """Whether entries of a node's outputs are zero where those of all units that it reads are."""
    (domain, op), known = operator(node), find(*operator(node))
    if any(i < len(node.inputs) and node.inputs[i].name in walk.silent for i in known.zeros):
        return True
    operands = node.inputs[1:] if op == "Where" else node.inputs
    return not domain and op in _OF_ZEROS and all(x.name in walk.silent for x in operands)


@rule("Transpose")
def transpose(walk: Walk, node: gs.Node) -> Outputs:
    """The axis moves."""
    axis, rank = _data(walk, node), len(walk.shape(node.inputs[0]))
    perm = list(node.attrs.get("perm", range(rank)[::-1]))
    return {node.outputs[0].name: Axis(perm.index(axis.index), axis.marks)}


# Every element of a tensor gets a mark of eight bytes while a Reshape is followed.
_MOST_MARKED = 2**27


@rule("Flatten", "Squeeze", "Unsqueeze", "Reshape")
def reshape(walk: Walk, node: gs.Node) -> Outputs:
    """Units repeat where their axis is merged, and are joined where it is split.

    Of a split axis the first part counts: (heads * size) to (heads, size) makes each head a unit;
    but not where it is set apart, as in (3, heads, size) and in a channel shuffle: then the next.
    Inside heads it is the last one: a unit is a dimension of all heads.
    """
    axis = _data(walk, node)
    old, new = walk.shape(node.inputs[0]), walk.shape(node.outputs[0])
    if math.prod(old) != math.prod(new) or old[axis.index] != len(axis.marks):
        raise NotFollowed(f"shapes {old} and {new} contradict each other")
    if math.prod(old) > _MOST_MARKED:
        raise NotFollowed("it is too large to tell what becomes of every element")
    along = [1] * len(old)
    along[axis.index] = len(axis.marks)
    marks = np.broadcast_to(axis.marks.reshape(along), old).reshape(new)
    varying = [i for i in range(len(new)) if np.any(marks != marks.take([0], axis=i))]
    if not varying:
        raise NotFollowed("it hides the axis of a single unit")
    apart = [_is_set_apart(walk, node.outputs[0], *pair) for pair in pairwise(varying)]
    if walk.inside and any(apart):
        return _put_side_by_side(walk, node, marks, varying, apart)
    index = varying[-1] if walk.inside else varying[sum(takewhile(bool, apart))]
    if index == 0 and not _follows_samples(marks.reshape(len(marks), -1)[:, 0], axis):
        raise NotFollowed("it merges units with the axis of samples")
    marks = marks[tuple(slice(None) if i in varying else slice(1) for i in range(len(new)))]
    first, *others = np.moveaxis(marks, index, 0).reshape(new[index], -1).T
    for other in others:
        walk.marks.join(first, other)
    if walk.inside and others:
        walk.heads += first.tolist()
    if node.op == "Reshape":
        _note_target(walk, node, index, first, [i for i in varying if i != index])
    return {node.outputs[0].name: Axis(index, first)}


def _follows_samples(marks: np.ndarray, axis: Axis) -> bool:
    """Whether an axis holds the units of one sample, then those of the next one."""
    return np.array_equal(marks, np.resize(axis.marks, len(marks)))


def _put_side_by_side(
    walk: Walk, node: gs.Node, marks: np.ndarray, varying: Sequence[int], apart: Sequence[bool]
) -> Outputs:
    """Queries, keys and values as (3, heads, size): each has dimensions, of which the same go.

    Args:
        walk: the walk, inside heads.
        node: what makes the parts, of one axis.
        marks: of its output, in its shape.
        varying: the axes that it made.
        apart: by pairs of them, whether the first is read entry by entry.
    """
    if not apart[0] or any(apart[1:]):
        raise NotFollowed("it puts parts side by side that are read one by one")
    parts, index = varying[0], varying[-1]
    marks = marks[tuple(slice(None) if i in varying else slice(1) for i in range(marks.ndim))]
    size = marks.shape[index]
    by_part = np.moveaxis(marks, (parts, index), (0, 1)).reshape(marks.shape[parts], size, -1)
    for own in by_part:
        first, *others = own.T
        for other in others:
            walk.marks.join(first, other)
        walk.heads += first.tolist()
    firsts = by_part[:, :, 0]
    walk.parts[node.outputs[0].name] = Parts(parts, index, firsts)
    walk.coupled.append(firsts)
    if node.op == "Reshape":
        _note_target(walk, node, index, firsts[0], [i for i in varying if i != index])
    return {}


def follow_parts(walk: Walk, node: gs.Node) -> Outputs:
    """Through an operator that moves parts, or takes one of them.

    Raises:
        NotFollowed: it does something else.
    """
    own, rank = walk.parts.get(node.inputs[0].name), len(walk.shape(node.inputs[0]))
    if own is None or node.domain:
        raise NotFollowed("it reads queries, keys and values together")
    if node.op == "Transpose":
        perm = list(node.attrs.get("perm", range(rank)[::-1]))
        moved = Parts(perm.index(own.parts), perm.index(own.index), own.marks)
        walk.parts[node.outputs[0].name] = moved
        return {}
    along = int(node.attrs.get("axis", 0)) % rank
    if node.op == "Split" and along == own.parts and len(node.outputs) == len(own.marks):
        pairs = zip(node.outputs, own.marks, strict=True)
        return {y.name: Axis(own.index, part) for y, part in pairs if y.name}
    chosen = walk.integers(node.inputs[1]) if node.op == "Gather" else None
    if chosen is None or along != own.parts or len(chosen) != 1:
        raise NotFollowed("it reads queries, keys and values together")
    gone = not walk.shape(node.inputs[1]) and along < own.index
    return {node.outputs[0].name: Axis(own.index - gone, own.marks[chosen[0]])}


# How many operators behind a Reshape are looked at.
_AHEAD = 12


def _is_set_apart(walk: Walk, tensor: gs.Tensor, axis: int, beside: int) -> bool:
    """Whether entries of an axis are read one by one, or normalised, summed or shuffled.

    Such an axis holds parts (queries, keys and values; branches; groups of a shuffle), of which
    each loses the same units, and not units.

    Args:
        walk: the walk.
        tensor: what a Reshape makes.
        axis: of it, the part of a split axis that is in front.
        beside: the next part.
    """
    waiting, seen = [(tensor, axis, beside)], 0
    while waiting and seen < _AHEAD:
        tensor, axis, beside = waiting.pop()
        for node in tensor.outputs:
            seen += 1
            rank, op = len(walk.shape(tensor)), node.op
            if node.domain or not node.outputs:
                continue
            if op == "Transpose":
                perm = list(node.attrs.get("perm", range(rank)[::-1]))
                if {axis, beside} - set(perm):
                    raise NotFollowed("its perm is none of these axes")
                waiting.append((node.outputs[0], perm.index(axis), perm.index(beside)))
            elif op in ("Softmax", "LogSoftmax"):
                if axis in _together(walk, node):
                    return True
                waiting.append((node.outputs[0], axis, beside))
            elif op in ("Gather", "Split") and int(node.attrs.get("axis", 0)) % rank == axis:
                return True
            elif op in ("Slice", "ReduceSum", "ReduceMean", "ReduceMax"):
                axes = walk.numbers(node, "axes", 3 if op == "Slice" else 1)
                return axes is not None and axis in {a % rank for a in axes}
            elif op == "Reshape":
                merged = len(walk.shape(node.outputs[0])) < rank
                if merged and beside == axis - 1:
                    return True
            elif find("", op).elementwise and len(walk.shape(node.outputs[0])) == rank:
                waiting.append((node.outputs[0], axis, beside))
    return False


def _note_target(
    walk: Walk, node: gs.Node, index: int, marks: np.ndarray, beside: Sequence[int]
) -> None:
    """Remember the entries of a Reshape's target that are wrong once units went.

    What is computed from shapes may follow the units, or those of another tensor that keeps its
    size; where it cannot be relied on, a number takes its place.

    Args:
        walk: the walk.
        node: a Reshape.
        index: of the units' axis behind it.
        marks: of its entries.
        beside: indices of the other axes that the units' axis was split into: they stay.
    """
    name, shape = node.outputs[0].name, walk.shape(node.outputs[0])
    numbers = walk.numbers(node, "shape", 1)
    if numbers is not None:
        if numbers[index] > 0:
            walk.counts.append(Count(name, "shape", index, marks, tuple(numbers)))
        return
    if node.inputs[1].name in walk.computed:
        raise NotFollowed("its target shape is computed in a way that is not followed")
    target, counted = _target(walk, node.inputs[1], len(shape)), entries_of(walk, node.inputs[1])
    number, axis, follows = target[index], walk.axis(node.inputs[0]), counted[index]
    assert axis is not None, "a Reshape of units"
    split = len(axis.marks) == np.prod([shape[i] for i in (index, *beside)])
    for i, other in enumerate(counted):
        if other is None or i == index:
            continue
        if i not in beside or not split:
            raise NotFollowed("the number of its units is the size of another axis")
        stays = walk.marks.fresh(shape[i])
        walk.marks.pin(stays, "another axis that heads were split into")
        walk.counts.append(Count(name, "stay", i, stays, shape))
    if isinstance(number, int) and number <= 0:
        return
    if not beside and follows is not None and _in_proportion(walk, follows, marks):
        return
    merged = not isinstance(number, int) and not split
    if merged and (
        beside or not all(_is_size(walk, x) for x in target[:index] + target[index + 1 :])
    ):
        raise NotFollowed("its target shape is computed in a way that is not followed")
    walk.counts.append(Count(name, "rest" if merged else "part", index, marks, shape))


# An entry of a target: its value, or the tensor of this one entry, or None where nobody knows.
_Entry: TypeAlias = int | gs.Tensor | None
# A target has an entry for every axis; there are not more of them.
_MOST_AXES = 64


def _target(walk: Walk, tensor: gs.Tensor, rank: int) -> list[_Entry]:
    """The entries of a computed target, as far as a Concat puts them together."""
    found = _entries(walk, tensor)
    return found if len(found) == rank else [None] * rank


def _entries(walk: Walk, tensor: gs.Tensor) -> list[_Entry]:
    found: list[_Entry] = []
    pending = [tensor]
    while pending:
        tensor = pending.pop()
        numbers = walk.integers(tensor)
        length = int(np.prod(walk.shape(tensor)))
        if numbers is not None:
            found += numbers
        elif tensor.inputs and tensor.inputs[0].op == "Concat" and length <= _MOST_AXES:
            pending += reversed(tensor.inputs[0].inputs)
        else:
            found += [tensor] if length == 1 else [None] * length
    return found


def _is_size(walk: Walk, entry: _Entry) -> bool:
    """Whether an entry of a target is surely not what stands for the rest."""
    if isinstance(entry, gs.Tensor):
        return walk.scope.is_of_shapes(entry) and not walk.scope.is_constant(entry)
    return entry is not None and entry >= 0


def _in_proportion(walk: Walk, counted: np.ndarray, marks: np.ndarray) -> bool:
    """Whether of two sets of entries the same share goes, whatever units go."""
    (first, *a), (second, *b) = (
        np.unique(walk.marks.roots(x), return_counts=True) for x in (counted, marks)
    )
    same = np.array_equal(first, second)
    return same and np.array_equal(a[0] * len(marks), b[0] * len(counted))


@rule("Concat")
def concat(walk: Walk, node: gs.Node) -> Outputs:
    """Side by side along the units' axis, or joined where it is another."""
    followed = _followed(walk, node)
    rank = len(walk.shape(node.outputs[0]))
    along = int(node.attrs["axis"]) % rank
    if any(axis.index != followed[0][1].index for _, axis in followed):
        raise NotFollowed("it combines units of different axes")
    index = followed[0][1].index
    if along == index:
        parts = [_marks_or_pinned(walk, tensor, along) for tensor in node.inputs]
        return {node.outputs[0].name: Axis(index, np.concatenate(parts))}
    for i in range(len(node.inputs)):
        walk.meet(node, i, index - rank, followed[0][1].marks)
    return {node.outputs[0].name: followed[0][1]}


def _marks_or_pinned(walk: Walk, tensor: gs.Tensor, along: int) -> np.ndarray:
    axis = walk.axis(tensor)
    if axis is not None:
        return axis.marks
    marks = walk.marks.fresh(walk.shape(tensor)[along])
    own = f"{tensor.name!r} is not made by a layer that is pruned"
    walk.marks.pin(marks, walk.ended.get(tensor.name, own))
    return marks


@rule("Split")
def split(walk: Walk, node: gs.Node) -> Outputs:
    """Parts of the units, or all units in every part."""
    axis, rank = _data(walk, node), len(walk.shape(node.inputs[0]))
    if int(node.attrs.get("axis", 0)) % rank != axis.index:
        return {y.name: axis for y in node.outputs if y.name}
    sizes = tuple(walk.shape(y)[axis.index] for y in node.outputs)
    parts = np.split(axis.marks, np.cumsum(sizes)[:-1])
    for entry, part in enumerate(parts):
        walk.counts.append(Count(node.outputs[0].name, "split", entry, part, sizes))
    return {y.name: Axis(axis.index, p) for y, p in zip(node.outputs, parts, strict=True) if y.name}


@rule("Slice")
def slices(walk: Walk, node: gs.Node) -> Outputs:
    """Cuts along other axes than the units', or takes consecutive units."""
    axis, rank = _data(walk, node), len(walk.shape(node.inputs[0]))
    starts, ends = (_bounds(walk, node, name, i) for i, name in ((1, "starts"), (2, "ends")))
    axes = walk.numbers(node, "axes", 3)
    if axes is None and len(node.inputs) > 3 and node.inputs[3].name:
        raise NotFollowed("it cuts along units")
    along = [a % rank for a in (range(len(starts)) if axes is None else axes)]
    counted = [any(True for _ in walk.marks_of(x.name)) for x in node.inputs[1:3]]
    if axis.index not in along:
        if any(counted):
            raise NotFollowed("it cuts another axis at a number of units")
        return {node.outputs[0].name: axis}
    entry, steps = along.index(axis.index), walk.numbers(node, "steps", 4)
    stepped = len(node.inputs) > 4 and bool(node.inputs[4].name)
    if stepped and (steps is None or steps[entry] != 1):
        raise NotFollowed("it takes units in steps")
    if None in starts or None in ends:
        raise NotFollowed("it cuts units at a number that is not known")
    name, length = node.outputs[0].name, len(axis.marks)
    first, last, _ = slice(starts[entry], ends[entry]).indices(length)
    if last <= first:
        raise NotFollowed("it cuts out nothing")
    for kind, bound, values, computed in zip(
        ("starts", "ends"), (first, last), (starts, ends), counted, strict=True
    ):
        sizes = tuple(int(x) for x in values if x is not None)
        if 0 < bound < length:
            walk.counts.append(Count(name, kind, entry, axis.marks[:bound], sizes))
        if computed:
            walk.counts.append(Count(name, kind, -1, axis.marks, sizes))
    return {name: Axis(axis.index, axis.marks[first:last])}


def _bounds(walk: Walk, node: gs.Node, name: str, index: int) -> list[int | None]:
    """Where a Slice begins or ends, by axis."""
    numbers = walk.numbers(node, name, index)
    return list(numbers) if numbers is not None else known_values(walk, node.inputs[index])


@rule("Gather")
def gather(walk: Walk, node: gs.Node) -> Outputs:
    """Picks along another axis than the units'."""
    axis, rank = _data(walk, node), len(walk.shape(node.inputs[0]))
    along = int(node.attrs.get("axis", 0)) % rank
    if along == axis.index:
        raise NotFollowed("it picks units by number")
    shift = len(walk.shape(node.inputs[1])) - 1 if along < axis.index else 0
    return {node.outputs[0].name: Axis(axis.index + shift, axis.marks)}


@rule("Pad")
def pad(walk: Walk, node: gs.Node) -> Outputs:
    """Adds entries along other axes than the units'."""
    axis, rank = _data(walk, node), len(walk.shape(node.inputs[0]))
    pads = walk.numbers(node, "pads", 1)
    if pads is None or len(pads) != 2 * rank or pads[axis.index] or pads[rank + axis.index]:
        raise NotFollowed("it adds entries to the units")
    return {node.outputs[0].name: axis}


@rule("Shape")
def shape_of(walk: Walk, node: gs.Node) -> Outputs:
    """Sizes follow by themselves when the model runs; what is made of them is followed, too."""
    found = of_shape(walk, node)
    if any(x is not None for x in found):
        walk.sizes[node.outputs[0].name] = found
    return {}


@rule("MatMul")
def product_of_activations(walk: Walk, node: gs.Node) -> Outputs:
    """A product of two activations: units on a batch axis, on a free axis, or summed over."""
    out, (left, right) = node.outputs[0], node.inputs
    ranks = [len(walk.shape(x)) for x in (left, right)]
    if any(walk.scope.is_constant(x) for x in (left, right)) or min(ranks) < 2:
        raise NotFollowed("it is a product that is not pruned")
    places = {x.name: a.index - len(walk.shape(x)) for x, a in _followed(walk, node)}
    here, there = places.get(left.name), places.get(right.name)
    rank = len(walk.shape(out))
    if (here, there) == (-1, -2):
        _meet_as_attention(walk, node)
        return {}
    roots = [walk.ended[x.name] for x in (left, right) if x.name in walk.ended]
    if (here, there) in ((-2, None), (None, -1)):
        ((_, axis),) = _followed(walk, node)
        return {out.name: Axis(rank + (here or -1), axis.marks)}
    place = here if here is not None else there
    if place is None or place > -3 or there not in (None, place):
        raise NotFollowed("it combines units of different axes", *roots[:1])
    marks = max((axis.marks for _, axis in _followed(walk, node)), key=len)
    for index in (0, 1):
        walk.meet(node, index, place, marks)
    return {out.name: Axis(rank + place, marks)}


def _meet_as_attention(walk: Walk, node: gs.Node) -> None:
    """Queries meet keys, and a softmax over the keys follows.

    A dimension of which neither has a weight any longer is then a constant over the keys, and does
    nothing: it may go.
    """
    query, key = (walk.axes[x.name].marks for x in node.inputs)
    if not walk.inside:
        raise NotFollowed("it sums over units")
    if not _softmax_follows(walk, node.outputs[0]):
        raise NotFollowed("it sums over units, and no softmax over the last axis follows")
    if not all(_is_steady(walk, tensor) for tensor in node.inputs):
        raise NotFollowed("its queries or keys are not just a layer with its bias")
    walk.products.append((query, key))
    walk.heads += query.tolist()


def _softmax_follows(walk: Walk, logits: gs.Tensor) -> bool:
    """Whether nothing reads a product but a Softmax over its last axis, behind scale and mask."""
    if not logits.outputs or any(y is logits for y in walk.scope.graph.outputs):
        return False
    return all(_is_softmax(walk, node, logits) for node in logits.outputs)


def _is_softmax(walk: Walk, node: gs.Node, logits: gs.Tensor) -> bool:
    domain, op = operator(node)
    others = [x for x in node.inputs if x is not logits]
    if domain:
        return False
    if op == "Softmax":
        return _together(walk, node) == {len(walk.shape(logits)) - 1}
    if op in ("Mul", "Div"):
        # A scale that is computed from shapes would follow the size of heads.
        scales = node.inputs[0] is logits or op == "Mul"
        numbers = all(walk.scope.is_constant(x) and np.prod(walk.shape(x)) == 1 for x in others)
        if not (others and scales and numbers):
            return False
    elif op not in ("Add", "Sub", "Where", "Cast", "Identity"):
        return False
    return _softmax_follows(walk, node.outputs[0])


_MOVES = moving(Moves.IN_ORDER, Moves.REORDERED, Moves.PICKED)


def _is_steady(walk: Walk, tensor: gs.Tensor) -> bool:
    """Whether rows of the layer in front, if they have no weights, are the same at all positions.

    Between it and here may stand moves, and stored vectors and numbers that meet the units.
    """
    while tensor.inputs:
        node = tensor.inputs[0]
        stored = [x for x in node.inputs if walk.scope.is_constant(x)]
        domain, op = operator(node)
        if not domain and (op in _MOVES or (op == "Gather" and len(stored) == 1)):
            tensor = node.inputs[0]
        elif not domain and op in ("Add", "Sub", "Mul", "Div") and len(stored) == 1:
            (data,) = (x for x in node.inputs if x is not stored[0])
            shape, axis = walk.shape(stored[0]), walk.axis(data)
            place = axis.index - len(walk.shape(data)) if axis is not None else 0
            if not all(size == 1 for i, size in enumerate(shape, -len(shape)) if i != place):
                return False
            tensor = data
        else:
            layer = layer_of(node, walk.scope)
            if layer is None or isinstance(layer, Skip):
                return False
            return layer.output == tensor.name and layer.groups == 1
    return False
