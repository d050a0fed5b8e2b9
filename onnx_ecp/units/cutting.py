"""Cut units out of a model, or put them in another order; everything else stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx

from onnx_ecp.graph import write_tensor
from onnx_ecp.graph.proto import opset_of
from onnx_ecp.layers import Layer, edit, find_layers
from onnx_ecp.units.groups import Structure
from onnx_ecp.units.propagation import Count, Slot

# Axis, and the entries that make the new one.
Cut = tuple[int, np.ndarray]


def cut(
    proto: onnx.ModelProto, structure: Structure, keep: np.ndarray, base: Path | None = None
) -> onnx.ModelProto:
    """A copy of a model without some of its units.

    What the removed units did is lost: fold it into biases before or afterwards.

    Args:
        proto: the model that the structure was found in.
        structure: its units.
        keep: (units,) bool, True where a unit stays.
        base: directory of its external data.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    if keep.all():
        return model
    _pick(model, structure.slots, lambda marks: np.flatnonzero(structure.kept(marks, keep)), base)
    for (node, kind), counts in _by_node(structure.counts).items():
        left = [(c, int(structure.kept(c.marks, keep).sum())) for c in counts]
        if any(number < len(count.marks) for count, number in left):
            _recount(model, node, kind, left)
    for info in [info for info in model.graph.value_info if info.name in structure.axes]:
        model.graph.value_info.remove(info)
    return model


def rearranged(
    proto: onnx.ModelProto, structure: Structure, order: np.ndarray, base: Path | None = None
) -> onnx.ModelProto:
    """A copy of a model that computes the same with its units in another order.

    Args:
        proto: the model that the structure was found in.
        structure: its units.
        order: (units,), the unit that takes the place of each; one that lies in the same tensors.
        base: directory of its external data.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    _pick(model, structure.slots, lambda marks: _moved(marks, order), base)
    return model


def _moved(marks: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The entries of an axis in the order that their units, marks (length,), take."""
    entries = np.argsort(marks, kind="stable")
    present, starts, counts = np.unique(marks[entries], return_index=True, return_counts=True)
    of = {u: entries[s : s + c] for u, s, c in zip(present.tolist(), starts, counts, strict=True)}
    picked = np.arange(len(marks))
    for unit, places in of.items():
        if unit >= 0:
            picked[places] = of[int(order[unit])]
    return picked


def store(
    model: onnx.ModelProto,
    layers: Iterable[Layer],
    weights: Mapping[str, np.ndarray],
    shifts: Mapping[str, np.ndarray],
    base: Path | None = None,
) -> frozenset[str]:
    """Write new weights and bias shifts into a model that was cut.

    Args:
        model: from ``cut``; it is changed.
        layers: of the model before the cut.
        weights: by layer name, (out, in) of what stays.
        shifts: by layer name, (out,) of what stays.
        base: directory of its external data.

    Returns:
        Names of the layers that had no bias and have one now.
    """
    wanted = {layer.name for layer in layers}
    created = set()
    for layer in find_layers(model).layers:
        if layer.name in wanted:
            stored = layer.weight.unmatrix(weights[layer.name])
            if layer.store(model, stored, shifts[layer.name], base):
                created.add(layer.name)
    return frozenset(created)


def shrink(
    model: onnx.ModelProto, slots: Iterable[Slot], keep: np.ndarray, base: Path | None
) -> None:
    """Take entries out of stored tensors of our own copy; nothing else is changed.

    Args:
        model: what is changed.
        slots: where the entries lie, each a unit of its own.
        keep: (units,) bool, True where a unit stays.
        base: directory of external data.
    """
    _pick(model, slots, lambda marks: np.flatnonzero(keep[marks]), base)


def _pick(
    model: onnx.ModelProto,
    slots: Iterable[Slot],
    choose: Callable[[np.ndarray], np.ndarray],
    base: Path | None,
) -> None:
    """Make every slot of the entries that are chosen, by number, from its marks."""
    private: dict[tuple, str] = {}
    for (node, index), axes in _by_input(slots).items():
        cuts = [(slot.axis, choose(slot.marks)) for slot in axes]
        if not all(
            np.array_equal(x, np.arange(len(s.marks))) for (_, x), s in zip(cuts, axes, strict=True)
        ):
            _replace(model, node, index, axes[0], cuts, base, private)


