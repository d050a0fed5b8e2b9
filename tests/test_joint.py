"""The loss in the outputs, its slope and its curvature in what may change, and the joint refit."""

import re
import tracemalloc
from dataclasses import replace
from itertools import islice

import numpy as np
import onnx
import pytest

import onnx_ecp
from onnx_ecp import graph as modelling
from onnx_ecp.api import preparation
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.layers import find_layers
from onnx_ecp.methods import COMPENSATIONS, METHODS
from onnx_ecp.pruning import joint_refit as joint
from onnx_ecp.statistics.linearised import samples_of
from onnx_ecp.statistics.objective import Objective, Parameters, Wanted
from onnx_ecp.statistics.observer import Observer, original_state

HEADER = '<ir_version: 8, opset_import: ["" : 17]> g '
MLP = """(double[batch, 6] x) => (double[batch, 4] y) {
    h = Gemm<transB = 1>(x, W1, b1)  r = Tanh(h)  y = Gemm(r, W2, b2)
}"""
LINEAR = "(double[batch, 6] x) => (double[batch, 4] y) { y = Gemm<alpha = 2.0>(x, W, b) }"
WIDE = """(float[batch, 6] x) => (float[batch, 4] y) {
    h = MatMul(x, W1)  r = Tanh(h)  k = MatMul(r, W2)  t = Tanh(k)  y = MatMul(t, W3)
}"""
STORED = {
    MLP: {"W1": (5, 6), "b1": (5,), "W2": (5, 4), "b2": (4,)},
    LINEAR: {"W": (6, 4), "b": (4,)},
}


def network(text, rng, metric="l2", count=50):
    """A model with random weights, samples, its objective, and a state with weights removed."""
    model = onnx.parser.parse_model(HEADER + text)
    for name, shape in STORED[text].items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape), name))
    return observed(model, rng, metric, count)


