"""Positions that no output depends on count for nothing."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

import onnx_ecp
from onnx_ecp.statistics.drawing import shrunk

SAMPLES, REAL, WIDTH = 60, 5, 8
# One head of attention under a mask, a pointwise layer, and a mean over the real positions.
ENCODER = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n,t,8] x, float[n,t] mask) => (float[n,3] y)
<float one = {1}, float[1] far = {-1e9}, int64[1] row = {1}, int64[1] column = {2}> {
    q = MatMul(x, Q)  k = MatMul(x, K)  v = MatMul(x, V)
    kt = Transpose<perm = [0, 2, 1]>(k)  raw = MatMul(q, kt)
    off = Sub(one, mask)  away = Mul(off, far)  under = Unsqueeze(away, row)
    scores = Add(raw, under)  p = Softmax(scores)  seen = MatMul(p, v)
    h = MatMul(seen, W)  t1 = Tanh(h)
    there = Unsqueeze(mask, column)  kept = Mul(t1, there)
    total = ReduceSum<keepdims = 0>(kept, row)  count = ReduceSum(mask, row)
    pooled = Div(total, count)  y = MatMul(pooled, O)
}"""


def pruned(rng, length, **choices):
    """The stored tensors of the result, with the same real positions and others behind them."""
    model = parser.parse_model(ENCODER)
    for name, shape in {**dict.fromkeys("QKVW", (WIDTH, WIDTH)), "O": (WIDTH, 3)}.items():
        values = rng.normal(size=shape) / WIDTH**0.5
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    real = rng.normal(size=(SAMPLES, REAL, WIDTH))
    mask = np.arange(length) < rng.integers(2, REAL + 1, size=SAMPLES)[:, None]
    x = rng.normal(size=(SAMPLES, length, WIDTH)) * 3 + 1
    x[:, :REAL] = real
    data = {"x": x.astype(np.float32), "mask": mask.astype(np.float32)}
    result = onnx_ecp.optimize(
        model, data, sparsity=0.5, cleanup=False, threads=1, batch_size=SAMPLES, **choices
    )
    stored = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    return {name: values for name, values in stored.items() if values.dtype == np.float32}


@pytest.mark.parametrize("choices", [{"effort": "fast"}, {"compensation": "refit"}, {}])
def test_more_padding_gives_the_same_weights(choices):
    short, long = (pruned(np.random.default_rng(3), t, **choices) for t in (REAL, 4 * REAL))
    assert short.keys() == long.keys()
    for name, values in short.items():
        np.testing.assert_allclose(long[name], values, rtol=2e-3, atol=2e-4, err_msg=name)


def test_a_position_that_is_not_read_has_no_weight_and_counts_in_no_mean():
    weights = np.array([[4.0, 0.0, 2.0, 0.0]])
    np.testing.assert_allclose(shrunk(weights, 0.5, skip_unread=True), [[3.5, 0, 2.5, 0]])
    np.testing.assert_allclose(shrunk(weights, 0.5, skip_unread=False), [[2.75, 0.75, 1.75, 0.75]])
    np.testing.assert_array_equal(shrunk(0 * weights, 0.5, skip_unread=True), 0 * weights)
