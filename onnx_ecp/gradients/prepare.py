"""The observation graph: a private copy of the model in which weights and bias shifts are inputs.

See docs/architecture.md. The copy is normalised (sparse initializers decoded, local functions
and constant Ifs inlined, fused operators lowered, opset lifted, half precision widened to float32),
so that the rules of the reverse graph meet standard operators only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs

from onnx_ecp.errors import ModelError
from onnx_ecp.gradients.lowering import is_fused, lower
from onnx_ecp.gradients.quantisation import in_floats, quantised
from onnx_ecp.gradients.reverse import adjoints, names_read
from onnx_ecp.graph import constants, is_external, printable
from onnx_ecp.graph.builder import Builder, Fact
from onnx_ecp.graph.inlining import has_bodies, inline
from onnx_ecp.graph.proto import bodies, nested, opset_of
from onnx_ecp.graph.surgery import export_graph, import_graph
from onnx_ecp.graph.tensors import byte_size, clear_values, stored_bytes
from onnx_ecp.layers import Layer
from onnx_ecp.runtime.session import Session

# The rules use ReduceSum and ReduceMean with axes as inputs, Split with num_outputs and
# ScatterElements with a reduction: all there from opset 18 on.
MINIMUM_OPSET = 18

# Bytes of tensors such as shapes and axes, which the rules read.
_SMALL = 2**16
_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class ObservationGraph:
    """The observation graph, before a reverse graph is added.

    Args:
        proto: the forward model with weights and shifts as inputs.
        base: directory of its external data.
        layers: the layers that it observes.
        outputs: names of the outputs of the model that depend on a layer.
        shifts: by layer name, the input that carries its bias shift.
        rewritten: whether its operators are not those of the model any more.
    """

    proto: onnx.ModelProto
    base: Path | None
    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]
    shifts: dict[str, str]
    rewritten: bool


def prepare(
    proto: onnx.ModelProto,
    base: Path | None,
    layers: Sequence[Layer],
    feeds: Mapping[str, np.ndarray],
    threads: int | None = None,
    *,
    reverse: bool = True,
) -> ObservationGraph:
    """Build the observation graph of a model whose sparse initializers are decoded.

    Args:
        proto: the model; it is not changed.
        base: directory of its external data.
        layers: layers of this model.
        feeds: inputs of the model and stored tensors of the layers, half precision widened; a run
            with them tells the ranks that the lowering of fused operators needs.
        threads: threads of that run.
        reverse: whether a reverse graph will be added; a forward one does without a new opset where
            the old one cannot be lifted.

    Raises:
        ModelError: the opset cannot be lifted.
    """
    private = onnx.ModelProto()
    private.CopyFrom(_without_values(proto, {layer.weight.tensor for layer in layers}, base))
    # The names are those that the layers were found under.
    places = inline(private) if has_bodies(private) else {}
    names = {name for layer in layers for name in (layer.input, layer.output)}
    lifted = _lifted(private, names, needed=reverse)
    graph = import_graph(lifted)
    widened = _widen(graph)
    z = {layer.output for layer in layers}
    fused, integers = is_fused(graph), reverse and quantised(graph, z)
    if fused or integers:
        facts = facts_of(export_graph(graph), base, feeds, threads)
        if integers:
            in_floats(graph, z, facts)
        lower(graph, facts)
    shifts = _insert_shifts(graph, layers)
    graph.toposort()
    model = export_graph(graph)
    model.ir_version = min(private.ir_version, 10)
    outputs = _downstream(graph, {layer.output for layer in layers})
    rewritten = lifted is not private or bool(places) or widened or fused or integers
    return ObservationGraph(model, base, tuple(layers), outputs, shifts, rewritten)


def add_reverse(
    prepared: ObservationGraph, facts: Mapping[str, Fact], seeded: Iterable[str]
) -> tuple[onnx.ModelProto, dict[str, str], dict[str, str], dict[str, str]]:
    """The observation graph with adjoints of every layer's pre-activation as further outputs.

    Args:
        prepared: from ``prepare``.
        facts: from ``probe``.
        seeded: names of the outputs that get a seed input ``ecp/seed/NAME``.

    Returns:
        The model; by layer name the output that carries its adjoint; by layer name the reason why
        there is none; by layer name an operator that is differentiated by differences, if any.
    """
    graph = import_graph(prepared.proto)
    op = Builder(graph, facts)
    seeds = {}
    for name in seeded:
        rank = len(facts[name].shape)
        seed = gs.Variable(f"ecp/seed/{name}", facts[name].dtype, [None] * (rank + 1))
        graph.inputs.append(seed)
        seeds[name] = seed
    result = adjoints(graph, op, dict.fromkeys(layer.output for layer in prepared.layers), seeds)
    names = {}
    for layer in prepared.layers:
        adjoint = result.tensors.get(layer.output)
        if adjoint is not None:
            if not adjoint.inputs:
                # An output must be some node's: that of an output itself is its seed, an input.
                adjoint = op.Identity(adjoint)
            adjoint.dtype = facts[layer.output].dtype
            names[layer.name] = adjoint.name
            if all(adjoint is not y for y in graph.outputs):
                graph.outputs.append(adjoint)
    tensors = graph.tensors()
    known = {y.name for y in graph.outputs} | {x.name for x in graph.inputs}
    for name in dict.fromkeys(layer.input for layer in prepared.layers):
        if name not in known:
            tensors[name].dtype = facts[name].dtype
            graph.outputs.append(tensors[name])
    model = export_graph(graph)
    model.ir_version = prepared.proto.ir_version
    blocked, numeric = (
        {x.name: found[x.output] for x in prepared.layers if x.output in found}
        for found in (result.blocked, result.numeric)
    )
    return model, names, blocked, numeric


def facts_of(
    proto: onnx.ModelProto,
    base: Path | None,
    feeds: Mapping[str, np.ndarray],
    threads: int | None = None,
) -> dict[str, Fact]:
    """Run a model once and note shape and dtype of every tensor.

    onnx shape inference knows ranks for only half of the tensors of a fused network.

    Args:
        proto: the model; it is not changed.
        base: directory of its external data.
        feeds: all its inputs, with a batch of at least two where it is free.
        threads: threads of the run.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    given = {y.name for y in model.graph.output}
    names = dict.fromkeys(y for node in model.graph.node for y in node.output if y)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    values = Session(model, base=base, threads=threads).run(feeds)
    facts = {n: Fact(v.shape, v.dtype) for n, v in values.items() if isinstance(v, np.ndarray)}
    facts.update({n: Fact(np.shape(v), np.asarray(v).dtype) for n, v in feeds.items()})
    return facts


