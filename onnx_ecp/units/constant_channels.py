"""Entries of activations that are one number, whatever the model is given.

That a value did not change on some samples says nothing of others, nor of other lengths, sizes or
masks. So it is followed along the graph: a row without weights is its bias; what acts entry by
entry, with stored numbers that are the same at all positions, makes a number of a number; and zero
times anything is zero. Which number it is, ONNX Runtime says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.graph.operators import Moves, find
from onnx_ecp.layers import Layer
from onnx_ecp.layers.trace import Scope
from onnx_ecp.layers.views import operator
from onnx_ecp.units.groups import Structure, with_layers
from onnx_ecp.units.union_find import Axis


@dataclass(frozen=True)
class Steady:
    """What is known of the tensors in front of a node.

    Args:
        scope: the main graph.
        axes: by name of the tensors along which units lie, where.
        values: by name, of all tensors in one run.
        found: by name, (length,) bool: the entries of the units' axis that are one number.
    """

    scope: Scope
    axes: Mapping[str, Axis]
    values: Mapping[str, np.ndarray]
    found: dict[str, np.ndarray] = field(default_factory=dict)

    def of(self, tensor: gs.Tensor) -> np.ndarray | None:
        """(length,) bool: entries that are one number; None where there are no units."""
        return self.found.get(tensor.name)

    def zero(self, tensor: gs.Tensor) -> np.ndarray | None:
        """(length,) bool: entries that are zero."""
        steady = self.of(tensor)
        if steady is None:
            return None
        by_entry = np.moveaxis(self.values[tensor.name], self.axes[tensor.name].index, 0)
        return steady & ~by_entry.reshape(len(steady), -1).any(axis=1)

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """Shape of a tensor, stored or computed."""
        return tuple(tensor.shape) if tensor.shape else np.shape(self.values.get(tensor.name, ()))

    def is_flat(self, tensor: gs.Tensor, place: int) -> bool:
        """Whether a tensor is stored and the same at all positions; units lie ``place`` (< 0)."""
        if not self.scope.is_constant(tensor):
            return False
        shape = self.shape(tensor)
        return all(size == 1 for i, size in enumerate(shape, -len(shape)) if i != place)


def steady_columns(
    scope: Scope,
    structure: Structure,
    layers: Sequence[Layer],
    dead: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """By name of the layers that read units, (in,) bool: columns that see one number.

    Args:
        scope: the main graph.
        structure: its units, none inside heads.
        layers: those of the structure.
        dead: by layer name, (out,) bool: rows without weights.
        values: by name, of all tensors in one run.
    """
    state, columns = Steady(scope, structure.axes, values), dict[str, np.ndarray]()
    for node, layer in with_layers(scope, layers):
        if layer is not None:
            data = next(x for x in node.inputs if x.name == layer.input)
            seen = state.zero(data) if layer.adds_zeros else state.of(data)
            if seen is not None and layer.groups_side_by_side:
                seen = np.asarray(seen.reshape(layer.groups, -1).all(axis=0))
            if seen is not None and layer.shape[1] % len(seen) == 0:
                columns[layer.name] = np.repeat(seen, layer.shape[1] // len(seen))
        for output in (y for y in node.outputs if y.name in structure.axes):
            if layer is not None:
                entries = _of_layer(state, node, layer, dead[layer.name])
            else:
                entries = _behind(state, node, output)
            state.found[output.name] = entries
    return columns


def _of_layer(state: Steady, node: gs.Node, layer: Layer, dead: np.ndarray) -> np.ndarray:
    """A row is its bias where it has no weights, or where a depthwise Conv reads one number."""
    output, data = node.outputs[0], state.of(node.inputs[0])
    of_groups = 1 if layer.groups_side_by_side else layer.groups
    steady: np.ndarray = np.logical_and.reduce(dead.reshape(of_groups, -1))
    if data is not None and layer.groups_side_by_side and layer.groups == len(data) > 1:
        seen = state.zero(node.inputs[0]) if layer.adds_zeros else data
        assert seen is not None, "its input has units"
        steady |= np.repeat(seen, len(dead) // len(data))
    place = state.axes[output.name].index - state.values[output.name].ndim
    for added in (x for x in node.inputs[2:] if x.name):
        vector = len(state.shape(added)) == 1
        steady &= _as_operand(state, added, -1 if vector else place, len(steady))
    return steady


def _as_operand(state: Steady, tensor: gs.Tensor, place: int, length: int) -> np.ndarray:
    """(length,) bool: entries that one operand leaves steady."""
    own = state.of(tensor)
    if own is None:
        return np.full(length, state.is_flat(tensor, place))
    return np.broadcast_to(own, (length,))


def _behind(state: Steady, node: gs.Node, output: gs.Tensor) -> np.ndarray:
    """(length,) bool: the entries of an output that are one number."""
    axis, known = state.axes[output.name], find(*operator(node))
    steady = np.zeros(len(axis.marks), np.bool_)
    if known.moves is Moves.JOINED:
        return _side_by_side(state, node, axis.index)
    if known.elementwise:
        place = axis.index - state.values[output.name].ndim
        operands = [_as_operand(state, x, place, len(steady)) for x in node.inputs if x.name]
        steady = np.logical_and.reduce(operands)
    elif known.averages(node.attrs):
        steady = _moved(state, node, output)
    for zero in (state.zero(node.inputs[i]) for i in known.zeros):
        if known.moves is None and zero is not None and len(zero) == len(steady):
            steady = steady | zero
    return steady


def _side_by_side(state: Steady, node: gs.Node, index: int) -> np.ndarray:
    """Entries behind a Concat; along another axis than the units' they are different numbers."""
    parts = [(state.of(x), state.values[x.name].shape) for x in node.inputs]
    along = int(node.attrs["axis"]) % len(parts[0][1]) == index
    if not along:
        return np.zeros(parts[0][1][index], np.bool_)
    fixed = [np.zeros(shape[index], np.bool_) if x is None else x for x, shape in parts]
    return np.concatenate(fixed)


