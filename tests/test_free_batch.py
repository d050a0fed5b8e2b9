"""A model of batch one gets a copy that takes many samples, where that copy computes the same."""

import numpy as np
import onnx
import onnx.parser
import pytest

import onnx_ecp
from onnx_ecp.api import preparation
from onnx_ecp.api.options import Options
from onnx_ecp.graph import Model
from onnx_ecp.graph.free_batch import free_batch, stacked
from onnx_ecp.graph.loading import load
from onnx_ecp.runtime.session import Session

F32 = np.float32


def network(text, rng, *, opset=17, ir=8, **shapes):
    proto = onnx.parser.parse_model(
        f"""<ir_version: {ir}, opset_import: ["" : {opset}]> g {text}"""
    )
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(F32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


ATTENTION = """(float[1,5,8] x) => (float[1,5,8] y)
    <int64[4] split = {1,5,2,4}, int64[3] whole = {1,5,8}, float scale = {0.5}> {
    q = MatMul(x, Q)  k = MatMul(x, K)  v = MatMul(x, V)
    q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
    qh = Transpose<perm = [0,2,1,3]>(q4)  kh = Transpose<perm = [0,2,3,1]>(k4)
    vh = Transpose<perm = [0,2,1,3]>(v4)
    s = MatMul(qh, kh)  t = Mul(s, scale)  p = Softmax<axis = -1>(t)  o = MatMul(p, vh)
    m = Transpose<perm = [0,2,1,3]>(o)  f = Reshape(m, whole)  y = MatMul(f, O) }"""
# Kinds of constants that hold the batch of one: text, shape of a sample, stored weights.
FREED = {
    "in the signature only": (
        "(float[1,6] x) => (float[1,3] y) { h = MatMul(x, W) r = Relu(h) y = MatMul(r, V) }",
        (6,),
        {"W": (6, 8), "V": (8, 3)},
    ),
    "an open size behind it": (
        """(float[1,2,3] x) => (float[1,3] y) <int64[2] s = {1,-1}> {
        f = Reshape(x, s) h = MatMul(f, W) r = Relu(h) y = MatMul(r, V) }""",
        (2, 3),
        {"W": (6, 8), "V": (8, 3)},
    ),
    "tokens beside each other": (
        """(float[1,4,6] x) => (float[1,4,3] y) <int64[2] s = {4,6}, int64[3] t = {1,4,3}> {
        f = Reshape(x, s) h = MatMul(f, W) r = Relu(h) z = MatMul(r, V) y = Reshape(z, t) }""",
        (4, 6),
        {"W": (6, 8), "V": (8, 3)},
    ),
    "heads": (ATTENTION, (5, 8), dict.fromkeys("QKVO", (8, 8))),
    "a class token": (
        """(float[1,4,6] x) => (float[1,3] y) {
        t = Concat<axis = 1>(CLS, x) h = MatMul(t, W) a = ReduceMean<axes = [1], keepdims = 0>(h)
        r = Tanh(a) y = MatMul(r, V) }""",
        (4, 6),
        {"CLS": (1, 1, 6), "W": (6, 8), "V": (8, 3)},
    ),
    "an expanded class token": (
        """(float[1,4,6] x) => (float[1,3] y) <int64[3] s = {1,-1,-1}, int64[3] one = {1,1,6}> {
        c = Expand(CLS, one)
        t = Concat<axis = 1>(c, x) h = MatMul(t, W) a = ReduceMean<axes = [1], keepdims = 0>(h)
        r = Tanh(a) y = MatMul(r, V) }""",
        (4, 6),
        {"CLS": (1, 1, 6), "W": (6, 8), "V": (8, 3)},
    ),
    "a first hidden state": (
        """(float[1,4,6] x) => (float[1,3] y)
        <float[1,1,5] zero = {0,0,0,0,0}, int64[2] s = {1,5}> {
        t = Transpose<perm = [1,0,2]>(x)
        a, last, c = LSTM<hidden_size = 5>(t, LW, LR, , , zero, zero)
        f = Reshape(last, s) y = MatMul(f, V) }""",
        (4, 6),
        {"LW": (1, 20, 6), "LR": (1, 20, 5), "V": (5, 3)},
    ),
    "sizes of a Resize": (
        """(float[1,2,4,4] x) => (float[1,2,8,8] y) <int64[4] s = {1,2,8,8}> {
        h = Conv<pads = [1,1,1,1]>(x, C) r = Resize<mode = "nearest">(h, , , s)
        y = Conv<pads = [1,1,1,1]>(r, D) }""",
        (2, 4, 4),
        {"C": (2, 2, 3, 3), "D": (2, 2, 3, 3)},
    ),
    "a sequence first": (
        """(float[1,4,6] x) => (float[1,12] y) <int64[3] s = {4,1,3}, int64[2] f = {1,-1}> {
        t = Transpose<perm = [1,0,2]>(x) h = MatMul(t, W) r = Relu(h) z = MatMul(r, V)
        w = Reshape(z, s) u = Transpose<perm = [1,0,2]>(w) y = Reshape(u, f) }""",
        (4, 6),
        {"W": (6, 8), "V": (8, 3)},
    ),
}
# What mixes samples must stay as it is.
MIXED = {
    "a mean over all": """(float[1,6] x) => (float[1,3] y) {
        m = ReduceMean(x) d = Sub(x, m) h = MatMul(d, W) r = Relu(h) y = MatMul(r, V) }""",
    "without its batch axis": """(float[1,6] x) => (float[3] y) <int64[1] a = {0}> {
        h = MatMul(x, W) r = Relu(h) s = Squeeze(r, a) y = MatMul(s, V) }""",
    "a sum over samples": """(float[1,6] x) => (float[1,3] y) {
        h = MatMul(x, W) m = ReduceMax<axes = [0]>(h) r = Sub(h, m) t = Exp(r) u = MatMul(t, V)
        y = Add(u, u) }""",
}


def feeds_of(shape, rng, n=3):
    return [{"x": rng.standard_normal((1, *shape)).astype(F32)} for _ in range(n)]


@pytest.mark.parametrize("case", FREED.values(), ids=FREED)
def test_any_batch_gives_the_outputs_of_single_samples(case, rng):
    text, shape, weights = case
    model = Model(network(text, rng, **weights), None, None)
    copy = free_batch(model, feeds_of(shape, rng), ["x"])
    assert copy is not None
    few = feeds_of(shape, rng, 5)
    (whole,) = Session(copy).run(stacked(few, ["x"])).values()
    single = [next(iter(Session(model.proto).run(feed).values())) for feed in few]
    np.testing.assert_allclose(whole, np.concatenate(single), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", MIXED.values(), ids=MIXED)
def test_what_mixes_samples_has_no_such_copy(text, rng):
    model = Model(network(text, rng, W=(6, 8), V=(8, 3)), None, None)
    assert free_batch(model, feeds_of((6,), rng), ["x"]) is None


def test_the_model_is_not_changed(rng):
    text, shape, weights = FREED["heads"]
    proto = network(text, rng, **weights)
    before = proto.SerializeToString()
    assert free_batch(Model(proto, None, None), feeds_of(shape, rng), ["x"]) is not None
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("case", FREED.values(), ids=FREED)
@pytest.mark.parametrize("method", ["ecp", "wanda"])
def test_importances_are_those_of_single_samples(case, method, rng, monkeypatch):
    text, shape, weights = case
    proto = network(text, rng, **weights)
    x = rng.standard_normal((20, *shape)).astype(F32)
    together = onnx_ecp.importance(proto, {"x": x}, method=method)
    monkeypatch.setattr(preparation, "free_batch", lambda *_, **__: None)
    alone = onnx_ecp.importance(proto, {"x": x}, method=method)
    assert together.keys() == alone.keys()
    for name, scores in alone.items():
        np.testing.assert_allclose(together[name], scores, rtol=2e-3, atol=1e-6 * scores.max())


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_the_result_still_has_the_batch_of_one(granularity, rng):
    text, shape, weights = FREED["an open size behind it"]
    proto = network(text, rng, **weights)
    x = rng.standard_normal((40, *shape)).astype(F32)
    result = onnx_ecp.optimize(proto, {"x": x}, sparsity=0.5, granularity=granularity)
    assert result.model.graph.input[0] == proto.graph.input[0]
    assert Session(result.model).run({"x": x[:1]})["y"].shape == (1, 3)


def test_a_run_takes_many_samples(rng):
    text, shape, weights = FREED["heads"]
    model = load(network(text, rng, **weights))
    x = rng.standard_normal((40, *shape)).astype(F32)
    layers, _ = preparation.choose_layers(model, Options())
    data = preparation.gather(model, {"x": x}, Options())
    network_, _ = preparation.observe_network(model, layers, data, Options())
    assert [batch.samples for batch in network_.train.batches(network_.size)] == [len(data.train)]
    assert [batch.feeds["x"].shape for batch in network_.train.as_given.batches(8)] == [
        (1, *shape) for _ in range(len(data.train))
    ]
