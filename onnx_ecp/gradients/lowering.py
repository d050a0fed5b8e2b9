"""Fused operators rewritten to standard ones, so that the gradient rules meet standard operators.

The table ``LOWERINGS`` holds ONNX Runtime's own operators (domain com.microsoft); operators of the
standard domain that have a function body and no rule are replaced by that body. A configuration
that is not covered stays as it is: the reverse graph then names the operator that blocks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules import RULES
from onnx_ecp.gradients.rules.registry import optional_input
from onnx_ecp.graph.builder import Builder, Fact
from onnx_ecp.graph.surgery import export_graph, import_graph
from onnx_ecp.layers.fused import preactivation

# One tensor for every output of the node; None for an output that the lowering does not compute.
Outputs = Sequence[gs.Tensor | None]
Lowering = Callable[[Builder, gs.Node], Outputs]

LOWERINGS: dict[str, Lowering] = {}


class NotLowered(Exception):
    """A lowering does not cover this configuration; the message says why."""


def lowers(*op_types: str) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of some of ONNX Runtime's operators.

    It gets a builder and the node, and returns its outputs computed by standard operators, or
    raises ``NotLowered``.
    """

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(op_types, function))
        return function

    return register


def lower(graph: gs.Graph, facts: Mapping[str, Fact] | None = None) -> None:
    """Replace fused operators of the graph, in place; the names of their outputs stay.

    Args:
        graph: a private copy of the model.
        facts: shapes and dtypes by tensor name, where known. Without them the graph's own
            annotations are used; a lowering that needs a rank that nobody knows refuses.
    """
    known = {**_annotated(graph), **(facts or {})}
    op = Builder(gs.Graph(opset=graph.opset), known, prefix="ecp/lowered")
    needed = {y.name for y in graph.outputs}
    pending, nodes = list(reversed(graph.nodes)), []
    while pending:
        node = pending.pop()
        replacement = _replacement(op, node, needed)
        if replacement is None:
            nodes.append(node)
        else:
            pending += reversed(replacement)
    graph.nodes = nodes


def is_fused(graph: gs.Graph) -> bool:
    """Whether ``lower`` has anything to do."""
    return any(
        (node.op in LOWERINGS and _is_own(node)) or _is_function(node, graph.opset)
        for node in graph.nodes
    )


def _annotated(graph: gs.Graph) -> dict[str, Fact]:
    """What the model itself says about its tensors; symbolic sizes count as -1."""
    typed = {n: t for n, t in graph.tensors().items() if t.shape is not None and t.dtype}
    return {
        name: Fact(tuple(d if isinstance(d, int) else -1 for d in t.shape), np.dtype(t.dtype))
        for name, t in typed.items()
        if not isinstance(t.dtype, int)
    }


def _replacement(op: Builder, node: gs.Node, needed: set[str]) -> list[gs.Node] | None:
    """The nodes that compute the outputs of a node; None to leave it in place."""
    if node.op in LOWERINGS and _is_own(node):
        lowering = LOWERINGS[node.op]
    elif _is_function(node, op.graph.opset):
        lowering = _function_body
    else:
        return None
    op.graph.nodes = []
    try:
        _take_over(op, node, list(lowering(op, node)), needed)
    except NotLowered:
        for new in op.graph.nodes:
            new.inputs.clear()
        return None
    return list(op.graph.nodes)


def _is_own(node: gs.Node) -> bool:
    """Whether the node is one of ONNX Runtime's; it keeps one of its own in the standard domain."""
    return bool(node.domain == "com.microsoft" or node.op == "SimplifiedLayerNormalization")


def _take_over(
    op: Builder, node: gs.Node, results: list[gs.Tensor | None], needed: set[str]
) -> None:
    """Let the new nodes write the tensors that the old node wrote."""
    outputs = list(node.outputs)
    results += [None] * (len(outputs) - len(results))
    pairs = [(y, r) for y, r in zip(outputs, results, strict=False) if not y.is_empty()]
    if any(r is None and (y.outputs or y.name in needed) for y, r in pairs):
        raise NotLowered("an output that is not computed here")
    node.outputs.clear()
    node.inputs.clear()
    for y, result in pairs:
        if result is not None:
            name = op.fresh("output")
            op.graph.nodes.append(gs.Node("Identity", name, inputs=[result], outputs=[y]))


