"""A sweep is many runs of ``optimize`` for the price of one observation, told in four forms."""

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import click
import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result

import onnx_ecp
from onnx_ecp.api import sweep as sweeping
from onnx_ecp.api.sweep import COMMON, grid_of, prepare, run, sweep
from onnx_ecp.cli.commands import main
from onnx_ecp.errors import CalibrationError, OnnxEcpError, TargetError, UsageError
from onnx_ecp.evaluation.facts import ModelFacts
from onnx_ecp.methods import METHODS
from onnx_ecp.pruning import loop as pruning
from onnx_ecp.report import CalibrationFacts, Versions, curves, sweeps, text
from onnx_ecp.report.sweep import EvaluationFacts, Sweep, SweepPoint, front
from onnx_ecp.statistics.observer import Observer

NET = """
<ir_version: 8, opset_import: ["": 17]>
net (float[n, 8] x) => (float[n, 4] y)
{ h = MatMul(x, W) s = Add(h, b) a = Relu(s) y = MatMul(a, V) }
"""
# U reaches an output through an operator without a gradient only.
BLOCKED = """
<ir_version: 8, opset_import: ["": 17]>
net (float[n, 8] x) => (float[n, 4] y, float[n] d)
{
  h = MatMul(x, W) s = Add(h, b) a = Relu(s) y = MatMul(a, V)
  u = MatMul(x, U) square = Constant <value_ints = [-1, 2, 2]> ()
  m = Reshape(u, square) d = Det(m)
}
"""
SHAPES = {"W": (8, 16), "b": (16,), "V": (16, 4)}
HOSTILE = {
    "markup": "<script>alert(1)</script> & more",
    "rich markup": "[bold red]ecp[/bold red]",
    "terminal escape": "\x1b[31mred\x1b[0m",
    "line break": "ecp\nOK out.json",
    "very long": 'w"' * 5000,
}


def model(body: str, rng: np.random.Generator, **shapes: tuple) -> onnx.ModelProto:
    """A model of a few lines with random initializers of these shapes."""
    proto = onnx.parser.parse_model(body)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


@pytest.fixture
def net(rng) -> onnx.ModelProto:
    return model(NET, rng, **SHAPES)


@pytest.fixture
def x(rng) -> np.ndarray:
    return rng.standard_normal((60, 8)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, net, x, rng, monkeypatch) -> Path:
    """The current directory, with a model, calibration inputs and labelled test inputs."""
    onnx.save(net, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=x)
    np.savez(tmp_path / "test.npz", x=x[:25], y=rng.integers(0, 4, 25))
    np.savez(tmp_path / "labels.npz", y=rng.integers(0, 4, 60))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: object) -> Result:
    """Run ``onnx-ecp sweep`` in this process."""
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)])


# Every point is what optimize makes.


def assert_like_optimize(proto, x, methods, sparsities, **options):
    grid = grid_of(methods, sparsities, options)
    shared = prepare(proto, x, grid, None, None)
    for chosen, plan in zip(grid, shared.plans, strict=True):
        point = run(shared, chosen, plan)
        alone = onnx_ecp.optimize(
            proto, x, method=chosen.method, sparsity=chosen.sparsity, **options
        ).report
        assert point.comparison.b.sha256 == alone.result.sha256, chosen.method
        assert point.comparison.gap == alone.gap
        assert (point.point.zeros, point.point.weights) == (alone.zeros_after, alone.weights)
        told = [text for text in alone.warnings if "linearisation" not in text]  # no prediction
        assert list(point.warnings) == told


