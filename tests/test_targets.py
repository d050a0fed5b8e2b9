"""Error targets, given masks, fine-tuning: what they promise, on small networks."""

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import onnx_ecp
from onnx_ecp.errors import CalibrationError, QualityError, TargetError, UsageError
from onnx_ecp.pruning.search import Limit, Point
from onnx_ecp.report import Report

MLP = """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 12] x) => (float[batch, 4] y) {
    h = Gemm<transB = 1>(x, W1, b1)
    r = Relu(h)
    y = Gemm<transB = 1>(r, W2, b2)
}"""


@pytest.fixture
def model(rng):
    model = onnx.parser.parse_model(MLP)
    shapes = {"W1": (16, 12), "b1": (16,), "W2": (4, 16), "b2": (4,)}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.fixture
def data(rng):
    mixing = rng.normal(size=(6, 12))
    return {"x": (rng.normal(size=(200, 6)) @ mixing).astype(np.float32)}


@pytest.fixture
def labels(model, data, tmp_path):
    y = ReferenceEvaluator(model).run(None, data)[0]
    np.save(tmp_path / "y.npy", y.argmax(axis=1))
    return tmp_path / "y.npy"


METHODS = [{"method": "ecp-refit", "stages": 4}, {"method": "ecp"}, {"method": "magnitude"}]


@pytest.mark.parametrize("choice", METHODS, ids=lambda c: c["method"])
def test_the_error_stays_within_the_target_and_a_little_more_would_not(model, data, choice):
    found = onnx_ecp.optimize(model, data, max_error=0.1, **choice).report
    assert found.gap.relative_error <= 0.1
    assert 0 < found.sparsity < 1
    within = [p.sparsity for p in found.curve if p.within]
    beyond = [p.sparsity for p in found.curve if not p.within]
    assert max(within) == pytest.approx(found.sparsity)
    # The last halved step is 1/16 of a step that leaves 0.7 of the weights.
    assert min(beyond) - max(within) < 0.3 * (1 - max(within)) / 8
    assert all(p.within == (p.error <= 0.1) for p in found.curve)


@pytest.mark.parametrize("method", ["magnitude", "ecp-refit"])
def test_the_walk_goes_on_where_fine_tuning_makes_room(model, data, method):
    choice = {"method": method, "stages": 2, "max_error": 0.1, "finetune_steps": 60}
    found = onnx_ecp.optimize(model, data, **choice).report
    assert found.gap.relative_error <= 0.1
    places = [p.sparsity for p in found.curve]
    tuned = next(i for i, s in enumerate(places) if s in places[:i])  # the same masks once more
    after = found.curve[tuned:]
    assert max(p.sparsity for p in after if p.within) == pytest.approx(found.sparsity)
    room = min(p.sparsity for p in after if not p.within) - found.sparsity
    assert room < 0.3 * (1 - found.sparsity) / 8


def test_whole_units_are_judged_once_however_often_the_walk_comes_by(model, data):
    curve = onnx_ecp.optimize(model, data, granularity="unit", max_error=0.5, stages=2).report.curve
    places = [p.sparsity for p in curve]
    assert len(places) > 2
    assert len(set(places)) == len(places)


def test_a_wider_target_prunes_more(model, data):
    tight, wide = (
        onnx_ecp.optimize(model, data, max_error=e, stages=2).report for e in (0.05, 0.3)
    )
    assert tight.sparsity < wide.sparsity


@pytest.mark.parametrize(
    "choice",
    [
        {"max_error": 0.1, "layer_sparsity": {"h": "2:4"}},
        {"seed": -1},
        {"seed": 2**128},
        {"timeout": 0},
        {"timeout": float("nan")},
    ],
    ids=str,
)
def test_choices_that_cannot_be_kept_are_usage_errors(model, data, choice):
    with pytest.raises(UsageError):
        onnx_ecp.optimize(model, data, **choice)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_a_network_of_decisions_has_no_error_to_limit(model, data, sparsity):
    model.graph.node.append(onnx.helper.make_node("ArgMax", ["y"], ["c"], axis=1, keepdims=0))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("c", 7, ["batch"]))
    with pytest.raises(TargetError, match="no floating-point output"):
        onnx_ecp.optimize(model, data, method="magnitude", max_error=0.1, sparsity=sparsity)


