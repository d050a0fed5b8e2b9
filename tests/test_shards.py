"""Sums over the parts of a data set, however it is parted, are the sums over the whole."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import partial, reduce
from multiprocessing import get_context
from operator import add

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.graph import load
from onnx_ecp.layers import find_layers
from onnx_ecp.statistics.collection import measure, row_sensitivities
from onnx_ecp.statistics.moments import total
from onnx_ecp.statistics.observer import Observer, original_state

SAMPLES = 24
# More outputs than are probed one by one: sensitivities are those of random directions.
TEXT = """<ir_version: 8, opset_import: ["": 18]> net (float[n,3,5,5] x) => (float[n,k] y) {
    h = Conv<pads = [1, 1, 1, 1]>(x, W, b)  t = Tanh(h)  u = ConvTranspose<strides = [2, 2]>(t, V)
    r = Relu(u)  y = Flatten(r) }"""
SHAPES = {"W": (4, 3, 3, 3), "b": (4,), "V": (4, 2, 2, 2)}
SHARDS = {
    "one after the other": [range(7), range(7, 24)],
    "in turns": [range(0, 24, 3), range(1, 24, 3), range(2, 24, 3)],
    "one sample and the rest": [[11], [i for i in range(24) if i != 11]],
    "in another order": [range(23, -1, -1)],
    "at random": np.split(np.random.default_rng(7).permutation(24), [5, 6, 17]),
}
each_split = pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)


@pytest.fixture
def data(rng):
    return Calibration(
        {"x": rng.normal(1, 1, (SAMPLES, 3, 5, 5)).astype(np.float32)}, True, "", False, 0
    )


@pytest.fixture
def model(rng):
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return load(proto)


def observed(model, data, **choices):
    layers = find_layers(model.proto).layers
    observer = Observer(model, layers, next(data.batches(4)), **choices)
    return observer, original_state(model, layers)


def assert_same(found, expected):
    """The same but for rounding of float32, in which ONNX Runtime computes a batch."""
    for part in ("bb", "wb", "ww", "gradient", "a", "aa"):
        x, y = getattr(found, part), getattr(expected, part)
        if y is not None:
            assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y) + 1e-5 * expected.rows, part


@each_split
@pytest.mark.parametrize("where", ["host", "graph"])
@pytest.mark.parametrize("gradient", [False, True])
def test_moments_of_shards_add_up_to_those_of_the_whole(model, data, shards, where, gradient, rng):
    observer, state = observed(model, data, statistics=where, metric="l2-raw")
    whole = measure(observer, state, data, size=5, with_gradient=gradient).moments
    parts = [
        measure(observer, state, data.shard(x), size=4, with_gradient=gradient).moments
        for x in shards
    ]
    for name, expected in whole.items():
        found = total(pickle.loads(pickle.dumps(part[name])) for part in parts)
        assert (found.count, found.rows) == (expected.count, expected.rows)
        assert_same(found.recentred(expected.centre), expected)


@each_split
def test_the_rows_of_a_sample_are_as_sensitive_in_a_shard_as_in_the_whole(model, data, shards):
    observer, state = observed(model, data, metric="l2-raw")
    whole = row_sensitivities(observer, state, data, size=24)
    for x in shards:
        found = row_sensitivities(observer, state, data.shard(x), size=3)
        for name, expected in whole.items():
            rows = expected.reshape(len(expected), SAMPLES, -1)[:, list(x)]
            np.testing.assert_allclose(found[name].reshape(rows.shape), rows, rtol=2e-4)


def added_up(measured, data, parts):
    """Sums over shards, by a map, are those over the whole."""
    whole = measured(data)
    found = reduce(add, parts)
    for name, expected in whole.moments.items():
        assert (found.moments[name].count, found.moments[name].rows) == (SAMPLES, expected.rows)
        assert_same(found.moments[name].recentred(expected.centre), expected)
        np.testing.assert_allclose(found.weights[name], whole.weights[name], rtol=2e-4)


def job(model, data, **choices):
    """``measure`` but for the samples, in the metric of ``optimize``."""
    observer, state = observed(model, data, threads=1, **choices)
    observer.normalise_outputs(state, data.batches(8))
    shift = np.full(4, 0.1)
    layer = observer.layers[0]
    state = state.with_layer(layer, 0.5 * state.weights[layer.weight.tensor], shift)
    return partial(measure, observer, state, size=5)


@pytest.mark.parametrize("where", ["host", "graph"])
@pytest.mark.parametrize("memory", [None, 1])
def test_what_a_worker_needs_and_gives_can_be_pickled(model, data, where, memory):
    here = partial(job(model, data, statistics=where), memory=memory)
    there = pickle.loads(pickle.dumps(here))
    parts = (pickle.loads(pickle.dumps(there(data.shard(x)))) for x in (range(9), range(9, 24)))
    added_up(here, data, parts)


@pytest.mark.slow
def test_processes_add_up_what_one_does(model, data):
    here = job(model, data)
    shards = [data.shard(x) for x in (range(9), range(9, 24))]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        added_up(here, data, pool.map(here, shards))


def test_a_shard_of_a_shard_keeps_its_numbers_too(data):
    shard = data.shard([3, 8, 9, 20]).shard([0, 2, 3]).take([2, 1])
    assert shard.numbers.tolist() == [20, 9]
    np.testing.assert_array_equal(shard.arrays["x"], data.arrays["x"][[20, 9]])
    first, second = next(shard.batches(2)).halves()
    assert (first.in_whole.tolist(), second.in_whole.tolist()) == ([20], [9])
    assert data.take([5, 4]).numbers is None