def _refuse_if(condition: bool, what: str) -> None:
    if condition:
        raise NotLowered(what)


def _rank(op: Builder, x: gs.Tensor) -> int:
    _refuse_if(x.name not in op.facts and not isinstance(x, gs.Constant), "an unknown rank")
    return op.rank(x)


# Standard operators that are functions.


def _is_function(node: gs.Node, opset: int) -> bool:
    standard = node.domain in (None, "", "ai.onnx")
    if not standard or node.op in RULES or not onnx.defs.has(node.op, max_inclusive_version=opset):
        return False
    schema: Any = onnx.defs.get_schema(node.op, opset)
    has_body = schema.has_function or schema.has_context_dependent_function
    return bool(has_body and "tensor(float)" in schema.outputs[0].types)


def _function_body(op: Builder, node: gs.Node) -> Outputs:
    """The operator's definition by simpler ones, as onnx writes it for these types and ranks."""
    outside = {f"x{k}": x for k, x in enumerate(node.inputs) if not x.is_empty()}
    inputs = {
        name: gs.Variable(name, op.dtype(x), [f"{name}_{d}" for d in range(_rank(op, x))])
        for name, x in outside.items()
    }
    given = [inputs.get(f"x{k}", gs.Variable.empty()) for k, _ in enumerate(node.inputs)]
    results = [
        gs.Variable.empty() if y.is_empty() else gs.Variable(f"y{k}", op.dtype(y))
        for k, y in enumerate(node.outputs)
    ]
    # The inliner leaves attributes out that the node does not spell out.
    attrs = {**_default_attributes(node.op, op.graph.opset), **node.attrs}
    call = gs.Node(node.op, attrs=attrs, inputs=given, outputs=results)
    named = [y for y in results if not y.is_empty()]
    body = import_graph(_inlined(gs.Graph([call], list(inputs.values()), named), op.graph.opset))
    _refuse_if(any(n.op in (node.op, "If", "Loop", "Scan") for n in body.nodes), "control flow")
    for name, tensor in body.tensors().items():
        if name not in outside and not tensor.is_empty():
            tensor.name = op.fresh(node.op.lower())
    for inner in body.nodes:
        inner.name = op.fresh(inner.op)
        inner.inputs = [outside.get(x.name, x) for x in inner.inputs]
    op.graph.nodes = list(body.nodes)
    found = iter(body.outputs)
    return [None if y.is_empty() else next(found) for y in results]


def _inlined(graph: gs.Graph, opset: int) -> onnx.ModelProto:
    """A model of the nodes that define the only node of the graph."""
    graph.opset = opset
    model = export_graph(graph)
    (call,) = model.graph.node
    types = {x.name: x.type.SerializeToString() for x in model.graph.input}
    schema: Any = onnx.defs.get_schema(call.op_type, opset)
    function = onnx.FunctionProto()
    if schema.has_function:
        function.CopyFrom(schema.function_body)
    else:
        empty = onnx.TypeProto().SerializeToString()
        given = [types.get(name, empty) for name in call.input]
        body = schema.get_context_dependent_function(call.SerializeToString(), given)
        _refuse_if(not body, "no body for these types")
        function.ParseFromString(body)
    _refuse_if(len(function.input) < len(call.input), "an input that the body does not know")
    function.name = call.op_type = f"{call.op_type}Body"
    function.domain = call.domain = "onnx_ecp"
    del function.opset_import[:]
    function.opset_import.append(onnx.helper.make_opsetid("", opset))
    model.opset_import.append(onnx.helper.make_opsetid("onnx_ecp", 1))
    model.functions.append(function)
    return onnx.inliner.inline_local_functions(model)


def _default_attributes(op_type: str, opset: int) -> dict[str, Any]:
    schema = onnx.defs.get_schema(op_type, opset)
    defaults = {n: a.default_value for n, a in schema.attributes.items() if a.default_value.name}
    values = {n: onnx.helper.get_attribute_value(value) for n, value in defaults.items()}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


