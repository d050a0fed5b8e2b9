"""The first line of a report says what one gets, and never calls noise a speed-up."""

import json
import re

import numpy as np
import onnx
import pytest

import onnx_ecp
from onnx_ecp.evaluation import latency as timing
from onnx_ecp.evaluation.latency import TURNS, Latency, brief_latency, latency_of
from onnx_ecp.evaluation.work import multiplications
from onnx_ecp.graph import load
from onnx_ecp.graph.shapes import shapes_of_a_run
from onnx_ecp.layers import find_layers
from onnx_ecp.report import Report, html, text
from onnx_ecp.report.as_json import dumps
from onnx_ecp.runtime.session import Session
from onnx_ecp.units import find_structure
from onnx_ecp.units.estimate import half_of_the_units

MLP = """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 12] x) => (float[batch, 4] y) {
    h = Gemm<transB = 1>(x, W1, b1)
    r = Relu(h)
    y = Gemm<transB = 1>(r, W2, b2)
}"""
SINGLE = """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 12] x) => (float[batch, 4] y) {
    y = Gemm<transB = 1>(x, W, b)
}"""


def build(text_of, rng, **shapes):
    model = onnx.parser.parse_model(text_of)
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.fixture
def model(rng):
    return build(MLP, rng, W1=(16, 12), b1=(16,), W2=(4, 16), b2=(4,))


@pytest.fixture
def data(rng):
    return {"x": rng.normal(size=(80, 12)).astype(np.float32)}


def around(center, width, runs=40):
    return [center * (1 + width * (k / (runs - 1) - 0.5)) for k in range(runs)]


VERDICTS = {
    "half": (around(2, 0.1), around(1, 0.1), "faster"),
    "double": (around(1, 0.1), around(2, 0.1), "slower"),
    "the same": (around(1, 0.1), around(1, 0.1), "no faster"),
    "within the spread": (around(1, 0.5), around(0.9, 0.5)[::-1], "no faster"),
    "other work met both": (around(2, 1.6), around(1, 1.6), "faster"),
    "a trifle without spread": (around(1, 0), around(0.98, 0), "no faster"),
    "a trifle slower": (around(1, 0), around(1.02, 0), "no faster"),
    "medians alone": ([1.0, *around(2, 0.1)], [1.0, *around(1.5, 0.1)], "no faster"),
    "the least alone": ([2.0, *around(2, 0.1)], [1.0, *around(2, 0.1)], "no faster"),
    "too few runs": (around(2, 0, 3), around(1, 0, 3), "no faster"),
}


@pytest.mark.parametrize(("a", "b", "verdict"), VERDICTS.values(), ids=VERDICTS)
def test_the_verdict(a, b, verdict):
    assert latency_of((a, b), 1, 8).verdict == verdict


@pytest.mark.parametrize("runs", [TURNS, 8, 11, 12, 20, 60])
def test_two_models_that_take_the_same_hardly_ever_seem_apart(runs, rng):
    times = rng.lognormal(sigma=0.3, size=(2, 1000, runs))
    apart = [latency_of(pair, 1, 8).verdict != "no faster" for pair in zip(*times, strict=True)]
    assert np.mean(apart) < 0.01


@pytest.mark.parametrize(("seconds", "runs"), [(0.001, 50), (0.2, 1), (0.005, TURNS)])
def test_a_measurement_nobody_asked_for_takes_a_small_share(
    seconds, runs, model, data, monkeypatch
):
    """On a clock that only runs of the models move on."""
    now = [0.0]

    def run(session, feeds):
        now[0] += seconds
        return seconds

    monkeypatch.setattr(Session, "seconds", run)
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    samples = onnx_ecp.data.calibration.load(data, onnx_ecp.graph.signature(model))
    batch = next(samples.batches(8))
    so_far = 2.0
    found = brief_latency(load(model), load(model), batch, so_far=so_far)
    assert now[0] <= max(timing.SHARE * so_far, timing.LONGEST, 4 * seconds) + 2 * seconds
    assert (found.spread is not None) == (runs >= TURNS)
    assert found.verdict == "no faster"


