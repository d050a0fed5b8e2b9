"""Unit groups: which rows of which layers, and columns of which others, live and die together.

A unit is a hidden neuron, a channel or a head: a row of a layer (its producer), whatever stored
numbers belong to it on the way, and the columns of the layers that read it (its consumers). Units
are followed along the graph; where an operator cannot be followed they stay, and the operator is
named.

Heads have units inside them, too: one dimension of every head, so that all heads stay equally wide.
These are followed on a second walk. A row then belongs to a head and to a dimension, and stays
while both do. Dimensions of queries and keys have no consumer: they meet in the product of both,
and one that is constant over the keys adds what the softmax behind it does not feel.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.layers import Layer, Skip, preactivation
from onnx_ecp.layers.trace import Scope, Traced, main_scope
from onnx_ecp.layers.views import operator
from onnx_ecp.units.propagation import Count, NotFollowed, Slot, Walk
from onnx_ecp.units.rules import RULES, follow_parts, is_silent
from onnx_ecp.units.shape_values import computes_integers, follow_sizes
from onnx_ecp.units.union_find import Axis

Key = TypeVar("Key", bound=Hashable)

STAYS = -1
"""In arrays of unit numbers: an entry that belongs to no unit that may be removed."""


@dataclass(frozen=True)
class Group:
    """Units that the same layers make and read.

    Args:
        producers: names of the layers that make them.
        consumers: names of the layers, or sums, that read them; none where queries meet keys.
        units: their numbers.
        width: rows of the first producer per unit: 1, the size of a head, or the number of heads.
        entries: rows, or columns, per unit of the layer that has the fewest.
        inside: whether they are dimensions of heads.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: np.ndarray
    width: int
    entries: int = 1
    inside: bool = False

    @property
    def name(self) -> str:
        """The producers' names."""
        return " + ".join(self.producers)


