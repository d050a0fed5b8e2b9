"""Lowered operators compute what ONNX Runtime's own kernels compute."""

import re

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from differences import disagreement, facts_of, in_onnxruntime, with_adjoints

from onnx_ecp.gradients.lowering import LOWERINGS, lower
from onnx_ecp.layers.fused import preactivation

BATCH, LENGTH, HEADS, SIZE = 2, 5, 4, 6
WIDTH = HEADS * SIZE

# Per case: the node, and its inputs: shapes of float inputs, or integer arrays.
TOKENS = {"x": (BATCH, LENGTH, WIDTH)}
QKV = dict.fromkeys("qkv", (BATCH, LENGTH, WIDTH))
MERGED = {**TOKENS, "w": (WIDTH, 3 * WIDTH), "b": (3 * WIDTH,)}
NORM = {**TOKENS, "skip": (BATCH, LENGTH, WIDTH), "s": (WIDTH,)}
GROUPED = {"q": (BATCH, LENGTH, 64), "k": (BATCH, LENGTH, 32), "v": (BATCH, LENGTH, 32)}
LENGTHS = {
    "last": np.full(BATCH, LENGTH - 1, np.int32),
    "total": np.array(LENGTH, np.int32),
}
SHORTER = {**LENGTHS, "last": np.array([1, LENGTH - 1], np.int32)}
BUFFERS = {"pk": (BATCH, 2, 7, 16), "pv": (BATCH, 2, 7, 16)}
ONE_MORE = {"q": (BATCH, 1, 64), "k": (BATCH, 1, 32), "v": (BATCH, 1, 32)}
CACHES = {"cos": (9, 8), "sin": (9, 8)}
PLACES = np.arange(LENGTH, dtype=np.int64)[None].repeat(BATCH, 0) + 1
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)

