"""Unit groups: which rows of which layers, and columns of which others, live and die together.

A unit is a hidden neuron, a channel or a head: a row of a layer (its producer), whatever stored
numbers belong to it on the way, and the columns of the layers that read it (its consumers). Units
are followed once along the graph; where an operator cannot be followed they stay, and the operator
is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.layers import Layer, Skip, preactivation
from onnx_ecp.layers.trace import Scope, Traced, main_scope
from onnx_ecp.layers.views import operator
from onnx_ecp.structure.marks import Axis
from onnx_ecp.structure.rules import RULES
from onnx_ecp.structure.walk import Count, Refused, Slot, Walk

STAYS = -1
"""In arrays of unit numbers: an entry that belongs to no unit that may be removed."""


@dataclass(frozen=True)
class Group:
    """Units that the same layers make and read.

    Args:
        producers: names of the layers that make them.
        consumers: names of the layers that read them.
        units: their numbers.
        width: rows of the first producer per unit: 1, or the size of a head.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: np.ndarray
    width: int

    @property
    def name(self) -> str:
        """The producers' names."""
        return " + ".join(self.producers)


@dataclass(frozen=True)
class Structure:
    """All units of a model that may be removed, numbered from 0.

    Args:
        groups: of units; every unit is in one.
        rows: by layer name, (out,), the unit of every row or STAYS.
        columns: by layer name, (in,), the unit of every column or STAYS.
        slots: stored tensors that shrink.
        counts: numbers in the graph that shrink.
        axes: by name of the tensors along which units lie, the unit of every entry or STAYS; their
            declared shapes are no longer right where units go.
        refusals: the layers whose rows stay, and why.
    """

    groups: tuple[Group, ...]
    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    slots: tuple[Slot, ...]
    counts: tuple[Count, ...]
    axes: dict[str, np.ndarray]
    refusals: tuple[Skip, ...]

    @property
    def units(self) -> int:
        """How many units there are."""
        return sum(len(group.units) for group in self.groups)

    def rows_kept(self, layer: str, keep: np.ndarray) -> np.ndarray:
        """(out,) bool: the rows of a layer that stay with the units ``keep`` (units,) bool."""
        return kept(self.rows[layer], keep)

    def columns_kept(self, layer: str, keep: np.ndarray) -> np.ndarray:
        """(in,) bool: the columns of a layer that stay."""
        return kept(self.columns[layer], keep)


