"""Local functions and Ifs whose condition is constant, replaced by what they do.

For a private copy of a model, so that what looks at the main graph sees what really runs. A tensor
``t`` of a body is then called ``PLACE/t``, with the place that the body had: the name of the call,
or that of the If and its branch. Tensors of the main graph keep their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnx_ecp.graph.external import is_external
from onnx_ecp.graph.inference import MOST_NODES, Key, expanded, inferred
from onnx_ecp.graph.proto import UNSHIFTED, constant_value, nested, subgraphs

# Conditions are computed from few numbers, such as the sizes of a tensor.
_MOST_NUMBERS = 64
# Their first input may be known in part, the others must be known.
_MOVES = ("Cast", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze")
# All inputs must be known; the result has no more elements than they have together.
_FOLDED = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max"),
    *("Min", "Mod", "Mul", "Not", "Or", "ReduceProd", "ReduceSum", "Sub", "Xor"),
)

_Body = onnx.GraphProto | onnx.FunctionProto
_Functions = Mapping[Key, onnx.FunctionProto]


@dataclass(frozen=True)
class Place:
    """Where a node was before it was inlined.

    Args:
        origin: first output of the node of the main graph that held it.
        words: the same for the user.
    """

    origin: str
    words: str


def has_bodies(proto: onnx.ModelProto) -> bool:
    """Whether there may be anything to inline."""
    return bool(proto.functions) or any(node.op_type == "If" for node in proto.graph.node)


def inline(model: onnx.ModelProto) -> dict[str, Place]:
    """Inline into the main graph of our own copy whatever can be; the rest stays.

    A function of another opset than the model's stays, as does an If whose condition is not known.

    Args:
        model: what is changed. Large values may be missing.

    Returns:
        By first output of every node that came out of a body, where that was.
    """
    places = _inline_functions(model)
    while True:
        known = _known(model) if any(n.op_type == "If" for n in model.graph.node) else {}
        taken = {
            node.output[0]: bool(known[node.input[0]])
            for node in model.graph.node
            if node.op_type == "If" and node.input[0] in known and node.output
            if known[node.input[0]].size == 1 and known[node.input[0]].dtype == np.bool_
            if not any(branch.sparse_initializer for branch in subgraphs(node))
        }
        if not taken:
            return places
        _inline_branches(model, taken, places)


# Splicing a body into a graph.


class _Names:
    """Names that are not taken yet."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._taken = set(_all_names(model.graph))

    def fresh(self, stem: str) -> str:
        """The name, with primes behind it where it is taken."""
        while stem in self._taken:
            stem += "'"
        self._taken.add(stem)
        return stem


def _all_names(root: onnx.GraphProto) -> Iterator[str]:
    for graph in nested(root):
        assert isinstance(graph, onnx.GraphProto), "bodies in a graph are graphs"
        for infos in (graph.input, graph.output, graph.initializer):
            yield from (info.name for info in infos)
        for node in graph.node:
            yield from (node.name, *node.input, *node.output)