CASES = {
    "FusedMatMul": (
        "y = m.FusedMatMul<transA=1, transB=1, alpha=0.5>(a, b)",
        {"a": (2, 3, 4), "b": (5, 3)},
    ),
    "FusedMatMul, batches on the right": (
        "y = m.FusedMatMul<transB=1>(a, b)",
        {"a": (4, 3), "b": (2, 5, 3)},
    ),
    "FusedGemm": (
        'y = m.FusedGemm<activation="LeakyRelu", activation_alpha=0.2, transB=1>(a, b, c)',
        {"a": (4, 3), "b": (5, 3), "c": (5,)},
    ),
    "FusedConv": (
        'y = m.FusedConv<activation="HardSigmoid", activation_params=[0.3, 0.4]>(x, w, b)',
        {"x": (2, 3, 5, 5), "w": (4, 3, 2, 2), "b": (4,)},
    ),
    "FusedConv with a sum": (
        'y = m.FusedConv<activation="Relu", pads=[1, 1, 0, 0]>(x, w, b, z)',
        {"x": (2, 3, 5, 5), "w": (4, 3, 2, 2), "b": (4,), "z": (2, 4, 5, 5)},
    ),
    "FusedConv, clipped": (
        'y = m.FusedConv<activation="Clip", activation_params=[-0.3, 0.4]>(x, w)',
        {"x": (2, 3, 5, 5), "w": (4, 3, 2, 2)},
    ),
    "Gelu": ("y = m.Gelu(x)", TOKENS),
    "BiasGelu": ("y = m.BiasGelu(x, b)", {**TOKENS, "b": (WIDTH,)}),
    "FastGelu": ("y = m.FastGelu(x, b)", {**TOKENS, "b": (WIDTH,)}),
    "FastGelu without bias": ("y = m.FastGelu(x)", TOKENS),
    "QuickGelu": ("y = m.QuickGelu<alpha=1.5>(x)", TOKENS),
    "SkipLayerNormalization": (
        "y, u, v, ysum = m.SkipLayerNormalization<epsilon=0.01>(x, skip, s, t, b)",
        {**NORM, "t": (WIDTH,), "b": (WIDTH,)},
    ),
    "SkipLayerNormalization, less": (
        "y = m.SkipLayerNormalization(x, skip, s)",
        {**NORM, "skip": (LENGTH, WIDTH)},
    ),
    "SimplifiedLayerNormalization": (
        "y = SimplifiedLayerNormalization<epsilon=0.01>(x, s)",
        {**TOKENS, "s": (WIDTH,)},
    ),
    "SkipSimplifiedLayerNormalization": (
        "y, u, v, ysum = m.SkipSimplifiedLayerNormalization<epsilon=0.01>(x, skip, s, b)",
        {**NORM, "b": (WIDTH,)},
    ),
    "EmbedLayerNormalization": (
        "y, u, ysum = m.EmbedLayerNormalization(ids, segments, words, places, kinds, s, t)",
        {
            "ids": np.array([[3, 1, 2], [0, 5, 5]], np.int32),
            "segments": np.array([[0, 0, 1], [0, 1, 1]], np.int32),
            "words": (6, 4),
            "places": (7, 4),
            "kinds": (2, 4),
            "s": (4,),
            "t": (4,),
        },
    ),
    "EmbedLayerNormalization, lengths": (
        "y, yi = m.EmbedLayerNormalization(ids, , words, places, , s, t, mask)",
        {
            "ids": np.array([[3, 1, 2], [0, 5, 5]], np.int32),
            "words": (6, 4),
            "places": (7, 4),
            "s": (4,),
            "t": (4,),
            "mask": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
        },
    ),
    "Attention": (f"y = m.Attention<num_heads={HEADS}>(x, w, b)", MERGED),
    "Attention, causal, scaled": (
        f"y = m.Attention<num_heads={HEADS}, unidirectional=1, scale=0.3>(x, w, b)",
        MERGED,
    ),
    "Attention, raw mask": (
        f"y = m.Attention<num_heads={HEADS}>(x, w, b, mask)",
        {**MERGED, "mask": MASK},
    ),
    "Attention, lengths": (
        f"y = m.Attention<num_heads={HEADS}>(x, w, b, mask)",
        {**MERGED, "mask": np.array([3, 5], np.int32)},
    ),
    "Attention, ends and starts": (
        f"y = m.Attention<num_heads={HEADS}>(x, w, b, mask)",
        {**MERGED, "mask": np.array([3, 5, 1, 2], np.int32)},
    ),
    "Attention, mask by position": (
        f"y = m.Attention<num_heads={HEADS}>(x, w, b, mask)",
        {**MERGED, "mask": MASK[:, None].repeat(LENGTH, 1)},
    ),
    "Attention, sizes and bias of scores": (
        f"y = m.Attention<num_heads={HEADS}, qkv_hidden_sizes=[24, 24, 16]>(x, w, b, , , r)",
        {**TOKENS, "w": (WIDTH, 64), "b": (64,), "r": (1, HEADS, LENGTH, LENGTH)},
    ),
    "MultiHeadAttention": (f"y = m.MultiHeadAttention<num_heads={HEADS}>(q, k, v)", QKV),
    "MultiHeadAttention, bias and mask": (
        f"y = m.MultiHeadAttention<num_heads={HEADS}, scale=0.3>(q, k, v, b, mask)",
        {**QKV, "b": (3 * WIDTH,), "mask": MASK},
    ),
    "MultiHeadAttention, causal, bias of scores": (
        f"y = m.MultiHeadAttention<num_heads={HEADS}, unidirectional=1>(q, k, v, , , r)",
        {**QKV, "r": (1, HEADS, LENGTH, LENGTH)},
    ),
    "MultiHeadAttention, other keys, past": (
        f"y, yk, yv = m.MultiHeadAttention<num_heads={HEADS}>(q, k, v, , , , pk, pv)",
        {**QKV, "pk": (BATCH, HEADS, 3, SIZE), "pv": (BATCH, HEADS, 3, SIZE)},
    ),
    "GroupQueryAttention": (
        "y, yk, yv = m.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, , , last, total)",
        {**GROUPED, **LENGTHS},
    ),
    "GroupQueryAttention, rotary": (
        "y = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>"
        "(q, k, v, , , last, total, cos, sin)",
        {**GROUPED, **LENGTHS, **CACHES},
    ),
    "GroupQueryAttention, interleaved, window, cap": (
        "y = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1, rotary_interleaved=1,"
        " local_window_size=2, softcap=2.0, scale=0.7>(q, k, v, , , last, total, cos, sin)",
        {**GROUPED, **LENGTHS, **CACHES},
    ),
    "GroupQueryAttention, packed": (
        "y = m.GroupQueryAttention<num_heads=4, kv_num_heads=2>(qkv, , , , , last, total)",
        {"qkv": (BATCH, LENGTH, 128), **LENGTHS},
    ),
    "GroupQueryAttention, past": (
        "y, yk, yv = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>"
        "(q, k, v, pk, pv, last, total, cos, sin)",
        {
            "q": (BATCH, 1, 64),
            "k": (BATCH, 1, 32),
            "v": (BATCH, 1, 32),
            "pk": (BATCH, 2, 4, 16),
            "pv": (BATCH, 2, 4, 16),
            **LENGTHS,
            **CACHES,
        },
    ),
    "GroupQueryAttention, other lengths": (
        "y, yk, yv = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>"
        "(q, k, v, , , last, total, cos, sin)",
        {**GROUPED, **SHORTER, **CACHES},
    ),
    "GroupQueryAttention, other lengths, window": (
        "y = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, local_window_size=2, softcap=2.0>"
        "(q, k, v, , , last, total)",
        {**GROUPED, **SHORTER},
    ),
    "GroupQueryAttention, other lengths, window, keys": (
        "y, yk, yv = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, local_window_size=2>"
        "(q, k, v, , , last, total)",
        {**GROUPED, **SHORTER},
    ),
    "GroupQueryAttention, prompt into a buffer": (
        "y, yk, yv = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>"
        "(q, k, v, pk, pv, last, total, cos, sin)",
        {**GROUPED, **BUFFERS, **SHORTER, **CACHES},
    ),
    "GroupQueryAttention, pasts of other lengths": (
        "y, yk, yv = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>"
        "(q, k, v, pk, pv, last, total, cos, sin)",
        {**ONE_MORE, **BUFFERS, **SHORTER, **CACHES},
    ),
    "GroupQueryAttention, pasts of other lengths, window, bias of scores": (
        "y, yk, yv = m.GroupQueryAttention<num_heads=4, kv_num_heads=2, local_window_size=2>"
        "(q, k, v, pk, pv, last, total, , , , r)",
        {**ONE_MORE, **BUFFERS, **SHORTER, "r": (BATCH, HEADS, 1, LENGTH)},
    ),
    "RotaryEmbedding by heads": (
        "y = m.RotaryEmbedding(x, places, cos, sin)",
        {"x": (BATCH, 3, LENGTH, 16), "places": PLACES, **CACHES},
    ),
    "RotaryEmbedding by offset": (
        "y = m.RotaryEmbedding<interleaved=1>(x, places, cos, sin)",
        {"x": (BATCH, LENGTH, 48), "places": np.array([2], np.int64), **CACHES},
    ),
    "RotaryEmbedding of a part": (
        "y = m.RotaryEmbedding<num_heads=2, rotary_embedding_dim=16>(x, places, cos, sin)",
        {"x": (BATCH, LENGTH, 48), "places": PLACES, **CACHES},
    ),
}

