"""The edges of what may be given: few samples, fixed batches, endless data, loose types."""

import itertools

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.api import preparation
from onnx_ecp.api.options import Options
from onnx_ecp.errors import CalibrationError, ModelError, TargetError, UsageError
from onnx_ecp.gradients.cotangents import SeedPlan
from onnx_ecp.graph import load as load_model
from onnx_ecp.graph.operators import find
from onnx_ecp.pruning import loop as pruning
from onnx_ecp.runtime.limits import threads_of, workers
from onnx_ecp.statistics.layerwise import LayerwiseForward

HEADER = '<ir_version: 8, opset_import: ["": 17]> net '
NET = "(float[n,6] x) => (float[n,3] y) { h = Gemm(x, W, b) r = Relu(h) y = MatMul(r, V) }"
SHAPES = {"W": (6, 12), "b": (12,), "V": (12, 3)}


def network(text, shapes, rng):
    proto = onnx.parser.parse_model(HEADER + text if text.startswith("(") else text)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return proto


@pytest.fixture
def net(rng):
    return network(NET, SHAPES, rng)


def drawn(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


PARTS = {
    1: (1, 0, "one sample only"),
    2: (1, 1, "two samples only"),
    3: (2, 1, None),
    9: (7, 2, None),
}


@pytest.mark.parametrize(("samples", "expected"), PARTS.items(), ids=str)
def test_the_report_counts_every_sample_once(net, rng, samples, expected):
    used, held_out, warning = expected
    report = onnx_ecp.optimize(net, drawn(rng, samples, 6)).report
    assert (report.calibration.samples, report.calibration.held_out) == (used, held_out)
    found = [w for w in report.warnings if "sample only" in w or "samples only" in w]
    assert len(found) == (warning is not None)
    assert all(warning in w for w in found)


@pytest.mark.parametrize("name", ["labels", "drop"])
def test_labels_of_a_fixed_batch_are_those_of_its_rows(rng, tmp_path, name):
    net = network(NET.replace("n,", "4,"), SHAPES, rng)
    x = drawn(rng, 40, 6)
    np.save(tmp_path / "y.npy", rng.integers(0, 3, 40))
    target = {"max_accuracy_drop": 100.0} if name == "drop" else {"sparsity": 0.0}
    report = onnx_ecp.optimize(net, x, labels=tmp_path / "y.npy", **target).report
    assert report.calibration.samples + report.calibration.held_out == 10
    assert report.gap.scores[0].metric == "accuracy"


def test_labels_of_a_fixed_batch_belong_to_their_rows(rng, tmp_path):
    """Those that the network itself gives are all right, whatever is held out."""
    net = network(NET.replace("n,", "4,"), SHAPES, rng)
    x = drawn(rng, 40, 6)
    free = network(NET, {}, rng)
    free.graph.initializer.extend(net.graph.initializer)
    y = onnx.reference.ReferenceEvaluator(free).run(None, {"x": x})[0].argmax(axis=1)
    np.save(tmp_path / "y.npy", y)
    score = onnx_ecp.optimize(net, x, labels=tmp_path / "y.npy", sparsity=0.0).report.gap.scores[0]
    assert (score.a, score.b) == (100.0, 100.0)


def test_an_endless_source_is_read_as_far_as_there_are_labels(net, rng, tmp_path):
    np.save(tmp_path / "y.npy", rng.integers(0, 3, 30))
    endless = ({"x": drawn(rng, 1, 6)} for _ in itertools.count())
    report = onnx_ecp.optimize(net, endless, labels=tmp_path / "y.npy").report
    assert report.calibration.samples + report.calibration.held_out == 30


def test_an_endless_source_without_a_limit_ends_before_memory_does(net, rng, monkeypatch):
    monkeypatch.setattr("onnx_ecp.data.calibration.memory_budget", lambda: 10_000)
    endless = ({"x": drawn(rng, 1, 6)} for _ in itertools.count())
    with pytest.raises(CalibrationError, match="there are more") as error:
        onnx_ecp.optimize(net, endless)
    assert "`samples`" in error.value.hint


def test_reduced_positions_weigh_their_own_rows_wherever_the_batch_axis_is(rng):
    """A refit walks through the rows in the order in which they were weighed."""
    text = """(float[n,6,4] x) => (float[n,3,4] y) {
        t = Transpose<perm = [2, 0, 1]>(x)  h = MatMul(t, W)  r = Tanh(h)  z = MatMul(r, V)
        y = Transpose<perm = [1, 2, 0]>(z)
    }"""
    model = load_model(network(text, {"W": (6, 12), "V": (12, 3)}, rng))
    options = Options(positions="reduce", batch_size=8)
    data = preparation.gather(model, drawn(rng, 30, 6, 4), options)
    layers, _ = preparation.choose_layers(model, options)
    network_, _ = preparation.observe_network(model, layers, data, options)
    plan = preparation.make_plan(network_.layers, options)
    weights = pruning.observe(network_, plan, network_.original).weights["h"][0]
    # One sample at a time, its four positions are next to each other.
    expected = []
    for batch in data.train.batches(1):
        g = network_.observer.observe(network_.original, batch).adjoints["h"]
        expected.append(np.square(g.astype(np.float64)).sum(axis=0).mean(axis=2)[0])
    np.testing.assert_allclose(weights, np.concatenate(expected), rtol=1e-6)
    walked = LayerwiseForward(network_, data.train)
    rows = list(walked._now.advance(network_.segments[0], network_.original))
    assert [a.shape[1] for a in rows] == [4] * len(data.train)


def test_gradients_of_many_outputs_do_not_cancel(rng):
    """Random probes of their own for every sample would average every mean gradient away."""
    text = "(float[n,5] x) => (float[n,30] y) { h = MatMul(x, W) r = Tanh(h) y = MatMul(r, V) }"
    net = network(text, {"W": (5, 10), "V": (10, 30)}, rng)
    x = drawn(rng, 400, 5) + 1.0
    found = onnx_ecp.importance(net, x, method="gradient-magnitude", probes=64, metric="l2-raw")[
        "y"
    ]
    # dy_k/dV_jk = r_j for output k alone: the exact mean gradient is E[r_j].
    fit = preparation.gather(load_model(net), x, Options()).train.arrays["x"]
    w, v = (numpy_helper.to_array(t) for t in net.graph.initializer)
    exact = np.abs(v * np.tanh(fit @ w).mean(axis=0)[:, None]).T
    assert np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)


