"""Two models are compared as a few lines of NumPy on all samples at once would compare them."""

import dataclasses
import math

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.errors import CalibrationError, ModelError
from onnx_ecp.evaluation import compare as evaluate
from onnx_ecp.evaluation.compare import compare, deviation_sums, measure_gap
from onnx_ecp.evaluation.facts import model_facts
from onnx_ecp.graph import Model, load
from onnx_ecp.runtime.session import OutOfMemory, Session
from onnx_ecp.statistics.columns import Measure, Spread

SAMPLES = 23


def model(body: str, outputs: str = "float[n, 4] y", inputs: str = "float[n, 3] x") -> Model:
    """A model of a few lines, in memory."""
    text = f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return load(onnx.parser.parse_model(text))


W = "W = Constant<value = float[3, 4] {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>() y = MatMul(x, W)"
V = "W = Constant<value = float[3, 4] {0, 2, 3, 4, 5, 0, 0, 8, 9, 10, 0, 12}>() y = MatMul(x, W)"
NET, PRUNED = model(W), model(V)


@pytest.fixture
def x(rng) -> np.ndarray:
    """Inputs of NET, (SAMPLES, 3): whole numbers, so that float32 sums are exact in any order."""
    return rng.integers(-9, 10, (SAMPLES, 3)).astype(np.float32)


def outputs(net: Model, x: np.ndarray) -> dict[str, np.ndarray]:
    return Session(net.proto).run({"x": x})