def _moved(state: Steady, node: gs.Node, output: gs.Tensor) -> np.ndarray:
    """Where entries are that an operator only moves: along the units' axis of its output."""
    entries = state.of(node.inputs[0])
    assert entries is not None, "its data has units"
    before, after = state.axes[node.inputs[0].name], state.axes[output.name]
    if node.op == "Split" and len(after.marks) < len(entries):
        sizes = [state.values[y.name].shape[after.index] for y in node.outputs]
        place = [y.name for y in node.outputs].index(output.name)
        start = sum(sizes[:place])
        return entries[start : start + sizes[place]]
    if node.op in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
        old, new = state.values[node.inputs[0].name].shape, state.values[output.name].shape
        along = [1] * len(old)
        along[before.index] = len(entries)
        whole = np.broadcast_to(entries.reshape(along), old).reshape(new)
        return np.asarray(np.moveaxis(whole, after.index, 0).reshape(len(after.marks), -1).all(1))
    if len(after.marks) != len(entries) or _picks_along(state, node, before.index):
        return np.zeros(len(after.marks), np.bool_)
    return entries


def _picks_along(state: Steady, node: gs.Node, index: int) -> bool:
    """Whether the operator may take entries of this axis in another order."""
    if node.op == "Gather":
        rank = state.values[node.inputs[0].name].ndim
        return int(node.attrs.get("axis", 0)) % rank == index
    if node.op == "Slice":
        steps = node.inputs[4] if len(node.inputs) > 4 and node.inputs[4].name else None
        stored = None if steps is None else state.scope.stored(steps)
        return steps is not None and (stored is None or bool((np.asarray(stored.values) < 0).any()))
    return find(*operator(node)).moves is Moves.REPEATED and node.op not in ("Expand", "Tile")