def test_common_signs_are_the_same_for_every_sample_and_batch():
    plan, y = SeedPlan(probes=3), {"y": np.zeros((4, 20), np.float32)}
    seeds = plan.seeds(y, range(8, 12), common=True)["y"]
    assert (seeds == seeds[:, :1]).all()
    np.testing.assert_array_equal(seeds[:, 0], plan.seeds(y, range(4))["y"][:, 0])


def test_threads_limit_all_work_side_by_side():
    cores = workers()
    with threads_of(1):
        assert workers() == 1
    assert workers() == cores


OLD = """<ir_version: 6, opset_import: ["": 9]> g (float[n,6] x, int64[n,12] i) => (float[n,3] y) {
    h = MatMul(x, W)  s = Scatter(h, i, h)  y = MatMul(s, V)
}"""


def test_an_opset_that_cannot_be_lifted_is_no_obstacle_without_sensitivities(rng):
    net = network(OLD, {"W": (6, 12), "V": (12, 3)}, rng)
    data = {"x": drawn(rng, 20, 6), "i": np.zeros((20, 12), np.int64)}
    for method in ("magnitude", "wanda", "random"):
        assert onnx_ecp.optimize(net, data, method=method).report.sparsity == 0.5
    with pytest.raises(ModelError, match="opset 9 cannot be lifted") as error:
        onnx_ecp.optimize(net, data, method="ecp")
    assert "magnitude" in error.value.hint


LOOSE = {
    "sparsity": (0.8, ["0.8", np.float64(0.8), "80e-2"]),
    "samples": (3, [np.int64(3), np.uint8(3), "3"]),
    "max_error": (0.5, [np.float64(0.5), "0.5"]),
    "seed": (7, [np.int32(7), "7"]),
    "force": (True, [np.bool_(True)]),
    "include": (("a",), ["a", ["a"], ("a",)]),
    "layer_sparsity": ({"a": 0.5}, [{"a": "0.5"}, [("a", np.float32(0.5))]]),
    "input_shapes": ({"x": (1, 2)}, [{"x": [1, 2]}, {"x": np.array([1, 2])}]),
}


@pytest.mark.parametrize("name", LOOSE)
def test_loose_values_become_those_of_the_option(name):
    expected, given = LOOSE[name]
    for value in given:
        found = getattr(Options.of(**{name: value}), name)
        assert found == expected
        assert type(found) is type(expected)


WRONG = {
    "samples": [3.5, True, [3], "many"],
    "sparsity": [[0.5], {}, True, "most"],
    "max_error": ["small", [1], True],
    "seed": [1.5, "one"],
    "method": [3, None],
    "include": [3, [3]],
    "layer_sparsity": [[1], {"a": None}, {3: 0.5}],
    "input_shapes": [{"x": 3}, {"x": [1.5]}],
    "labels": [3, {"y": 1}],
    "force": ["yes", 1],
}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_another_type_are_usage_errors(name):
    for value in WRONG[name]:
        with pytest.raises(UsageError, match=f"sparsity|`{name}`"):
            Options.of(**{name: value})