def kept(units: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Which entries stay, given their units; entries of no unit do."""
    return np.asarray((units == STAYS) | np.append(keep, True)[units])


def find_structure(
    proto: onnx.ModelProto,
    layers: Sequence[Layer],
    shapes: Mapping[str, tuple[int, ...]],
    frozen: Mapping[str, str] | None = None,
) -> Structure:
    """Follow the units of all layers through the graph.

    Args:
        proto: the model in which the layers were found.
        layers: that may lose rows and columns; others are obstacles.
        shapes: of all tensors, from one run or from shape inference.
        frozen: by name, why a layer must keep its rows; it may lose columns.
    """
    walk = Walk(main_scope(proto), shapes)
    found = _Found(walk, {}, {})
    for node, layer in with_layers(walk.scope, layers):
        _visit(found, node, layer)
    _share(found, layers)
    for layer in layers:
        if frozen and layer.name in frozen:
            walk.marks.pin(found.rows[layer.name], frozen[layer.name])
    for tensor in walk.scope.graph.outputs:
        axis = walk.axis(tensor)
        if axis is not None:
            walk.marks.pin(axis.marks, f"they are the model's output {tensor.name!r}")
    return _numbered(found, layers)


def with_layers(scope: Scope, layers: Iterable[Layer]) -> list[tuple[gs.Node, Layer | None]]:
    """All nodes of a graph in order, each with the layer that it is, if it is one."""
    by_output = {layer.output: layer for layer in layers}
    found = []
    for node in scope.graph.nodes:
        outputs = [name for y in node.outputs for name in (y.name, preactivation(y.name))]
        found.append((node, next((by_output[x] for x in outputs if x in by_output), None)))
    return found


def column_slot(scope: Scope, node: gs.Node, layer: Layer) -> Slot:
    """Where the columns of a Gemm or MatMul layer are stored, each a unit of its own."""
    index, (_, axis) = weight_axes(node, layer)
    constant = scope.trace(node.inputs[index])
    assert isinstance(constant, Traced), "the weight of a layer is stored"
    return Slot(node.outputs[0].name, index, axis, constant, np.arange(layer.shape[1]))


@dataclass(frozen=True)
class _Found:
    """The walk, and the marks of rows and columns by layer name."""

    walk: Walk
    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]


def _visit(found: _Found, node: gs.Node, layer: Layer | None) -> None:
    """Follow units through one node; where that is refused all it reads stays."""
    walk = found.walk
    name = walk.scope.names[id(node)]
    for body in node.attrs.values():
        if isinstance(body, gs.Graph):
            inside = {x.name for n in body.nodes for x in n.inputs}
            inside |= {y.name for y in body.outputs}
            for axis in (walk.axes[x] for x in inside if x in walk.axes):
                walk.marks.pin(axis.marks, f"they are read inside {node.op} {name!r}")
    try:
        if layer is not None:
            walk.axes |= _follow_layer(found, node, layer)
        elif any(walk.axis(x) for x in node.inputs):
            follow = RULES.get(operator(node))
            if follow is None:
                raise Refused("units are not followed through this operator")
            walk.axes |= follow(walk, node)
    except Refused as refusal:
        reason = f"{node.op} {name!r}: {refusal}"
        for axis in filter(None, map(walk.axis, node.inputs)):
            walk.marks.pin(axis.marks, reason)


def _follow_layer(found: _Found, node: gs.Node, layer: Layer) -> dict[str, Axis]:
    """A layer reads units as columns and makes new ones as rows; a depthwise Conv passes them on.

    Rows and columns of every layer are known afterwards, whatever is refused.
    """
    walk, (out, width) = found.walk, layer.shape
    found.rows[layer.name] = rows = walk.marks.fresh(out)
    found.columns[layer.name] = columns = walk.marks.fresh(width)
    if node.op == "Attention":
        walk.marks.pin([*rows, *columns], f"{node.op} {layer.name!r}: its heads are not followed")
        raise Refused("its heads are not followed")
    data = next(x for x in node.inputs if x.name == layer.input)
    axis = walk.axis(data)
    at = units_axis(layer)
    place, output = (
        at if at > 0 else len(walk.shape(tensor)) + at for tensor in (data, node.outputs[0])
    )
    index, axes = weight_axes(node, layer)
    try:
        walk.slot(node, index, axes[0], rows)
        _follow_bias(walk, node, layer, rows)
    except Refused as refusal:
        walk.marks.pin(rows, f"{node.op} {layer.name!r}: {refusal}")
    if layer.groups > 1:
        walk.marks.pin(columns, "a group of channels is read as it is")
        _follow_groups(walk, node, layer, axis, rows)
    elif axis is None:
        walk.marks.pin(columns, "they are not made by a layer that is pruned")
    elif axis.index != place:
        walk.marks.pin(axis.marks, f"{node.op} {layer.name!r} reads another axis")
        walk.marks.pin(columns, "they are not made by a layer that is pruned")
    else:
        walk.marks.join(columns, np.repeat(axis.marks, width // len(axis.marks)))
        walk.slot(node, index, axes[1], axis.marks)
    return {node.outputs[0].name: Axis(output, rows)}


def is_conv(layer: Layer) -> bool:
    """Whether inputs and units are channels, on the second axis."""
    return layer.op in ("Conv", "FusedConv")


def units_axis(layer: Layer) -> int:
    """Where inputs lie in what a layer reads, and units in what it makes: from the end if < 0."""
    return 1 if is_conv(layer) else -len(layer.shift_shape)


def weight_axes(node: gs.Node, layer: Layer) -> tuple[int, tuple[int, int]]:
    """Which input is the weight, and its axes of rows and columns."""
    if is_conv(layer):
        return 1, (0, 1)
    left = node.inputs[0].name != layer.input
    turned = bool(node.attrs.get("transA" if left else "transB", 0))
    return (0 if left else 1), ((-2, -1) if left != turned else (-1, -2))


def _follow_bias(walk: Walk, node: gs.Node, layer: Layer, rows: np.ndarray) -> None:
    """What the operator itself adds: the bias, and the tensor Z of FusedConv."""
    conv = is_conv(layer)
    for index, tensor in enumerate(node.inputs[2:], 2):
        if not tensor.name:
            continue
        if conv and index == 2:
            walk.slot(node, index, 0, rows)
        elif conv:
            walk.meet(node, index, 1 - len(walk.shape(tensor)), rows)
        else:
            walk.meet(node, index, -1, rows)


def _follow_groups(
    walk: Walk, node: gs.Node, layer: Layer, axis: Axis | None, rows: np.ndarray
) -> None:
    """A grouped Conv: its rows are the units of its input if every channel is a group."""
    constant = walk.constant(node.inputs[1])
    depthwise = constant is not None and constant.seen_shape[1] == 1
    if axis is None or axis.index != 1 or not depthwise:
        reason = f"{node.op} {layer.name!r}: channels of a group are not followed"
        walk.marks.pin(rows, reason)
        if axis is not None:
            walk.marks.pin(axis.marks, reason)
        return
    walk.marks.join(rows, np.repeat(axis.marks, len(rows) // len(axis.marks)))
    walk.counts.append(Count(node.outputs[0].name, "group", 0, axis.marks))


def _share(found: _Found, layers: Sequence[Layer]) -> None:
    """Layers that share a stored tensor share the fate of its rows and columns."""
    first: dict[str, Layer] = {}
    for layer in layers:
        other = first.setdefault(layer.weight.tensor, layer)
        if other is not layer:
            found.walk.marks.join(found.rows[other.name], found.rows[layer.name])
            found.walk.marks.join(found.columns[other.name], found.columns[layer.name])


def _numbered(found: _Found, layers: Sequence[Layer]) -> Structure:
    """Marks to unit numbers: those that may go and that some layer reads."""
    walk = found.walk
    made, read = _by_root(walk, found.rows), _by_root(walk, found.columns)
    for root in made:
        if root not in read:
            walk.marks.pin([root], "no layer that is pruned reads them")
    free = [root for root in made if not walk.marks.reason(root)]
    number = {root: i for i, root in enumerate(sorted(free))}

    def units(marks: np.ndarray) -> np.ndarray:
        return np.array([number.get(walk.marks.root(m), STAYS) for m in marks.tolist()], int)

    members: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for root, unit in number.items():
        key = (tuple(dict.fromkeys(made[root])), tuple(dict.fromkeys(read[root])))
        members.setdefault(key, []).append(unit)
    roots = {unit: root for root, unit in number.items()}
    groups = tuple(
        Group(makers, readers, np.array(group), made[roots[group[0]]].count(makers[0]))
        for (makers, readers), group in members.items()
    )
    return Structure(
        groups,
        {name: units(marks) for name, marks in found.rows.items()},
        {name: units(marks) for name, marks in found.columns.items()},
        tuple(replace(slot, marks=units(slot.marks)) for slot in walk.slots),
        tuple(replace(count, marks=units(count.marks)) for count in walk.counts),
        {name: units(axis.marks) for name, axis in walk.axes.items()},
        tuple(_refusals(found, layers)),
    )


def _by_root(walk: Walk, marks: Mapping[str, np.ndarray]) -> dict[int, list[str]]:
    """By root, the name of the layer of every row or column that carries it."""
    found: dict[int, list[str]] = {}
    for name, entries in marks.items():
        for mark in entries.tolist():
            found.setdefault(walk.marks.root(mark), []).append(name)
    return found


def _refusals(found: _Found, layers: Sequence[Layer]) -> list[Skip]:
    """Layers of which no row can go, with the reason for the first one."""
    refused = []
    for layer in layers:
        reasons = [found.walk.marks.reason(mark) for mark in found.rows[layer.name].tolist()]
        if all(reasons):
            refused.append(Skip(layer.name, layer.op, f"its units stay: {reasons[0]}"))
    return refused