@dataclass(frozen=True)
class Structure:
    """All units of a model that may be removed, numbered from 0.

    Where there are units of one kind only, atoms are units.

    Args:
        groups: of units; every unit is in one.
        atoms: (atoms + 1, kinds of units), the units that an atom belongs to or STAYS; it stays
            while all of them do. The last row is that of entries which belong to none.
        rows: by layer name, (out,), the atom of every row or STAYS.
        columns: by layer name, (in,), the atom of every column or STAYS.
        slots: stored tensors that shrink.
        counts: numbers in the graph that shrink.
        axes: by name of the tensors along which units lie, the axis with the unit of every entry or
            STAYS; their declared shapes are no longer right where units go.
        parts: units of which one must stay, set by set: all that lie along one axis.
        queries: by layer name, (out,) bool: rows that a product of activations takes as queries.
        keys: likewise, those that it takes as keys.
        silent: likewise, those that a sum over units reads: they are to be zero where units go.
        refusals: the layers whose rows stay, or whose heads keep their width, and why.
    """

    groups: tuple[Group, ...]
    atoms: np.ndarray
    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    slots: tuple[Slot, ...]
    counts: tuple[Count, ...]
    axes: dict[str, Axis]
    parts: tuple[np.ndarray, ...]
    queries: dict[str, np.ndarray]
    keys: dict[str, np.ndarray]
    silent: dict[str, np.ndarray]
    refusals: tuple[Skip, ...]

    @property
    def units(self) -> int:
        """How many units there are."""
        return sum(len(group.units) for group in self.groups)

    def units_at(self, atoms: np.ndarray) -> np.ndarray:
        """(kinds of units, entries): the units of entries, given their atoms (entries,)."""
        return np.asarray(self.atoms[atoms].T)

    def kept(self, atoms: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """(entries,) bool: those that stay with the units ``keep`` (units,) bool."""
        return np.append(keep, True)[self.units_at(atoms)].all(axis=0)  # type: ignore[no-any-return]

    def rows_kept(self, layer: str, keep: np.ndarray) -> np.ndarray:
        """(out,) bool: the rows of a layer that stay with the units ``keep`` (units,) bool."""
        return self.kept(self.rows[layer], keep)

    def columns_kept(self, layer: str, keep: np.ndarray) -> np.ndarray:
        """(in,) bool: the columns of a layer that stay."""
        return self.kept(self.columns[layer], keep)

    def dimensions(self, layer: str) -> np.ndarray:
        """(out,): the units inside heads that the rows of a layer belong to, or STAYS."""
        return np.asarray(self.units_at(self.rows[layer])[-1])

    def rows_read(self, layer: str, keep: np.ndarray) -> np.ndarray:
        """(out,) bool: all rows, but for those of units that go which no layer's columns read."""
        met = self.queries[layer] | self.keys[layer] | self.silent[layer]
        return ~met | self.kept(self.rows[layer], keep)

    @property
    def summed(self) -> np.ndarray:
        """(units,) bool: those that a sum over units reads."""
        found = np.zeros(self.units, np.bool_)
        for name, rows in self.silent.items():
            units = self.units_at(self.rows[name][rows])
            found[units[units >= 0]] = True
        return found


def find_structure(
    proto: onnx.ModelProto,
    layers: Sequence[Layer],
    shapes: Mapping[str, tuple[int, ...]],
    frozen: Mapping[str, str] | None = None,
    *,
    inside: bool = True,
) -> Structure:
    """Follow the units of all layers through the graph.

    Args:
        proto: the model in which the layers were found.
        layers: that may lose rows and columns; others are obstacles.
        shapes: of all tensors, from one run or from shape inference.
        frozen: by name, why a layer must keep its rows; it may lose columns.
        inside: whether heads have units inside them.
    """
    scope = main_scope(proto)
    walks = [Walk(scope, shapes)] + [Walk(scope, shapes, inside=True)] * inside
    return _numbered([_followed(walk, layers, frozen or {}) for walk in walks], layers)


def _followed(walk: Walk, layers: Sequence[Layer], frozen: Mapping[str, str]) -> _Found:
    """Everything that one walk finds, with the reasons why units stay."""
    found = _Found(walk, {}, {}, {}, {}, biased=_biased(layers))
    for node, layer in with_layers(walk.scope, layers):
        _visit(found, node, layer)
    for layer in layers:
        if layer.name not in found.rows:
            found.rows[layer.name] = walk.marks.fresh(layer.shape[0])
            found.columns[layer.name] = walk.marks.fresh(layer.shape[1])
            both = np.concatenate([found.rows[layer.name], found.columns[layer.name]])
            walk.marks.pin(both, "it is inside a local function or an If")
    _share(found, layers)
    _meet(found, layers)
    for layer in layers:
        if layer.name in frozen:
            walk.marks.pin(found.rows[layer.name], frozen[layer.name])
    for tensor in walk.scope.graph.outputs:
        for marks in walk.marks_of(tensor.name):
            walk.marks.pin(marks, f"they are the model's output {tensor.name!r}")
    if walk.inside:
        heads = walk.marks.roots(walk.heads)
        for rows in found.rows.values():
            walk.marks.pin(rows[~np.isin(walk.marks.roots(rows), heads)], "they are in no head")
    return found


def with_layers(scope: Scope, layers: Iterable[Layer]) -> list[tuple[gs.Node, Layer | None]]:
    """All nodes of a graph in order, each with the layer that it is, if it is one.

    Layers inside local functions and constant Ifs are no nodes of the graph.
    """
    by_output = {(layer.op, layer.output): layer for layer in layers}
    found = []
    for node in scope.graph.nodes:
        names = [name for y in node.outputs for name in (y.name, preactivation(y.name))]
        keys = [(node.op, name) for name in names]
        found.append((node, next((by_output[x] for x in keys if x in by_output), None)))
    return found


def column_slot(scope: Scope, node: gs.Node, layer: Layer) -> Slot:
    """Where the columns of a Gemm or MatMul layer are stored, each a unit of its own."""
    index, (_, axis) = layer.weight_axes(node)
    constant = scope.trace(node.inputs[index])
    assert isinstance(constant, Traced), "the weight of a layer is stored"
    return Slot(node.outputs[0].name, index, axis, constant, np.arange(layer.shape[1]))


@dataclass(frozen=True)
class _Found:
    """The walk; by layer name, the marks of rows and columns, and which rows meet in products."""

    walk: Walk
    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    queries: dict[str, np.ndarray]
    keys: dict[str, np.ndarray]
    silent: dict[str, np.ndarray] = field(default_factory=dict)
    biased: frozenset[str] = frozenset()


def _is_silent_layer(node: gs.Node, layer: Layer) -> bool:
    """Whether rows without weights, and without their bias, are zero."""
    own = layer.bias.node == node.outputs[0].name
    return layer.output == node.outputs[0].name and (not own or layer.bias.is_flat)


def _biased(layers: Sequence[Layer]) -> frozenset[str]:
    """Outputs of the nodes that add the bias of a layer in front of them, the same everywhere."""
    return frozenset(x.bias.node for x in layers if x.bias.node != x.output and x.bias.is_flat)


def _visit(found: _Found, node: gs.Node, layer: Layer | None) -> None:
    """Follow units through one node; where that is refused all it reads stays."""
    walk = found.walk
    name = walk.scope.names[id(node)]
    for body in node.attrs.values():
        if isinstance(body, gs.Graph):
            bodies = [body, *body.subgraphs(recursive=True)]
            inside = {x.name for b in bodies for n in b.nodes for x in n.inputs}
            inside |= {y.name for b in bodies for y in b.outputs}
            for marks in (marks for x in inside for marks in walk.marks_of(x)):
                walk.marks.pin(marks, f"they are read inside {node.op} {name!r}")
    try:
        if layer is not None:
            walk.axes |= _follow_layer(found, node, layer)
            walk.silent |= {y.name for y in node.outputs if _is_silent_layer(node, layer)}
        elif _reads_sizes(walk, node):
            _follow_numbers(walk, node)
        elif any(x.name in walk.parts for x in node.inputs):
            walk.axes |= follow_parts(walk, node)
        elif any(walk.axis(x) for x in node.inputs):
            follow = RULES.get(operator(node))
            if follow is None:
                raise NotFollowed("units are not followed through this operator")
            walk.axes |= follow(walk, node)
            if is_silent(walk, node) or node.outputs[0].name in found.biased:
                walk.silent |= {y.name for y in node.outputs}
    except NotFollowed as refusal:
        reads = [(x.name, marks) for x in node.inputs for marks in walk.marks_of(x.name)]
        tensor = reads[0][0] if reads else node.inputs[0].name
        reason = root = refusal.root or f"{node.op} {name!r}: {refusal} (tensor {tensor!r})"
        if refusal.root:
            reason = f"{root}; what comes of it meets them in {node.op} {name!r}"
        for _, marks in reads:
            walk.marks.pin(marks, reason)
        walk.ended |= {y.name: root for y in node.outputs}
    ended = [walk.ended[x.name] for x in node.inputs if x.name in walk.ended]
    for output in node.outputs if ended else ():
        if layer is None and output.name not in walk.axes:
            walk.ended.setdefault(output.name, ended[0])


# Operators whose further inputs are sizes or bounds of what their first input has units in.
_SIZED = ("Expand", "Reshape", "Resize", "Slice")


def _reads_sizes(walk: Walk, node: gs.Node) -> bool:
    """Whether a node computes with numbers of units; sizes of its result are its rule's to see."""
    sized = node.op in _SIZED and walk.axis(node.inputs[0]) is not None
    return not sized and any(x.name in walk.sizes or x.name in walk.computed for x in node.inputs)


def _follow_numbers(walk: Walk, node: gs.Node) -> None:
    """Numbers of units, or in proportion to them, in the output; else what it is computed from.

    Raises:
        NotFollowed: what is made of the numbers is no integer any more.
    """
    try:
        if any(x.name in walk.computed for x in node.inputs):
            raise NotFollowed("it computes with the number of units")
        walk.sizes |= follow_sizes(walk, node)
    except NotFollowed:
        if not computes_integers(node) or any(walk.axis(x) for x in node.inputs):
            raise
        read = tuple(marks for x in node.inputs for marks in walk.marks_of(x.name))
        walk.computed[node.outputs[0].name] = read


def _follow_layer(found: _Found, node: gs.Node, layer: Layer) -> dict[str, Axis]:
    """A layer reads units as columns and makes new ones as rows; a depthwise Conv passes them on.

    Rows and columns of every layer are known afterwards, whatever is refused.
    """
    walk, (out, width) = found.walk, layer.shape
    found.rows[layer.name] = rows = walk.marks.fresh(out)
    found.columns[layer.name] = columns = walk.marks.fresh(width)
    if layer.units_refusal:
        walk.marks.pin([*rows, *columns], f"{node.op} {layer.name!r}: {layer.units_refusal}")
        raise NotFollowed(layer.units_refusal)
    data = next(x for x in node.inputs if x.name == layer.input)
    axis = walk.axis(data)
    at = layer.units_axis
    place, output = (
        at if at > 0 else len(walk.shape(tensor)) + at for tensor in (data, node.outputs[0])
    )
    index, axes = layer.weight_axes(node)
    if layer.makes_number:
        walk.marks.pin(rows, f"{node.op} {layer.name!r}: it makes a single number")
        _follow_columns(walk, node, layer, axis, place, columns)
        return {}
    made = _of_one_group(walk, layer, rows)
    try:
        walk.slot(node, index, axes[0], made)
        _follow_bias(walk, node, layer, made)
    except NotFollowed as refusal:
        walk.marks.pin(rows, f"{node.op} {layer.name!r}: {refusal}")
    if layer.groups > 1 and layer.groups_side_by_side:
        _follow_groups(walk, node, layer, rows, columns)
    else:
        _follow_columns(walk, node, layer, axis, place, columns)
    return {node.outputs[0].name: Axis(output, made)}


def _of_one_group(walk: Walk, layer: Layer, rows: np.ndarray) -> np.ndarray:
    """The marks along the output's axis: of a batch of matrices, the k-th rows of all share it."""
    if layer.groups_side_by_side:
        return rows
    first, *others = rows.reshape(layer.groups, -1)
    for other in others:
        walk.marks.join(first, other)
    return np.asarray(first)


def _follow_columns(
    walk: Walk, node: gs.Node, layer: Layer, axis: Axis | None, place: int, columns: np.ndarray
) -> None:
    """Columns are the units that lie where a layer reads its inputs."""
    # Sizes that shape inference tells may contradict each other where a model does not run.
    fits = axis is not None and axis.index == place and len(columns) % len(axis.marks) == 0
    if axis is not None and not fits:
        walk.marks.pin(axis.marks, f"{node.op} {layer.name!r} reads another axis")
    if axis is None or not fits:
        walk.marks.pin(columns, "they are not made by a layer that is pruned")
        return
    index, (_, along) = layer.weight_axes(node)
    walk.marks.join(columns, np.repeat(axis.marks, len(columns) // len(axis.marks)))
    walk.slot(node, index, along, axis.marks)


def _follow_bias(walk: Walk, node: gs.Node, layer: Layer, rows: np.ndarray) -> None:
    """What the operator itself adds: the bias, and the tensor Z of FusedConv.

    A vector has one entry per unit, wherever units lie.
    """
    z = len(walk.shape(node.outputs[0]))
    for index, tensor in enumerate(node.inputs[2:], 2):
        if tensor.name:
            vector = len(walk.shape(tensor)) == 1
            place = layer.units_axis - z if layer.units_axis >= 0 else layer.units_axis
            walk.meet(node, index, -1 if vector else place, rows)


def _follow_groups(
    walk: Walk, node: gs.Node, layer: Layer, rows: np.ndarray, columns: np.ndarray
) -> None:
    """A grouped Conv: whole groups go, or as many channels of every group.

    Whole groups where there are at least as many as a group has channels (depthwise: one), and
    both their channels and their rows are units; else the k-th channel of all groups is one unit,
    and so is the k-th row.
    """
    index, axes = layer.weight_axes(node)
    axis, groups = walk.axis(node.inputs[0]), layer.groups
    of_groups = rows.reshape(groups, -1)
    if axis is not None and axis.index != 1:
        walk.marks.pin(axis.marks, f"{node.op} {layer.name!r} reads another axis")
        axis = None
    channels = None if axis is None else axis.marks.reshape(groups, -1)
    if channels is not None and channels.shape[1] <= groups:
        walk.marks.pin(columns, "a group of channels is read as it is")
        whole = channels[:, 0]
        for other in (*channels.T[1:], *of_groups.T):
            walk.marks.join(whole, other)
        walk.counts.append(Count(node.outputs[0].name, "group", 0, whole))
        return
    if of_groups.shape[1] == 1:
        walk.marks.pin(rows, f"{node.op} {layer.name!r} makes one channel of every group")
    for other in of_groups[1:]:
        walk.marks.join(of_groups[0], other)
    if channels is None:
        walk.marks.pin(columns, "they are not made by a layer that is pruned")
        return
    for other in channels[1:]:
        walk.marks.join(channels[0], other)
    walk.marks.join(columns, np.repeat(channels[0], len(columns) // channels.shape[1]))
    walk.slot(node, index, axes[1], channels[0])


def _share(found: _Found, layers: Sequence[Layer]) -> None:
    """Layers that share a stored tensor share the fate of its rows and columns."""
    first: dict[str, Layer] = {}
    for layer in layers:
        other = first.setdefault(layer.weight.tensor, layer)
        if other is not layer:
            found.walk.marks.join(found.rows[other.name], found.rows[layer.name])
            found.walk.marks.join(found.columns[other.name], found.columns[layer.name])


def _meet(found: _Found, layers: Sequence[Layer]) -> None:
    """Queries and keys share their fate, once it is known which rows are which."""
    marks = found.walk.marks
    roots = {layer.name: marks.roots(found.rows[layer.name]) for layer in layers}
    for side, rows in enumerate((found.queries, found.keys)):
        met = [marks.roots(product[side]) for product in found.walk.products]
        rows |= {name: np.isin(own, np.concatenate([*met, []])) for name, own in roots.items()}
    for query, key in found.walk.products:
        marks.join(query, key)
    for first, *others in found.walk.coupled:
        for other in others:
            marks.join(first, other)
    summed = [marks.roots(x) for x, _ in found.walk.summed]
    for layer in layers:
        own = marks.roots(found.rows[layer.name])
        found.silent[layer.name] = np.isin(own, np.concatenate([*summed, []]))


@dataclass(frozen=True)
class _Kind:
    """The units that one walk found: their groups, and their numbers by root."""

    found: _Found
    groups: tuple[Group, ...]
    number: dict[int, int]

    def units(self, marks: np.ndarray) -> np.ndarray:
        """(entries,): the unit of every entry or STAYS."""
        roots = self.found.walk.marks.roots(marks).tolist()
        return np.array([self.number.get(root, STAYS) for root in roots], int)


def _kind(found: _Found, first: int) -> _Kind:
    """Marks to unit numbers from ``first`` on: those that may go and that something reads."""
    walk = found.walk
    made, read = _by_root(walk, found.rows), _by_root(walk, found.columns)
    for marks, name in walk.summed:
        for root in walk.marks.roots(marks).tolist():
            read.setdefault(root, []).append(name)
    met = set(walk.marks.roots(np.concatenate([*(q for q, _ in walk.products), []])).tolist())
    for root in made:
        if root not in read and root not in met:
            walk.marks.pin([root], "no layer that is pruned reads them")
    free = [root for root in made if not walk.marks.reason(root)]
    number = {root: i for i, root in enumerate(sorted(free), first)}
    members: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for root, unit in number.items():
        key = (tuple(dict.fromkeys(made[root])), tuple(dict.fromkeys(read.get(root, ()))))
        members.setdefault(key, []).append(unit)
    roots = {unit: root for root, unit in number.items()}
    groups = []
    for (makers, readers), units in members.items():
        of_makers, of_readers = made[roots[units[0]]], read.get(roots[units[0]], [])
        counts = [*map(of_makers.count, makers), *map(of_readers.count, readers)]
        groups.append(Group(makers, readers, np.array(units), counts[0], min(counts), walk.inside))
    return _Kind(found, tuple(groups), number)


def _by_root(walk: Walk, marks: Mapping[str, np.ndarray]) -> dict[int, list[str]]:
    """By root, the name of the layer of every row or column that carries it."""
    found: dict[int, list[str]] = {}
    for name, entries in marks.items():
        for root in walk.marks.roots(entries).tolist():
            found.setdefault(root, []).append(name)
    return found


class _Atoms:
    """Atoms by the units that they belong to, one of each kind; those of one unit come first."""

    def __init__(self, kinds: Sequence[_Kind]) -> None:
        self._kinds = kinds
        alone = [
            tuple(unit if other is kind else STAYS for other in kinds)
            for kind in kinds
            for unit in kind.number.values()
        ]
        self._number = {units: i for i, units in enumerate(alone)}

    def of(self, marks: Sequence[Mapping[Key, np.ndarray]]) -> dict[Key, np.ndarray]:
        """By key, the atom of every entry or STAYS, from its marks on the walks that have it."""
        found: dict[Key, np.ndarray] = {}
        for key in dict.fromkeys(key for own in marks for key in own):
            size = next(len(own[key]) for own in marks if key in own)
            units = [
                kind.units(own[key]) if key in own else np.full(size, STAYS)
                for kind, own in zip(self._kinds, marks, strict=True)
            ]
            found[key] = np.array([self._of_one(x) for x in zip(*units, strict=True)], int)
        return found

    def _of_one(self, units: tuple[int, ...]) -> int:
        if all(unit == STAYS for unit in units):
            return STAYS
        return self._number.setdefault(tuple(map(int, units)), len(self._number))

    def table(self) -> np.ndarray:
        """(atoms + 1, kinds): see ``Structure``."""
        return np.array([*self._number, (STAYS,) * len(self._kinds)], int)


def _numbered(walks: Sequence[_Found], layers: Sequence[Layer]) -> Structure:
    """All kinds of units, with atoms where they overlap."""
    kinds: list[_Kind] = []
    for found in walks:
        kinds.append(_kind(found, sum(len(kind.number) for kind in kinds)))
    atoms = _Atoms(kinds)
    slots = [{(x.node, x.index, x.axis): x for x in found.walk.slots} for found in walks]
    counts = [{(x.node, x.kind, x.entry): x for x in found.walk.counts} for found in walks]
    lying = [_lying(kind) for kind in kinds]
    rows = atoms.of([found.rows for found in walks])
    columns = atoms.of([found.columns for found in walks])
    slots_of = atoms.of([{key: x.marks for key, x in own.items()} for own in slots])
    counts_of = atoms.of([{key: x.marks for key, x in own.items()} for own in counts])
    every_slot, every_count = dict(ChainMap(*slots)), dict(ChainMap(*counts))
    return Structure(
        tuple(group for kind in kinds for group in kind.groups),
        atoms.table(),
        rows,
        columns,
        tuple(replace(every_slot[key], marks=marks) for key, marks in slots_of.items()),
        tuple(replace(every_count[key], marks=marks) for key, marks in counts_of.items()),
        dict(ChainMap(*lying)),
        _parts([axis.marks for axes in lying for axis in axes.values()]),
        walks[-1].queries,
        walks[-1].keys,
        walks[0].silent,
        tuple(_refusals(walks, layers)),
    )


def _lying(kind: _Kind) -> dict[str, Axis]:
    """By name of a tensor, the axis along which units of one kind lie."""
    walk = kind.found.walk
    axes = {name: Axis(parts.index, parts.marks[0]) for name, parts in walk.parts.items()}
    axes |= walk.axes
    return {name: Axis(axis.index, kind.units(axis.marks)) for name, axis in axes.items()}


def _parts(axes: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The sets of units that make up a whole axis, each once: without them it would be empty."""
    whole = [np.unique(units) for units in axes if (units != STAYS).all()]
    return tuple({units.tobytes(): units for units in whole}.values())


def _refusals(walks: Sequence[_Found], layers: Sequence[Layer]) -> Iterator[Skip]:
    """Layers of which no row can go, or whose heads keep their width, with a first reason."""
    for layer in layers:
        reasons = [
            [found.walk.marks.reason(mark) for mark in found.rows[layer.name].tolist()]
            for found in walks
        ]
        if all(map(all, reasons)):
            yield Skip(layer.name, layer.op, f"its units stay: {reasons[0][0]}")
            continue
        heads = walks[-1].walk.marks
        inside = np.isin(heads.roots(walks[-1].rows[layer.name]), heads.roots(walks[-1].walk.heads))
        held = [reason for reason, x in zip(reasons[-1], inside, strict=True) if x and reason]
        if held:
            yield Skip(layer.name, layer.op, f"its heads keep their width: {held[0]}")