# Affine layers with something fused into them.


@lowers("FusedMatMul")
def _fused_matmul(op: Builder, node: gs.Node) -> Outputs:
    _refuse_if(node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0), "transBatch")
    a, b = (
        _transposed(op, x) if node.attrs.get(flag, 0) else x
        for x, flag in zip(node.inputs, ("transA", "transB"), strict=True)
    )
    return [_scaled(op, op.MatMul(a, b), node.attrs.get("alpha", 1.0))]


def _transposed(op: Builder, x: gs.Tensor) -> Any:
    """The last two axes exchanged; a vector stays a vector."""
    rank = _rank(op, x)
    return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2]) if rank > 1 else x


def _scaled(op: Builder, x: Any, factor: float) -> Any:
    return x if factor == 1.0 else op.Mul(x, float(factor))


@lowers("FusedGemm")
def _fused_gemm(op: Builder, node: gs.Node) -> Outputs:
    attrs = {k: v for k, v in node.attrs.items() if not k.startswith("activation")}
    parameters = {
        k.removeprefix("activation_"): v
        for k, v in node.attrs.items()
        if k.startswith("activation_")
    }
    return [_activated(op, node, op.Gemm(*node.inputs, **attrs), parameters)]


# What FusedConv's list of activation parameters stands for; Clip takes them as inputs.
_PARAMETERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}


@lowers("FusedConv")
def _fused_conv(op: Builder, node: gs.Node) -> Outputs:
    attrs = {k: v for k, v in node.attrs.items() if not k.startswith("activation")}
    z = op.Conv(*node.inputs[:3], **attrs)
    added = optional_input(node, 3)
    if added is not None:
        z = op.Add(z, added)
    values = node.attrs.get("activation_params", [])
    if node.attrs.get("activation") == "Clip":
        return [op.Clip(op.rename(z, preactivation(node.outputs[0].name)), *map(float, values))]
    names = _PARAMETERS.get(node.attrs.get("activation", ""), ())
    return [_activated(op, node, z, dict(zip(names, values, strict=True)))]


def _activated(op: Builder, node: gs.Node, z: gs.Tensor, parameters: dict[str, Any]) -> Any:
    """The fused activation of z, where there is one; z gets the name under which layers know it."""
    activation = node.attrs.get("activation", "")
    if not activation:
        return z
    z = op.rename(z, preactivation(node.outputs[0].name))
    return op.op(activation, z, **parameters)


# Activations.


def _gelu(op: Builder, x: Any) -> Any:
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0))


@lowers("Gelu")
def _plain_gelu(op: Builder, node: gs.Node) -> Outputs:
    return [_gelu(op, node.inputs[0])]


@lowers("BiasGelu")
def _bias_gelu(op: Builder, node: gs.Node) -> Outputs:
    return [_gelu(op, op.Add(*node.inputs))]


@lowers("FastGelu")
def _fast_gelu(op: Builder, node: gs.Node) -> Outputs:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    bias = optional_input(node, 1)
    x = node.inputs[0] if bias is None else op.Add(node.inputs[0], bias)
    scale = math.sqrt(2.0 / math.pi)
    cubic = op.Add(op.Mul(op.Mul(x, x), scale * 0.044715), scale)
    return [op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(op.Mul(x, cubic)), 1.0))]


@lowers("QuickGelu")
def _quick_gelu(op: Builder, node: gs.Node) -> Outputs:
    (x,) = node.inputs
    return [op.Mul(x, op.Sigmoid(_scaled(op, x, node.attrs.get("alpha", 1.702))))]


# Normalizations.


def _root_mean_square(op: Builder, x: Any, scale: gs.Tensor, epsilon: float) -> Any:
    power = op.ReduceMean(op.Mul(x, x), [-1], keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Add(power, float(epsilon))))
    return op.Mul(op.Mul(x, inverse), scale)


@lowers("SimplifiedLayerNormalization")
def _simplified_layernorm(op: Builder, node: gs.Node) -> Outputs:
    _refuse_if(node.attrs.get("axis", -1) != -1, "an axis that is not the last")
    x, scale = node.inputs
    return [_root_mean_square(op, x, scale, node.attrs.get("epsilon", 1e-5))]


