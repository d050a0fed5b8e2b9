"""Rows that are drawn stand for all of them."""

import numpy as np
import onnx
import onnx.parser
import pytest

import onnx_ecp
from onnx_ecp.layers import find_layers
from onnx_ecp.statistics import drawing
from onnx_ecp.statistics.drawing import drawn, shrunk


@pytest.fixture
def few(monkeypatch):
    """Rows are drawn from 100 on."""
    monkeypatch.setattr(drawing, "LEAST_ROWS", 50)
    monkeypatch.setattr(drawing, "ROWS_PER_INPUT", 1)


def test_few_rows_are_all_taken(rng):
    weights = rng.exponential(size=(2, 16_384))
    found = drawn(weights, 0.3, 9, skip_unread=False)
    assert found.at is None
    np.testing.assert_array_equal(found.weights, shrunk(weights, 0.3, skip_unread=False))


@pytest.mark.parametrize("skip_unread", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_sums_of_drawn_rows_are_those_of_all(groups, skip_unread, rng):
    """Heavy tails and rows that nothing reads included."""
    number = 400_000
    weights = rng.pareto(1.5, (groups, number)) * (rng.random((groups, number)) < 0.5)
    x = rng.normal([0, 1, 2], size=(number, 3))
    s = shrunk(weights, 0.3, skip_unread=skip_unread)
    found = drawn(weights, 0.3, 9, skip_unread=skip_unread)
    assert len(found.at) <= drawing.LEAST_ROWS
    assert np.all(np.diff(found.at) > 0)
    wanted = np.einsum("gk,ki,kj->gij", s, x, x)
    sums = np.einsum("gk,ki,kj->gij", found.weights, x[found.at], x[found.at])
    np.testing.assert_allclose(sums, wanted, atol=0.05 * wanted.max())


def test_what_is_drawn_is_right_on_average(few, rng, monkeypatch):
    weights, x = rng.pareto(1.5, (1, 500)), rng.standard_normal(500)
    generators = iter([np.random.default_rng(k) for k in range(3000)])
    monkeypatch.setattr(drawing.np.random, "default_rng", lambda seed: next(generators))
    sums = []
    for _ in range(3000):
        found = drawn(weights, 0.3, 1, skip_unread=False)
        sums.append(found.weights[0] @ x[found.at])
    wanted = float(shrunk(weights, 0.3, skip_unread=False)[0] @ x)
    assert np.mean(sums) == pytest.approx(wanted, abs=4 * np.std(sums) / 3000**0.5)


def test_the_same_weights_give_the_same_draws(rng):
    weights = rng.exponential(size=(1, 40_000))
    a, b = (drawn(weights, 0.3, 9, skip_unread=False) for _ in range(2))
    np.testing.assert_array_equal(a.at, b.at)
    np.testing.assert_array_equal(a.weights, b.weights)


def test_weights_that_are_all_zero_stay_zero(few):
    found = drawn(np.zeros((2, 500)), 0.0, 1, skip_unread=False)
    assert not found.weights.any()


KERNELS = {
    "1-D": ("float[n,4,9] x", (6, 4, 3), "kernel_shape = [3], pads = [1,1], strides = [2]", (4, 9)),
    "2-D": ("float[n,4,7,6] x", (6, 4, 3, 2), "kernel_shape = [3,2], dilations = [2,1]", (4, 7, 6)),
    "grouped": (
        "float[n,4,7,6] x",
        (6, 2, 3, 3),
        'kernel_shape = [3,3], group = 2, auto_pad = "SAME_UPPER"',
        (4, 7, 6),
    ),
}


def conv(kind, rng):
    """(model of one convolution, shape of a sample)."""
    inputs, shape, attributes, sample = KERNELS[kind]
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float y) '
        f"{{ y = Conv <{attributes}> (x, W) }}"
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    values = rng.standard_normal(shape).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "W"))
    return model, sample


@pytest.mark.parametrize("kind", KERNELS)
def test_some_rows_are_those_of_all(kind, rng):
    model, sample = conv(kind, rng)
    (layer,) = find_layers(model).layers
    a = rng.standard_normal((5, *sample)).astype(np.float32)
    rows = layer.rows_in(a)
    assert layer.count_rows(a) == rows.shape[1]
    at = np.sort(rng.choice(rows.shape[1], 7, replace=False))
    np.testing.assert_array_equal(layer.some_rows_in(a, at), rows[:, at])
    assert layer.some_rows_in(a, at[:0]).shape == (*rows.shape[:1], 0, *rows.shape[2:])


NET = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n,2,12,12] x) => (float[n,5] y)
{
  h = Conv <kernel_shape = [3,3]> (x, U)
  r = Relu(h)
  k = Conv <kernel_shape = [3,3], group = 6> (r, V)
  s = Relu(k)
  p = GlobalAveragePool(s)
  f = Flatten(p)
  y = MatMul(f, W)
}
"""


@pytest.mark.parametrize("batch_size", [7, 64])
def test_a_network_pruned_on_drawn_rows_is_as_good(batch_size, rng, monkeypatch):
    model = onnx.parser.parse_model(NET)
    for name, shape in {"U": (6, 2, 3, 3), "V": (6, 1, 3, 3), "W": (6, 5)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    x = np.cumsum(rng.standard_normal((100, 2, 12, 12)), axis=3).astype(np.float32)
    choices = {"sparsity": 0.5, "effort": "fast", "measure": False, "batch_size": batch_size}
    whole = onnx_ecp.optimize(model, x, **choices).report
    monkeypatch.setattr(drawing, "LEAST_ROWS", 1000)
    some = onnx_ecp.optimize(model, x, **choices).report
    assert some.gap.relative_error != whole.gap.relative_error
    assert some.gap.relative_error < 1.2 * whole.gap.relative_error