def _by_input(slots: Iterable[Slot]) -> dict[tuple[str, int], list[Slot]]:
    found: dict[tuple[str, int], list[Slot]] = {}
    for slot in slots:
        found.setdefault((slot.node, slot.index), []).append(slot)
    return found


def _by_node(counts: Iterable[Count]) -> dict[tuple[str, str], list[Count]]:
    found: dict[tuple[str, str], list[Count]] = {}
    for count in counts:
        kind = "target" if count.kind in ("part", "rest", "stay") else count.kind
        found.setdefault((count.node, kind), []).append(count)
    return found


def _replace(
    model: onnx.ModelProto,
    node: str,
    index: int,
    slot: Slot,
    cuts: list[Cut],
    base: Path | None,
    private: dict[tuple, str],
) -> None:
    """Let one input of a node see other entries of a stored tensor: in place where it is its own.

    Others get a tensor of their own, one for all that see the same; views in front of it go.
    """
    constant = slot.constant
    name = model.graph.node[edit.node_index(model, node)].input[index]
    rank = len(constant.seen_shape)
    seen = tuple((axis % rank, entries.tobytes()) for axis, entries in cuts)
    key = (constant.tensor, constant.steps, constant.seen_dtype, seen)
    if key in private:
        edit.set_input(model, node, index, private[key])
        return
    dtype = onnx.helper.tensor_dtype_to_np_dtype(constant.seen_dtype)
    values = constant.view(edit.read(model, constant.tensor, base)).astype(dtype)
    for axis, entries in cuts:
        values = np.take(values, entries, axis=axis)
    if constant.direct and _readers(model, name) == 1:
        write_tensor(edit.stored(model, name), values)
        _declare(model, name, values.shape)
        return
    own = edit.add_constant(model, f"{name}/ecp_units", values, constant.dtype, before=node)
    if constant.dtype != constant.seen_dtype:
        own = _converted(model, own, constant.seen_dtype, before=node)
    private[key] = own
    edit.set_input(model, node, index, own)


def _converted(model: onnx.ModelProto, name: str, dtype: int, *, before: str) -> str:
    """A Cast of a stored tensor, which stays in its own type."""
    output = edit.fresh_name(model, f"{name}/ecp_cast")
    cast = onnx.helper.make_node("Cast", [name], [output], name=output, to=dtype)
    model.graph.node.insert(edit.node_index(model, before), cast)
    return output


def _readers(model: onnx.ModelProto, name: str) -> int:
    """How many inputs of nodes, and outputs, a stored tensor is."""
    read = [x for node in model.graph.node for x in node.input]
    read += [y.name for y in model.graph.output]
    # A tensor that a body reads is nobody's own; counting it twice says so.
    bodies = [node for node in model.graph.node if any(a.HasField("g") for a in node.attribute)]
    inside = 2 * sum(name.encode() in node.SerializeToString() for node in bodies)
    return read.count(name) + inside


def _declare(model: onnx.ModelProto, name: str, shape: tuple[int, ...]) -> None:
    """Correct the shape of a stored tensor that is listed as an input, or described, too."""
    for info in (*model.graph.input, *model.graph.value_info):
        if info.name == name:
            for dim, size in zip(info.type.tensor_type.shape.dim, shape, strict=False):
                dim.dim_value = size