@lowers("SkipSimplifiedLayerNormalization")
def _skip_simplified_layernorm(op: Builder, node: gs.Node) -> Outputs:
    x, skip, scale = node.inputs[:3]
    total = _sum_of(op, [x, skip, optional_input(node, 3)])
    y = _root_mean_square(op, total, scale, node.attrs.get("epsilon", 1e-12))
    return [y, None, None, total]


@lowers("SkipLayerNormalization")
def _skip_layernorm(op: Builder, node: gs.Node) -> Outputs:
    x, skip, scale = node.inputs[:3]
    total = _sum_of(op, [x, skip, optional_input(node, 4)])
    y = _layernorm(op, total, scale, optional_input(node, 3), node)
    return [y, None, None, total]


def _layernorm(
    op: Builder, x: Any, scale: gs.Tensor, shift: gs.Tensor | None, node: gs.Node
) -> Any:
    epsilon = float(node.attrs.get("epsilon", 1e-12))
    rest = [] if shift is None else [shift]
    return op.LayerNormalization(x, scale, *rest, axis=-1, epsilon=epsilon)


def _sum_of(op: Builder, terms: Iterable[gs.Tensor | None]) -> Any:
    first, *others = (x for x in terms if x is not None)
    for x in others:
        first = op.Add(first, x)
    return first


@lowers("EmbedLayerNormalization")
def _embed_layernorm(op: Builder, node: gs.Node) -> Outputs:
    ids, words, positions = node.inputs[0], node.inputs[2], node.inputs[3]
    segments, table, places = (optional_input(node, k) for k in (1, 4, 8))
    if places is None:
        length = op.Squeeze(op.Shape(ids, start=1, end=2))
        places = op.Range(op.const(0), length, op.const(1))
    terms = [op.Gather(words, ids), op.Gather(positions, places)]
    if segments is not None and table is not None:
        terms.append(op.Gather(table, segments))
    total = _sum_of(op, terms)
    y = _layernorm(op, total, node.inputs[5], optional_input(node, 6), node)
    mask = optional_input(node, 7)
    lengths = None if mask is None else op.ReduceSum(mask, [1], keepdims=0)
    return [y, lengths, total]


# Attention. Heads: (batch, heads, positions, size of a head).


def _heads(op: Builder, x: Any, count: int) -> Any:
    """(batch, positions, count * size) to heads."""
    return op.Transpose(op.Reshape(x, [0, 0, count, -1]), perm=[0, 2, 1, 3])