OPTIONS = {
    "as they are": {},
    "per layer, with fine-tuning": {"scope": "layer", "finetune_steps": 2, "seed": 3},
    "bias for all, in two stages": {"compensation": "bias", "stages": 2, "batch_size": 7},
    "tokens summed, one layer": {"positions": "reduce", "exclude": ["y"], "samples": 40},
    "one layer on its own": {"layer_sparsity": {"y": 0.25}},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_point_is_bit_by_bit_what_optimize_makes(net, x, options):
    assert_like_optimize(net, x, list(METHODS), [0.8, "2:4"], **options)


def test_that_holds_where_only_some_methods_can_prune_a_layer(rng, x):
    proto = model(BLOCKED, rng, U=(8, 4), **SHAPES)
    methods = ["magnitude", "ecp", "wanda", "gradient-magnitude", "ecp-refit"]
    assert_like_optimize(proto, x, methods, [0.5])
    swept = sweep(proto, x, methods="magnitude,ecp,obs", sparsities="0.5")
    assert [point.weights for point in swept.points] == [224, 192, 192]
    assert "their sparsities are not shares of the same weights" in swept.warnings[0]
    assert "(3 layers with nothing, 2 layers with sensitivities measured)" in swept.warnings[0]


def test_what_looks_backward_has_one_observer_even_where_layers_are_blocked(rng, x, seen):
    proto = model(BLOCKED, rng, U=(8, 4), **SHAPES)
    sweep(proto, x, methods="magnitude,ecp,obs,gradient-magnitude", sparsities=[0.5])
    assert seen["observers"] == 3  # two of them: before and after it is known what is blocked


# One observation for all.


@pytest.fixture
def seen(monkeypatch) -> dict[str, int]:
    """How often observers were built, and the calibration data measured with one."""
    count = {"observers": 0, "backward": 0, "forward": 0}

    def counting(key, function):
        def counted(*arguments, **options):
            count[key] += 1
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(Observer, "__init__", counting("observers", Observer.__init__))
    monkeypatch.setattr(pruning, "measure", counting("backward", pruning.measure))
    measure_activations = counting("forward", pruning.measure_activations)
    monkeypatch.setattr(pruning, "measure_activations", measure_activations)
    return count


# (methods, options, measured with sensitivities, measured without), for three sparsities
MEASURED = {
    "one-shot methods": ("ecp,obd,magnitude,random,wanda", {}, 1, 1),
    "those that need gradients too": ("ecp,obd,gradient-magnitude", {}, 2, 0),
    "none that needs a sensitivity": ("wanda,magnitude", {}, 0, 1),
    "later stages see what they made": ("ecp", {"stages": 2}, 1 + 3, 0),
    "a staged method beside others": ("ecp-refit,ecp", {"stages": 1}, 1, 0),
}


@pytest.mark.parametrize(
    ("methods", "options", "backward", "forward"), MEASURED.values(), ids=MEASURED
)
def test_the_original_is_observed_once_for_all_points(
    net, x, seen, methods, options, backward, forward, monkeypatch
):
    """The control aside, which looks once more where magnitude stands better."""
    control = "onnx_ecp.api.sweep.not_behind_magnitude"
    monkeypatch.setattr(control, lambda network, plan, found, progress: found)
    swept = sweep(net, x, methods=methods, sparsities=[0.5, 0.7, 0.9], **options)
    assert len(swept.points) == 3 * len(methods.split(","))
    assert seen == {"observers": 1, "backward": backward, "forward": forward}


def test_what_is_named_twice_is_run_once(net, x):
    swept = sweep(net, x, methods="magnitude, magnitude", sparsities=["0.5", 0.5, "0.50"])
    assert [(p.method, p.target, p.sparsity) for p in swept.points] == [("magnitude", "0.5", 0.5)]


# What the points are judged on.


def test_blocks_are_for_the_methods_that_have_some(net, x):
    choices = {"sparsities": "0.5", "methods": "magnitude,woodfisher"}
    blocks = sweep(net, x, blocks="layer", **choices)
    assert blocks.options["blocks"] == "layer"
    errors = [p.relative_error for p in blocks.points]
    whole = [p.relative_error for p in sweep(net, x, **choices).points]
    assert (errors[0] == whole[0], errors[1] == whole[1]) == (True, False)


def test_without_evaluation_samples_the_held_out_part_judges(net, x):
    swept = sweep(net, x, methods="magnitude", sparsities=[0.5])
    assert (swept.evaluation.samples, swept.evaluation.held_out) == (12, True)
    assert (swept.accuracy, swept.points[0].accuracy, swept.r2) == (None, None, None)


def test_given_samples_judge_as_compare_does(folder, tmp_path):
    swept = sweep(
        "in.onnx", "data.npz", methods="ecp", sparsities=[0.8],
        evaluation="test.npz", labels="test.npz",
    )  # fmt: skip
    onnx_ecp.optimize("in.onnx", "data.npz", output="out.onnx", method="ecp", sparsity=0.8)
    gap = onnx_ecp.compare("in.onnx", "out.onnx", "test.npz", "test.npz").gap
    (point,) = swept.points
    assert (point.relative_error, point.agreement) == (gap.relative_error, gap.agreement)
    assert (swept.accuracy, point.accuracy) == (gap.scores[0].a, gap.scores[0].b)
    assert (swept.evaluation.held_out, swept.evaluation.samples) == (False, 25)


def test_labels_alone_are_those_of_the_calibration_samples(folder):
    swept = sweep("in.onnx", "data.npz", methods="ecp", sparsities=[0.8], labels="labels.npz")
    alone = onnx_ecp.optimize(
        "in.onnx", "data.npz", method="ecp", sparsity=0.8, labels="labels.npz"
    )
    score = alone.report.gap.scores[0]
    assert (swept.accuracy, swept.points[0].accuracy) == (score.a, score.b)


def test_targets_of_a_regression_are_scored_by_r2(net, x, tmp_path, rng):
    np.savez(tmp_path / "t.npz", y=rng.standard_normal((60, 4)))
    swept = sweep(net, x, methods="ecp", sparsities=[0.1], labels=tmp_path / "t.npz")
    assert swept.accuracy is None
    assert swept.r2 is not None
    assert swept.points[0].r2 is not None


def test_a_warning_is_given_once_with_the_points_that_have_it(net):
    swept = sweep(net, None, methods="magnitude,ecp", sparsities=[0.5, 0.7])
    made_up = [w for w in swept.warnings if "made-up" in w]
    assert len(made_up) == 1
    assert made_up[0].startswith("calibrated on made-up inputs")


# Refusals.

REFUSED = {
    "an unknown method": ({"methods": "ecp,magnitud"}, UsageError, "Did you mean 'magnitude'"),
    "a sparsity above 1": ({"sparsities": "0.5,1.5"}, UsageError, "2:4"),
    "a sparsity that is no number": ({"sparsities": [0.5, "half"]}, UsageError, "2:4"),
    "N:M that keeps all": ({"sparsities": "4:4"}, UsageError, "2:4"),
    "a missing item": ({"sparsities": "0.5,,0.7"}, UsageError, "commas"),
    "no method": ({"methods": ""}, UsageError, "commas"),
    "no sparsity": ({"sparsities": []}, UsageError, "commas"),
    "an option of one run": ({"quantize": "int8"}, UsageError, "Known: batch_size"),
    "a misspelt option": ({"stage": 3}, UsageError, "Did you mean 'stages'?"),
    "N:M that does not fit": ({"sparsities": "0.5,2:5"}, UsageError, "`exclude`"),
    "no layer left": ({"exclude": ".*"}, TargetError, ""),
    "blocks of nothing": ({"methods": "ecp", "blocks": "layer"}, UsageError, "woodfisher"),
    "labels without a file": ({"labels": "missing.npz"}, CalibrationError, ""),
}


@pytest.mark.parametrize(("options", "error", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said_before_any_point_is_made(
    net, x, monkeypatch, options, error, hint
):
    monkeypatch.setattr(sweeping, "run", None)  # calling it would be a TypeError
    with pytest.raises(error) as caught:
        sweep(net, x, **options)
    assert hint in caught.value.hint


# Files.


def swept(count: int = 12, **changes: object) -> Sweep:
    """A made-up sweep of four methods; errors grow with the sparsity, the last one to infinity."""
    made = [
        SweepPoint(
            method=["ecp-refit", "ecp", "wanda", "magnitude"][k % 4],
            target=str((k // 4) / count),
            sparsity=(k // 4) / count,
            zeros=k,
            weights=count,
            relative_error=0.001 * math.exp(6 * k / count) if k + 1 < count else math.inf,
            agreement=100.0 - k / count,
            accuracy=98.0 - k / count,
            r2=None,
            compressed_bytes=1000 - k % 1000,
            seconds=0.25,
        )
        for k in range(count)
    ]
    whole = Sweep(
        original=ModelFacts("in.onnx", "a" * 64, 2000, 1000, 500, 0),
        accuracy=98.5,
        r2=None,
        calibration=CalibrationFacts("in.npz", 100, 10, synthetic=False),
        evaluation=EvaluationFacts("test.npz", 1000, held_out=False, labels="test.npz"),
        points=tuple(made),
        options={"seed": 0, "exclude": ["head"]},
        versions=Versions(*("1.0" for _ in dataclasses.fields(Versions))),
        shared_seconds=0.5,
        seconds=4.0,
    )
    return dataclasses.replace(whole, **changes)


VARIANTS = {
    "with labels": {},
    "without labels": {"accuracy": None, "evaluation": EvaluationFacts("x", 5, True, None)},
    "regression": {"accuracy": None, "r2": 0.9},
    "one point": {"points": swept().points[:1]},
    "nothing to draw": {
        "points": tuple(dataclasses.replace(p, relative_error=0.0) for p in swept().points[:3])
    },
    "N:M": {"points": tuple(dataclasses.replace(p, target="2:4") for p in swept().points)},
    "many methods": {
        "points": tuple(
            dataclasses.replace(p, method=f"{p.method} {k}") for k, p in enumerate(swept(40).points)
        )
    },
    "many points": {"points": swept(2000).points},
}
VARIANTS |= {
    name: {
        "points": tuple(dataclasses.replace(p, method=value) for p in swept(40).points),
        "original": dataclasses.replace(swept().original, path=value),
        "warnings": (value,),
        "options": {"include": [value]},
    }
    for name, value in HOSTILE.items()
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def test_csv_has_one_header_row_and_full_precision():
    whole = swept()
    header = (
        "method,target,sparsity,zeros,weights,relative_error,agreement,accuracy,r2,"
        "compressed_bytes,seconds"
    )
    lines = sweeps.as_csv(whole).splitlines()
    assert lines[0] == header
    assert lines[1] == "ecp-refit,0.0,0.0,0,12,0.001,100.0,98.0,,1000,0.25"
    rows = list(csv.DictReader(io.StringIO(sweeps.as_csv(whole))))
    assert [float(row["relative_error"]) for row in rows] == [
        p.relative_error for p in whole.points
    ]


def test_json_holds_the_fields_and_the_schema():
    values = json.loads(sweeps.as_json(swept()))
    fields = [f.name for f in dataclasses.fields(Sweep)]
    assert list(values) == ["schema", *fields, "worth_having"]
    assert values["schema"] == 2
    assert values["points"][-1]["relative_error"] == "Infinity"
    assert values["evaluation"]["held_out"] is False


@each_variant
def test_the_page_is_small_well_formed_and_needs_nothing_else(changes):
    page = curves.page(swept(**changes))
    assert len(page.encode()) < 500_000
    # Void elements are all that keeps HTML as written here from being XML.
    ET.fromstring(re.sub(r"<(meta[^>]*|br)>", "", page.removeprefix("<!DOCTYPE html>\n")))
    for foreign in ("<script", "http", "url(", "src=", "href=", "@import"):
        assert foreign not in page
    assert "prefers-color-scheme: dark" in page


@each_variant
def test_the_table_is_printable_and_80_columns_wide(changes):
    whole = swept(**changes)
    shown = text.plain(sweeps.tables(whole))
    assert max(map(len, shown.splitlines())) <= 80
    shown += sweeps.ok_line(whole, [])
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert shown.splitlines()[-1].startswith("OK (nothing written) points=")


def drawn(page: str) -> list[ET.Element]:
    """The charts of a page."""
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


@each_variant
def test_all_that_is_drawn_lies_within_the_chart_and_names_never_overlap(changes):
    for chart in drawn(curves.page(swept(**changes))):
        _, _, width, height = map(float, chart.get("viewBox").split())
        places = [
            [float(v) for v in re.split("[ ,]", pair)]
            for group in chart.iter("g")
            for pair in [re.search(r"\((.*)\)", group.get("transform"))[1]]
        ]
        for line in chart.iter("polyline"):
            places += [[float(v) for v in p.split(",")] for p in line.get("points").split()]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
        names = [t for t in chart.iter("text") if t.get("text-anchor") is None]
        rows = sorted(float(t.get("y")) for t in names)
        assert all(b - a > 16 for a, b in itertools.pairwise(rows))


def test_a_page_shows_every_curve_with_its_name_and_tooltips():
    charts = drawn(curves.page(swept()))
    titles = [chart.get("aria-label") for chart in charts]
    assert titles == [
        f"{measure} over {across}, by method"
        for across in ("sparsity", "size")
        for measure in ("Accuracy (%)", "Relative output error (logarithmic)")
    ]
    for chart, points in zip(charts, (12, 11, 12, 11), strict=True):
        assert len(chart.findall("g/title")) == points
        names = [t.text for t in chart.iter("text") if t.get("text-anchor") is None]
        assert {"ecp-refit", "ecp", "wanda", "magnitude"} <= set(names)
    assert "1 points without a place on this axis" in curves.page(swept())
    assert "held-out" not in curves.page(swept())
    held_out = EvaluationFacts("in.npz", 10, held_out=True, labels=None)
    assert "Judged on held-out part of in.npz: 10 samples" in curves.page(
        swept(evaluation=held_out)
    )


def test_points_worth_having_are_those_that_nothing_beats(rng):
    for _ in range(50):
        pairs = rng.integers(0, 6, (12, 2))
        points = [
            dataclasses.replace(swept().points[0], compressed_bytes=int(a), relative_error=float(b))
            for a, b in pairs
        ]
        found = front(points, lambda p: p.compressed_bytes, lambda p: p.relative_error)
        beaten = [any((a <= b).all() and (a < b).any() for a in pairs) for b in pairs]
        assert found == tuple(p for p, lost in zip(points, beaten, strict=True) if not lost)
    nan = dataclasses.replace(points[0], compressed_bytes=-1, relative_error=math.nan)
    assert front([nan], lambda p: p.compressed_bytes, lambda p: p.relative_error) == ()


def test_points_worth_having_are_marked_everywhere():
    points = swept().points
    larger = [dataclasses.replace(p, compressed_bytes=5000 + k) for k, p in enumerate(points[1:5])]
    whole = swept(points=(*points, *larger))
    worth = whole.worth_having
    assert 0 < len(worth) < len(whole.points)
    page = curves.page(whole)
    size = drawn(page)[2]
    assert len([c for c in size.iter("circle") if c.get("class") == "front"]) == len(worth)
    assert page.count("<td>yes</td>") == len(worth)
    kept = json.loads(sweeps.as_json(whole))["worth_having"]
    assert [whole.points[k] for k in kept] == list(worth)
    lines = text.plain(sweeps.tables(whole)).splitlines()
    assert sum("  *  " in line for line in lines) == len(worth)


def test_colours_differ_in_both_modes():
    for mode in (0, 1):
        assert len({pair[mode] for pair in curves.COLOURS}) == len(curves.COLOURS)
    assert len(set(curves.MARKERS)) == len(curves.MARKERS)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_labels_are_spread_apart_in_order_and_within_the_ends(rng, count):
    for _ in range(50):
        wanted = list(rng.uniform(0, 100, count) ** rng.uniform(0.2, 1))
        placed = curves.spread(wanted, 10, 0, 200)
        order = np.argsort(wanted, kind="stable")
        assert np.all(np.diff(np.array(placed)[order]) >= 10 - 1e-9)
        assert min(placed) >= 0
        assert max(placed) <= 200
        if count == 1:
            assert placed == wanted


@pytest.mark.parametrize("log", [False, True])
def test_axes_have_some_ticks_in_order_between_their_ends(rng, log):
    make = curves.logarithmic if log else curves.linear
    for _ in range(200):
        values = list(10 ** rng.uniform(-7, 3, 3))
        axis = make(values, 300, 20)
        assert 1 <= len(axis.ticks) <= 16
        pixels = [axis.at(tick) for tick in axis.ticks]
        assert pixels == sorted(pixels, reverse=True)
        assert all(20 <= p <= 300 for p in [*pixels, *map(axis.at, values)])


# The command.


def test_the_command_writes_all_formats_and_says_ok(folder):
    result = command(
        "in.onnx", "-c", "data.npz", "--eval", "test.npz", "--labels", "test.npz", "--methods",
        "ecp,magnitude", "--sparsities", ".5,.9,2:4", "-o", "s.csv", "-o", "s.json", "-o", "S.HTML",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith(
        "OK s.csv s.json S.HTML points=6 methods=2 samples=25 seconds="
    )
    assert "evaluation   test.npz: 25 samples, labels test.npz" in result.stdout
    assert len((folder / "s.csv").read_text().splitlines()) == 7
    assert json.loads((folder / "s.json").read_text())["points"][1]["target"] == "0.9"
    assert (folder / "S.HTML").read_text().endswith("</html>\n")


def test_quiet_prints_the_last_line_and_warnings(folder):
    result = command("in.onnx", "-q", "--methods", "magnitude", "--sparsities", ".5")
    assert len(result.stdout.splitlines()) == 1
    assert result.stdout.startswith("OK (nothing written) points=1 ")
    assert result.stderr.startswith("warning: calibrated on made-up inputs")


BAD_COMMANDS = {
    "unknown method": (["--methods", "ecp,wnda"], 2, "hint: Did you mean 'wanda'?"),
    "bad sparsity": (["--sparsities", "0.5,-1"], 2, "hint: Examples"),
    "unknown suffix": (["-o", "s.csv", "-o", "s.xlsx"], 2, "*.csv or *.html or *.json"),
    "no such directory": (["-o", "missing/s.csv"], 8, "missing"),
    "unknown option": (["--sparsity", "0.5"], 2, "--sparsities"),
    "labels that do not fit": (["--eval", "test.npz", "--labels", "labels.npz"], 4, "labels"),
    "no such evaluation data": (["--eval", "missing.npz"], 4, "missing.npz"),
}


@pytest.mark.parametrize(("arguments", "code", "said"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_failing_command_writes_nothing(folder, arguments, code, said):
    before = sorted(folder.iterdir())
    result = command("in.onnx", "-c", "data.npz", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OnnxEcpError("enough.")], ids=repr)
def test_what_stops_halfway_leaves_the_old_files(folder, monkeypatch, error):
    make, made = sweeping.run, []

    def failing(*arguments):
        if made:
            raise error
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(sweeping, "run", failing)
    (folder / "s.csv").write_text("old")
    before = sorted(folder.iterdir())
    result = command("in.onnx", "-c", "data.npz", "-o", "s.csv", "-o", "s.html", "--force")
    assert result.exit_code != 0
    assert made
    assert sorted(folder.iterdir()) == before
    assert (folder / "s.csv").read_text() == "old"


def test_the_options_and_their_defaults_are_those_of_the_library(folder, monkeypatch):
    given = {}

    def recording(model, calibration, **options):
        given.update(options)
        raise OnnxEcpError("enough.")

    monkeypatch.setattr(sweeping, "sweep", recording)
    command("in.onnx")
    own = {"methods", "sparsities", "evaluation", "labels", "calibration_labels", "progress"}
    assert set(given) == own | set(COMMON)
    monkeypatch.undo()
    grid = grid_of(given["methods"], given["sparsities"], {n: given[n] for n in COMMON})
    assert grid == grid_of(sweeping.METHODS_SWEPT, sweeping.SPARSITIES, {})


def test_a_configuration_file_sets_options(folder):
    (folder / "s.toml").write_text('methods = "magnitude"\nsparsities = "0.25"\noutput = ["s.csv"]')
    result = command("in.onnx", "-c", "data.npz", "--config", "s.toml")
    assert result.exit_code == 0
    assert (folder / "s.csv").read_text().splitlines()[1].startswith("magnitude,0.25,0.25,48,192,")


def test_the_help_names_only_methods_that_exist():
    option = next(p for p in main.commands["sweep"].params if p.name == "methods")
    assert isinstance(option, click.Option)
    assert set(option.default.split(",")) <= set(METHODS)