def _downstream(graph: gs.Graph, names: set[str]) -> tuple[str, ...]:
    """Names of the outputs of a sorted graph that depend on the named tensors."""
    down = set(names)
    for node in graph.nodes:
        if names_read(node) & down:
            down.update(y.name for y in node.outputs)
    return tuple(y.name for y in graph.outputs if y.name in down)


def _without_values(proto: onnx.ModelProto, names: set[str], base: Path | None) -> onnx.ModelProto:
    """The model with the named stored tensors as graph inputs; no large value is copied.

    What must be read to rewrite the graph, half precision and small tensors, is taken in from
    external files: graphsurgeon does not know where they are.
    """
    graph = proto.graph
    # Before IR 4 initializers had to be listed as inputs; here none is.
    skeleton = onnx.ModelProto(ir_version=max(proto.ir_version, 8), opset_import=proto.opset_import,
                               functions=proto.functions)  # fmt: skip
    new = skeleton.graph
    new.name = graph.name or "graph"
    initializers = {t.name for t in graph.initializer}
    new.input.extend(x for x in graph.input if x.name not in initializers)
    new.output.extend(graph.output)
    new.value_info.extend(graph.value_info)
    stored = constants(proto)
    new.node.extend(n for n in graph.node if n.op_type != "Constant" or n.output[0] not in names)
    new.input.extend(
        onnx.helper.make_tensor_value_info(name, stored[name].data_type, stored[name].dims)
        for name in stored
        if name in names
    )
    new.initializer.extend(t for t in graph.initializer if t.name not in names)
    for tensor in new.initializer:
        if is_external(tensor) and (tensor.data_type in _HALF or byte_size(tensor) <= _SMALL):
            raw = stored_bytes(tensor, base).tobytes()
            clear_values(tensor)
            tensor.raw_data = raw
    _respelled(skeleton)
    return skeleton


def _respelled(model: onnx.ModelProto) -> None:
    """The standard domain is "" everywhere: the converter and graphsurgeon know no other name."""
    for imported in (o for x in [model, *model.functions] for o in x.opset_import):
        imported.domain = "" if imported.domain == "ai.onnx" else imported.domain
    for node in (node for body in bodies(model) for node in body.node):
        node.domain = "" if node.domain == "ai.onnx" else node.domain


def _lifted(model: onnx.ModelProto, names: set[str], *, needed: bool) -> onnx.ModelProto:
    """The model at opset MINIMUM_OPSET or later; as it is where that fails and is not needed.

    Args:
        model: with these tensors.
        names: of tensors that must be called the same afterwards.
        needed: whether it is an error that the opset cannot be lifted.
    """
    opset = opset_of(model) or MINIMUM_OPSET
    if opset >= MINIMUM_OPSET:
        return model
    try:
        lifted = onnx.version_converter.convert_version(_veiled(model, opset), MINIMUM_OPSET)
        _unveil(lifted)
        _check_names(model, lifted, names)
    except Exception as error:
        if not needed:
            return model
        # The converter begins with the place in its own source.
        reason = str(error).rsplit(" failed: ", maxsplit=1)[-1][:200]
        raise ModelError(
            f"opset {opset} cannot be lifted to {MINIMUM_OPSET}: {reason}",
            hint="Convert the model with onnx.version_converter, export it anew, or use a method "
            "that needs no sensitivities, such as --method magnitude.",
        ) from error
    # The converter drops custom domains of operators it does not know.
    have = {o.domain for o in lifted.opset_import}
    lifted.opset_import.extend(o for o in model.opset_import if o.domain not in have | {"ai.onnx"})
    return lifted