def _joined(op: Builder, x: Any) -> Any:
    """Heads to (batch, positions, heads * size)."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, -1])


def _length(op: Builder, x: Any, axis: int) -> Any:
    """One size of x, an int64 scalar."""
    return op.Squeeze(op.Shape(x, start=axis, end=axis + 1))


def _range(op: Builder, start: Any, end: Any) -> Any:
    return op.Range(start, end, op.const(1))


def _attend(
    op: Builder,
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    biases: Sequence[Any] = (),
    allowed: Any = None,
    softcap: float = 0.0,
) -> Any:
    """Softmax(scale q k^T + biases, where allowed) v of heads; scale 0 is 1/sqrt(size)."""
    if scale:
        q = op.Mul(q, float(scale))
    else:
        size = op.cast(op.Shape(q, start=3), op.dtype(q))
        q = op.Div(q, op.Sqrt(size))
    scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    if softcap:
        scores = op.Mul(op.Tanh(op.Div(scores, float(softcap))), float(softcap))
    scores = _sum_of(op, [scores, *biases])
    if allowed is not None:
        scores = op.Where(allowed, scores, float(np.finfo(op.dtype(q)).min))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def _causal(op: Builder, q: Any, k: Any) -> Any:
    """Which of the keys (columns) a query may see: those up to it, the last query all."""
    queries, keys = _length(op, q, 2), _length(op, k, 2)
    rows = op.Unsqueeze(_range(op, op.Sub(keys, queries), keys), [1])
    return op.LessOrEqual(_range(op, op.const(0), keys), rows)


def _padding_bias(op: Builder, node: gs.Node, mask: gs.Tensor, x: gs.Tensor, keys: Any) -> Any:
    """The padding mask of Attention as a bias against scores (batch, heads, queries, keys)."""
    rank = _rank(op, mask)
    if rank == 1:
        seen = _between(op, mask, x, _range(op, op.const(0), keys))
    else:
        _refuse_if(rank > 3, "mask of rank 4")
        seen = op.Greater(op.cast(mask, np.int64), 0)
    seen = op.Unsqueeze(seen, [1] if rank == 3 else [1, 2])
    low = float(node.attrs.get("mask_filter_value", -10000.0))
    return op.Where(seen, 0.0, low, dtype=op.dtype(x))


def _between(op: Builder, mask: gs.Tensor, x: gs.Tensor, places: Any) -> Any:
    """(batch, keys): which places are in front of the end of a sequence, and behind its start.

    A mask (batch,) holds the ends, one (2 * batch,) the starts behind them.
    """
    _refuse_if(x.name not in op.facts or mask.name not in op.facts, "an unknown batch")
    times, rest = divmod(op.shape(mask)[0], op.shape(x)[0])
    _refuse_if(rest != 0 or times > 2, "a mask of packed sequences")
    limits = op.cast(op.Unsqueeze(mask, [1]), np.int64)
    if times == 1:
        return op.Less(places, limits)
    ends, starts = op.Split(limits, axis=0, num_outputs=2, outputs=2)
    return op.And(op.Less(places, ends), op.GreaterOrEqual(places, starts))


@lowers("Attention")
def _attention(op: Builder, node: gs.Node) -> Outputs:
    x, weight = node.inputs[:2]
    bias, mask, past, score_bias = (optional_input(node, k) for k in (2, 3, 4, 5))
    _refuse_if(past is not None or node.attrs.get("do_rotary", 0), "past or rotary")
    z = _sum_of(op, [op.MatMul(x, weight), bias])
    projected = op.rename(z, preactivation(node.outputs[0].name))
    sizes, count = node.attrs.get("qkv_hidden_sizes"), node.attrs["num_heads"]
    if sizes:
        parts = op.Split(projected, list(sizes), axis=-1, outputs=3)
    else:
        parts = op.Split(projected, axis=-1, num_outputs=3, outputs=3)
    q, k, v = (_heads(op, part, count) for part in parts)
    biases = [] if score_bias is None else [score_bias]
    if mask is not None:
        biases.append(_padding_bias(op, node, mask, x, _length(op, k, 2)))
    allowed = _causal(op, q, k) if node.attrs.get("unidirectional", 0) else None
    scale = node.attrs.get("scale", 0.0)
    return [_joined(op, _attend(op, q, k, v, scale=scale, biases=biases, allowed=allowed))]


@lowers("MultiHeadAttention")
def _multi_head_attention(op: Builder, node: gs.Node) -> Outputs:
    query, key, value, bias, mask, score_bias, past_k, past_v = (
        optional_input(node, k) for k in range(8)
    )
    _refuse_if(key is None or value is None, "packed projections")
    _refuse_if(any(_rank(op, x) != 3 for x in (query, key, value)), "projections by heads")
    _refuse_if(any(not x.is_empty() for x in node.inputs[8:]), "cache indirection")
    count = node.attrs["num_heads"]
    if bias is not None:
        width = op.Shape(query, start=2)
        double = op.Add(width, width)
        query = op.Add(query, op.Slice(bias, [0], width))
        key = op.Add(key, op.Slice(bias, width, double))
        value = op.Add(value, op.Slice(bias, double, [np.iinfo(np.int64).max]))
    q, k, v = (_heads(op, x, count) for x in (query, key, value))
    if past_k is not None:
        k, v = op.Concat(past_k, k, axis=2), op.Concat(past_v, v, axis=2)
    biases = [] if score_bias is None else [score_bias]
    if mask is not None:
        biases.append(_padding_bias(op, node, mask, node.inputs[0], _length(op, k, 2)))
    allowed = _causal(op, q, k) if node.attrs.get("unidirectional", 0) else None
    scale = node.attrs.get("scale", 0.0)
    y = _attend(op, q, k, v, scale=scale, biases=biases, allowed=allowed)
    return [_joined(op, y), k, v]


@lowers("GroupQueryAttention")
def _group_query_attention(op: Builder, node: gs.Node) -> Outputs:
    """Causal attention of sequences that end where ``last`` says, as ONNX Runtime computes it.

    In a prompt, which is as long as ``total``, sequences begin at place 0 and are padded behind;
    otherwise the new places are the last ones of their sequence.
    """
    query, key, value, past_k, past_v, last, total, cos, sin, places, score_bias = (
        optional_input(node, k) for k in range(11)
    )
    _refuse_if(any(not x.is_empty() for x in node.inputs[11:]), "sinks or quantised caches")
    _refuse_if(node.attrs.get("smooth_softmax", 0) > 0, "smooth softmax")
    _refuse_if(last is None or total is None, "unknown lengths of the sequences")
    count, groups = node.attrs["num_heads"], node.attrs["kv_num_heads"]
    if key is None:
        size = op.Div(op.Shape(query, start=2), count + 2 * groups)
        sizes = op.Mul(size, np.array([count, groups, groups]))
        query, key, value = op.Split(query, sizes, axis=-1, outputs=3)
    q, k, v = _heads(op, query, count), _heads(op, key, groups), _heads(op, value, groups)
    length, total = _length(op, q, 2), op.Squeeze(op.cast(total, np.int64))
    ends = op.Add(op.Reshape(op.cast(last, np.int64), [-1, 1]), 1)
    before: Any = np.zeros((1, 1), np.int64)
    if past_k is not None:
        before = op.Where(op.Equal(length, total), 0, op.Sub(ends, length))
    rows = op.Add(_range(op, op.const(0), length), before)
    if node.attrs.get("do_rotary", 0):
        interleaved = node.attrs.get("rotary_interleaved", 0)
        at = rows if places is None else places
        q, k = (_rotated(op, x, cos, sin, at, interleaved) for x in (q, k))
    own = [k, v]
    if past_k is not None:
        pairs = ((past_k, k), (past_v, v))
        k, v = own = [_present(op, *pair, before, total) for pair in pairs]
        # Behind ``total`` the buffers are empty, and the bias of the scores has nothing for them.
        k, v = (op.Slice(x, [0], op.Unsqueeze(total, [0]), [2]) for x in own)
    if all(x.is_empty() for x in node.outputs[1:]):
        # The kernel that gives out no keys lets what is behind the end of a sequence see its end.
        rows = op.Min(rows, op.Sub(ends, 1))
    window = node.attrs.get("local_window_size", -1)
    y = _attend(
        op,
        q,
        _repeated(op, k, count // groups),
        _repeated(op, v, count // groups),
        scale=node.attrs.get("scale", 0.0),
        biases=[] if score_bias is None else [score_bias],
        allowed=_up_to(op, rows, ends, _length(op, k, 2), window),
        softcap=node.attrs.get("softcap", 0.0),
    )
    if window > 0:
        # The other one does not; where a window then sees nothing the result is zero.
        sees = op.Greater(op.Min(rows, op.Sub(ends, 1)), op.Sub(rows, window))
        y = op.Where(op.Unsqueeze(sees, [1, 3]), y, 0.0)
    return [_joined(op, y), *own]


def _up_to(op: Builder, rows: Any, ends: Any, keys: Any, window: int) -> Any:
    """(batch, 1, queries, keys): those up to the query's place, and before the sequence's end.

    Args:
        op: builder.
        rows: (batch, queries), places of the queries.
        ends: (batch, 1), lengths of the sequences.
        keys: their number.
        window: how many of the keys, the last ones, a query may see; all where it is not positive.
    """
    columns, rows = _range(op, op.const(0), keys), op.Unsqueeze(rows, [1, 3])
    allowed = op.And(op.LessOrEqual(columns, rows), op.Less(columns, op.Unsqueeze(ends, [1, 3])))
    if window > 0:
        allowed = op.And(allowed, op.Greater(columns, op.Sub(rows, window)))
    return allowed


def _present(op: Builder, past: Any, new: Any, before: Any, total: Any) -> Any:
    """Heads of the first ``before`` places of a buffer, then all new ones, then zeros.

    The result has as many places as the buffer, ``total`` at least.
    """
    buffer = _length(op, past, 2)
    columns = _range(op, op.const(0), op.Max(buffer, total))
    both = op.Concat(past, new, axis=2)
    fresh = op.Add(op.Sub(columns, before), buffer)
    source = op.Where(op.Less(columns, before), columns, fresh)
    source = op.Unsqueeze(op.Min(source, op.Sub(_length(op, both, 2), 1)), [1, 3])
    heads, size = op.Shape(new, start=1, end=2), op.Shape(new, start=3)
    shape = op.Concat([1], heads, [1], size, axis=0)
    there = op.GatherElements(both, op.Expand(source, shape), axis=2)
    ends = op.Add(before, _length(op, new, 2))
    return op.Where(op.Unsqueeze(op.Less(columns, ends), [1, 3]), there, 0.0)


def _repeated(op: Builder, x: Any, times: int) -> Any:
    """Every head ``times`` times in a row."""
    if times == 1:
        return x
    shape = op.shape_of(x)
    sizes = op.Concat(op.Slice(shape, [0], [2]), [times], op.Slice(shape, [2], [4]), axis=0)
    spread = op.Expand(op.Unsqueeze(x, [2]), sizes)
    merged = op.Mul(shape, np.array([1, times, 1, 1]))
    return op.Reshape(spread, merged)


@lowers("RotaryEmbedding")
def _rotary_embedding(op: Builder, node: gs.Node) -> Outputs:
    x, places, cos, sin = node.inputs
    _refuse_if(node.attrs.get("scale", 1.0) != 1.0, "scale")
    _refuse_if(node.attrs.get("is_packed_batching", 0), "packed batching")
    by_heads, interleaved = _rank(op, x) == 4, node.attrs.get("interleaved", 0)
    if _rank(op, places) == 1:
        first = op.Squeeze(op.cast(places, np.int64))
        end = op.Add(first, _length(op, x, 2 if by_heads else 1))
        places = op.Unsqueeze(_range(op, first, end), [0])
    if by_heads:
        return [_rotated(op, x, cos, sin, places, interleaved)]
    count = node.attrs.get("num_heads", 0)
    if not count:
        # The caches tell the size of a head: half of it is their width.
        _refuse_if(bool(node.attrs.get("rotary_embedding_dim", 0)), "unknown size of a head")
        size = op.Mul(op.Shape(cos, start=1), 2)
        split = op.Reshape(x, op.Concat([0, 0, -1], size, axis=0))
        heads = op.Transpose(split, perm=[0, 2, 1, 3])
    else:
        heads = _heads(op, x, count)
    return [_joined(op, _rotated(op, heads, cos, sin, places, interleaved))]


def _rotated(op: Builder, x: Any, cos: Any, sin: Any, places: Any, interleaved: int) -> Any:
    """Heads with the first 2 * (width of the caches) entries rotated by place."""
    cos, sin = (op.Unsqueeze(op.Gather(table, places), [1]) for table in (cos, sin))
    half = op.Shape(cos, start=3)
    whole, end = op.Add(half, half), [np.iinfo(np.int64).max]
    rest = op.Slice(x, whole, end, [3])
    if interleaved:
        turning = op.Slice(x, [0], whole, [3])
        a, b = (op.Slice(turning, [k], end, [3], [2]) for k in (0, 1))
    else:
        a, b = op.Slice(x, [0], half, [3]), op.Slice(x, half, whole, [3])
    real = op.Sub(op.Mul(a, cos), op.Mul(b, sin))
    imaginary = op.Add(op.Mul(a, sin), op.Mul(b, cos))
    if interleaved:
        pairs = op.Concat(op.Unsqueeze(real, [4]), op.Unsqueeze(imaginary, [4]), axis=4)
        turned = op.Reshape(pairs, [0, 0, 0, -1])
    else:
        turned = op.Concat(real, imaginary, axis=3)
    return op.Concat(turned, rest, axis=3)