FUNCTIONS = {
    "Attention": (
        "y = Attention<is_causal=1, q_num_heads=4, kv_num_heads=2>(q, k, v)",
        GROUPED,
    ),
    "Attention by heads": (
        "y = Attention<softcap=2.0>(q, k, v, r)",
        dict.fromkeys("qkv", (2, 3, 4, 6)) | {"r": (4, 4)},
    ),
    "RotaryEmbedding": (
        "y = RotaryEmbedding(x, cos, sin, places)",
        {"x": (BATCH, 3, LENGTH, 16), **CACHES, "places": PLACES},
    ),
    "MeanVarianceNormalization": ("y = MeanVarianceNormalization(x)", {"x": (2, 3, 4, 5)}),
}


ALL = {**CASES, **{f"standard {name}": case for name, case in FUNCTIONS.items()}}


def model_of(body, inputs):
    kinds = {np.dtype(np.int32): "int32", np.dtype(np.int64): "int64"}

    def declared(name, x):
        shape, kind = (x, "float") if isinstance(x, tuple) else (x.shape, kinds[x.dtype])
        return f"{kind}[{','.join(map(str, shape))}] {name}"

    names = [n.strip() for n in body.split("=")[0].split(",") if n.strip().startswith("y")]
    types = [f"{'int32' if n == 'yi' else 'float'} {n}" for n in names]
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]> g'
        f" ({', '.join(declared(n, x) for n, x in inputs.items())})"
        f" => ({', '.join(types)})"
        f" {{ {body.replace('m.', 'com.microsoft.')} }}"
    )
    for y in model.graph.output:
        y.type.tensor_type.ClearField("shape")
    return model