def _recount(model: onnx.ModelProto, node: str, kind: str, counts: list[tuple[Count, int]]) -> None:
    """Correct the numbers of units that a node holds, given each with the number that stays."""
    if kind == "target":
        _retarget(model, node, _entries(counts), len(counts[0][0].sizes))
        return
    proto = model.graph.node[edit.node_index(model, node)]
    if kind in ("starts", "ends"):
        _rebound(model, node, kind, counts)
        return
    before = list(counts[0][0].sizes)
    sizes = before.copy()
    for count, number in counts:
        if kind in ("group", "num_groups"):
            _set_attribute(proto, kind, number)
        else:
            sizes[count.entry] = number
    if kind in ("group", "num_groups") or sizes == before:
        return
    attribute = {"shape": "shape", "split": "split"}[kind]
    opset = opset_of(model)
    if opset < {"shape": 5, "split": 13}[kind]:
        _set_attribute(proto, attribute, sizes)
        return
    for outdated in [a for a in proto.attribute if a.name == "num_outputs"]:
        proto.attribute.remove(outdated)
    values = np.array(sizes, np.int64)
    stem = f"{node}/ecp_{kind}"
    name = edit.add_constant(model, stem, values, onnx.TensorProto.INT64, before=node)
    edit.set_input(model, node, 1, name)


def _rebound(model: onnx.ModelProto, node: str, kind: str, counts: list[tuple[Count, int]]) -> None:
    """Let a Slice begin, or end, behind the units that stay in front of where it did."""
    values = list(counts[0][0].sizes)
    for count, number in counts:
        if count.entry >= 0:
            values[count.entry] = number
    proto = model.graph.node[edit.node_index(model, node)]
    if any(a.name == kind for a in proto.attribute):
        _set_attribute(proto, kind, values)
        return
    index = 1 if kind == "starts" else 2
    dtype = next(
        (t.data_type for t in model.graph.initializer if t.name == proto.input[index]),
        onnx.TensorProto.INT64,
    )
    numbers = np.array(values, onnx.helper.tensor_dtype_to_np_dtype(dtype))
    name = edit.add_constant(model, f"{node}/ecp_{kind}", numbers, dtype, before=node)
    edit.set_input(model, node, index, name)


def _entries(counts: list[tuple[Count, int]]) -> dict[int, int]:
    """The entries of a computed target that are other numbers now."""
    stay = {count.entry: number for count, number in counts if count.kind == "stay"}
    return stay | {
        count.entry: -1 if count.kind == "rest" else number
        for count, number in counts
        if number < len(count.marks)
    }


def _retarget(model: onnx.ModelProto, node: str, entries: Mapping[int, int], length: int) -> None:
    """Give a Reshape sizes of its own, in which some entries are other numbers; so of others."""
    proto = model.graph.node[edit.node_index(model, node)]
    index = _SIZES.get(proto.op_type, 1)
    target = proto.input[index]
    made_by = next((n for n in model.graph.node if target in n.output), None)
    concat = onnx.helper.make_node("Concat", [], [edit.fresh_name(model, f"{node}/ecp_target")])
    concat.name = concat.output[0]
    concat.attribute.append(onnx.helper.make_attribute("axis", 0))
    if made_by is not None and made_by.op_type == "Concat" and len(made_by.input) == length:
        concat.input.extend(made_by.input)
    else:
        others = (None if i in entries else _entry(model, node, target, i) for i in range(length))
        concat.input.extend(x or "" for x in others)
    for entry, number in entries.items():
        concat.input[entry] = _integer(model, f"{node}/ecp_part", number, before=node)
    model.graph.node.insert(edit.node_index(model, node), concat)
    edit.set_input(model, node, index, concat.output[0])


# Which input holds the sizes of the result, where it is not the second one.
_SIZES = {"Resize": 3}


def _entry(model: onnx.ModelProto, node: str, target: str, index: int) -> str:
    """A Gather of one entry of a target, in front of its Reshape."""
    picked = _integer(model, f"{node}/ecp_entry", index, before=node)
    output = edit.fresh_name(model, f"{node}/ecp_size")
    gather = onnx.helper.make_node("Gather", [target, picked], [output], name=output, axis=0)
    model.graph.node.insert(edit.node_index(model, node), gather)
    return output


def _integer(model: onnx.ModelProto, stem: str, number: int, *, before: str) -> str:
    """A stored vector of one number."""
    values = np.array([number], np.int64)
    return edit.add_constant(model, stem, values, onnx.TensorProto.INT64, before=before)


def _set_attribute(node: onnx.NodeProto, name: str, value: int | list[int]) -> None:
    for old in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(old)
    node.attribute.append(onnx.helper.make_attribute(name, value))
