"""What must hold of a model before anything is allocated, inferred or run for it.

Cheap checks of our own come first: the official checker and ONNX Runtime hang on some of the
models refused here, and read files or memory for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.agreement import check_agreement
from onnx_ecp.graph.external import is_external
from onnx_ecp.graph.operators import Moves, moving
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import (
    Body,
    bodies,
    nested,
    sparse_tensors,
    subgraphs,
    tensors,
)
from onnx_ecp.graph.sparse import check_sparse
from onnx_ecp.graph.tensors import check_tensor, clear_values, values

MAX_NODES = 1_000_000
# The checker infers the shapes of models of up to so many bytes.
LARGEST_CHECKED = 2**28
# ONNX Runtime follows calls no deeper; protobuf reads no deeper than these bodies take.
MAX_CALLS, MAX_BODIES = 100, 30
_DAMAGED = "The model is damaged: export or download it again."
_CHUNK = 2**22
_STANDARD = ("", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training")
# ONNX Runtime has these in the standard domain at every opset, the standard does not; its own
# optimizers write some of them. Found by loading one node of each with version 1.31.
_RUNTIME_OPS = frozenset(
    {
        "Affine",
        "Crop",
        "DynamicSlice",
        "ImageScaler",
        "LayerNormalization",
        "MeanVarianceNormalization",
        "ParametricSoftplus",
        "Scale",
        "ScaledTanh",
        "SimplifiedLayerNormalization",
    }
)
_RUNTIME_DOMAIN = "com.microsoft"
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_CARRIERS = moving(Moves.IN_ORDER, Moves.REORDERED)
_WEIGHTED = frozenset(
    {
        "Gemm",
        "MatMul",
        "Conv",
        "ConvTranspose",
        "FusedGemm",
        "FusedMatMul",
        "FusedConv",
        "LSTM",
        "GRU",
        "RNN",
        "BatchNormalization",
        "LayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
    }
)


def validate(proto: onnx.ModelProto, base: Path | None) -> None:
    """Refuse a model that is invalid, dangerous to load, or has weights that are not finite.

    Args:
        proto: the model; it is not changed.
        base: directory of its external data, None if there is none.

    Raises:
        ModelError: with what is wrong and where.
    """
    _check_skeleton(proto)
    _check_names(proto)
    _check_functions(proto)
    for _, tensor in tensors(proto):
        check_tensor(tensor, base)
    check_sparse(sparse_tensors(proto))
    for root in (proto.graph, *proto.functions):
        _check_definitions(root)
    _check_operators(proto)
    _check_officially(proto)
    check_agreement(proto)
    _check_finite(proto, base)


def _check_skeleton(proto: onnx.ModelProto) -> None:
    if not proto.HasField("graph"):
        raise ModelError("not an ONNX model: it has no graph.", hint=_DAMAGED)
    if not proto.graph.node:
        raise ModelError("the graph has no nodes.", hint=_DAMAGED)
    if not proto.opset_import:
        raise ModelError("no opset is given (opset_import is empty).", hint=_DAMAGED)
    if not proto.graph.output:
        raise ModelError("the graph has no outputs.", hint=_DAMAGED)


def _check_names(proto: onnx.ModelProto) -> None:
    """Protobuf hands out names that are not UTF-8 as bytes, on which all later code stumbles."""
    for name in _names(proto):
        if not isinstance(name, str):
            raise ModelError(f"the name '{printable(name)}' is not UTF-8.", hint=_DAMAGED)


def _names(proto: onnx.ModelProto) -> Iterator[str | bytes]:
    yield from (opset.domain for opset in proto.opset_import)
    for body in bodies(proto):
        for node in body.node:
            yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)
        if isinstance(body, onnx.FunctionProto):
            yield from (body.domain, *body.input, *body.output)
        else:
            infos = (*body.input, *body.output, *body.value_info)
            yield from (value.name for value in infos)
            for value in infos:
                yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for label, tensor in tensors(proto):
        yield from (label, tensor.name)
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    yield from (sparse.values.name for _, sparse in sparse_tensors(proto))


# Local functions: expanding them may take for ever, so the size is counted instead.

_Key = tuple[str, str, str]


def _key(node: onnx.NodeProto) -> _Key:
    return (_domain(node.domain), node.op_type, node.overload)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _check_functions(proto: onnx.ModelProto) -> None:
    """Refuse recursive functions, and those that expand to more than a million nodes."""
    known = {(_domain(f.domain), f.name, f.overload): f for f in proto.functions}
    if len(known) != len(proto.functions):
        raise ModelError("a local function is defined twice.", hint=_DAMAGED)
    calls = {key: _calls(function) for key, function in known.items()}
    try:
        order = list(
            TopologicalSorter({k: c.keys() & known for k, c in calls.items()}).static_order()
        )
    except CycleError as error:
        names = " -> ".join(printable(key[1]) for key in error.args[1][:5])
        raise ModelError(
            f"local functions call each other in a circle: {names}.",
            hint="Export the model again.",
        ) from error
    sizes: dict[_Key, int] = {}
    for key in order:
        sizes[key] = _expanded(calls[key], sizes)
    if max([_expanded(_calls(proto.graph), sizes), *sizes.values()]) > MAX_NODES:
        raise ModelError(
            f"local functions expand to more than {MAX_NODES} nodes.",
            hint="Such a model hangs ONNX's own tools too; export it without functions.",
        )
    depths: dict[_Key, tuple[int, int]] = {}
    for key in order:
        depths[key] = _depths(known[key], depths)
    called, inside = map(max, zip(_depths(proto.graph, depths), *depths.values(), strict=True))
    if called > MAX_CALLS or inside > MAX_BODIES:
        raise ModelError(
            f"local functions call each other {called} deep, with If and Loop bodies {inside} "
            f"deep: {MAX_CALLS} and {MAX_BODIES} are the limits.",
            hint="Inline the functions, for example with onnx.inliner, or export without them.",
        )


def _depths(body: Body, known: Mapping[_Key, tuple[int, int]]) -> tuple[int, int]:
    """How deep calls, and bodies of nodes, lie in each other once all is expanded."""
    calls = bodies = 0
    open_bodies: list[tuple[Body, int]] = [(body, 0)]
    while open_bodies:
        inner, depth = open_bodies.pop()
        bodies = max(bodies, depth)
        for node in inner.node:
            more = known.get(_key(node))
            if more is not None:
                calls, bodies = max(calls, more[0] + 1), max(bodies, depth + more[1])
            open_bodies += [(graph, depth + 1) for graph in subgraphs(node)]
    return calls, bodies


def _calls(body: Body) -> Counter[_Key]:
    return Counter(_key(node) for inner in nested(body) for node in inner.node)


def _expanded(calls: Counter[_Key], sizes: Mapping[_Key, int]) -> int:
    """Number of nodes after expansion; capped, for it grows exponentially with the functions."""
    return min(sum(n * sizes.get(key, 1) for key, n in calls.items()), MAX_NODES + 1)


# Graphs: every tensor is defined once, before it is used.


def _check_definitions(root: Body) -> None:
    open_bodies: list[tuple[Body, tuple[set[str], ...]]] = [(root, ())]
    while open_bodies:
        body, outer = open_bodies.pop()
        known, later = _defined_before(body), _defined_by_nodes(body)
        for name in later & known:
            raise ModelError(f"tensor '{printable(name)}' is defined twice.", hint=_DAMAGED)
        inner = (*outer, known | later)
        open_bodies += [(graph, inner) for node in body.node for graph in subgraphs(node)]
        _check_order(body, outer, known, later)


def _check_order(body: Body, outer: tuple[set[str], ...], known: set[str], later: set[str]) -> None:
    """Every input is known before its node; of the graphs around, the checker knows the order."""
    for node in body.node:
        for name in node.input:
            if name and name not in known and not any(name in names for names in outer):
                _refuse_input(body, node, name, later)
        known.update(node.output)
    for output in body.output:
        name = output if isinstance(output, str) else output.name
        if name not in known and not any(name in names for names in outer):
            raise ModelError(f"nothing computes the output '{printable(name)}'.", hint=_DAMAGED)


def _defined_before(body: Body) -> set[str]:
    """Inputs and initializers; ModelError when a name is in either of them twice."""
    if isinstance(body, onnx.FunctionProto):
        return _unique("input", list(body.input))
    stored = [t.name for t in body.initializer] + [s.values.name for s in body.sparse_initializer]
    inputs = [value.name for value in body.input]
    return _unique("input", inputs) | _unique("initializer", stored)


def _defined_by_nodes(body: Body) -> set[str]:
    return _unique("tensor", [name for node in body.node for name in node.output if name])


def _unique(what: str, names: list[str]) -> set[str]:
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ModelError(f"{what} '{printable(twice)}' is defined twice.", hint=_DAMAGED)
    return set(names)


def _refuse_input(body: Body, node: onnx.NodeProto, name: str, later: set[str]) -> None:
    reader = f"{printable(node.op_type)} node '{printable(_label(node))}'"
    if name not in later:
        raise ModelError(
            f"{reader} reads '{printable(name)}', which does not exist.", hint=_DAMAGED
        )
    if _is_cyclic(body):
        raise ModelError(f"the graph is cyclic: {reader} reads its own result.", hint=_DAMAGED)
    raise ModelError(
        f"the nodes are not sorted: {reader} reads '{printable(name)}' before it is computed.",
        hint="Sort them, for example with onnx-graphsurgeon's Graph.toposort().",
    )


def _label(node: onnx.NodeProto) -> str:
    return node.name or next(iter(node.output), "")


def _is_cyclic(body: Body) -> bool:
    maker = {name: i for i, node in enumerate(body.node) for name in node.output}
    needs = {i: {maker[x] for x in node.input if x in maker} for i, node in enumerate(body.node)}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError:
        return True
    return False


# Operators.


def is_newer(proto: onnx.ModelProto) -> bool:
    """Whether the installed onnx is too old to judge the model."""
    newest = onnx.defs.onnx_opset_version()
    opsets = [*proto.opset_import, *(o for f in proto.functions for o in f.opset_import)]
    return proto.ir_version > onnx.IR_VERSION or any(
        _domain(o.domain) == "" and o.version > newest for o in opsets
    )


def _check_operators(proto: onnx.ModelProto) -> None:
    if is_newer(proto):
        return
    local = {(_domain(f.domain), f.name, f.overload) for f in proto.functions}
    for root in (proto.graph, *proto.functions):
        opsets = _opsets(proto) | (_opsets(root) if root is not proto.graph else {})
        for body in nested(root):
            for node in body.node:
                if _key(node) not in local:
                    _check_operator(node, opsets)


def _opsets(owner: onnx.ModelProto | onnx.FunctionProto) -> dict[str, int]:
    return {_domain(opset.domain): opset.version for opset in owner.opset_import}


def _check_operator(node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    domain = _domain(node.domain)
    if domain not in opsets:
        # ONNX Runtime imports its own domains by itself.
        if domain.startswith(_RUNTIME_DOMAIN):
            return
        raise ModelError(
            f"{printable(node.op_type)} node '{printable(_label(node))}': the model imports no "
            f"opset for the domain '{printable(domain)}'.",
            hint=_DAMAGED,
        )
    if domain not in _STANDARD or (domain == "" and node.op_type in _RUNTIME_OPS):
        return
    # The schema lookup takes 32-bit numbers; what is negative or larger does not exist anyway.
    version = opsets[domain] if 0 < opsets[domain] < 2**31 else 0
    try:
        onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError as error:
        raise ModelError(
            f"unknown operator '{printable(node.op_type)}' (node '{printable(_label(node))}'): "
            f"opset {opsets[domain]} of domain {domain or 'ai.onnx'!r} does not have it.",
            hint="A custom operator needs a domain of its own.",
        ) from error


def _check_officially(proto: onnx.ModelProto) -> None:
    """What ``onnx.checker`` finds beyond the above, on a copy without weights."""
    if is_newer(proto):
        return
    try:
        onnx.checker.check_model(_without_weights(proto))
    except EncodeError:
        # More than 2 GB in Constant nodes: nothing that the checker could be given.
        return
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"invalid model: {printable(first, 300)}", hint=_DAMAGED) from error


def passes_fully(proto: onnx.ModelProto) -> bool:
    """Whether the checker of the model's own opset, types and shapes included, has no objection.

    External weights, and those of a larger file, are left out, with what follows from their values.
    """
    if is_newer(proto):
        return False
    try:
        small = proto.ByteSize() <= LARGEST_CHECKED
        small = small and not any(is_external(tensor) for _, tensor in tensors(proto))
        onnx.checker.check_model(proto if small else _without_weights(proto), full_check=small)
    except (
        *(onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
        *(EncodeError, ValueError, RuntimeError),
    ):
        return False
    return True


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A small copy for the checker: initializers and external tensors are empty.

    It also allows what ONNX Runtime allows: its own operators, outputs without a shape.
    """
    copy = onnx.ModelProto(
        ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions
    )
    copy.graph.name = proto.graph.name or "graph"
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(copy.graph, field).extend(getattr(proto.graph, field))
    for tensor in proto.graph.initializer:
        copy.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=[0])
    for _, tensor in tensors(copy):
        if is_external(tensor):
            clear_values(tensor)
            tensor.dims[:] = [0]
    for body in bodies(copy):
        _allow_runtime(body)
    for owner in (copy, *copy.functions):
        _import_runtime_domains(owner)
    return copy