@pytest.mark.parametrize(("value", "meant"), [("80", "0.8"), (80, "0.8"), ("37.5%", "0.375")])
def test_percent_is_understood_but_not_taken(value, meant):
    with pytest.raises(UsageError) as error:
        Options.of(sparsity=value)
    assert error.value.hint == f"Did you mean {meant}?"


KINKED = {
    "Where": "k = Greater(x, c) d = Add(x, x) y = Where(k, d, x)",
    "Max": "y = Max(x, c)",
    "Min": "y = Min(x, c)",
    "Clip": "y = Clip(x, c)",
    "ReduceL1": "t = Reshape(x, s) y = ReduceL1<keepdims = 0>(t, a)",
    "ReduceMax": "t = Concat<axis = 0>(x, z) r = Reshape(t, q) y = ReduceMax<axes = [0]>(r)",
    "GlobalMaxPool": "t = Concat<axis = 0>(x, z) r = Reshape(t, q) p = Transpose(r) "
    "u = Reshape(p, e) y = GlobalMaxPool(u)",
    **{
        op: f"y = {op}(x)"
        for op in (
            *("Abs", "Relu", "LeakyRelu", "Selu", "Elu", "Shrink", "ThresholdedRelu"),
            *("HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Softplus", "Mish", "Gelu", "Celu"),
        )
    },
}


@pytest.mark.parametrize("op", KINKED)
def test_operators_with_kinks_get_small_steps(op):
    """Second differences of a smooth operator vanish with the step; those at a kink do not."""
    opset = 22 if op not in ("ReduceL1", "ReduceMax") else 13
    body = KINKED[op]
    if op == "ReduceL1":
        body = body.replace("(t, a)", "(t)").replace("keepdims = 0", "keepdims = 0, axes = [1]")
    text = f"""<ir_version: 8, opset_import: ["": {opset}]> g (double[n] x) => (double[m] y)
        <double c = {{0.1}}, double[1] w = {{0}}, int64[2] s = {{-1, 1}}, int64[2] q = {{2, -1}},
         int64[3] e = {{-1, 1, 2}}> {{ z = Mul(x, w) {body} }}"""
    net = onnx.reference.ReferenceEvaluator(onnx.parser.parse_model(text))
    h = 1e-4
    grid = np.arange(-4, 4, h)
    y = net.run(None, {"x": grid})[0].reshape(-1)
    bend = np.abs(y[2:] - 2 * y[1:-1] + y[:-2]).max() / h
    assert len(y) == len(grid)
    assert (bend > 0.01) == find("", op).kinked({})


def test_shapes_chosen_for_real_samples_must_be_theirs(rng):
    net = network("(float[n,t,6] x) => (float[n,t,3] y) { y = MatMul(x, W) }", {"W": (6, 3)}, rng)
    x = drawn(rng, 20, 5, 6)
    assert onnx_ecp.optimize(net, x, input_shapes={"x": (1, 5, 6)}).report.sparsity == 0.5
    with pytest.raises(UsageError, match="samples of ndarray are N,5,6") as error:
        onnx_ecp.optimize(net, x, input_shapes={"x": (1, 7, 6)})
    assert "Leave it out" in error.value.hint


def test_numbers_are_no_classes(net, rng, tmp_path):
    """With the targets of a regression, which of its outputs is largest says nothing."""
    x = drawn(rng, 40, 6)
    np.save(tmp_path / "y.npy", drawn(rng, 40, 3))
    with_targets = onnx_ecp.optimize(net, x, labels=tmp_path / "y.npy").report.gap
    assert [score.metric for score in with_targets.scores] == ["r2", "mse"]
    assert with_targets.agreement is None
    assert onnx_ecp.optimize(net, x).report.gap.agreement is not None


def test_given_masks_are_no_importance(net, rng, tmp_path):
    x, path = drawn(rng, 40, 6), tmp_path / "keep.npz"
    onnx_ecp.optimize(net, x, masks=path)
    again = onnx_ecp.optimize(net, x, apply_masks=path).report.recipe
    assert again.importance == "none, the masks of keep.npz were given"