def observed(model, rng, metric, count):
    """What ``network`` gives, of any model with such an input."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    x = rng.normal(size=(count, 6)).astype(kind)
    samples = Calibration({"x": x}, True, "", False, 0)
    layers = find_layers(model).layers
    loaded = modelling.load(model)
    observer = Observer(loaded, layers, next(samples.batches(2)), metric=metric, probes=0)
    original = original_state(loaded, layers)
    keep = {n: rng.random(k.shape) < 0.6 for n, k in original.keep.items()}
    views = {x.weight.tensor: x.weight for x in layers}
    weights = {n: np.where(views[n].layout(k), original.weights[n], 0) for n, k in keep.items()}
    weights = original_state(loaded, layers).weights.of(weights)
    pruned = replace(original, weights=weights, keep=keep)
    return model, samples, Objective(observer, original), pruned


def wide(rng, width):
    """6 inputs, two layers of some units, in float32."""
    model = onnx.parser.parse_model(HEADER + WIDE)
    for name, shape in (("W1", (6, width)), ("W2", (width, width)), ("W3", (width, 4))):
        values = (rng.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


def central(function, point, direction, step=1e-5):
    return (function(point + step * direction) - function(point - step * direction)) / (2 * step)


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_the_gradient_is_that_of_the_loss(rng, metric):
    _, samples, objective, state = network(MLP, rng, metric)
    theta = Parameters(objective.observer.layers, state.keep)
    point = theta.of(state)
    assert point.size == Parameters.count(objective.observer.layers, state.keep)
    batch = next(samples.batches(50))
    slopes = objective.slopes(objective.observer.heads(state, batch), objective.targets(batch))
    gradient = objective.gradient(state, batch, slopes, theta) / 50
    for direction in np.eye(point.size)[:: point.size // 8]:
        slope = central(lambda p: objective.loss(theta.state(state, p), samples), point, direction)
        assert gradient @ direction == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_bends_are_the_change_of_the_slopes(rng, metric):
    _, samples, objective, _ = network(MLP, rng, metric)
    batch = next(samples.batches(50))
    targets = objective.targets(batch)
    y, u = rng.normal(size=(2, 50, 4))
    ((name, bends),) = objective.bends({"y": y}, {"y": u}).items()
    change = central(lambda p: objective.slopes({name: p}, targets)[name], y, u)
    np.testing.assert_allclose(bends, change, rtol=1e-6, atol=1e-8)


def test_a_state_made_from_its_own_vector_is_the_same(rng):
    _, _, objective, state = network(MLP, rng)
    theta = Parameters(objective.observer.layers, state.keep)
    again = theta.state(state, theta.of(state))
    for name in state.weights:
        np.testing.assert_array_equal(again.weights[name], state.weights[name])
    for name in state.shifts:
        np.testing.assert_array_equal(again.shifts[name], state.shifts[name])


def test_on_a_linear_network_the_steps_end_at_the_ridge_regression(rng):
    """In coordinates in which inputs have mean zero, with a ridge for W and one for b."""
    _, samples, objective, state = network(LINEAR, rng)
    theta = Parameters(objective.observer.layers, state.keep)
    damping = 0.05
    centred, diagonal = joint._coordinates(objective, state, samples, 50, None, theta)
    wanted = samples_of(objective, samples, 20)
    system = joint._System(objective, state, wanted, theta, centred, diagonal, damping, None)
    *_, found = islice(system.steps(), theta.of(state).size)
    x = samples.arrays["x"]
    kept = np.argwhere(objective.observer.layers[0].weight.layout(state.keep["W"]))
    jacobian = np.zeros((50, 4, len(kept) + 4))
    for column, (i, o) in enumerate(kept):
        jacobian[:, o, column] = 2 * (x[:, i] - x[:, i].mean())
    jacobian[:, :, len(kept) :] = np.eye(4)
    flat = jacobian.reshape(200, -1)
    gap = 2 * x @ (state.weights["W"] - objective.original.weights["W"])
    np.testing.assert_allclose(diagonal, (flat**2).sum(axis=0) / 50, rtol=1e-9)
    of_weights, of_shifts = diagonal[: len(kept)], diagonal[len(kept) :]
    # In units of the norms of the columns of W, which are the rows of the layer.
    norms = np.square(np.linalg.norm(objective.original.weights["W"], axis=0))
    size = norms[kept[:, 1]]
    ridge = damping * np.concatenate(
        [(of_weights * size).mean() / size, (of_shifts * norms).mean() / norms]
    )
    matrix = flat.T @ flat / 50 + np.diag(ridge)
    expected = np.linalg.solve(matrix, -flat.T @ gap.reshape(-1) / 50)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_centred_coordinates_pull_back_what_they_move(rng):
    _, samples, objective, state = network(MLP, rng)
    theta = Parameters(objective.observer.layers, state.keep)
    centred, diagonal = joint._coordinates(objective, state, samples, 50, None, theta)
    d, g = rng.normal(size=(2, diagonal.size))
    assert g @ centred.moved(d) == pytest.approx(centred.pulled(g) @ d)


@pytest.mark.parametrize(
    "changed",
    [
        ({"x": lambda v: 255 * v, "W1": lambda v: v / 255}),
        ({"W2": lambda v: 1e-3 * v, "b2": lambda v: 1e-3 * v}),
        ({"x": lambda v: v + 100, "b1": lambda v, w: v - 100 * w.sum(axis=1)}),
    ],
    ids=["inputs in another unit", "outputs in another unit", "inputs with an offset"],
)
def test_it_gains_as_much_in_any_unit(rng, changed):
    """The same function of other numbers is refitted as well."""
    model, samples, _, state = network(MLP, rng)

    def gained(change):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        stored = {t.name: t for t in other.graph.initializer}
        for name, of in change.items():
            if name == "x":
                continue
            value, args = onnx.numpy_helper.to_array(stored[name]), ()
            if name == "b1":
                args = (onnx.numpy_helper.to_array(stored["W1"]),)
            stored[name].CopyFrom(onnx.numpy_helper.from_array(of(value, *args), name))
        x = change.get("x", lambda v: v)(samples.arrays["x"])
        data = Calibration({"x": x}, True, "", False, 0)
        loaded, layers = modelling.load(other), find_layers(other).layers
        observer = Observer(loaded, layers, next(data.batches(2)))
        whole = original_state(loaded, layers)
        views = {y.weight.tensor: y.weight for y in layers}
        cut = {n: np.where(views[n].layout(k), whole.weights[n], 0) for n, k in state.keep.items()}
        start = replace(whole, weights=whole.weights.of(cut), keep=state.keep)
        # Removed weights take their mean with them, as the bias shift before any refit does.
        gone = {n: whole.weights[n] - cut[n] for n in cut}
        mean = x.mean(axis=0)
        first = next(y.name for y in layers if y.weight.tensor == "W1")
        shifts = {**start.shifts, first: gone["W1"] @ mean}
        start = replace(start, shifts=shifts)
        objective = Objective(observer, whole)
        fit, guard = data.take(np.arange(40)), data.take(np.arange(40, 50))
        found = joint.refit_jointly(objective, start, fit, guard, size=16, damping=1e-2)
        return found.after / found.before

    assert gained(changed) == pytest.approx(gained({}), rel=2e-2)


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_it_lowers_the_loss_that_it_was_not_shown_and_leaves_the_mask(rng, metric):
    _, samples, objective, state = network(MLP, rng, metric)
    fit = samples.take(np.arange(40))
    guard = samples.take(np.arange(40, 50))
    found = joint.refit_jointly(objective, state, fit, guard, size=16, damping=1e-2)
    assert found.before == pytest.approx(objective.loss(state, guard))
    assert found.after == pytest.approx(objective.loss(found.state, guard))
    assert found.after < 0.8 * found.before
    for layer in objective.observer.layers:
        tensor = layer.weight.tensor
        removed = ~layer.weight.layout(state.keep[tensor])
        assert removed.any()
        assert np.all(found.state.weights[tensor][removed] == 0)
    assert found.state.keep is state.keep


@pytest.mark.parametrize("metric", ["l2", "kl"])
@pytest.mark.parametrize("memory", [None, 1])
def test_what_is_wanted_is_computed_once(rng, monkeypatch, metric, memory):
    """And is the same from a temporary file; the loss over it is that of the samples."""
    _, samples, objective, state = network(MLP, rng, metric)
    loss = objective.loss(state, samples, 16)
    wanted = Wanted(objective, samples, 16, memory)
    monkeypatch.setattr(Objective, "targets", lambda *_: pytest.fail("computed again"))
    assert objective.loss_over(state, wanted) == objective.loss_over(state, wanted) == loss


def test_nothing_is_moved_where_nothing_is_wrong(rng):
    _, samples, objective, _ = network(MLP, rng)
    found = joint.refit_jointly(
        objective, objective.original, samples, samples, size=50, damping=1e-2
    )
    assert found.state is objective.original
    assert found.after == 0


def test_joint_is_the_refit_with_one_step_more_and_needs_memory(rng):
    model, samples, *_ = network(MLP, rng, count=300)
    assert COMPENSATIONS[METHODS["ecp-refit"].compensation].joint
    assert not COMPENSATIONS["refit"].joint
    data, choices = samples.arrays, {"sparsity": 0.5, "stages": 2, "cleanup": False}
    whole = onnx_ecp.optimize(model, data, **choices)
    by_layer = onnx_ecp.optimize(model, data, compensation="refit", **choices)
    squeezed = onnx_ecp.optimize(model, data, max_memory="4K", **choices)
    for name, mask in whole.masks.items():
        np.testing.assert_array_equal(mask, by_layer.masks[name])
    assert whole.report.gap.relative_error < by_layer.report.gap.relative_error
    assert squeezed.report.gap.relative_error == by_layer.report.gap.relative_error
    (text,) = (text for text in squeezed.report.warnings if "joint refit was left out" in text)
    enough = re.search(r"With --max-memory (\S+) it is done", text)[1]
    again = onnx_ecp.optimize(model, data, max_memory=enough, **choices)
    assert again.model.SerializeToString() == whole.model.SerializeToString()


@pytest.mark.parametrize("free", [2**20, 2**40])
def test_what_is_free_decides_nothing(rng, monkeypatch, free):
    """The same command gives the same bytes, whatever else the machine does."""
    monkeypatch.setattr(preparation, "free_memory", lambda: free)
    model, x = wide(rng, 120), rng.normal(size=(30, 6)).astype(np.float32)
    found = [
        onnx_ecp.optimize(model, x, sparsity=0.5, stages=1, threads=1, max_memory=memory)
        for memory in (None, "8G")
    ]
    assert not any("left out" in text for text in found[0].report.warnings)
    assert found[0].model.SerializeToString() == found[1].model.SerializeToString()


def test_it_takes_no_more_memory_than_it_says(rng):
    """Of what grows with the model; samples are few here."""
    _, samples, objective, state = observed(wide(rng, 400), rng, "l2", 8)
    layers = objective.observer.layers
    objective.loss(state, samples)
    tracemalloc.start()
    joint.refit_jointly(objective, state, samples, samples, size=8, damping=1e-2, rounds=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    needed = joint.memory_needed(layers, state)
    assert joint.precision(layers, state) == np.float32
    assert 0.8 * needed < peak < needed + 2**20


def test_joint_is_left_out_by_finite_differences_and_said_to_be(rng):
    model, samples, *_ = network(MLP, rng)
    choices = {"gradients": "numeric", "sparsity": 0.5, "stages": 1, "cleanup": False}
    made, by_layer = (
        onnx_ecp.optimize(model, samples.arrays, compensation=name, **choices).report
        for name in ("joint", "refit")
    )
    assert made.gap.relative_error == by_layer.gap.relative_error
    left_out = ["joint refit was left out" in " ".join(x.warnings) for x in (made, by_layer)]
    assert left_out == [True, False]


def test_where_all_that_stays_is_zero_there_is_no_step_to_take(rng):
    _, samples, objective, state = network(LINEAR, rng)
    keep = {name: np.zeros_like(kept) for name, kept in state.keep.items()}
    nothing = {name: np.zeros_like(state.weights[name]) for name in keep}
    state = replace(state, weights=state.weights.of(nothing), keep=keep)
    found = joint.refit_jointly(objective, state, samples, samples, size=50, damping=1e-2)
    assert found.state is state
