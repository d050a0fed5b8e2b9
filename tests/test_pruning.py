"""The loop of stages: what holds whatever the data, the batch size and the sharing of weights."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.api import preparation
from onnx_ecp.api.options import Options
from onnx_ecp.methods import COMPENSATIONS, METHODS, Solved
from onnx_ecp.pruning import compensation
from onnx_ecp.pruning import loop as pruning
from onnx_ecp.statistics import gram as grams
from onnx_ecp.statistics import layerwise as networks

HEADER = '<ir_version: 8, opset_import: ["": 17]> net '
MLP = """(float[n,12] x) => (float[n,4] y) {
    h = Gemm<transB=1>(x, W1, b1)  r = Relu(h)  y = Gemm<transB=1>(r, W2, b2)
}"""
SHAPES = {"W1": (16, 12), "b1": (16,), "W2": (4, 16), "b2": (4,)}


@pytest.fixture
def model(rng):
    return with_values(MLP, SHAPES, rng)


@pytest.fixture
def data(rng):
    return {"x": (rng.normal(size=(200, 6)) @ rng.normal(size=(6, 12))).astype(np.float32)}


def with_values(text, shapes, rng, kind=np.float32):
    """A model of random initializers."""
    model = onnx.parser.parse_model(HEADER + text)
    for name, shape in shapes.items():
        values = (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(kind)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


# Ties.


@pytest.mark.parametrize("method", ["ecp", "obs", "flap"])
def test_where_inputs_never_vary_size_ranks_weights_and_that_is_told(model, data, method):
    x = np.tile(data["x"][:1], (50, 1))
    found = onnx_ecp.optimize(model, x, method=method, sparsity=0.6, cleanup=False)
    sizes = {}
    for tensor in model.graph.initializer:
        if tensor.name in found.masks:
            size = np.abs(numpy_helper.to_array(tensor).astype(np.float64))
            sizes[tensor.name] = size / size.mean()
    stays = np.concatenate([sizes[n][found.masks[n]] for n in sizes])
    gone = np.concatenate([sizes[n][~found.masks[n]] for n in sizes])
    assert gone.max() < stays.min()
    assert any("importances of 2 layers, such as h, are zero" in w for w in found.report.warnings)


def test_three_samples_do_not_empty_a_layer(model, data):
    found = onnx_ecp.optimize(model, data["x"][:3], sparsity=0.5, cleanup=False)
    assert all(0.3 < mask.mean() < 0.7 for mask in found.masks.values())


# Fine-tuning.


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_fine_tuning_does_not_depend_on_the_batch_size(model, data, metric):
    found = [
        onnx_ecp.optimize(
            model, data, method="magnitude", metric=metric, finetune_steps=30, batch_size=size
        ).model
        for size in (128, 50, 3)
    ]
    weights = [[numpy_helper.to_array(t) for t in x.graph.initializer] for x in found]
    for other in weights[1:]:
        for one, two in zip(weights[0], other, strict=True):
            np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4)


# Compensation.


def test_a_refit_shrinks_its_sensitivities_whatever_ranked_the_weights(model, data, monkeypatch):
    choices = {"compensation": "refit", "sparsity": 0.6, "stages": 1}
    monkeypatch.setitem(METHODS, "shrunk", replace(METHODS["magnitude"], shrinkage=0.3))
    plain = onnx_ecp.optimize(model, data, method="magnitude", **choices).model
    assert plain == onnx_ecp.optimize(model, data, method="shrunk", **choices).model
    refit = replace(COMPENSATIONS["refit"], shrinkage=0.0)
    monkeypatch.setitem(COMPENSATIONS, "refit", refit)
    assert plain != onnx_ecp.optimize(model, data, method="magnitude", **choices).model


@pytest.mark.parametrize("wrong", [10.0, 1e6], ids=["better than the shift", "worse"])
def test_neither_a_refit_nor_a_bias_shift_may_raise_the_held_out_error(
    model, data, monkeypatch, wrong
):
    def solve(problem):
        masked = np.where(problem.keep, problem.weight, 0)
        return Solved(masked, problem.keep, np.full(len(masked), wrong))

    choices = {"method": "magnitude", "sparsity": 0.5, "cleanup": False}
    masked = onnx_ecp.optimize(model, data, **choices)
    monkeypatch.setattr(compensation, "bias_shift", lambda weight, *_: np.full(len(weight), 1e3))
    monkeypatch.setitem(COMPENSATIONS, "refit", replace(COMPENSATIONS["refit"], solve=solve))
    found = onnx_ecp.optimize(model, data, compensation="refit", **choices)
    assert found.model == masked.model
    notes = {row.note for row in found.report.layers}
    assert len(notes) == 1
    assert notes.pop().startswith("last refit and bias shift rejected")


THRICE = """(float[n,6] x1, float[n,6] x2) => (float[n,3] y) {
    h1 = Gemm<transB=1>(x1, W, b)  h2 = Gemm<transB=1>(x2, W, b)  h = Concat<axis=1>(h1, h2)
    r = Relu(h)  y = Gemm<transB=1>(r, V, c)
}"""


def test_a_layer_where_nothing_went_is_told_nothing_of_a_refit(model, data, rng):
    """Its solution is the original but for rounding, and so is its error."""
    choices = {"compensation": "refit", "stages": 2, "sparsity": 0.5, "cleanup": False}
    report = onnx_ecp.optimize(model, data, layer_sparsity={"h": 0}, **choices).report
    assert [row.note for row in report.layers] == ["", ""]
    shared = with_values(THRICE, {"W": (4, 6), "b": (4,), "V": (3, 8), "c": (3,)}, rng)
    x = {name: rng.normal(size=(90, 6)).astype(np.float32) for name in ("x1", "x2")}
    report = onnx_ecp.optimize(shared, x, layer_sparsity={"h1": 0, "h2": 0}, **choices).report
    assert [row.note for row in report.layers][:2] == ["", ""]


GROUPED = """(float[n,4,6] x) => (float[n,6,4] y) { h = Conv<group=2>(x, W, b)  y = Relu(h) }"""


@pytest.mark.parametrize(
    "blocks",
    [{"BLOCK": 10}, {"BLOCK_BYTES": 200}, {"BLOCK": 1}, {}],
    ids=["ten rows", "200 bytes", "one row", "all at once"],
)
@pytest.mark.parametrize("batch_size", [3, 40])
@pytest.mark.parametrize("name", ["rows", "patches in groups"])
def test_sums_and_errors_do_not_depend_on_the_blocks(name, batch_size, blocks, rng, monkeypatch):
    text, shapes, sample = {
        "rows": (MLP, SHAPES, (12,)),
        "patches in groups": (GROUPED, {"W": (6, 2, 3), "b": (6,)}, (4, 6)),
    }[name]
    for constant, value in blocks.items():
        monkeypatch.setattr(networks, constant, value)
        if constant == "BLOCK":
            monkeypatch.setattr(grams, "BLOCK", value)
    source = preparation.load(with_values(text, shapes, rng))
    options = Options.of(batch_size=batch_size)
    layers, _ = preparation.choose_layers(source, options)
    x = {"x": rng.normal(size=(50, *sample)).astype(np.float32) + 2}
    network, _ = preparation.observe_network(
        source, layers, preparation.gather(source, x, options), options
    )
    state = network.original
    run, run_twice = (networks.LayerwiseForward(network, network.train) for _ in range(2))
    for segment in network.segments:
        layer = segment.layer
        whole = next(network.train.batches(len(network.train)))
        a = np.asarray(network.observer.activations(state, whole)[layer.name], np.float64)
        weights, shrink = rng.random(a.shape[:2]), 0.3
        s = (1 - shrink) * weights + shrink * weights.mean(axis=1, keepdims=True)
        gram = run.gram(segment, state, weights, shrink)
        mean = np.einsum("gr,gri->gi", s, a) / s.sum(axis=1)[:, None]
        off = a - mean[:, None]
        covariance = np.einsum("gr,gri,grj->gij", s, off, off) / s.sum(axis=1)[:, None, None]
        np.testing.assert_allclose(gram.mean_now, mean, rtol=1e-5)
        for found in (gram.covariance, gram.cross_covariance):
            np.testing.assert_allclose(found, covariance, rtol=1e-4, atol=1e-5)
        target = networks.matrix(layer, state)
        candidate, shifts = rng.normal(size=target.shape), rng.normal(size=(2, len(target)))
        energy, (errors,) = run_twice.errors(segment, state, weights, shrink, [(candidate, shifts)])
        groups = (len(a), -1, target.shape[1])
        wanted, made = (
            np.einsum("gri,goi->gro", a, w.reshape(groups)) for w in (target, candidate)
        )
        expected = [
            np.einsum("gr,gro->", s, (made + d.reshape(len(a), 1, -1) - wanted) ** 2)
            for d in shifts
        ]
        np.testing.assert_allclose(errors, expected, rtol=1e-5)
        np.testing.assert_allclose(energy, np.einsum("gr,gro->", s, wanted**2), rtol=1e-5)


TWICE = """(double[n,6] x1, double[n,6] x2) => (double[n,8] y) {
    h1 = Gemm<transB=1>(x1, W, b)  h2 = Gemm<transB=1>(x2, W, b)  y = Concat<axis=1>(h1, h2)
}"""
TWICE_SHAPES = {"W": (4, 6), "b": (4,)}


def twice(rng, **choices):
    """A network of two layers with one weight, its plan, and their inputs, which depend."""
    model = with_values(TWICE, TWICE_SHAPES, rng, np.float64)
    mixing = rng.normal(size=(2, 6, 6))
    x = {f"x{i + 1}": rng.normal(size=(90, 6)) @ m + i for i, m in enumerate(mixing)}
    # The plain sum: rows of the two layers that share W then count alike.
    options = Options.of(sparsity=0.5, stages=1, metric="l2-raw", **choices)
    source = preparation.load(model)
    layers, _ = preparation.choose_layers(source, options)
    network, _ = preparation.observe_network(
        source, layers, preparation.gather(source, x, options), options
    )
    return network, preparation.make_plan(network.layers, options)


@pytest.mark.parametrize("method", ["magnitude", "obc"])
def test_a_shared_weight_is_the_least_squares_solution_of_all_its_layers(rng, method):
    shifted = method == "magnitude"
    compensation = "refit" if shifted else "obc"
    network, plan = twice(rng, method=method, compensation=compensation, damping=1e-9)
    state = pruning.prune(network, plan).state
    original, keep = network.original.weights["W"], state.keep["W"]
    inputs = network.train.arrays
    means = {name: x.mean(axis=0) * shifted for name, x in inputs.items()}
    rows = np.concatenate([x - means[name] for name, x in inputs.items()])
    assert np.count_nonzero(~keep) == keep.size // 2
    for row, w, on in zip(state.weights["W"], original, keep, strict=True):
        expected, *_ = np.linalg.lstsq(rows[:, on], rows @ w, rcond=None)
        np.testing.assert_allclose(row[on], expected, rtol=1e-6, atol=1e-7)
        assert not row[~on].any()
    for layer in network.layers:
        expected = (original - state.weights["W"]) @ means[layer.input]
        np.testing.assert_allclose(state.shifts[layer.name], expected, rtol=1e-6, atol=1e-9)


def test_a_shared_solution_that_raises_the_error_of_its_layers_is_not_kept(rng, monkeypatch):
    network, plan = twice(rng, method="magnitude", compensation="refit")
    wrong = replace(
        COMPENSATIONS["refit"],
        solve=lambda x: Solved(np.where(x.keep, -3 * x.weight, 0), x.keep),
    )
    monkeypatch.setitem(COMPENSATIONS, "refit", wrong)
    found = pruning.prune(network, plan)
    kept = np.where(found.state.keep["W"], network.original.weights["W"], 0)
    np.testing.assert_array_equal(found.state.weights["W"], kept)
    assert set(found.notes) == {layer.name for layer in network.layers}


def test_a_kernel_may_be_shared_by_convolutions_of_other_groups(rng):
    text = """(float[n,2,6] x, float[n,4,6] z) => (float[n,4,4] y) {
        h = Conv(x, W)  g = Conv<group=2>(z, W)  y = Add(h, g)
    }"""
    model = with_values(text, {"W": (4, 2, 3)}, rng)
    x = {
        "x": rng.normal(size=(60, 2, 6)).astype(np.float32),
        "z": rng.normal(size=(60, 4, 6)).astype(np.float32),
    }
    found = onnx_ecp.optimize(model, x, sparsity=0.5, stages=2, cleanup=False)
    assert found.report.sparsity == 0.5


@pytest.mark.parametrize("compensation", ["bias", "refit", "joint"])
def test_what_a_stage_made_is_let_go_by_the_next(model, data, compensation):
    """As many copies of the weights as there are stages would not fit in memory."""
    options = Options.of(stages=3, compensation=compensation)
    source = preparation.load(model)
    layers, _ = preparation.choose_layers(source, options)
    network, _ = preparation.observe_network(
        source, layers, preparation.gather(source, data, options), options
    )
    made = []

    def step(*arguments, **choices):
        result = pruning.stage(*arguments, **choices)
        made.append([weakref.ref(result.state.weights[x.weight.tensor]) for x in layers])
        return result

    plan = preparation.make_plan(network.layers, options)
    result = pruning.prune(network, plan, step=step)
    gc.collect()
    assert len(made) == 3
    assert all(array() is None for stage in made[:2] for array in stage)
    assert not result.state.keep["W1"].all()


def test_an_importance_of_another_shape_is_refused(model, data, monkeypatch):
    method = onnx_ecp.Method(lambda view: np.abs(view.weight).T)
    monkeypatch.setitem(onnx_ecp.METHODS, "mine", method)
    with pytest.raises(
        onnx_ecp.OnnxEcpError, match=r"shape \(12, 16\): its weights are \(16, 12\)"
    ):
        onnx_ecp.optimize(model, data, method="mine")
