"""Clean-up after unstructured pruning: units and inputs that do nothing any longer leave the model.

A unit whose outgoing weights are all zero goes. One whose incoming weights are all zero is a
constant, whatever stands between it and its readers: ONNX Runtime says which, and it is folded into
their biases. Inputs that nothing reads go where a Gather and a smaller product are faster, or, if
that is wished, wherever both are smaller. Layers
that were not pruned keep their shape. Both models are run on calibration samples, and where they
differ nothing is cleaned up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_ecp.layers import Layer, edit, find_layers
from onnx_ecp.layers.dense import Dense
from onnx_ecp.layers.trace import main_scope
from onnx_ecp.model import Model, constants, output_names, read_tensor
from onnx_ecp.runtime import Session
from onnx_ecp.structure.groups import (
    STAYS,
    Structure,
    column_slot,
    find_structure,
    with_layers,
)
from onnx_ecp.structure.outcome import UnitRow, unit_rows
from onnx_ecp.structure.removal import cut, shrink
from onnx_ecp.structure.shapes import shapes_of_a_run

Feeds = Mapping[str, np.ndarray]

# Largest difference of outputs, as a share of their largest value, that rounding may make: the sums
# are the same, but for constants that enter them in another place.
ROUNDING = 1e-5
# A Gather copies an element in the time of so many multiplications of a matrix product, or a little
# less (ONNX Runtime on the CPU, batch 64; benchmarks/dead_inputs.py).
COPY = 400
# What a Gather adds to a file, in bytes: eight for each index, and about so many for the node.
INDEX, NODE = 8, 200
# Gather counts axes from the end from this opset on.
_NEGATIVE_AXES = 11


@dataclass(frozen=True)
class CleanUp:
    """What clean-up did.

    Args:
        model: the result.
        rows: what went: units by group, then inputs by layer.
        refused: why the model stayed as it was; empty where it did not.
    """

    model: Model
    rows: tuple[UnitRow, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class _Alive:
    """Which rows (out,) and columns (in,) of a layer have any weight, bool."""

    rows: np.ndarray
    columns: np.ndarray

    @property
    def all(self) -> bool:
        return bool(self.rows.all() and self.columns.all())


def clean_up(
    model: Model,
    pruned: Collection[str],
    batches: Sequence[Feeds],
    unread: str = "faster",
    **settings: object,
) -> CleanUp:
    """Remove dead units and dead inputs of a model, exact but for rounding.

    Args:
        model: a pruned model; it is not changed.
        pruned: names of the layers that may lose rows and columns.
        batches: calibration samples, on which equality is checked; the first of them tells shapes.
        unread: where inputs that nothing reads go: a name in UNREAD.
        settings: of the ``Session``.
    """
    current, rows = model, list[UnitRow]()
    while True:
        layers = [x for x in find_layers(current.proto).layers if x.name in pruned]
        alive = {layer.name: _alive(_matrix(current, layer)) for layer in layers}
        if all(part.all for part in alive.values()):
            break
        found = _without_dead(current, layers, alive, batches[0], settings)
        if found is None:
            current, gathered = _without_dead_inputs(current, layers, alive, UNREAD[unread])
            rows += gathered
            break
        current = found[0]
        rows += found[1]
    if not rows:
        return CleanUp(model)
    gap = largest_difference(model, current, batches, **settings)
    if not gap <= ROUNDING:
        return CleanUp(model, refused=f"outputs would change by {gap:.2g} of their largest value")
    return CleanUp(current, _joined(rows))


def _joined(rows: Iterable[UnitRow]) -> tuple[UnitRow, ...]:
    """One row for each group, whatever number of rounds it lost units in."""
    joined: dict[tuple[tuple[str, ...], tuple[str, ...]], UnitRow] = {}
    for row in rows:
        first = joined.setdefault((row.producers, row.consumers), row)
        joined[row.producers, row.consumers] = replace(first, after=row.after)
    return tuple(joined.values())


def largest_difference(
    first: Model, second: Model, batches: Iterable[Feeds], **settings: object
) -> float:
    """Largest difference of any output, as a share of the largest value of that output."""
    sessions = [Session(m.proto, base=m.base, **settings) for m in (first, second)]  # type: ignore[arg-type]
    worst = 0.0
    for feeds in batches:
        a, b = (session.run(feeds) for session in sessions)
        for name in output_names(first.proto):
            if np.issubdtype(np.asarray(a[name]).dtype, np.floating) and a[name].size:
                scale = float(np.abs(a[name]).max()) or 1.0
                worst = max(worst, float(np.abs(a[name] - b[name]).max()) / scale)
    return worst


def _without_dead(
    model: Model,
    layers: Sequence[Layer],
    alive: Mapping[str, _Alive],
    feeds: Feeds,
    settings: Mapping[str, object],
) -> tuple[Model, list[UnitRow]] | None:
    """The model without the units that are dead now; None where none is."""
    shapes = shapes_of_a_run(model, feeds, **settings)
    structure = find_structure(model.proto, layers, shapes, inside=False)
    columns = {name: part.columns for name, part in alive.items()}
    rows = {name: part.rows for name, part in alive.items()}
    unread = ~_any(structure, columns, structure.columns)
    constant = ~_any(structure, rows, structure.rows) & ~unread
    values = _constants(model, structure, layers, constant, feeds, settings)
    keep = _at_least_one(structure, ~unread & ~(constant & _foldable(structure, values, constant)))
    if keep.all():
        return None
    proto = cut(model.proto, structure, keep, model.base)
    after = {layer.name: layer for layer in find_layers(proto).layers}
    for layer in layers:
        shift = _shift(model, layer, structure, values, constant & ~keep)
        stays = structure.rows_kept(layer.name, keep)
        after[layer.name].store(proto, None, shift[stays], model.base)
    return Model(proto, None, model.base), unit_rows(structure, keep, "dead")


def _matrix(model: Model, layer: Layer) -> np.ndarray:
    stored = constants(model.proto)[layer.weight.tensor]
    return layer.weight.matrix(read_tensor(model, stored))


def _alive(weight: np.ndarray) -> _Alive:
    return _Alive(np.asarray(weight.any(axis=1)), np.asarray(weight.any(axis=0)))


def _any(
    structure: Structure, alive: Mapping[str, np.ndarray], entries: Mapping[str, np.ndarray]
) -> np.ndarray:
    """(units,) bool: whether any of a unit's entries, rows or columns of layers, has a weight."""
    found = np.zeros(structure.units, np.bool_)
    for name, units in entries.items():
        found[units[alive[name] & (units != STAYS)]] = True
    return found


