"""How sure a stated error is: the interval, what carries it, and what the report says of it."""

import json

import numpy as np
import onnx
import pytest

import onnx_ecp
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.evaluation.compare import compare, deviation_sums, how_certain, measure_gap, overall
from onnx_ecp.evaluation.facts import model_of
from onnx_ecp.pruning.search import Point
from onnx_ecp.report import Report
from onnx_ecp.statistics import by_sample, uncertainty
from onnx_ecp.statistics.by_sample import SampleSquares
from onnx_ecp.statistics.columns import Measure, Spread
from onnx_ecp.statistics.uncertainty import certainty


def test_of_equal_samples_nothing_is_open():
    found = certainty(np.full(50, 0.04))
    assert (found.low, found.high) == pytest.approx((0.2, 0.2))
    assert (found.effective, found.largest) == pytest.approx((50, 0.02))


def test_the_interval_of_a_known_array_is_this_one():
    """Squared standard normal numbers: their mean has a relative standard error of sqrt(2 / n)."""
    squares = np.random.default_rng(0).standard_normal(1000) ** 2
    found = certainty(squares, seed=0)
    error, half = np.sqrt(squares.mean()), 1.96 * np.sqrt(2 / 1000) / 2
    assert found.low == pytest.approx(error * np.exp(-half), rel=0.01)
    assert found.high == pytest.approx(error * np.exp(half), rel=0.01)
    assert found.effective == pytest.approx(1000 / 3, rel=0.1)  # E x^4 = 3
    assert certainty(squares, seed=0) == found


def test_one_sample_that_carries_all_is_named():
    squares = np.full(100, 1e-3)
    squares[7] = 10.0
    found = certainty(squares)
    assert (found.largest_at, found.rests_on_few) == (7, True)
    assert found.effective == pytest.approx(1.02, abs=0.01)
    assert found.largest == pytest.approx(10 / (10 + 0.099))
    assert np.sqrt(squares.mean()) < found.high < np.inf


@pytest.mark.parametrize(
    ("squares", "ends"),
    [([], None), ([1.0], None), ([0.0, 0.0], (0, 0)), ([1.0, np.inf], (np.inf, np.inf))],
    ids=str,
)
def test_extremes(squares, ends):
    found = certainty(np.array(squares))
    assert (None if found is None else (found.low, found.high)) == ends


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e150])
def test_the_unit_does_not_matter(scale):
    squares = np.random.default_rng(1).exponential(size=40)
    one, other = certainty(squares), certainty(scale * squares)
    assert other.high == pytest.approx(one.high * np.sqrt(scale))
    assert (other.effective, other.largest) == pytest.approx((one.effective, one.largest))


DISTRIBUTIONS = {
    "squared normal": (lambda rng, n: rng.standard_normal(n) ** 2, 1.0, 51, 0.9),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0, 26, 0.9),
    "log-normal": (lambda rng, n: rng.lognormal(0, 1, n), np.exp(0.5), 51, 0.88),
    "log-normal, few": (lambda rng, n: rng.lognormal(0, 1, n), np.exp(0.5), 13, 0.82),
}