# Takes the place of the standard domain where only ONNX Runtime has the operator.
_UNKNOWN = "ecp.unknown"
# ONNX Runtime has Affine, ScaledTanh and the like of the first opsets up to this one.
_OLD_OPSET = 9


def _veiled(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A copy in which operators that onnx does not know are no standard ones: they stay.

    Raises:
        ValueError: ONNX Runtime itself knows such an operator in old opsets only.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in (node for graph in nested(copy.graph) for node in graph.node):
        if not node.domain and not onnx.defs.has(node.op_type, max_inclusive_version=opset):
            if opset <= _OLD_OPSET:
                raise ValueError(f"operator {node.op_type} is gone from newer opsets")
            node.domain = _UNKNOWN
    if not any(o.domain == _UNKNOWN for o in copy.opset_import):
        copy.opset_import.append(onnx.helper.make_opsetid(_UNKNOWN, 1))
    return copy


def _unveil(model: onnx.ModelProto) -> None:
    for node in (node for graph in nested(model.graph) for node in graph.node):
        if node.domain == _UNKNOWN:
            node.domain = ""
    for imported in [o for o in model.opset_import if o.domain == _UNKNOWN]:
        model.opset_import.remove(imported)


def _check_names(before: onnx.ModelProto, after: onnx.ModelProto, names: set[str]) -> None:
    """ValueError where a named tensor is not there any more: some conversions rename outputs."""
    made_before, made = ({y for n in m.graph.node for y in n.output} for m in (before, after))
    lost = names & (made_before - made)
    if lost:
        raise ValueError(f"the converter renames {', '.join(map(printable, sorted(lost)))}.")


def _widen(graph: gs.Graph) -> bool:
    """Turn half precision into float32 everywhere, in bodies too; whether there was any."""
    graphs = [graph, *graph.subgraphs(recursive=True)]
    tensors = {id(t): t for g in graphs for t in g.tensors(check_duplicates=False).values()}
    tensors |= {id(t): t for g in graphs for t in (*g.inputs, *g.outputs)}
    found = any(_is_half(tensor.dtype) for tensor in tensors.values())
    for tensor in tensors.values():
        if isinstance(tensor, gs.Constant):
            if _is_half(tensor.dtype):
                tensor.values = tensor.values.astype(np.float32)
        elif _is_half(tensor.dtype):
            tensor.dtype = np.float32
    for node in (node for g in graphs for node in g.nodes):
        if node.attrs.get("to") in _HALF:
            node.attrs["to"] = int(onnx.TensorProto.FLOAT)
        if node.attrs.get("dtype") in _HALF:
            node.attrs["dtype"] = int(onnx.TensorProto.FLOAT)
        value = node.attrs.get("value")
        if isinstance(value, gs.Constant) and _is_half(value.dtype):
            value.values = value.values.astype(np.float32)
            found = True
    return found


def _is_half(dtype: Any) -> bool:
    """Whether graphsurgeon's idea of a type, an ONNX number or a NumPy one, is half precision."""
    if dtype is None or isinstance(dtype, int):
        return dtype in _HALF
    return str(np.dtype(dtype)) in ("float16", "bfloat16")


def _insert_shifts(graph: gs.Graph, layers: Iterable[Layer]) -> dict[str, str]:
    """Behind every layer's z: ``z = Add(z/ecp/raw, shift)`` with shift a new graph input.

    Returns:
        By layer name, the name of the input.
    """
    tensors, shifts = graph.tensors(), dict[str, str]()
    bodies = graph.subgraphs(recursive=True)
    taken = {*tensors, *(name for body in bodies for name in body.tensors())}
    for layer in layers:
        z = tensors[layer.output]
        raw = gs.Variable(_fresh(f"{layer.output}/ecp/raw", taken))
        for node in list(z.inputs):
            node.outputs = [raw if y is z else y for y in node.outputs]
        # Not the model's annotation, which may be missing. Half precision is widened by now.
        dtype = np.float64 if layer.dtype == onnx.TensorProto.DOUBLE else np.float32
        shift = gs.Variable(_fresh(f"ecp/shift/{layer.output}", taken), dtype, None)
        shifts[layer.name] = shift.name
        graph.inputs.append(shift)
        add = gs.Node("Add", f"{layer.output}/ecp/shift", inputs=[raw, shift], outputs=[z])
        graph.nodes.append(add)
    return shifts


def _fresh(stem: str, taken: set[str]) -> str:
    """The name, with primes behind it where it is taken; it is taken then."""
    while stem in taken:
        stem += "'"
    taken.add(stem)
    return stem
