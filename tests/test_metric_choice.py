"""Which metric the default takes, and that it never stands behind magnitude pruning."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.gradients.links import LINKS
from onnx_ecp.methods import METHODS, Method
from onnx_ecp.runtime.session import Session

ENDS = {
    "Softmax": "y = Softmax(z)",
    "LogSoftmax": "y = LogSoftmax(z)",
    "Sigmoid": "y = Sigmoid(z)",
    "Softmax, cast and reshaped": "p = Softmax(z) q = Identity(p) y = Flatten(q)",
}
TAKEN = "taken at the logits of y"


def classifier(end, rng, gain=1.0):
    """Three layers; the larger the gain, the surer the probabilities."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        net (float[n, 8] x) => (float[n, 5] y) {{
            a = Gemm<transB = 1>(x, W0, b0) h = Relu(a)
            c = Gemm<transB = 1>(h, W1, b1) k = Relu(c)
            z = Gemm<transB = 1>(k, W2, b2) {end}
        }}"""
    )
    for k, (o, i) in enumerate([(24, 8), (16, 24), (5, 16)]):
        scale = gain if k == 2 else 1.0
        for name, values in (
            ("W", rng.normal(0, scale / np.sqrt(i), (o, i))),
            ("b", rng.normal(0, 0.3 * scale, o)),
        ):
            tensor = numpy_helper.from_array(values.astype(np.float32), f"{name}{k}")
            model.graph.initializer.append(tensor)
    return model


def inputs(rng, samples=300):
    return (rng.normal(size=(samples, 4)) @ rng.normal(size=(4, 8))).astype(np.float32)


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_trial_chooses_where_logits_are_known_and_the_report_says_which(end, rng):
    report = onnx_ecp.optimize(classifier(end, rng), inputs(rng), sparsity=0.6).report
    assert report.recipe.metric in ("kl", "l2")
    assert "in a trial of both" in report.recipe.metric_reason
    assert (TAKEN in report.recipe.metric_reason) == (report.recipe.metric == "kl")


@pytest.mark.parametrize("end", ["y = Identity(z)", "y = Tanh(z)"])
def test_other_outputs_have_the_plain_metric(end, rng):
    report = onnx_ecp.optimize(classifier(end, rng), inputs(rng), sparsity=0.6).report
    assert report.recipe.metric == "l2"
    assert "trial" not in report.recipe.metric_reason


@pytest.mark.parametrize("end", ["Softmax", "Sigmoid"])
def test_sure_probabilities_survive(end, rng):
    """Saturated outputs say nothing of most samples; their logits do."""
    model, x = classifier(ENDS[end], rng, gain=40.0), inputs(rng)
    report = onnx_ecp.optimize(model, x, sparsity=0.5).report
    if end == "Softmax":  # magnitude keeps six in ten
        assert report.gap.outputs[0].agreement >= 95
    control = onnx_ecp.optimize(model, x, sparsity=0.5, method="magnitude").report
    assert report.gap.relative_error < control.gap.relative_error


@pytest.mark.parametrize("name", ["Softmax", "Sigmoid"])
def test_the_pieces_of_a_link_are_derivatives_of_its_divergence(name, rng):
    link, y = LINKS[name], rng.normal(size=(3, 4))
    p = link.probabilities(y)
    u, step = rng.normal(size=(3, 4)), 1e-4
    moved = [link.divergence(p, link.probabilities(y + s * u)) for s in (step, -step)]
    second = sum(moved) / step**2
    assert second == pytest.approx(float((u * link.bend(u, p)).sum()), rel=1e-5)
    eye = np.eye(12).reshape(12, 3, 4)
    roots = np.stack([link.root(v, p) for v in eye])
    assert float(np.square((roots * u).sum(axis=(1, 2))).sum()) == pytest.approx(second, rel=1e-5)
    assert link.divergence(p, p) == 0


def test_logits_of_sigmoids_far_out_are_exact():
    p = LINKS["Sigmoid"].probabilities(np.array([-800.0, -40.0, 0.0, 40.0, 800.0]))
    np.testing.assert_allclose(p, [0.0, np.exp(-40.0), 0.5, 1.0, 1.0], rtol=1e-12)


def test_a_ranking_that_stands_behind_magnitude_is_replaced_and_the_report_says_so(
    rng, monkeypatch
):
    """The default with an importance that takes the largest weights first."""
    upside_down = Method(lambda view: 1 / (1e-3 + np.abs(view.weight)), summary="the largest")
    monkeypatch.setitem(METHODS, "ecp-refit", upside_down)
    model, x = classifier("y = Identity(z)", rng), inputs(rng)
    found = onnx_ecp.optimize(model, x, sparsity=0.5, compensation="none")
    control = onnx_ecp.optimize(model, x, sparsity=0.5, method="magnitude")
    assert any("the masks are those of magnitude" in text for text in found.report.warnings)
    for name, keep in control.masks.items():
        np.testing.assert_array_equal(found.masks[name], keep)


def test_fine_tuning_never_raises_the_error_on_the_validation_samples(rng, monkeypatch):
    """Whatever it does: here it destroys what it is given."""
    from dataclasses import replace

    from onnx_ecp.pruning import loop
    from onnx_ecp.pruning.finetune import Tuned

    def destroyed(objective, state, *_, **__):
        shifts = {name: shift + 100.0 for name, shift in state.shifts.items()}
        return Tuned(replace(state, shifts=shifts), 1.0, 0.5)

    model, x = classifier("y = Softmax(z)", rng), inputs(rng)
    plain = onnx_ecp.optimize(model, x, sparsity=0.5, stages=2, metric="kl")
    monkeypatch.setattr(loop, "finetune", destroyed)
    tuned = onnx_ecp.optimize(model, x, sparsity=0.5, stages=2, metric="kl", finetune_steps=20)
    assert any("fine-tuning was rejected" in text for text in tuned.report.warnings)
    outputs = [Session(m).run({"x": x})["y"] for m in (plain.model, tuned.model)]
    np.testing.assert_array_equal(*outputs)