def test_one_stage_methods_are_observed_once_however_many_points(model, data, monkeypatch):
    from onnx_ecp.pruning import loop as pruning
    from onnx_ecp.pruning import search as targets

    looks = []

    def observe(*arguments, **keywords):
        looks.append(1)
        return pruning.observe(*arguments, **keywords)

    monkeypatch.setattr(targets, "observe", observe)
    found = onnx_ecp.optimize(model, data, method="ecp", max_error=0.2)
    assert len(looks) == 1
    assert len(found.report.curve) > 2


def test_a_walk_ends_in_what_a_run_to_its_sparsity_gives(model, data):
    """Of a one-stage method: every guess starts from the original network."""
    walked = onnx_ecp.optimize(model, data, method="ecp", max_error=0.2)
    direct = onnx_ecp.optimize(model, data, method="ecp", sparsity=walked.report.sparsity)
    assert walked.model == direct.model


@pytest.mark.parametrize("kind", ["file", "array", "list"])
def test_accuracy_drop_is_judged_on_labels(model, data, labels, kind):
    known = {"file": labels, "array": np.load(labels), "list": np.load(labels).tolist()}[kind]
    found = onnx_ecp.optimize(model, data, max_accuracy_drop=10.0, labels=known, stages=2).report
    assert found == Report.from_dict(found.to_dict())
    assert any(p.within for p in found.curve)
    assert all(p.within == (p.drop <= 10.0) for p in found.curve)
    score = found.gap.scores[0]
    assert score.a - score.b <= 10.0


def test_a_target_that_nothing_meets_is_said_to_be(model, data):
    with pytest.raises(TargetError, match="no sparsity meets the target") as error:
        onnx_ecp.optimize(model, data, method="random", max_error=1e-9)
    assert error.value.exit_code == 5


def test_a_sparsity_with_a_target_is_a_gate(model, data, tmp_path):
    output = tmp_path / "out.onnx"
    with pytest.raises(QualityError, match="misses the target") as error:
        onnx_ecp.optimize(
            model, data, output=output, method="magnitude", sparsity=0.9, max_error=0.01
        )
    assert error.value.exit_code == 7
    assert not output.exists()
    passed = onnx_ecp.optimize(model, data, output=output, sparsity=0.1, max_error=0.5)
    assert output.exists()
    assert passed.report.sparsity == pytest.approx(0.1, abs=0.01)


def test_a_speedup_with_a_target_is_a_gate_too(model, data, tmp_path):
    output = tmp_path / "out.onnx"
    choices = {"granularity": "unit", "speedup": 2.0, "output": output}
    with pytest.raises(QualityError, match="misses the target") as error:
        onnx_ecp.optimize(model, data, max_error=1e-6, **choices)
    assert "`speedup`" in error.value.hint
    assert not output.exists()
    report = onnx_ecp.optimize(model, data, max_error=10.0, **choices).report
    assert report.work_after.flops <= report.work_before.flops / 2


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"max_error": -1.0}, "must be 0 or more"),
        ({"max_error": float("inf")}, "finite"),
        ({"max_accuracy_drop": 200.0, "labels": "y.npy"}, "from 0 to 100"),
        ({"granularity": "unit", "speedup": float("inf")}, "finite"),
        *(({"damping": x}, "`damping`") for x in (0.0, float("inf"), float("nan"), 1e300)),
        ({"blocks": "layer"}, "`blocks`"),
        ({"unread_inputs": "smaller", "cleanup": False}, "there is none"),
        ({"unread_inputs": "smaller", "sparsity": "2:4"}, "there is none"),
        ({"max_accuracy_drop": 1.0}, "needs labels"),
        ({"finetune_steps": -1}, "cannot be negative"),
        ({"max_error": 0.1, "apply_masks": "m.npz"}, "leaves nothing"),
    ],
)
def test_targets_that_make_no_sense_are_refused(model, data, choices, words):
    with pytest.raises(UsageError, match=words):
        onnx_ecp.optimize(model, data, **choices)


