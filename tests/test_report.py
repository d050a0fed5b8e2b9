"""A report says the same in every form, and nothing that a model is called can break one."""

import dataclasses
import io
import json
import math
import re
import tomllib
from html.parser import HTMLParser

import numpy as np
import onnx.parser
import pytest
from click.testing import CliRunner
from rich.console import Console

from onnx_ecp.cli.commands import main
from onnx_ecp.errors import OnnxEcpError, OutputError, UsageError
from onnx_ecp.evaluation.bounds import from_gaps
from onnx_ecp.evaluation.bounds.sampling import Gaps
from onnx_ecp.evaluation.compare import Deviation, Gap, Score
from onnx_ecp.evaluation.facts import ModelFacts
from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.evaluation.targets import Eligible
from onnx_ecp.evaluation.work import Work
from onnx_ecp.layers import Skip
from onnx_ecp.pruning.search import Point
from onnx_ecp.report import (
    CalibrationFacts,
    ForTarget,
    LayerRow,
    Recipe,
    Report,
    Versions,
    check_target,
    html,
    text,
)
from onnx_ecp.report.as_json import dumps
from onnx_ecp.report.evidence import Evidence, Histogram, LayerEvidence, OutputEvidence
from onnx_ecp.statistics.uncertainty import Certainty
from onnx_ecp.units.rows import Speedup, UnitRow

HOSTILE = {
    "markup": "<script>alert(1)</script>",
    "rich markup": "[bold red]fc[/bold red] :smile:",
    "terminal escape": "\x1b[31mred\x1b[0m",
    "line break": "fc1\nOK out.onnx sparsity=1.0",
    "a megabyte": 'w"' * 500_000,
    "right to left": "\u202egnol",
}


def layer(name: str = "fc1", **changes: object) -> LayerRow:
    row = LayerRow(
        name=name,
        op="Gemm",
        tensor=f"{name}.weight",
        shape=(40, 784),
        weights=31360,
        zeros_before=0,
        zeros_after=25088,
        importance_removed=0.0123,
        largest_shift=0.25,
        ess=812.5,
    )
    return dataclasses.replace(row, **changes)


def gap(**changes: object) -> Gap:
    whole = Gap(
        samples=200,
        relative_error=0.0456,
        outputs=(Deviation("logits", 0.0456, 1e-4, 0.31, 17, 98.5, 0, 0),),
        scores=(Score("accuracy", "logits", 97.5, 97.0),),
    )
    return dataclasses.replace(whole, **changes)


def report(**changes: object) -> Report:
    whole = Report(
        original=ModelFacts("in.onnx", "a" * 64, 130_000, 120_000, 31_370, 0),
        result=ModelFacts("out.onnx", "b" * 64, 130_000, 40_000, 31_370, 25_088),
        versions=Versions("0.1.0", "1.23.0", "onnxruntime 1.31.0", "2.4.0", "3.11.0"),
        recipe=Recipe("ecp", "ecp", "bias", "l2", "expand", "vjp", 1),
        options={"sparsity": 0.8, "include": ["fc"], "labels": None},
        seed=0,
        calibration=CalibrationFacts("in.npz", 1800, 200, synthetic=False),
        layers=(layer(), layer("fc2", shape=(10, 40), weights=400, zeros_after=100, ess=None)),
        skips=(Skip("head", "MatMul", "its weight is not constant"),),
        predicted_error=0.05,
        gap=gap(),
        seconds=1.25,
        warnings=("the effective sample size of fc1 is small.",),
    )
    return dataclasses.replace(whole, **changes)