def drawn(rng, inputs):
    return {
        n: rng.standard_normal(x).astype(np.float32) if isinstance(x, tuple) else x
        for n, x in inputs.items()
    }


def lowered(model):
    graph = gs.import_onnx(model)
    lower(graph)
    result = gs.export_onnx(graph, do_type_check=False)
    result.ir_version = model.ir_version
    return result


def by_name(table):
    return pytest.mark.parametrize(("body", "inputs"), table.values(), ids=table)


@by_name(ALL)
def test_what_is_lowered_computes_the_same(body, inputs, rng):
    model, feeds = model_of(body, inputs), drawn(rng, inputs)
    standard = lowered(model)
    assert {n.domain for n in standard.graph.node} <= {"", "ai.onnx"}
    found = in_onnxruntime(standard)(feeds)
    for name, expected in in_onnxruntime(model)(feeds).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)


@by_name(ALL)
def test_what_is_lowered_has_adjoints(body, inputs, rng):
    model, feeds = model_of(body, inputs), drawn(rng, inputs)
    standard = lowered(model)
    facts = facts_of(standard, feeds, in_onnxruntime)
    # Weights, scales and tables of places are not asked for.
    wrt = [n for n in inputs if n in ACTIVATIONS]
    extended, names, blocked = with_adjoints(standard, facts, wrt, ["y"])
    assert not blocked
    error = disagreement(
        standard,
        extended,
        names,
        feeds,
        ["y"],
        rng,
        engine=in_onnxruntime,
        differences=in_onnxruntime,
        step=3e-3,
    )
    assert error < 5e-3


ACTIVATIONS = {"a", "x", "skip", "q", "k", "v", "qkv", "pk", "pv", "r", "z", "words"}


def test_every_lowering_has_a_case():
    assert {
        node for body, _ in CASES.values() for node in re.findall(r"= (?:m\.)?(\w+)", body)
    } == set(LOWERINGS)


def test_a_layer_inside_a_fused_operator_keeps_its_name():
    body, inputs = CASES["FusedGemm"]
    (gemm, *_) = lowered(model_of(body, inputs)).graph.node
    assert list(gemm.output) == [preactivation("y")]


REFUSED = {
    "past in one tensor": (
        "y = m.Attention<num_heads=4>(x, w, b, , past)",
        {**MERGED, "past": (2, BATCH, HEADS, 3, SIZE)},
    ),
    "packed projections": (
        "y = m.MultiHeadAttention<num_heads=4>(q)",
        {"q": (BATCH, LENGTH, HEADS, 3, SIZE)},
    ),
    "statistics asked for": ("y, u, yv = m.SkipSimplifiedLayerNormalization(x, skip, s)", NORM),
    "ranks that nobody knows": (
        "u = m.Unknown(x)\ny = m.RotaryEmbedding(u, places, cos, sin)",
        {"x": (BATCH, 3, LENGTH, 16), "places": PLACES, **CACHES},
    ),
}


@by_name(REFUSED)
def test_what_is_not_covered_stays_as_it_is(body, inputs):
    before = gs.import_onnx(model_of(body, inputs))
    after = before.copy()
    lower(after)
    assert after.nodes == before.nodes
