"""Operators that move, select, repeat or sum elements without changing them.

Two generic rules. What only changes the shape is reshaped back. What selects elements is run on
an index tensor, and the adjoint is scatter-added there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.convolution import merge_probes
from onnx_ecp.gradients.rules.registry import (
    Unsupported,
    constant,
    known,
    nonnegative,
    only,
    optional_input,
    rule,
)
from onnx_ecp.graph.builder import Builder


@rule("Flatten", "Reshape", "Squeeze", "Unsqueeze")
def _reshape(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    return op.reshape_like(only(node, g, i, 0), g[0], node.inputs[0])


@rule("Optional", "OptionalGetElement")
def _same(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    return only(node, g, i, 0)


@rule("Transpose")
def _transpose(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    perm = node.attrs.get("perm", [*reversed(range(op.rank(node.inputs[0])))])
    return op.Transpose(g[0], perm=[0, *(1 + int(a) for a in np.argsort(perm))])


@rule("Expand")
def _expand(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    return op.unbroadcast(only(node, g, i, 0), node.inputs[0], of=node.outputs[0])


@rule("Concat")
def _concat(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    axis = nonnegative(node.attrs["axis"], op.rank(node.outputs[0]))
    ends = [op.Shape(x, start=axis, end=axis + 1) for x in node.inputs[: i + 1]]
    start = op.ReduceSum(op.Concat(*ends[:-1], axis=0), [0], keepdims=1) if i else op.const([0])
    return op.Slice(g[0], start, op.Add(start, ends[-1]), [axis + 1])


@rule("Split")
def _split(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    any_g = next(x for x in g if x is not None)
    axis = nonnegative(node.attrs.get("axis", 0), op.rank(node.inputs[0]))
    parts = [op.zeros(any_g, y) if x is None else x for x, y in zip(g, node.outputs, strict=True)]
    return op.Concat(*parts, axis=axis + 1)


@rule("Slice")
def _slice(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """Zeros around the adjoint; with steps, the index rule."""
    x, y, adjoint = node.inputs[0], node.outputs[0], only(node, g, i, 0)
    given, steps = optional_input(node, 3), optional_input(node, 4)
    axes = constant(given) if given is not None else np.arange(op.rank(x))
    if axes is None or (steps is not None and not _all_ones(constant(steps))):
        return _by_index(op, node, g, i)
    axes = np.array([nonnegative(int(a), op.rank(x)) for a in axes.ravel()], np.int64)
    starts = constant(node.inputs[1])
    if starts is not None:
        axes = axes[: starts.size]
    sizes, kept = (op.Gather(op.shape_of(t), axes) for t in (x, y))
    start = op.cast(node.inputs[1], np.int64)
    start = op.Where(op.Less(start, 0), op.Add(start, sizes), start)
    before = op.Max(op.Min(start, sizes), 0)
    after = op.Sub(op.Sub(sizes, kept), before)
    return op.pad(adjoint, op.rank(x) + 1, axes + 1, op.Concat(before, after, axis=0))


def _all_ones(steps: np.ndarray | None) -> bool:
    return steps is not None and bool((steps == 1).all())


@rule("Pad")
def _pad(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """Negative padding takes away what was added."""
    if node.attrs.get("mode", "constant") != "constant":
        return _by_index(op, node, g, i)
    given = optional_input(node, 3)
    axes = np.arange(op.rank(node.inputs[0])) if given is None else known(given, "axes")
    rank = op.rank(node.inputs[0])
    own = [1 + nonnegative(int(a), rank) for a in axes]
    return op.pad(only(node, g, i, 0), rank + 1, own, op.Neg(node.inputs[1]))


@rule("Trilu")
def _trilu(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    return op.Trilu(only(node, g, i, 0), *node.inputs[1:], upper=node.attrs.get("upper", 1))


@rule("CumSum")
def _cumsum(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    axis = nonnegative(int(known(node.inputs[1], "axis").item()), op.rank(node.inputs[0]))
    backward, exclusive = 1 - node.attrs.get("reverse", 0), node.attrs.get("exclusive", 0)
    return op.CumSum(only(node, g, i, 0), axis + 1, reverse=backward, exclusive=exclusive)


@rule("TopK")
def _topk(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    x, indices = node.inputs[0], op.further_output(node, 1, np.int64)
    axis = nonnegative(node.attrs.get("axis", -1), op.rank(x))
    places = op.Expand(indices, op.shape_of(g[0]))
    return op.ScatterElements(op.zeros(g[0], x), places, g[0], axis=axis + 1)


@rule("DepthToSpace")
def _depth_to_space(
    op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int
) -> gs.Tensor | None:
    (x,), (y,), block = node.inputs, node.outputs, node.attrs["blocksize"]
    images = op.SpaceToDepth(merge_probes(op, g[0], y), blocksize=block)
    if node.attrs.get("mode", "DCR") == "CRD":
        # SpaceToDepth puts the place in the block first, CRD the channel.
        images = op.Reshape(images, [0, block * block, op.shape(y)[1], -1])
        images = op.Transpose(images, perm=[0, 2, 1, 3])
    return op.reshape_like(images, g[0], x)


@rule("SpaceToDepth")
def _space_to_depth(
    op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int
) -> gs.Tensor | None:
    (x,), (y,) = node.inputs, node.outputs
    images = op.DepthToSpace(merge_probes(op, g[0], y), **node.attrs)
    return op.reshape_like(images, g[0], x)


@rule("Compress", "Gather", "GatherElements", "GatherND", "ReverseSequence", "Tile")
def _by_index(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """Run the operator on the numbers 0, 1, 2, ... of its elements to see where they went."""
    x = node.inputs[0]
    origin = op.op(node.op, element_numbers(op, x), *node.inputs[1:], **node.attrs)
    return scatter_add(op, only(node, g, i, 0), origin, x)


def element_numbers(op: Builder, x: gs.Tensor) -> Any:
    """The numbers 0, 1, 2, ... of the elements of x, in the shape of x; int64."""
    numbers = op.Range(op.const(0), op.Size(x), op.const(1))
    return op.Reshape(numbers, op.shape_of(x), allowzero=1)


def scatter_add(op: Builder, g: gs.Tensor, origin: gs.Tensor, x: gs.Tensor) -> Any:
    """The adjoint of x, where output element j with adjoint g[:, j] was element origin[j] of x."""
    probes = op.probes(g)
    empty = op.Reshape(op.zeros(g, x), op.Concat(probes, op.Reshape(op.Size(x), [1]), axis=0))
    flat = op.Flatten(g, axis=1)
    places = op.Expand(op.Reshape(origin, [1, -1]), op.shape_of(flat))
    return op.reshape_like(op.ScatterElements(empty, places, flat, axis=1, reduction="add"), g, x)


@rule("ScatterElements", "ScatterND")
def _scatter(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """Updates read the adjoint where they were written; overwritten data have none."""
    data, indices, updates = node.inputs
    reduction = node.attrs.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise Unsupported(f"reduction {reduction!r}")
    adjoint = only(node, g, i, 0, 2)
    if i == 0 and reduction == "add":
        return adjoint
    numbers = element_numbers(op, data)
    if node.op == "ScatterND":
        places = op.GatherND(numbers, indices)
    else:
        places = op.GatherElements(numbers, indices, axis=node.attrs.get("axis", 0))
    flat, places = op.Flatten(adjoint, axis=1), op.Reshape(places, [-1])
    if i == 2:
        return op.reshape_like(op.Gather(flat, places, axis=1), adjoint, updates)
    shape = op.Concat(op.probes(adjoint), op.Shape(places), axis=0)
    erased = op.ScatterElements(
        flat, op.Expand(places, shape), op.Expand(op.const(0.0, op.dtype(flat)), shape), axis=1
    )
    return op.reshape_like(erased, adjoint, data)