def test_labels_that_are_none_are_refused_by_the_name_they_have(model, data):
    with pytest.raises(CalibrationError, match="the labels given: labels are float64"):
        onnx_ecp.optimize(model, data, labels=np.ones(3))
    with pytest.raises(UsageError, match="a path or an array"):
        onnx_ecp.optimize(model, data, labels=3)


def test_a_drop_needs_class_scores(rng, tmp_path):
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 1] y) {
        y = Gemm(x, W)
    }"""
    )
    weight = rng.normal(size=(4, 1)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    np.save(tmp_path / "y.npy", np.zeros(20, np.int64))
    x = rng.normal(size=(20, 4)).astype(np.float32)
    with pytest.raises(CalibrationError, match="class"):
        onnx_ecp.optimize(model, x, max_accuracy_drop=1.0, labels=tmp_path / "y.npy")


def test_limits_are_met_together():
    limit = Limit(error=0.1, drop=1.0)
    assert limit.allows(Point(0.5, 0.1, 1.0))
    assert not limit.allows(Point(0.5, 0.11, 0.0))
    assert not limit.allows(Point(0.5, 0.0, 1.1))
    assert not limit.allows(Point(0.5, 0.0, None))


def test_masks_that_were_written_can_be_applied(model, data, tmp_path):
    masks = tmp_path / "masks.npz"
    choices = {"method": "ecp", "sparsity": 0.6, "masks": masks, "cleanup": False}
    first = onnx_ecp.optimize(model, data, **choices)
    again = onnx_ecp.optimize(model, data, method="ecp", apply_masks=masks)
    assert again.model == first.model
    refitted = onnx_ecp.optimize(model, data, apply_masks=masks, stages=3)
    for name, mask in first.masks.items():
        np.testing.assert_array_equal(refitted.masks[name], mask)
    assert refitted.report.gap.relative_error < first.report.gap.relative_error


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"W9": np.ones((16, 12), bool)}, "W9"),
        ({"W1": np.ones((12, 16), bool)}, r"\(16, 12\)"),
        ({"W1": np.ones((16, 12))}, "float64"),
    ],
)
def test_masks_that_do_not_fit_are_refused(model, data, tmp_path, stored, words):
    np.savez(tmp_path / "masks.npz", **stored)
    with pytest.raises(UsageError, match=words):
        onnx_ecp.optimize(model, data, apply_masks=tmp_path / "masks.npz")


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_fine_tuning_lowers_the_held_out_loss_and_keeps_the_mask(model, rng, metric):
    data = {"x": (rng.normal(size=(400, 6)) @ rng.normal(size=(6, 12))).astype(np.float32)}
    choices = {"sparsity": 0.7, "method": "ecp", "metric": metric, "cleanup": False}
    plain = onnx_ecp.optimize(model, data, **choices)
    tuned = onnx_ecp.optimize(model, data, finetune_steps=200, **choices)
    for name, mask in plain.masks.items():
        np.testing.assert_array_equal(tuned.masks[name], mask)
    if metric == "l2":
        assert tuned.report.gap.relative_error < plain.report.gap.relative_error
    assert tuned.report.gap.agreement >= plain.report.gap.agreement
    for tensor in tuned.model.graph.initializer:
        if tensor.name in tuned.masks:
            values = onnx.numpy_helper.to_array(tensor)
            assert np.all(values[~tuned.masks[tensor.name]] == 0)