def _spliced(
    body: _Body, given: Mapping[str, str], outputs: Mapping[str, str], place: str, names: _Names
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Copies of the nodes of a body under names of the graph around it, and what is called how.

    Args:
        body: whose outputs are named in ``outputs``.
        given: by name inside, the name of what is passed in.
        outputs: by name outside, the name inside.
        place: goes in front of all other names.
        names: of the graph around it.
    """
    made = [name for node in body.node for name in node.output if name]
    if isinstance(body, onnx.GraphProto):
        made += [tensor.name for tensor in body.initializer]
    called = dict(given)
    wanted = {inside: outside for outside, inside in reversed(list(outputs.items()))}
    produced = {name for node in body.node for name in node.output}
    for name in made:
        direct = name in wanted and name in produced
        called[name] = wanted[name] if direct else names.fresh(f"{place}/{name}")
    nodes = []
    for node in body.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if copy.name:
            copy.name = f"{place}/{copy.name}"
        _rename(copy, called)
        nodes.append(copy)
    for outside, inside in outputs.items():
        if called.get(inside, inside) != outside:
            identity = onnx.helper.make_node("Identity", [called.get(inside, inside)], [outside])
            nodes.append(identity)
    return nodes, called


def _rename(node: onnx.NodeProto, called: Mapping[str, str]) -> None:
    """Let a node read and write tensors under their new names, its own bodies included."""
    for names in (node.input, node.output):
        names[:] = [called.get(name, name) for name in names]
    for graph in subgraphs(node):
        own = {name for inner in graph.node for name in inner.output}
        own |= {x.name for x in (*graph.input, *graph.initializer)}
        outer = {old: new for old, new in called.items() if old not in own}
        for inner in graph.node:
            _rename(inner, outer)
        for y in graph.output:
            y.name = outer.get(y.name, y.name)


def _node_name(node: onnx.NodeProto, times: Counter[str]) -> str:
    """How users are told of a node: by its name, or its output where that is not unique."""
    if node.name and times[node.name] == 1:
        return str(node.name)
    return next((str(y).removesuffix(UNSHIFTED) for y in node.output if y), node.op_type)


# Functions.


def _inline_functions(model: onnx.ModelProto) -> dict[str, Place]:
    versions = {_domain(o.domain): o.version for o in model.opset_import}
    functions = {
        (f.domain, f.name, f.overload): f
        for f in model.functions
        if all(versions.get(_domain(o.domain), o.version) == o.version for o in f.opset_import)
    }
    places: dict[str, Place] = {}
    if not functions or expanded(model.graph, functions) > MOST_NODES:
        return places
    _inline_calls(model.graph, functions, _Names(model), places, None)
    for imported in [o for f in functions.values() for o in f.opset_import]:
        if _domain(imported.domain) not in versions:
            versions[_domain(imported.domain)] = imported.version
            model.opset_import.append(imported)
    kept = [f for f in model.functions if (f.domain, f.name, f.overload) not in functions]
    del model.functions[:]
    model.functions.extend(kept)
    return places


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _inline_calls(
    graph: _Body,
    functions: _Functions,
    names: _Names,
    places: dict[str, Place],
    outer: Place | None,
) -> None:
    """Replace all calls in a graph, and in the bodies of its nodes.

    Args:
        graph: what is changed.
        functions: that are inlined; they end.
        names: of the main graph.
        places: new ones are noted here.
        outer: where the graph itself is, if it is a body.
    """
    times = Counter(node.name for node in graph.node)
    pending = [(node, outer) for node in reversed(graph.node)]
    nodes: list[onnx.NodeProto] = []
    while pending:
        node, place = pending.pop()
        function = functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            origin = next((y for y in node.output if y), "")
            where = place or Place(origin, f"the local function {function.name!r}")
            pending += [(x, where) for x in reversed(_called(node, function, times, names))]
            continue
        nodes.append(node)
        if place is not None and node.output:
            places[node.output[0]] = place
        for body in subgraphs(node):
            _inline_calls(body, functions, names, places, place)
    del graph.node[:]
    graph.node.extend(nodes)


def _called(
    call: onnx.NodeProto, function: onnx.FunctionProto, times: Counter[str], names: _Names
) -> list[onnx.NodeProto]:
    """The nodes of a function's body for one call."""
    passed = [*call.input, *[""] * (len(function.input) - len(call.input))]
    given = dict(zip(function.input, passed, strict=True))
    pairs = zip(call.output, function.output, strict=False)
    outputs = {outside: inside for outside, inside in pairs if outside}
    place = _node_name(call, times)
    nodes, _ = _spliced(function, given, outputs, place, names)
    values = {a.name: a for a in (*function.attribute_proto, *call.attribute)}
    for node in nodes:
        _set_attributes(node, values)
    return nodes


def _set_attributes(node: onnx.NodeProto, values: Mapping[str, onnx.AttributeProto]) -> None:
    """Attributes that refer to those of the call get their values, or go where there is none."""
    own = list(node.attribute)
    del node.attribute[:]
    for attribute in own:
        value = values.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if value is not None:
            new = node.attribute.add()
            new.CopyFrom(value)
            new.name = attribute.name
    for graph in subgraphs(node):
        for inner in graph.node:
            _set_attributes(inner, values)


# Ifs.


def _inline_branches(
    model: onnx.ModelProto, taken: Mapping[str, bool], places: dict[str, Place]
) -> None:
    """Replace Ifs, by first output, by the branch that is taken; new places are noted."""
    graph, names = model.graph, _Names(model)
    times = Counter(node.name for node in graph.node)
    nodes: list[onnx.NodeProto] = []
    for node in list(graph.node):
        if not (node.op_type == "If" and node.output and node.output[0] in taken):
            nodes.append(node)
            continue
        attribute = "then_branch" if taken[node.output[0]] else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == attribute)
        pairs = zip(node.output, (y.name for y in branch.output), strict=False)
        outputs = {outside: inside for outside, inside in pairs if outside}
        name = _node_name(node, times)
        inside, called = _spliced(branch, {}, outputs, f"{name}/{attribute}", names)
        for kind in ("initializer", "value_info"):
            for tensor in getattr(branch, kind):
                new = getattr(graph, kind).add()
                new.CopyFrom(tensor)
                new.name = called.get(tensor.name, tensor.name)
        nodes += inside
        place = places.get(node.output[0], Place(node.output[0], f"{attribute} of If {name!r}"))
        places |= {n.output[0]: place for n in inside if n.output}
    del graph.node[:]
    graph.node.extend(nodes)