def _allow_runtime(body: Body) -> None:
    for node in body.node:
        if _domain(node.domain) == "" and node.op_type in _RUNTIME_OPS:
            node.domain = _RUNTIME_DOMAIN
    if isinstance(body, onnx.GraphProto):
        for value in (*body.input, *body.output, *body.value_info):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()


def _import_runtime_domains(owner: onnx.ModelProto | onnx.FunctionProto) -> None:
    root = owner.graph if isinstance(owner, onnx.ModelProto) else owner
    used = {node.domain for body in nested(root) for node in body.node}
    for domain in sorted(used - {opset.domain for opset in owner.opset_import}):
        if domain.startswith(_RUNTIME_DOMAIN):
            owner.opset_import.add(domain=domain, version=1)


# Values.


def _check_finite(proto: onnx.ModelProto, base: Path | None) -> None:
    """Refuse NaN anywhere, and infinities in weights.

    Other constants may be infinite: attention masks and limits often are.
    """
    weights = _weights(proto)
    bad = [*_bad_numbers(proto)]
    for label, tensor in tensors(proto):
        if tensor.data_type in _FLOATS:
            nan, infinite = _count_nonfinite(values(tensor, base))
            if nan or (infinite and label in weights):
                bad.append(f"'{printable(label)}' ({nan} NaN, {infinite} infinite)")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ModelError(
            f"weights are not finite: {', '.join(bad[:5])}{more}.",
            hint="The training diverged or the export overflowed; there is nothing to measure.",
        )