PAIRS = {
    "pruned": (NET, PRUNED),
    "the same": (NET, NET),
    "the original is zero": (
        model("y = Sub(x, x)", "float[n, 3] y"),
        model("y = Neg(x)", "float[n, 3] y"),
    ),
    "no class scores": (
        model("y = Relu(x)", "float[n, 3] y"),
        model("y = Abs(x)", "float[n, 3] y"),
    ),
    "two outputs of unequal scale": (
        model(f"{W} z = Mul(y, y)", "float[n, 4] y, float[n, 4] z"),
        model(f"{V} z = Mul(y, y)", "float[n, 4] y, float[n, 4] z"),
    ),
    "class ids beside scores": (
        model(f"{W} k = ArgMax<axis = 1>(y)", "float[n, 4] y, int64[n, 1] k"),
        model(f"{V} k = ArgMax<axis = 1>(y)", "float[n, 4] y, int64[n, 1] k"),
    ),
}
each_pair = pytest.mark.parametrize(("a", "b"), PAIRS.values(), ids=PAIRS)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The formula of the module on whole arrays (samples, columns)."""
    error = np.square((b - a).astype(np.float64)).mean(axis=0)
    there = (variance := a.astype(np.float64).var(axis=0)) > 0
    if not there.any():
        return math.inf if error.any() else 0.0
    return math.sqrt((error[there] / variance[there]).mean())


def data(x: np.ndarray) -> Calibration:
    return Calibration({"x": x}, True, "test", False, 0)


@each_pair
def test_the_gap_is_that_of_all_samples_at_once(a, b, x):
    gap = measure_gap(a, b, data(x), batch_size=7)
    y_a, y_b = outputs(a, x), outputs(b, x)
    assert gap.samples == SAMPLES
    for d in gap.outputs:
        if y_a[d.output].dtype.kind != "f":
            continue
        distance = np.abs(y_b[d.output].astype(np.float64) - y_a[d.output])
        assert d.relative_error == pytest.approx(relative(y_a[d.output], y_b[d.output]), rel=1e-12)
        assert d.mean_squared_error == pytest.approx(np.square(distance).mean(), rel=1e-12)
        assert d.largest == distance.max()
        assert d.largest_at == distance.max(axis=1).argmax()
    errors = [relative(y_a[k], y_b[k]) for k in y_a if y_a[k].dtype.kind == "f"]
    assert gap.relative_error == pytest.approx(np.sqrt(np.square(errors).mean()), rel=1e-12)


@each_pair
@pytest.mark.parametrize("size", [1, 5, SAMPLES, 100])
def test_the_batch_size_changes_nothing(a, b, x, size):
    whole = measure_gap(a, b, data(x), batch_size=SAMPLES)
    gap = measure_gap(a, b, data(x), batch_size=size)
    assert gap.relative_error == pytest.approx(whole.relative_error, rel=1e-12)
    for one, other in zip(gap.outputs, whole.outputs, strict=True):
        assert (one.output, one.agreement) == (other.output, other.agreement)
        assert one.mean_squared_error == pytest.approx(other.mean_squared_error, rel=1e-12)


@each_pair
def test_a_model_does_not_differ_from_itself(a, b, x):
    gap = measure_gap(a, a, data(x))
    assert gap.relative_error == 0.0
    assert all(d.largest == 0.0 and d.agreement in (None, 100.0) for d in gap.outputs)


def test_agreement_is_of_the_top_class(x):
    gap = measure_gap(NET, PRUNED, data(x))
    top_a, top_b = (outputs(net, x)["y"].argmax(axis=1) for net in (NET, PRUNED))
    assert gap.agreement == pytest.approx(100 * (top_a == top_b).mean())
    assert 0 < gap.agreement < 100


def test_agreement_is_that_of_the_output_that_agrees_least():
    parts = (None, 99.0, 80.0)
    outputs = tuple(evaluate.Deviation(str(p), 0.0, 0.0, 0.0, 0, p, 0, 0) for p in parts)
    assert evaluate.Gap(1, 0.0, outputs).agreement == 80.0


def test_ids_are_equal_or_not_and_do_not_count_in_the_overall_error(x):
    a, b = PAIRS["class ids beside scores"]
    gap = measure_gap(a, b, data(x))
    ids = next(d for d in gap.outputs if d.output == "k")
    differ = (outputs(a, x)["k"] != outputs(b, x)["k"]).mean()
    assert ids.agreement == pytest.approx(100 * (1 - differ))
    assert ids.mean_squared_error == pytest.approx(differ)
    assert gap.relative_error == measure_gap(NET, PRUNED, data(x)).relative_error


NAN, INF = math.nan, math.inf
NOT_FINITE = {
    "NaN in both": ([1, NAN], [1, NAN], 0.0, (1, 1)),
    "the same infinity in both": ([1, -INF], [2, -INF], 1.0, (1, 1)),
    "NaN in the result only": ([1, 2], [1, NAN], INF, (0, 1)),
    "NaN in the original only": ([1, NAN], [1, 2], INF, (1, 0)),
    "opposite infinities": ([1, INF], [1, -INF], INF, (1, 1)),
}


@pytest.mark.parametrize(("a", "b", "error", "counts"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_values_that_are_not_finite_are_told(a, b, error, counts):
    sums = deviation_sums(np.float32([a]), np.float32([b]), 0, 1)
    assert sums.raw_error == error
    found = sums.deviation("y", Measure.of({"y": Spread.of(np.float32([a]), None, 1)}))
    assert (found.not_finite_a, found.not_finite_b) == counts
    warning = evaluate.Gap(1, 0.0, (found,)).warnings
    assert "output 'y'" in warning[0]


KINDS = {
    "scalar": np.float32(2.0),
    "empty": np.zeros((0, 3), np.float32),
    "text": np.array([["a"], ["b"]], dtype=object),
    "bool": np.array([True, False]),
    "huge doubles": np.array([[1e200, -1e200]]),
    "half": np.float16([[6e4, -6e4]]),
}


@pytest.mark.parametrize("a", KINDS.values(), ids=KINDS)
def test_any_kind_of_output_equals_itself(a):
    a = np.asarray(a)
    sums = deviation_sums(a, a.copy(), 5, 2)
    assert (sums.raw_error, sums.largest, sums.not_finite_b) == (0.0, 0.0, 0)
    assert sums.largest_at == 5


# Labels.

TASKS = {
    "classes": (NET, PRUNED, lambda y: y["y"].argmax(axis=1), ["accuracy"]),
    "class ids": (
        model(f"{W} k = ArgMax<axis = 1, keepdims = 0>(y)", "int64[n] k"),
        model(f"{V} k = ArgMax<axis = 1, keepdims = 0>(y)", "int64[n] k"),
        lambda y: y["k"],
        ["accuracy"],
    ),
    "regression": (NET, PRUNED, lambda y: y["y"].astype(np.float64), ["r2", "mse"]),
    "regression of one number": (
        model(
            "y = ReduceSum<keepdims = 1>(x, a)", "float[n, 1] y", "float[n, 3] x, int64[1] a = {1}"
        ),
        model("y = ReduceMax<keepdims = 1, axes = [1]>(x)", "float[n, 1] y"),
        lambda y: y["y"][:, 0].astype(np.float64),
        ["r2", "mse"],
    ),
}
BEST = {"accuracy": 100.0, "r2": 1.0, "mse": 0.0}


@pytest.mark.parametrize(("a", "b", "labels", "metrics"), TASKS.values(), ids=TASKS)
def test_a_model_is_perfect_on_its_own_predictions(a, b, labels, metrics, x):
    scores = measure_gap(a, b, data(x), labels(outputs(a, x)), batch_size=4).scores
    assert [score.metric for score in scores] == metrics
    assert [score.a for score in scores] == [BEST[metric] for metric in metrics]
    assert all(score.b != score.a for score in scores)


def test_r2_is_that_of_scikit_learn(x):
    # sklearn.metrics.r2_score([1, 2, 4], [1, 2, 3]) == 0.7857142857142857
    net = model("y = Identity(x)", "float[n, 1] y", "float[n, 1] x")
    given = data(np.float32([[1], [2], [3]]))
    r2, mse = measure_gap(net, net, given, np.array([1.0, 2.0, 4.0])).scores
    assert r2.a == pytest.approx(0.7857142857142857)
    assert mse.a == pytest.approx(1 / 3)


WRONG_LABELS = {
    "too few": (np.zeros(SAMPLES - 1, np.int64), "22 labels for 23 samples"),
    "too many": (np.zeros(SAMPLES + 1, np.int64), "24 labels for 23 samples"),
    "counted from 1": (np.arange(SAMPLES) % 4 + 1, "has 4 classes"),
    "of another width": (np.zeros((SAMPLES, 3)), "fit no output"),
    "no integers": (np.zeros(SAMPLES), "fit no output"),
}


@pytest.mark.parametrize(("labels", "message"), WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_labels_that_do_not_fit_are_refused(labels, message, x):
    with pytest.raises(CalibrationError, match=message) as caught:
        measure_gap(NET, PRUNED, data(x), labels, batch_size=5)
    assert caught.value.hint


STRANGERS = {
    "another input": model(W.replace("(x,", "(v,"), inputs="float[n, 3] v"),
    "another output": model(W.replace("y =", "z ="), "float[n, 4] z"),
    "an output more": PAIRS["two outputs of unequal scale"][0],
}


@pytest.mark.parametrize("other", STRANGERS.values(), ids=STRANGERS)
def test_models_with_other_inputs_or_outputs_are_not_compared(other, x):
    with pytest.raises(ModelError, match="puts are"):
        measure_gap(NET, other, data(x))


def test_outputs_of_other_shapes_are_not_compared(x):
    wide = model("y = Concat<axis = 1>(x, x, x)", "float[n, m] y")
    with pytest.raises(ModelError, match="shape"):
        measure_gap(NET, wide, data(x))


# Fixed batches, memory, files.


def test_a_fixed_batch_runs_sample_by_sample_and_its_rows_have_labels(x):
    fixed = [model(body, "float[2, 4] y", "float[2, 3] x") for body in (W, V)]
    pairs = x[: SAMPLES - 1]
    labels = outputs(NET, pairs)["y"].argmax(axis=1)
    comparison = compare(*(net.proto for net in fixed), {"x": pairs}, labels)
    free = measure_gap(NET, PRUNED, data(pairs), labels)
    assert comparison.gap.samples == (SAMPLES - 1) // 2
    assert comparison.gap.relative_error == pytest.approx(free.relative_error, rel=1e-12)
    assert comparison.gap.scores == free.scores


def test_a_batch_that_does_not_fit_is_halved(x, monkeypatch):
    whole, run = measure_gap(NET, PRUNED, data(x)), Session.run

    def small_machine(session, feeds, names=None):
        if len(feeds["x"]) > 3:
            raise OutOfMemory("too much")
        return run(session, feeds, names)

    monkeypatch.setattr(Session, "run", small_machine)
    gap = measure_gap(NET, PRUNED, data(x), batch_size=20)
    assert gap.relative_error == pytest.approx(whole.relative_error, rel=1e-12)
    assert gap.outputs[0].largest_at == whole.outputs[0].largest_at

    monkeypatch.setattr(Session, "run", lambda *_: small_machine(None, {"x": range(9)}))
    with pytest.raises(OutOfMemory):
        measure_gap(NET, PRUNED, data(x))


def test_facts_count_dense_and_sparse_alike():
    weight = np.float32([[0, 1, 0], [2, 0, 0]])
    dense = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 2] x) => (float[n, 3] y) '
        "<float[2, 3] W = {0, 1, 0, 2, 0, 0}> { y = MatMul(x, W) }"
    )
    sparse = onnx.ModelProto()
    sparse.CopyFrom(dense)
    del sparse.graph.initializer[:]
    sparse.graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(
            onnx.numpy_helper.from_array(weight[weight != 0], "W"),
            onnx.numpy_helper.from_array(np.flatnonzero(weight)),
            weight.shape,
        )
    )
    facts = [model_facts(load(proto)) for proto in (dense, sparse)]
    assert [(f.parameters, f.zeros) for f in facts] == [(6, 4)] * 2
    assert facts[0].sha256 != facts[1].sha256
    assert facts[0].bytes == dense.ByteSize()


def test_facts_of_a_file_take_its_external_data_in(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 2] x) => (float[n, 2] y) '
        "{ y = MatMul(x, W) }"
    )
    weight = onnx.numpy_helper.from_array(np.float32([[0, 1], [0, 2]]), "W")
    proto.graph.initializer.append(weight)
    onnx.save(proto, tmp_path / "whole.onnx")
    onnx.save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    whole, facts = (model_facts(load(tmp_path / name)) for name in ("whole.onnx", "m.onnx"))
    assert facts.bytes == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.data"))
    assert (facts.parameters, facts.zeros) == (whole.parameters, whole.zeros) == (4, 2)
    assert facts.path == str(tmp_path / "m.onnx")


def test_latency_is_measured_in_turns(x, monkeypatch):
    order, seconds = [], Session.seconds
    monkeypatch.setattr(
        Session,
        "seconds",
        lambda session, feeds: order.append(id(session)) or seconds(session, feeds),
    )
    batch = next(data(x).batches(8))
    latency = evaluate.measure_latency(NET, PRUNED, batch, threads=1, turns=4, seconds=0)
    assert order == order[:2] * 7
    assert order[0] != order[1]
    assert latency.ratio == latency.seconds_b / latency.seconds_a > 0
    assert (latency.batch, latency.threads) == (8, 1)
    assert (latency.median_a, latency.median_b) >= (latency.seconds_a, latency.seconds_b)


def test_latency_says_how_many_threads_were_there(x, monkeypatch):
    """One per core unless told otherwise, which is what the sessions are told as well."""
    monkeypatch.setattr("onnx_ecp.evaluation.latency.workers", lambda: 3)
    batch = next(data(x).batches(8))
    latency = evaluate.measure_latency(NET, PRUNED, batch, turns=1, seconds=0)
    assert (latency.threads, latency.conditions) == (3, "batch 8, 3 threads")


def test_a_comparison_counts_multiplications(x):
    comparison = compare(NET.proto, PRUNED.proto, {"x": x})
    assert comparison.work_a == comparison.work_b
    assert comparison.work_a.flops > 0


def test_labels_and_data_come_from_files(tmp_path, x):
    labels = outputs(NET, x)["y"].argmax(axis=1)
    np.savez(tmp_path / "test.npz", x=x, y=labels)
    path = tmp_path / "test.npz"
    comparison = compare(NET.proto, PRUNED.proto, path, path, measure=False)
    assert comparison.gap == measure_gap(NET, PRUNED, data(x), labels)
    assert comparison.a == model_facts(NET)
    assert dataclasses.replace(comparison.b, path=None) == model_facts(PRUNED)
    assert comparison.latency is None