@pytest.mark.parametrize(("draw", "mean", "n", "least"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_most_intervals_hold_the_error_of_all_inputs(draw, mean, n, least, monkeypatch):
    monkeypatch.setattr(uncertainty, "DRAWS", 400)
    rng = np.random.default_rng(0)
    found = [certainty(draw(rng, n), seed=k) for k in range(300)]
    assert least < np.mean([x.low**2 <= mean <= x.high**2 for x in found]) <= 0.99


def test_many_samples_are_drawn_together_with_the_same_interval(monkeypatch):
    squares = np.random.default_rng(2).exponential(size=2000)
    one = certainty(squares)
    monkeypatch.setattr(uncertainty, "_MOST", 500)
    other = certainty(squares)
    assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=0.01)
    assert other.effective == one.effective


# Sample by sample.


@pytest.mark.parametrize("axis", [None, 1, 2])
def test_squares_of_samples_add_up_to_those_of_columns(rng, axis):
    squares = np.square(rng.standard_normal((6, 4, 5)))
    whole = SampleSquares.of(squares, axis, 6)
    halves = SampleSquares.of(squares[:2], axis, 2) + SampleSquares.of(squares[2:], axis, 4)
    columns = 1 if axis is None else squares.shape[axis]
    factors = rng.random(columns)
    np.testing.assert_allclose(halves.weighted(factors), whole.weighted(factors))
    by_hand = squares.sum(axis=(1, 2)) if axis is None else squares.sum(axis=3 - axis)
    np.testing.assert_allclose(whole.weighted(np.ones(columns)), by_hand.reshape(6, -1).sum(axis=1))


def test_of_many_samples_neighbours_count_together(rng, monkeypatch):
    squares = np.square(rng.standard_normal((40, 3)))
    monkeypatch.setattr(by_sample, "MOST", 30)
    parts = [SampleSquares.of(squares[i : i + 5], 1, 5) for i in range(0, 40, 5)]
    whole = sum(parts[1:], parts[0])
    assert whole.per_row > 1
    assert sum(map(len, whole.parts)) * 3 <= 30
    np.testing.assert_allclose(whole.weighted(np.ones(3)).sum(), squares.sum())


def test_where_rows_are_no_samples_nothing_is_said(rng):
    squares = np.square(rng.standard_normal((7, 3)))
    assert not SampleSquares.of(squares, 1, 2).known
    assert not (SampleSquares.of(squares, 1, 7) + SampleSquares.of(squares, 1, 2)).known


def test_samples_carry_what_the_error_is_made_of(rng):
    """Each in units of the spread of columns, so that their mean is the squared error."""
    a, gap = rng.standard_normal((30, 3)) * [1e-3, 1, 1e3], rng.standard_normal((30, 3))
    b = a + 0.1 * gap * [1e-3, 1, 1e3]
    measure = Measure.of({"y": Spread.of(a, 1, 30)})
    sums = {"y": deviation_sums(a, b, 0, 30, 1)}
    by_hand = (np.square(b - a) / a.var(axis=0)).mean(axis=1)
    assert overall(sums, measure) == pytest.approx(np.sqrt(by_hand.mean()))
    found, wanted = how_certain(sums, measure), certainty(by_hand)
    assert found.high == pytest.approx(wanted.high)
    assert found.effective == pytest.approx(wanted.effective)
    assert found.largest_at == by_hand.argmax()


# What is said of it.

NET = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 6] x) => (float[n, 3] y) { h = MatMul (x, A)  r = Relu (h)  y = MatMul (r, B) }
"""


def network(rng, scale=1.0):
    proto = onnx.parser.parse_model(NET)
    for name, shape in (("A", (6, 12)), ("B", (12, 3))):
        values = rng.standard_normal(shape).astype(np.float32)
        values = values * np.float32(scale) if name == "A" else values
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def calibration(x):
    return Calibration({"x": x.astype(np.float32)}, True, "test", False, 0)


@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_the_batch_size_changes_no_interval(rng, batch_size):
    a = model_of(network(rng))
    b, data = model_of(network(rng, 0.9)), calibration(rng.standard_normal((40, 6)))
    known = measure_gap(a, b, data).certainty
    found = measure_gap(a, b, data, batch_size=batch_size).certainty
    assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-4)
    assert known.low < measure_gap(a, b, data).relative_error < known.high


@pytest.mark.parametrize("share", [1.0, 1e-4])
def test_an_error_that_one_sample_carries_is_warned_of(share, rng):
    """However small: on samples that a model is very sure of, all errors are."""
    a, x = network(rng), rng.standard_normal((200, 6))
    b = network(rng, 1.0)
    b.CopyFrom(a)
    kept = onnx.numpy_helper.to_array(a.graph.initializer[0]).copy()
    kept[5] *= np.float32(1 - share)  # an input that only sample 17 has
    b.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(kept, "A"))
    x[:, 5] = 0.0
    x[17, 5] = 3.0
    gap = compare(a, b, calibration(x)).gap
    (warning,) = [w for w in gap.warnings if "rests on few samples" in w]
    assert "(100 % lies in sample 17)" in warning
    assert "give more samples" in warning


def test_an_equal_model_has_no_such_warning(rng):
    a = network(rng)
    gap = compare(a, a, calibration(rng.standard_normal((5, 6)))).gap
    assert gap.warnings == ()
    assert (gap.certainty.low, gap.certainty.high) == (0, 0)


def test_reports_state_the_interval(rng, tmp_path):
    x = rng.standard_normal((300, 6)).astype(np.float32)
    paths = [tmp_path / "r.json", tmp_path / "r.html"]
    report = onnx_ecp.optimize(network(rng), x, sparsity=0.4, report=paths).report
    known = report.gap.certainty
    assert known.samples == report.calibration.held_out == 60
    assert known.low < report.gap.relative_error < known.high
    assert Report.from_dict(json.loads(paths[0].read_text())).gap.certainty == known
    told = f"(95 %: {known.low:.3g} to {known.high:.3g})"
    assert told in paths[1].read_text()
    assert report.errors["measured"].endswith(told)
    assert report.learnt_error > 0


def test_rare_samples_that_no_held_out_one_is_like_are_told(rng):
    """The error of those that the result was computed from says what the held-out ones do not."""
    x = rng.standard_normal((200, 6)).astype(np.float32)
    x[:, 3:] *= 1e-3
    _, held_out = calibration(x).split(0.2, 0)
    seen = (x[:, None] != held_out.arrays["x"][None]).any(axis=2).all(axis=1)
    x[np.flatnonzero(seen)[:9], 3:] = 20.0
    net = network(rng)
    weights = onnx.numpy_helper.to_array(net.graph.initializer[0]).copy()
    weights[3:] *= 1e-2  # what magnitude takes
    net.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "A"))
    report = onnx_ecp.optimize(net, x, sparsity=0.3, method="magnitude").report
    (warned,) = [w for w in report.warnings if "samples that matter are rare" in w]
    assert report.learnt_error > 1.5 * report.gap.certainty.high
    assert f"{report.learnt_error:.3g}, on those held out" in warned


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_gate_says_where_the_interval_crosses_the_limit(rng, share):
    net, x = network(rng), rng.standard_normal((300, 6)).astype(np.float32)
    (point,) = onnx_ecp.optimize(net, x, sparsity=0.4, max_error=10.0).report.curve
    assert isinstance(point, Point)
    assert point.error < point.high
    limit = point.error + share * (point.high - point.error)
    report = onnx_ecp.optimize(net, x, sparsity=0.4, max_error=limit).report
    assert any("upper end of its 95 %" in w for w in report.warnings) == (share < 1)


def test_few_samples_hold_out_more_than_a_tenth(rng):
    for samples, held_out in ((50, 10), (512, 102), (1000, 128), (2000, 200)):
        x = rng.standard_normal((samples, 6)).astype(np.float32)
        report = onnx_ecp.optimize(network(rng), x, sparsity=0.3, method="magnitude").report
        assert report.calibration.held_out == held_out