def _bad_numbers(proto: onnx.ModelProto) -> Iterator[str]:
    """Attributes that are NaN, or infinite in an operator with weights, described."""
    for body in bodies(proto):
        for node in body.node:
            for attribute in node.attribute:
                numbers = np.array([attribute.f, *attribute.floats])
                nan, infinite = _count_nonfinite(numbers)
                if nan or (infinite and node.op_type in _WEIGHTED):
                    place = f"'{printable(attribute.name)}' of '{printable(_label(node))}'"
                    yield f"{place} ({nan} NaN, {infinite} infinite)"


def _weights(proto: onnx.ModelProto) -> set[str]:
    """Names of tensors that an operator with weights reads, directly or merely reshaped."""
    origin: dict[str, str] = {}
    found = set()
    for body in bodies(proto):
        for node in body.node:
            if node.op_type in _CARRIERS and node.input and node.output:
                origin[node.output[0]] = origin.get(node.input[0], node.input[0])
            elif node.op_type in _WEIGHTED:
                found |= {origin.get(name, name) for name in node.input}
    return found


def _count_nonfinite(array: np.ndarray) -> tuple[int, int]:
    """Numbers of NaN and of infinities, looked for piece by piece so that a map stays a map."""
    flat, nan, infinite = array.reshape(-1), 0, 0
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK]
        # bfloat16 is not NumPy's own; float32 holds all its values.
        piece = piece if piece.dtype.kind == "f" else piece.astype(np.float32)
        if not np.isfinite(piece).all():
            nan += int(np.isnan(piece).sum())
            infinite += int(np.isinf(piece).sum())
    return nan, infinite