def _constants(
    model: Model,
    structure: Structure,
    layers: Iterable[Layer],
    constant: np.ndarray,
    feeds: Feeds,
    settings: Mapping[str, object],
) -> dict[str, np.ndarray]:
    """By layer, what every column sees, (in,): NaN where that is not one value.

    At the borders of a padded Conv a constant is not one, unless it is zero.
    """
    readers = [x for x in layers if _reads(structure, x.name, constant).any()]
    if not readers:
        return {}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    names = dict.fromkeys(layer.input for layer in readers)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    seen = Session(proto, base=model.base, **settings).run(feeds)  # type: ignore[arg-type]
    values = {}
    for layer in readers:
        rows = layer.rows_in(seen[layer.input])[0].astype(np.float64)
        values[layer.name] = np.where((rows == rows[0]).all(axis=0), rows[0], np.nan)
    return values


def _reads(structure: Structure, layer: str, chosen: np.ndarray) -> np.ndarray:
    """(in,) bool: the columns of a layer that are those of chosen units (units,) bool."""
    return np.append(chosen, False)[structure.columns[layer]]


def _foldable(
    structure: Structure, values: Mapping[str, np.ndarray], constant: np.ndarray
) -> np.ndarray:
    """(units,) bool: whether all readers see a constant."""
    foldable = constant.copy()
    for name, seen in values.items():
        columns = structure.columns[name]
        foldable[columns[np.isnan(seen) & (columns != STAYS)]] = False
    return foldable


def _shift(
    model: Model,
    layer: Layer,
    structure: Structure,
    values: Mapping[str, np.ndarray],
    folded: np.ndarray,
) -> np.ndarray:
    """(out,): what the folded units add to z."""
    columns = _reads(structure, layer.name, folded)
    if layer.name not in values or not columns.any():
        return np.zeros(layer.shape[0])
    weight = _matrix(model, layer)[:, columns].astype(np.float64)
    return np.asarray(weight @ values[layer.name][columns])


def _at_least_one(structure: Structure, keep: np.ndarray) -> np.ndarray:
    """The same with one unit left in every group: there are no empty tensors."""
    keep = keep.copy()
    for group in structure.groups:
        if not keep[group.units].any():
            keep[group.units[0]] = True
    return keep


def _without_dead_inputs(
    model: Model,
    layers: Sequence[Layer],
    alive: Mapping[str, _Alive],
    pays: Callable[[int, int, int], bool],
) -> tuple[Model, list[UnitRow]]:
    """The model with a Gather in front of the Gemm and MatMul layers where that pays."""
    opset = next(o.version for o in model.proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset < _NEGATIVE_AXES:
        return model, []
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    scope, rows = main_scope(model.proto), []
    for node, layer in with_layers(scope, layers):
        if not isinstance(layer, Dense) or layer.axis != -1:
            continue
        read = alive[layer.name].columns
        before, after = len(read), int(read.sum())
        if 0 < after < before and pays(before, after, layer.shape[0]):
            slot = column_slot(scope, node, layer)
            shrink(proto, [slot], read, model.base)
            _gather(proto, slot.node, 1 - slot.index, np.flatnonzero(read))
            rows.append(UnitRow((layer.input,), (layer.name,), 1, before, after, "unread"))
    return (Model(proto, None, model.base), rows) if rows else (model, [])


def is_faster(inputs: int, read: int, outputs: int) -> bool:
    """Whether a layer is faster if it is given only the inputs that it reads."""
    return (inputs - read) * outputs >= COPY * read


def is_smaller(inputs: int, read: int, outputs: int) -> bool:
    """Whether the file is smaller if a layer of float32 is given only the inputs that it reads."""
    return (inputs - read) * outputs * 4 > INDEX * read + NODE


# Where inputs that nothing reads go; asked with the numbers of inputs, of those read, of outputs.
UNREAD: dict[str, Callable[[int, int, int], bool]] = {"faster": is_faster, "smaller": is_smaller}


def _gather(proto: onnx.ModelProto, output: str, index: int, chosen: np.ndarray) -> None:
    """Put a Gather of some entries of the last axis in front of one input of a node."""
    stem = f"{output}/ecp_inputs"
    int64 = onnx.TensorProto.INT64
    indices = edit.add_constant(proto, stem, chosen.astype(np.int64), int64, before=output)
    name = edit.fresh_name(proto, f"{output}/ecp_gather")
    place = edit.node_index(proto, output)
    data = proto.graph.node[place].input[index]
    node = onnx.helper.make_node("Gather", [data, indices], [name], name=name, axis=-1)
    proto.graph.node[place].input[index] = name
    proto.graph.node.insert(place, node)