EVIDENCE = Evidence(
    samples=64,
    layers=(
        LayerEvidence(
            "fc1", ("0f8", "f00"), 0.04, Histogram(1e-9, 1e-3, (0, 2, 3), (4, 1, 0), 5, 1e-7)
        ),
        LayerEvidence("fc2", ("ff",), None, None),
    ),
    outputs=(
        OutputEvidence("logits", (0.0, 1.0, math.inf), (0.1, 0.9, 1.0), (0.1, None, 0.3)),
        OutputEvidence("other", (1.0,), (1.0,)),
    ),
    unmeasured="no time",
)
VARIANTS = {
    "everything there": report(),
    "dry run, nothing measured": report(
        result=ModelFacts(None, "b" * 64, 130_000, 40_000, 31_370, 25_088),
        gap=None,
        predicted_error=None,
    ),
    "nothing finite": report(
        gap=gap(
            relative_error=math.inf,
            outputs=(Deviation("y", math.inf, math.inf, math.inf, 3, None, 2, 7),),
            scores=(Score("r2", "y", -math.inf, 0.5),),
        )
    ),
    "two outputs": report(gap=gap(outputs=gap().outputs * 2)),
    "no layers, no skips": report(layers=(), skips=(), warnings=()),
    "bounds, one without a value": report(
        bounds=from_gaps(Gaps(np.ones(4), np.ones(4), np.zeros(4, bool)), confidence=0.95)
    ),
    "a speedup": report(speedup=Speedup(2.0, 2.2, Latency(1e-3, 4.8e-4, 0.48, 1, 64))),
    "latency": report(latency=Latency(1e-3, 4.8e-4, 0.48, 2, 64, 1.1e-3, 5e-4)),
    "no faster": report(
        latency=Latency(1e-3, 9e-4, 0.9, 2, 64, 1.1e-3, 1e-3, (0.8, 1.1)),
        work_before=Work(31_370, 31_370),
        work_after=Work(31_370, 31_370),
        advice="whole units: half of them would leave 15,000 of 31,370 multiplications.",
    ),
    "units that stay": report(
        units=(UnitRow(("fc1",), ("fc2",), 1, 40, 40), UnitRow(("fc2",), ("fc3",), 1, 10, 8)),
        skips=(Skip("fc2", "Gemm", "an output reads it"), Skip("head", "MatMul", "constant")),
    ),
    "one sample": report(
        calibration=CalibrationFacts("in.npz", 1, 1, synthetic=False), gap=gap(samples=1)
    ),
    "a target": report(
        target=ForTarget(
            "tensorrt",
            "TensorRT",
            "2:4 along the input axis",
            "its guide",
            (
                Eligible("fc1", "Gemm", "", "build the engine with FP16", 0.5),
                Eligible("fc2", "Gemm", "axis: 4 does not divide 10", "", 0.1),
            ),
            "trtexec --onnx=out.onnx",
            "IR version 9 instead of 10.",
        )
    ),
    "an interval": report(
        gap=gap(certainty=Certainty(0.04, 0.06, 0.95, 200, 41.5, 0.08, 17)), learnt_error=0.03
    ),
    "pictures": report(evidence=EVIDENCE, command="onnx-ecp optimize in.onnx out.onnx"),
    "bias created, note": report(layers=(layer(bias_created=True, note="refit not kept"),)),
}
each_variant = pytest.mark.parametrize("whole", VARIANTS.values(), ids=VARIANTS)


@each_variant
def test_json_and_back_is_the_identity(whole):
    assert Report.from_dict(json.loads(dumps(whole.to_dict()))) == whole


@each_variant
def test_json_has_no_literals_that_are_not_json(whole):
    def refuse(literal):
        raise AssertionError(literal)

    json.loads(dumps(whole.to_dict()), parse_constant=refuse)


def test_json_schema_is_this_one():
    values = report().to_dict()
    assert {key: _keys(value) for key, value in values.items()} == {
        "schema": None,
        "headline": None,
        "totals": ["weights", "zeros_before", "zeros_after", "sparsity"],
        "original": ["path", "sha256", "bytes", "compressed_bytes", "parameters", "zeros"],
        "result": ["path", "sha256", "bytes", "compressed_bytes", "parameters", "zeros"],
        "versions": ["onnx_ecp", "onnx", "onnxruntime", "numpy", "python"],
        "recipe": [
            "method", "importance", "compensation", "metric", "positions", "gradients", "stages",
            "metric_reason", "damping", "support", "effort", "budget",
        ],
        "options": ["sparsity", "include", "labels"],
        "seed": None,
        "calibration": ["source", "samples", "held_out", "synthetic", "rows"],
        "int8": None,
        "layers": [
            "name", "op", "tensor", "shape", "weights", "zeros_before", "zeros_after",
            "importance_removed", "largest_shift", "bias_created", "ess", "note", "sparsity",
        ],
        "skips": ["name", "op", "reason"],
        "predicted_error": None,
        "gap": ["samples", "relative_error", "outputs", "scores", "centred", "certainty"],
        "seconds": None,
        "warnings": None,
        "speed": None,
        "curve": None,
        "units": None,
        "work_before": None,
        "work_after": None,
        "bounds": None,
        "speedup": None,
        "target": None,
        "latency": None,
        "operators": None,
        "advice": None,
        "learnt_error": None,
        "evidence": None,
        "command": None,
    }  # fmt: skip
    computed = ["schema", "headline", "totals"]
    assert list(values) == [*computed, *[f.name for f in dataclasses.fields(Report)]]