@pytest.mark.parametrize(("samples", "warned"), [(40, True), (1200, False)])
def test_accuracy_on_few_samples_cannot_resolve_a_point(net, rng, tmp_path, samples, warned):
    np.save(tmp_path / "y.npy", rng.integers(0, 3, samples))
    report = onnx_ecp.optimize(
        net,
        drawn(rng, samples, 6),
        labels=tmp_path / "y.npy",
        max_accuracy_drop=1.0,
        sparsity=0.0,
    ).report
    assert any("percentage points" in w for w in report.warnings) == warned


def test_a_search_that_never_meets_its_target_says_where_it_ended(net, rng):
    report = onnx_ecp.optimize(net, drawn(rng, 40, 6), method="magnitude", max_error=1e9).report
    assert report.sparsity < 1
    assert any("every step of the search" in w for w in report.warnings)


PROBABILITIES = {
    "logits": ("y = MatMul(x, W)", False),
    "softmax": ("z = MatMul(x, W) y = Softmax(z)", False),  # traced back to its logits
    "behind a move": ("z = MatMul(x, W) p = Softmax(z) y = Identity(p)", False),
    "behind another node": ("z = MatMul(x, W) p = Softmax(z) y = Abs(p)", True),
}


@pytest.mark.parametrize(("body", "warned"), PROBABILITIES.values(), ids=PROBABILITIES)
def test_kl_of_probabilities_is_warned_of(rng, body, warned):
    net = network(f"(float[n,6] x) => (float[n,3] y) {{ {body} }}", {"W": (6, 3)}, rng)
    report = onnx_ecp.optimize(net, drawn(rng, 40, 6), method="ecp", metric="kl").report
    assert any("look like probabilities" in w for w in report.warnings) == warned


def test_units_that_went_are_counted_in_all_stages(rng):
    text = "(float[n,6] x) => (float[n,3] y) { h = MatMul(x, W) r = Tanh(h) y = MatMul(r, V) }"
    net = network(text, {"W": (6, 24), "V": (24, 3)}, rng)
    report = onnx_ecp.optimize(net, drawn(rng, 100, 6), granularity="unit", sparsity=0.5).report
    rows = {row.name: row for row in report.layers}
    assert rows["h"].importance_removed > 0


def test_progress_tells_the_stages(net, rng):
    seen = []
    onnx_ecp.optimize(net, drawn(rng, 40, 6), stages=3, progress=lambda *event: seen.append(event))
    assert [event for event in seen if event[0] == "stages"] == [
        ("stages", done, 3) for done in range(4)
    ]


WORDS = {
    "text": (["a"] * 40, "holds text, not numbers", ""),
    "targets": (np.zeros(40), "y.npy: an accuracy drop needs class scores", "`max_error`"),
    "classes that are none": (np.full(40, 7), "y.npy: labels go from 7 to 7", "count from 0"),
}


@pytest.mark.parametrize(("labels", "message", "hint"), WORDS.values(), ids=WORDS)
def test_labels_that_do_not_fit_are_told_in_words_with_their_file(
    net, rng, tmp_path, labels, message, hint
):
    np.save(tmp_path / "y.npy", labels)
    with pytest.raises(CalibrationError) as error:
        onnx_ecp.optimize(
            net, drawn(rng, 40, 6), labels=tmp_path / "y.npy", max_accuracy_drop=100.0
        )
    assert message in error.value.message
    assert hint in error.value.hint


def test_samples_of_a_fixed_batch_are_told_to_be_batches(rng):
    facts = onnx_ecp.optimize(
        network(NET.replace("n,", "4,"), SHAPES, rng), drawn(rng, 40, 6)
    ).report.calibration
    assert str(facts) == "8 samples (each a fixed batch of 4), 2 held out"


def test_ids_beyond_a_vocabulary_come_with_a_hint_at_the_data(rng):
    text = (
        "(int64[n,5] ids) => (float[n,3] y) { e = Gather(E, ids) f = Flatten(e) y = MatMul(f, W) }"
    )
    net = network(text, {"E": (10, 4), "W": (20, 3)}, rng)
    with pytest.raises(CalibrationError) as error:
        onnx_ecp.optimize(net, rng.integers(10, 20, (20, 5)))
    assert "vocabulary" in error.value.hint


def test_units_that_cannot_all_go_are_told_in_percent(rng):
    text = "(float[n,6] x) => (float[n,3] y) { h = MatMul(x, W) r = Tanh(h) y = MatMul(r, V) }"
    net = network(text, {"W": (6, 24), "V": (24, 3)}, rng)
    for gate in ({}, {"max_error": 1e9}):
        with pytest.raises(TargetError, match="100 % of the weights cannot go"):
            onnx_ecp.optimize(net, drawn(rng, 50, 6), granularity="unit", sparsity=1.0, **gate)