# What conditions are computed from. Of values such as the sizes of a tensor some may be unknown.


def _known(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """By tensor name, the small values that are the same for all inputs of the model."""
    sizes, graph = _sizes(model), model.graph
    found = {t.name: _of_tensor(t) for t in graph.initializer if _few(t)}
    for node in graph.node:
        value = _value(node, found, sizes, model)
        if value is not None and value[0].size <= _MOST_NUMBERS:
            found[node.output[0]] = value
    return {name: value for name, (value, there) in found.items() if there.all()}


_Value = tuple[np.ndarray, np.ndarray]
"""Numbers, and which of them are known (1 or 0)."""


def _whole(values: np.ndarray) -> _Value:
    return values, np.ones(values.shape, np.int64)


def _of_tensor(tensor: onnx.TensorProto) -> _Value:
    return _whole(onnx.numpy_helper.to_array(tensor))


def _few(tensor: onnx.TensorProto) -> bool:
    number = int(np.prod(tensor.dims, dtype=object))
    plain = tensor.data_type in (*_INTEGERS, onnx.TensorProto.FLOAT)
    return plain and 0 < number <= _MOST_NUMBERS and not is_external(tensor)


_INTEGERS = (onnx.TensorProto.BOOL, onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def _value(
    node: onnx.NodeProto,
    found: Mapping[str, _Value],
    sizes: Mapping[str, list[int | None]],
    model: onnx.ModelProto,
) -> _Value | None:
    """What a node computes, as far as that is known."""
    if node.domain not in ("", "ai.onnx") or not node.output:
        return None
    if node.op_type == "Constant":
        tensor = constant_value(node.attribute[0]) if node.attribute else None
        return _of_tensor(tensor) if tensor is not None and _few(tensor) else None
    if node.op_type in ("Shape", "Size"):
        return _of_sizes(node, sizes.get(node.input[0]))
    inputs = [found.get(name) for name in node.input if name]
    if not inputs or any(x is None for x in inputs):
        return None
    values, there = zip(*(x for x in inputs if x is not None), strict=True)
    free = len(values) if node.op_type == "Concat" else int(node.op_type in _MOVES)
    if not (free or node.op_type in _FOLDED) or not all(x.all() for x in there[free:]):
        return None
    result = _run(node, values, model)
    if result is None or not free:
        return None if result is None else _whole(result)
    moved = _run(node, [*there[:free], *values[free:]], model)
    return None if moved is None else (result, moved.astype(np.int64))


def _of_sizes(node: onnx.NodeProto, sizes: list[int | None] | None) -> _Value | None:
    if sizes is None:
        return None
    if node.op_type == "Size":
        return None if None in sizes else _whole(np.array(np.prod(sizes, dtype=np.int64)))  # type: ignore[arg-type]
    bounds = {a.name: a.i for a in node.attribute}
    part = sizes[slice(bounds.get("start", 0), bounds.get("end", len(sizes)))]
    values = np.array([-1 if d is None else d for d in part], np.int64)
    return values, (values >= 0).astype(np.int64)


def _run(
    node: onnx.NodeProto, values: Iterable[np.ndarray], model: onnx.ModelProto
) -> np.ndarray | None:
    """The first output of one node; None where the reference implementation does not know it."""
    feeds = dict(zip((name for name in node.input if name), values, strict=True))
    inputs = [onnx.ValueInfoProto(name=name) for name in feeds]
    outputs = [onnx.ValueInfoProto(name=node.output[0])]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    with suppress(Exception):  # whatever it does not like leaves the condition unknown
        results: Any = ReferenceEvaluator(alone).run(None, feeds)
        return np.asarray(results[0])
    return None


def _sizes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """By tensor name, its shape as shape inference tells it, None for what is not known."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    skeleton.functions.extend(model.functions)
    graph = skeleton.graph
    graph.node.extend(model.graph.node)
    # What a model says about the sizes of other tensors than its inputs need not be true.
    graph.input.extend(model.graph.input)
    graph.output.extend(onnx.ValueInfoProto(name=y.name) for y in model.graph.output)
    listed = {x.name for x in model.graph.input}
    for t in model.graph.initializer:
        if _few(t):
            graph.initializer.append(t)
        elif t.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims))
    graph = inferred(skeleton, data_prop=True) or graph
    return {
        x.name: [int(d.dim_value) if d.HasField("dim_value") else None for d in kind.shape.dim]
        for x in (*graph.input, *graph.output, *graph.value_info)
        if (kind := x.type.tensor_type).HasField("shape")
    }