def _keys(value):
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0]
    return list(value) if isinstance(value, dict) else None


BROKEN = {
    "another schema": lambda v: v | {"schema": 1},
    "no schema": lambda v: {k: x for k, x in v.items() if k != "schema"},
    "a field missing": lambda v: {k: x for k, x in v.items() if k != "seed"},
    "no layers": lambda v: {k: x for k, x in v.items() if k != "layers"},
    "a field too many": lambda v: v | {"sed": 1},
    "a part of another kind": lambda v: v | {"recipe": "ecp"},
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_no_report_is_refused(broken):
    with pytest.raises(OnnxEcpError):
        Report.from_dict(broken(report().to_dict()))


def test_a_shared_tensor_counts_once():
    twice = report(layers=(layer("a", tensor="W"), layer("b", tensor="W")))
    assert (twice.weights, twice.zeros_after) == (31360, 25088)
    assert twice.sparsity == 0.8


GOLDEN = """\
latency not measured; size x1.000, gzip x0.333

                               original            result       change
 ─────────────────────────────────────────────────────────────────────
 file                           in.onnx          out.onnx
 sha256                    aaaaaaaaaaaa      bbbbbbbbbbbb
 parameters                      31,370            31,370
 zeros                                0            25,088
 size                         127.0 KiB         127.0 KiB       x1.000
 size, gzip                   117.2 KiB          39.1 KiB       x0.333
 zeros in prunable layers    0 (0.00 %)  25,188 (79.31 %)    of 31,760
 accuracy                        97.5 %              97 %  -0.5 points

Layers

                            zeros               imp.   bias  effective
 layer     op    out x in   after  sparsity  removed  shift    samples
 ─────────────────────────────────────────────────────────────────────
 fc1       Gemm  40 x 784  25,088   80.00 %   0.0123   0.25        812
 fc2       Gemm   10 x 40     100   25.00 %   0.0123   0.25

 2 layers          31,760  25,188   79.31 %

Not pruned

 node  op      reason
 ────────────────────────────────────────
 head  MatMul  its weight is not constant

Outputs on 200 samples

         relative  mean squared           largest      top-1
 output     error         error         deviation  agreement
 ───────────────────────────────────────────────────────────
 logits    0.0456        0.0001  0.31 (sample 17)    98.50 %

method        ecp: importance ecp, compensation bias, metric l2, stages 1
calibration   in.npz: 1,800 samples, 200 held out
output error  predicted 0.05, measured 0.0456
speed         Scattered zeros make the compressed file smaller, not the
              inference faster: ONNX Runtime multiplies them like other numbers.
              --granularity unit removes whole units for that.
time          1.2 s
warning: the effective sample size of fc1 is small.
"""


def test_text_is_this_one():
    assert text.plain(text.report_tables(report())) == GOLDEN


@each_variant
def test_text_fits_eighty_columns(whole):
    assert max(map(len, text.plain(text.report_tables(whole)).splitlines())) <= 80


@pytest.mark.parametrize("width", [50, 60, 80])
def test_a_narrow_terminal_leaves_out_columns_but_no_names(width):
    rows = (layer("/layers.0/Gemm"), layer("/layers.2/Gemm"))
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False)
    console.print(text.fitted(text.report_tables(report(layers=rows)), console))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for fact in ("/layers.0/Gemm", "/layers.2/Gemm", "25,088", "logits"):
        assert fact in shown
    assert ("no room for" in shown) == (width < 80)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_break_neither_text_nor_html(name):
    whole = report(
        original=dataclasses.replace(report().original, path=name),
        layers=(layer(name, note=name),) * 300,
        skips=(Skip(name, name, name),) * 300,
        warnings=(name,),
        calibration=CalibrationFacts(name, 1, 1, synthetic=True),
        gap=gap(outputs=(Deviation(name, 0.0, 0.0, 0.0, 0, None, 0, 0),) * 300),
        options={"include": [name]},
        command=f"onnx-ecp optimize {name}",
        evidence=dataclasses.replace(
            EVIDENCE,
            layers=(dataclasses.replace(EVIDENCE.layers[0], name=name),) * 300,
            outputs=(dataclasses.replace(EVIDENCE.outputs[0], name=name),) * 4,
        ),
    )
    shown = text.plain(text.report_tables(whole))
    assert max(map(len, shown.splitlines())) <= 80
    shown += text.ok_line(whole)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert not any(line.startswith("OK") for line in shown.splitlines()[:-1])
    page = html.page(whole)
    assert len(page.encode()) < 500_000
    assert "<script" not in page
    assert _balanced(page)


