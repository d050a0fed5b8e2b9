"""Clean-up after unstructured pruning: units and inputs that do nothing any longer leave the model.

A unit whose outgoing weights are all zero goes. One that its readers see as one number, whatever
the model is given, is folded into their biases: its incoming weights are zero, and what stands in
between makes a number of a number (``steady``). Inputs that nothing reads go where a Gather and a
smaller product are faster, or, if that is wished, wherever both are smaller. Layers that were not
pruned keep their shape. Both models are run on calibration samples, and where they differ, or the
smaller one cannot be run, nothing is cleaned up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_ecp.errors import ModelError, ProviderError
from onnx_ecp.graph import Model, constants, read_tensor
from onnx_ecp.graph.proto import opset_of
from onnx_ecp.graph.shapes import shapes_of, values_of_a_run
from onnx_ecp.layers import Layer, edit, find_layers
from onnx_ecp.layers.trace import main_scope
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.outputs import arrays
from onnx_ecp.runtime.session import Session
from onnx_ecp.units.constant_channels import steady_columns
from onnx_ecp.units.cutting import cut, shrink
from onnx_ecp.units.groups import STAYS, Structure, column_slot, find_structure, with_layers
from onnx_ecp.units.rows import UnitRow, unit_rows

Feeds = Mapping[str, np.ndarray]

# Largest difference of outputs, as a share of their largest value, that rounding may make: the sums
# are the same, but for constants that enter them in another place.
ROUNDING = 1e-5
# The same in units of the last place, for types in which one is more than that: ten times the
# largest difference on 14 exported networks cast to float16 (0.67).
ULPS = 8
_UNITS = {int(onnx.TensorProto.FLOAT16): 2.0**-10, int(onnx.TensorProto.BFLOAT16): 2.0**-7}
# A Gather copies an element in the time of so many multiplications of a matrix product, or a little
# less (ONNX Runtime on the CPU, batch 64; benchmarks/dead_inputs.py).
COPY = 400
# What a Gather adds to a file, in bytes: eight for each index, and about so many for the node.
INDEX, NODE = 8, 200
# Gather counts axes from the end from this opset on.
_NEGATIVE_AXES = 11
# Channels that kernels of convolutions take at a time.
BLOCKS = (16, 8)


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
    try:
        current, rows = _without_all_dead(model, pruned, batches[0], unread, settings)
        if not rows:
            return CleanUp(model)
        gap = largest_difference(model, current, batches, **settings)
    except (ModelError, ProviderError) as error:
        check_deadline()  # what ended the time limit ends the run
        return CleanUp(model, refused=f"the smaller model cannot be run: {error.message}")
    if not gap <= tolerance(model):
        return CleanUp(model, refused=f"outputs would change by {gap:.2g} of their largest value")
    return CleanUp(current, _joined(rows))


def _without_all_dead(
    model: Model,
    pruned: Collection[str],
    feeds: Feeds,
    unread: str,
    settings: Mapping[str, object],
) -> tuple[Model, list[UnitRow]]:
    """The model without dead units, as long as new ones are found, and without dead inputs."""
    rows = list[UnitRow]()
    while True:
        layers = [x for x in find_layers(model.proto).layers if x.name in pruned]
        alive = {layer.name: _alive(_matrix(model, layer)) for layer in layers}
        if all(part.all for part in alive.values()):
            return model, rows
        found = _without_dead(model, layers, alive, feeds, settings)
        if found is None:
            model, gathered = _without_dead_inputs(model, layers, alive, UNREAD[unread])
            return model, rows + gathered
        model = found[0]
        rows += found[1]


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
    """Largest difference of any output, as a share of the largest value of that output.

    Of integers it is the share that differs. Infinite where shapes do, or where one model alone
    gives values that are not finite.
    """
    sessions = [Session(m.proto, base=m.base, **settings) for m in (first, second)]  # type: ignore[arg-type]
    worst = 0.0
    for feeds in batches:
        a, b = (arrays(session.run(feeds)) for session in sessions)
        if a.keys() != b.keys():
            return np.inf
        worst = max([worst, *(_difference(a[name], b[name]) for name in a)])
    return worst


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """See ``largest_difference``; never NaN, which is larger than nothing."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf
    if not a.size:
        return 0.0
    if not np.issubdtype(a.dtype, np.floating):
        return float((a != b).mean())
    finite = np.isfinite(a)
    if (
        not np.array_equal(a[~finite], b[~finite], equal_nan=True)
        or not np.isfinite(b[finite]).all()
    ):
        return np.inf
    a, b = (x[finite].astype(np.float64) for x in (a, b))
    return float(np.abs(a - b).max(initial=0.0)) / (float(np.abs(a).max(initial=0.0)) or 1.0)


def tolerance(model: Model, of_float32: float = ROUNDING) -> float:
    """What rounding may change, by the coarsest type that a model computes with.

    Args:
        model: the model.
        of_float32: the limit where it is float32, or finer.
    """
    types = {int(tensor.data_type) for tensor in constants(model.proto).values()}
    types |= {output.type.tensor_type.elem_type for output in model.proto.graph.output}
    coarsest = max((unit for kind, unit in _UNITS.items() if kind in types), default=0.0)
    return max(of_float32, ULPS * coarsest)