CHOICES = {
    "zeros": {"sparsity": 0.5, "method": "magnitude", "cleanup": False},
    "a pattern": {"sparsity": "2:4", "method": "magnitude"},
    "units": {"speedup": 2.0, "method": "magnitude"},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("verdict", ["faster", "slower", "no faster"])
def test_a_report_begins_with_what_one_gets(choices, verdict, model, data, monkeypatch):
    monkeypatch.setattr(Latency, "verdict", property(lambda self: verdict))
    monkeypatch.setattr(timing, "LONGEST", 60.0)  # enough on any machine
    report = onnx_ecp.optimize(model, data, **choices).report
    products = 12 * 16 + 16 * 4
    assert report.work_before.flops == products
    share = report.work_after.flops / products
    assert (share <= 0.5) == ("speedup" in choices)
    line = report.headline
    assert re.match(r"latency \S+ -> \S+ ms \(x\S+ to x\S+\), " + verdict + "; size x", line)
    assert line.endswith(f"multiplications x{share:.3f}")
    assert " ".join(text.plain(text.report_tables(report)).split()).startswith(line)
    assert len(line) <= 2 * text.WIDTH
    written = report.to_dict()
    assert list(written)[:2] == ["schema", "headline"]
    assert Report.from_dict(json.loads(dumps(written))) == report
    page = html.page(report)
    assert page.index("multiplications x") < page.index("<table")
    assert bool(report.advice) == (verdict != "faster")
    for shown in (text.plain(text.report_tables(report)), page):
        assert ("What would be faster" in shown) == bool(report.advice)
    if report.advice and "speedup" not in choices:
        assert f"{12 * 8 + 8 * 4} of {products} multiplications" in report.advice
        assert "--speedup 2" in report.advice


def test_a_model_without_units_is_told_no_speedup(rng, data, monkeypatch):
    model = build(SINGLE, rng, W=(4, 12), b=(4,))
    monkeypatch.setattr(Latency, "verdict", property(lambda self: "no faster"))
    report = onnx_ecp.optimize(model, data, method="magnitude").report
    assert "No unit of this model can be removed" in report.advice
    assert "--speedup" not in report.advice


def test_a_file_for_another_runtime_is_told_what_it_is_for(model, data, monkeypatch):
    monkeypatch.setattr(Latency, "verdict", property(lambda self: "no faster"))
    report = onnx_ecp.optimize(model, data, method="magnitude", target="deepsparse").report
    assert report.advice.startswith("DeepSparse, which the file is for")


def test_no_measurement_where_none_is_wanted(model, data):
    report = onnx_ecp.optimize(model, data, method="magnitude", measure=False).report
    assert (report.latency, report.advice) == (None, "")
    assert report.headline.startswith("latency not measured; size x")


def test_very_large_weights_are_timed_for_those_who_ask(model, data, monkeypatch):
    monkeypatch.setattr("onnx_ecp.api.gain.modelling.LARGEST_FILE", 100)
    choices = {"method": "magnitude", "cleanup": False}
    assert onnx_ecp.optimize(model, data, **choices).report.latency is None
    assert onnx_ecp.optimize(model, data, measure=True, **choices).report.latency is not None


def test_half_of_the_units_is_what_cutting_them_leaves(model, data):
    layers = find_layers(model).layers
    shapes = shapes_of_a_run(load(model), {"x": data["x"][:2]})
    structure = find_structure(model, layers, shapes)
    whole, left = half_of_the_units(structure, layers, shapes)
    assert whole == sum(multiplications(layers, shapes).values()) == 2 * (12 * 16 + 16 * 4)
    assert left == 2 * (12 * 8 + 8 * 4)