@pytest.mark.parametrize("show", [lambda r: text.plain(text.report_tables(r)), html.page])
def test_units_that_went_and_units_that_stay_are_called_so(show):
    shown = show(VARIANTS["units that stay"])
    assert "unchanged" in shown
    assert len(re.findall("removed", shown.partition("Units")[2])) == 1
    rest = shown.partition("Not pruned")[2]
    between, _, last = rest.partition("Units that stay")
    assert ("head" in between, "fc2" in between, "fc2" in last) == (True, False, True)
    assert "Not pruned" not in show(report(skips=(Skip("fc1", "Gemm", "kept"),)))


@pytest.mark.parametrize("show", [lambda r: text.plain(text.report_tables(r)), html.page])
def test_latency_is_shown_where_it_was_measured(show):
    shown = show(VARIANTS["latency"])
    for fact in ("latency, least", "latency, median", "1.1 ms", "x0.48", "batch 64, 2 threads"):
        assert fact in shown


@pytest.mark.parametrize("show", [lambda r: text.plain(text.report_tables(r)), html.page])
def test_one_sample_is_one(show):
    shown = show(VARIANTS["one sample"])
    assert "1 sample" in shown or "1 held-out sample:" in shown
    assert "1 samples" not in shown


def test_the_line_for_scripts_is_one_line_of_fields():
    assert text.ok_line(report()) == (
        "OK out.onnx sparsity=0.7931 error=0.0456 agreement=98.50 zeros=25188/31760 "
        "bytes=130000 gzip=40000"
    )
    bare = text.ok_line(VARIANTS["dry run, nothing measured"])
    assert bare.startswith("OK (nothing written) sparsity=0.7931 zeros=")


@pytest.mark.parametrize("layers", [30, 31, 1000])
def test_long_tables_are_cut_and_say_so(layers):
    whole = report(layers=tuple(layer(f"layer{i:04}", tensor=str(i)) for i in range(layers)))
    short = text.plain(text.report_tables(whole))
    shown = len(re.findall(r"layer\d{4}", short))
    assert shown == min(layers, 30)
    assert (f"... {layers - 30} more" in short) == (layers > 30)
    full = text.plain(text.report_tables(whole, verbose=True))
    assert len(re.findall(r"layer\d{4}", full)) == layers


