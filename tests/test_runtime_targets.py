"""Every runtime is a row: defaults, refusals, the layers that gain, and a page that says so."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnx_ecp
from onnx_ecp.api.options import Options
from onnx_ecp.cli.commands import main
from onnx_ecp.errors import ModelError, TargetError, UsageError
from onnx_ecp.evaluation.targets import TARGETS, eligible
from onnx_ecp.graph import ENCODINGS, load
from onnx_ecp.graph.lowest_ir import lowered, lowest_ir
from onnx_ecp.pruning.selection import NM, parse_sparsity
from onnx_ecp.report import Report
from onnx_ecp.report.as_json import dumps

DOCS = Path(__file__).parent.parent / "docs"
each_target = pytest.mark.parametrize("name", TARGETS)

# Stem, two inverted residuals, mean, classifier: every target but units gains from some layer.
MOBILE = """<ir_version: 9, opset_import: ["": 17]>
g (float[N, 3, 16, 16] x) => (float[N, 4] y) {
    s = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, Ws, bs)
    s6 = Relu(s)
    e = Conv(s6, We, be)
    e6 = Relu(e)
    d = Conv<group = 64, pads = [1, 1, 1, 1]>(e6, Wd, bd)
    d6 = Relu(d)
    p = Conv(d6, Wp, bp)
    r = Add(p, s6)
    m = GlobalAveragePool(r)
    f = Flatten(m)
    h = Gemm<transB = 1>(f, Wf, bf)
    a = Relu(h)
    y = Gemm<transB = 1>(a, Wy, by)
}"""
SHAPES = {
    "Ws": (64, 3, 3, 3), "bs": (64,), "We": (64, 64, 1, 1), "be": (64,), "Wd": (64, 1, 3, 3),
    "bd": (64,), "Wp": (64, 64, 1, 1), "bp": (64,), "Wf": (64, 64), "bf": (64,), "Wy": (4, 64),
    "by": (4,),
}  # fmt: skip


def build(text, shapes, rng):
    model = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        values = (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.fixture
def model(rng):
    return build(MOBILE, SHAPES, rng)


@pytest.fixture
def data(rng):
    return {"x": rng.normal(size=(40, 3, 16, 16)).astype(np.float32)}


@each_target
def test_a_row_is_complete_and_has_its_section(name):
    row = TARGETS[name]
    assert all((row.title, row.gains, row.evidence, row.next_step))
    assert set(row.formats) <= set(ENCODINGS)
    assert row.granularity in ("weight", "unit")
    assert "{model}" in row.next_step
    page = (DOCS / "targets.md").read_text()
    section = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert section, f"docs/targets.md has no section {name}"
    said = " ".join(section[1].split())
    assert row.title in said
    if row.sparsity is not None:
        wanted = parse_sparsity(row.sparsity)
        assert f"`-s {wanted}`" in said
        assert isinstance(wanted, NM) or wanted >= row.least
    if row.ir is not None:
        assert f"IR version {row.ir}" in said
    if row.opset is not None:
        assert f"opset {row.opset}" in said


def test_all_targets_are_named_in_the_help():
    shown = " ".join(CliRunner().invoke(main, ["optimize", "--help"]).output.split())
    assert all(name in shown for name in TARGETS)


@each_target
def test_a_target_makes_a_file_of_which_layers_gain(name, model, data, tmp_path):
    path = tmp_path / "out.onnx"
    given = {"method": "magnitude", "target": name, "cleanup": None, "measure": False}
    report = onnx_ecp.optimize(model, data, output=path, **given).report
    found = report.target
    assert (found.name, found.title) == (name, TARGETS[name].title)
    assert str(path) in found.next_step or "MODEL" not in TARGETS[name].next_step
    assert [row.name for row in found.layers] == [
        node.output[0] for node in onnx.load(path).graph.node if node.op_type in ("Conv", "Gemm")
    ]
    gaining = [row.name for row in found.layers if not row.refused]
    assert gaining
    pruned = {row.name for row in report.layers if row.zeros_after > row.zeros_before}
    if TARGETS[name].granularity == "weight":
        refused = {r.name: r.refused for r in eligible(load(model), TARGETS[name], pruned=False)}
        assert pruned == {layer for layer, why in refused.items() if not why}
        dense = {skip.name: skip.reason for skip in report.dense}
        assert all(refused[x] in dense[x] for x in refused if refused[x])
    else:
        assert report.units
    assert Report.from_dict(json.loads(dumps(report.to_dict()))) == report


@each_target
def test_inspect_foresees_what_may_gain(name, model):
    found = onnx_ecp.inspect(model, target=name).target
    assert found.name == name
    assert any(not row.refused for row in found.layers)
    assert "OUTPUT" in found.next_step
    assert found.evidence == TARGETS[name].evidence


@each_target
def test_every_runtime_gains_from_units(name, model, data):
    choices = {"method": "magnitude", "measure": False, "granularity": "unit"}
    found = onnx_ecp.optimize(model, data, target=name, sparsity=0.3, **choices).report
    lost = {x for r in found.units if r.after < r.before for x in (*r.producers, *r.consumers)}
    assert lost
    assert {row.name for row in found.target.layers if not row.refused} == lost
    assert "units" in found.target.gains


def test_xnnpack_wants_1x1_convolutions_between_stem_and_mean(model):
    rows = eligible(load(model), TARGETS["xnnpack"], pruned=False)
    reasons = {row.name: row.refused for row in rows}
    assert {name for name, why in reasons.items() if not why} == {"e", "p"}
    assert "3x3" in reasons["s"]
    assert "64 groups" in reasons["d"]
    assert "Gemm" in reasons["h"]


PLACES = {
    "no stem": ("strides = [2, 2], ", "", "neither 1x1 nor depthwise"),
    "another operator": ("e6 = Relu(e)", "e6 = Softmax(e)", "Softmax (e6) on the way"),
    "padding at one end": (
        "group = 64, pads = [1, 1, 1, 1]", "group = 64, pads = [0, 0, 2, 2]", "[0, 0, 2, 2]",
    ),
    "no mean": ("m = GlobalAveragePool(r)", "m = MaxPool<kernel_shape = [8, 8]>(r)", "MaxPool (m)"),
    "a stride": ("e = Conv(s6", "e = Conv<strides = [1, 1], pads = [1, 1, 1, 1]>(s6", "padding"),
}  # fmt: skip


@pytest.mark.parametrize(("was", "becomes", "reason"), PLACES.values(), ids=PLACES)
def test_xnnpack_says_what_is_in_the_way(was, becomes, reason, rng):
    assert was in MOBILE
    model = build(MOBILE.replace(was, becomes), SHAPES, rng)
    rows = eligible(load(model), TARGETS["xnnpack"], pruned=False)
    assert reason in {row.name: row.refused for row in rows}["e"]


def test_two_thirds_count_over_all_1x1_convolutions(model):
    tensors = {t.name: t for t in model.graph.initializer}
    for name, zeros in (("We", 62), ("Wp", 30)):
        values = onnx.numpy_helper.to_array(tensors[name]).copy()
        values[:, :zeros] = 0
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    rows = {row.name: row for row in eligible(load(model), TARGETS["xnnpack"])}
    assert (rows["e"].refused, rows["p"].refused) == ("", "")
    assert rows["p"].zeros == pytest.approx(30 / 64, abs=1e-4)
    assert "67 % wanted" in _with_fewer(model, tensors)


def _with_fewer(model, tensors):
    values = np.ones((64, 64, 1, 1), np.float32)
    tensors["We"].CopyFrom(onnx.numpy_helper.from_array(values, "We"))
    return {row.name: row.refused for row in eligible(load(model), TARGETS["xnnpack"])}["p"]


DEFAULTS = {
    "tensorrt": ({}, "2:4", "weight"),
    "a limit keeps the pattern": ({"target": "tensorrt", "max_error": 0.1}, "2:4", "weight"),
    "own share": ({"target": "tensorrt", "sparsity": 0.9}, "0.9", "weight"),
    "deepsparse": ({}, "0.8", "weight"),
    "a limit says how far": ({"target": "deepsparse", "max_error": 0.1}, "None", "weight"),
    "units after all": ({"target": "deepsparse", "speedup": 2.0}, "None", "unit"),
    "zeros in what stays": (
        {"target": "deepsparse", "speedup": 2.0, "units_and_zeros": True},
        "0.8",
        "unit",
    ),
    "onnxruntime": ({}, "None", "unit"),
    "a pattern after all": ({"target": "onnxruntime", "sparsity": "2:4"}, "2:4", "weight"),
    "weights after all": ({"target": "onnxruntime", "granularity": "weight"}, "None", "weight"),
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_a_target_sets_what_was_left_open(case):
    choices, sparsity, granularity = DEFAULTS[case]
    options = Options.of(**({"target": case} | choices))
    assert str(options.sparsity) == sparsity
    assert options.resolved_granularity == granularity


@each_target
def test_a_storage_that_it_does_not_read_is_refused(name):
    for form in ENCODINGS.keys() - set(TARGETS[name].formats):
        with pytest.raises(UsageError, match=f"{name} does not go with `format` {form}"):
            Options.of(target=name, format=form)


def test_an_unknown_target_is_refused_with_a_suggestion(model):
    with pytest.raises(UsageError, match="unknown target") as error:
        Options.of(target="tensort")
    assert "tensorrt" in error.value.hint
    with pytest.raises(UsageError, match="unknown target"):
        onnx_ecp.inspect(model, target="tensort")


LIMITED = [name for name, row in TARGETS.items() if row.opset is not None]


@pytest.mark.parametrize("name", LIMITED)
def test_an_opset_that_is_too_new_is_refused_before_any_work(name, model, data):
    model.opset_import[0].version = TARGETS[name].opset + 1
    model.ir_version = 13
    with pytest.raises(ModelError, match=rf"takes at most {TARGETS[name].opset}\."):
        onnx_ecp.optimize(model, data, target=name)


def test_an_operator_of_onnxruntime_is_refused_by_others(rng, data):
    text = MOBILE.replace("Relu(h)", "com.microsoft.QuickGelu(h)").replace(
        '["": 17]', '["": 17, "com.microsoft": 1]'
    )
    model = build(text, SHAPES, rng)
    for name, row in TARGETS.items():
        if row.standard:
            with pytest.raises(ModelError, match=r"com\.microsoft\.QuickGelu is no operator"):
                onnx_ecp.optimize(model, data, target=name)


def test_the_ir_version_is_lowered_where_that_is_legal_and_told(model, data, tmp_path):
    model.ir_version = 10
    model.graph.node[0].metadata_props.add(key="module", value="stem")
    model.metadata_props.add(key="license", value="none")
    choices = {"method": "magnitude", "measure": False}
    path = tmp_path / "out.onnx"
    report = onnx_ecp.optimize(model, data, output=path, target="deepsparse", **choices).report
    written = onnx.load(path)
    assert written.ir_version == TARGETS["deepsparse"].ir == 9
    assert "IR version 9 instead of 10" in report.target.changes
    assert not written.graph.node[0].metadata_props
    assert written.metadata_props[0].key == "license"
    onnx.checker.check_model(written, full_check=True)
    report = onnx_ecp.optimize(model, data, output=path, target="tensorrt", force=True, **choices)
    assert onnx.load(path).ir_version == 10
    assert report.report.target.changes == ""


NEEDS = {
    "opset": ('<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) '
              "{ y = Relu(x) }", 10, "opset 21"),
    "old opset": ('<ir_version: 10, opset_import: ["": 13]> g (float[2] x) => (float[2] y) '
                  "{ y = Relu(x) }", 7, "opset 13"),
    "type": ('<ir_version: 10, opset_import: ["": 17]> g (int4[2] x) => (int4[2] y) '
             "{ y = Identity(x) }", 10, "INT4"),
    "function": ('<ir_version: 10, opset_import: ["": 13, "f": 1]> g (float[2] x) => (float[2] y) '
                 "{ y = f.h(x) } "
                 '<domain: "f", opset_import: ["": 13]> h (a) => (b) { b = Relu(a) }',
                 8, "local functions"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "version", "why"), NEEDS.values(), ids=NEEDS)
def test_the_lowest_ir_version_is_that_of_what_the_model_says(text, version, why):
    model = onnx.parser.parse_model(text)
    assert lowest_ir(model) == (version, why)
    copy = lowered(model, version)
    assert (copy.ir_version, model.ir_version) == (version, 10)
    onnx.checker.check_model(copy)


def test_a_model_that_needs_a_newer_ir_version_is_refused_by_name(rng, data, monkeypatch):
    row = TARGETS["deepsparse"]
    monkeypatch.setitem(TARGETS, "deepsparse", __import__("dataclasses").replace(row, ir=7))
    model = build(MOBILE, SHAPES, rng)
    with pytest.raises(ModelError, match=r"needs IR version 8 \(opset 17\); DeepSparse takes"):
        onnx_ecp.optimize(model, data, target="deepsparse")


def test_a_model_of_which_no_layer_gains_is_an_error_with_the_reasons(rng):
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 8] x) => (float[N, 4] y) {
        y = Gemm<transB = 1>(x, W) }"""
    model = build(text, {"W": (4, 8)}, rng)
    x = {"x": rng.normal(size=(20, 8)).astype(np.float32)}
    with pytest.raises(TargetError, match="only 1x1 convolutions gain"):
        onnx_ecp.optimize(model, x, target="xnnpack")


def test_in_int8_layers_are_listed_as_they_were_in_floats(rng):
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 64] x) => (float[N, 8] y) {
        h = Gemm<transB = 1>(x, W) a = Relu(h) y = Gemm<transB = 1>(a, V) }"""
    model = build(text, {"W": (64, 64), "V": (8, 64)}, rng)
    x = {"x": rng.normal(size=(60, 64)).astype(np.float32)}
    choices = {"method": "magnitude", "measure": False, "cleanup": False, "quantize": "int8"}
    found = onnx_ecp.optimize(model, x, target="openvino", **choices).report.target
    assert [(row.name, row.refused) for row in found.layers] == [("h", ""), ("y", "")]
    assert found.next_step.startswith("compile OUTPUT with CPU_SPARSE_WEIGHTS")
    report = onnx_ecp.optimize(model, x, sparsity="2:4", **choices).report
    assert report.target is None