def _without_dead(
    model: Model,
    layers: Sequence[Layer],
    alive: Mapping[str, _Alive],
    feeds: Feeds,
    settings: Mapping[str, object],
) -> tuple[Model, list[UnitRow]] | None:
    """The model without the units that are dead now; None where none is."""
    values = values_of_a_run(model, feeds, **settings)
    shapes = shapes_of(model, values)
    structure = find_structure(model.proto, layers, shapes, inside=False)
    columns = {name: part.columns for name, part in alive.items()}
    unread = ~_any(structure, columns, structure.columns)
    seen = _numbers(model, structure, layers, alive, values)
    constant = ~unread & ~_any(
        structure, {n: np.isnan(x).any(axis=0) for n, x in seen.items()}, structure.columns
    )
    loud = _loud(model, structure, layers, alive)
    keep = at_least_one(structure, loud | (~unread & ~constant))
    keep = whole_blocks(structure, keep, {x.name for x in layers if "Conv" in x.op})
    if keep.all():
        return None
    proto = cut(model.proto, structure, keep, model.base)
    after = {layer.name: layer for layer in find_layers(proto).layers}
    for layer in layers:
        shift = _shift(model, layer, structure, seen, constant & ~keep)
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


def _loud(
    model: Model, structure: Structure, layers: Sequence[Layer], alive: Mapping[str, _Alive]
) -> np.ndarray:
    """(units,) bool: those that are summed, and of which a row has a weight or a bias."""
    found = np.zeros(structure.units, np.bool_)
    for layer in layers:
        rows = structure.silent[layer.name]
        if rows.any():
            bias = layer.bias_values(model.proto, model.base)
            assert bias is not None, "the bias of units that are summed is the same everywhere"
            units = structure.rows[layer.name][rows & (alive[layer.name].rows | (bias != 0))]
            found[units[units != STAYS]] = True
    return found


def _numbers(
    model: Model,
    structure: Structure,
    layers: Sequence[Layer],
    alive: Mapping[str, _Alive],
    values: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """By layer, the one number that every column sees, (groups, in); NaN where it may change."""
    dead = {name: ~part.rows for name, part in alive.items()}
    steady = steady_columns(main_scope(model.proto), structure, layers, dead, values)
    found = {}
    for layer in layers:
        found[layer.name] = np.full((layer.groups, layer.shape[1]), np.nan)
        chosen = steady.get(layer.name, np.zeros(layer.shape[1], np.bool_))
        if chosen.any():
            rows = layer.rows_in(values[layer.input]).astype(np.float64)
            chosen &= (rows == rows[:, :1]).all(axis=(0, 1))
            found[layer.name][:, chosen] = rows[:, 0, chosen]
    return found


def _reads(structure: Structure, layer: str, chosen: np.ndarray) -> np.ndarray:
    """(in,) bool: the columns of a layer that are those of chosen units (units,) bool."""
    return np.append(chosen, False)[structure.columns[layer]]


def _shift(
    model: Model,
    layer: Layer,
    structure: Structure,
    values: Mapping[str, np.ndarray],
    folded: np.ndarray,
) -> np.ndarray:
    """(out,): what the folded units add to z."""
    columns = _reads(structure, layer.name, folded)
    if not columns.any():
        return np.zeros(layer.shape[0])
    weight = _matrix(model, layer)[:, columns].astype(np.float64)
    of_groups = weight.reshape(layer.groups, -1, weight.shape[1])
    return np.asarray((of_groups @ values[layer.name][:, columns, None]).reshape(-1))


def at_least_one(structure: Structure, keep: np.ndarray) -> np.ndarray:
    """The same with one unit left in every group and along every axis: no tensor may be empty."""
    keep = keep.copy()
    for units in (*(group.units for group in structure.groups), *structure.parts):
        if not keep[units].any():
            keep[units[0]] = True
    return keep


def whole_blocks(structure: Structure, keep: np.ndarray, convolutions: set[str]) -> np.ndarray:
    """The same with as many channels of convolutions as their kernels take in whole blocks.

    Kernels of ONNX Runtime are laid out for blocks of 8 or 16 channels, and fall back to slower
    ones for other numbers (``kernels.py``): a network whose channels fill such blocks must not
    become slower because some of them are dead. Those that are left in it are zero.
    """
    keep = keep.copy()
    for group in structure.groups:
        number = len(group.units)
        block = next((b for b in BLOCKS if number % b == 0), 1)
        if group.width > 1 or convolutions.isdisjoint((*group.producers, *group.consumers)):
            continue
        lacking = -int(keep[group.units].sum()) % block
        keep[group.units[~keep[group.units]][:lacking]] = True
    return keep


def _without_dead_inputs(
    model: Model,
    layers: Sequence[Layer],
    alive: Mapping[str, _Alive],
    pays: Callable[[int, int, int], bool],
) -> tuple[Model, list[UnitRow]]:
    """The model with a Gather in front of the Gemm and MatMul layers where that pays."""
    opset = opset_of(model.proto)
    if opset < _NEGATIVE_AXES:
        return model, []
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    scope, rows = main_scope(model.proto), []
    for node, layer in with_layers(scope, layers):
        if layer is None or not layer.reads_vectors or layer.makes_number or layer.units_axis != -1:
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