class _Balance(HTMLParser):
    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open = []
        self.links = []

    def handle_starttag(self, tag, attrs):
        links = [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        self.links += [link for link in links if not link.startswith("data:image/png;base64,")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _balanced(page):
    parser = _Balance()
    parser.feed(page)
    return not parser.open and not parser.links


@each_variant
def test_html_is_well_formed_and_needs_no_network(whole):
    page = html.page(whole)
    assert _balanced(page)
    assert "http" not in page
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page


def test_html_shows_what_the_report_says():
    page = html.page(report())
    for fact in ("fc1", "fc2", "25,088", "not constant", "0.0456", "a" * 64, "1.23.0", "98.50 %"):
        assert fact in page


@pytest.mark.parametrize("name", ["r.json", "r.html", "R.JSON"])
def test_writing_leaves_one_whole_file(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    report().save(path)
    assert path.read_text().rstrip().endswith(("}", "</html>"))
    assert [p.name for p in tmp_path.iterdir()] == [name]


UNWRITABLE = {
    "no format of that name": ("r.pdf", UsageError),
    "no suffix": ("report", UsageError),
    "no such directory": ("missing/r.json", OutputError),
    "a directory": ("folder.json", OutputError),
    "a file that is there": ("old.json", OutputError),
}


@pytest.mark.parametrize(("name", "error"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, name, error):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "old.json").write_text("old")
    with pytest.raises(error) as caught:
        check_target(tmp_path / name, force=False)
    assert caught.value.hint


def test_force_replaces_a_file_and_nothing_else(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "old.json").write_text("old")
    check_target(tmp_path / "old.json", force=True)
    with pytest.raises(OutputError):
        check_target(tmp_path / "folder.json", force=True)


CURVE = (Point(0.3, 0.01, None, True), Point(0.6, 0.2, None, False))
UNITS = (UnitRow(("fc1",), ("fc2",), 1, 40, 30),)


@pytest.mark.parametrize("show", [lambda r: text.plain(text.report_tables(r)), html.page])
def test_the_way_to_the_target_is_shown_and_explained(show):
    shown = " ".join(show(report(curve=CURVE)).split())
    assert "The way to the target" in shown
    assert "worse of two parts" in shown
    assert "accuracy drop" not in shown
    with_drop = tuple(dataclasses.replace(point, drop=1.5) for point in CURVE)
    assert "accuracy drop" in show(report(curve=with_drop))


@pytest.mark.parametrize("show", [lambda r: text.plain(text.report_tables(r)), html.page])
def test_weights_that_went_with_units_are_not_called_zeros(show):
    work = {"work_before": Work(1000, 2000), "work_after": Work(500, 900)}
    shown = show(report(units=UNITS, **work))
    assert "removed" in shown
    assert "multiplications of the layers" in shown
    assert "zeros in prunable" not in shown
    assert "zeros after" not in " ".join(shown.split())


@pytest.mark.parametrize("show", [lambda r: text.plain(text.report_tables(r)), html.page])
def test_outputs_without_classes_have_no_column_for_agreement(show):
    plain = gap(outputs=(Deviation("y", 0.1, 0.1, 0.1, 3, None, 0, 0),))
    assert "agreement" in show(report())
    assert "agreement" not in show(report(gap=plain))


SETTINGS = {
    "a sparsity": ["-s", "0.6", "--seed", "3"],
    "a pattern, many options": [
        "-s", "2:4", "-m", "ecp", "--layer-sparsity", "y=0.5", "--include", "h", "--include",
        "y", "--max-memory", "2G", "--output-weights", "y=2", "--no-measure", "--samples", "30",
    ],
    "units": ["--speedup", "1.5", "--stages", "2"],
}  # fmt: skip


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_the_settings_of_a_run_repeat_it(words, tmp_path, rng, monkeypatch):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> net (float[n, 8] x) => (float[n, 4] y) {
        h = MatMul(x, W) a = Relu(h) y = MatMul(a, V) }"""
    )
    for name, shape in (("W", (8, 16)), ("V", (16, 4))):
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    monkeypatch.chdir(tmp_path)
    onnx.save(proto, "in.onnx")
    np.savez("a file.npz", x=rng.standard_normal((40, 8)).astype(np.float32))
    run = ["optimize", "in.onnx"]
    first = [*run, "a.onnx", "-c", "a file.npz", *words, "--report", "a.toml"]
    again = [*run, "b.onnx", "--config", "a.toml", "--report", "b.toml"]
    for arguments in (first, again):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (tmp_path / "a.toml").read_text() == (tmp_path / "b.toml").read_text()


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\x7f", "é", "😀", "\x00", "a = 1"])
def test_settings_of_any_text_are_what_they_were(text):
    from onnx_ecp.report.as_toml import _value

    assert tomllib.loads(f"{_value(text)} = {_value([text])}") == {text: [text]}
