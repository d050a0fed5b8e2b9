"""Pictures of a report show what was measured, and a page of them stays small."""

import dataclasses
import json
import math
import re
import shlex
import struct
import zlib

import numpy as np
import onnx
import onnx.parser
import pytest

import onnx_ecp
from onnx_ecp.api.command import command_line
from onnx_ecp.api.evidence import CELLS, MOST, SIDE, small_mask, small_shape
from onnx_ecp.api.options import Options
from onnx_ecp.cli import commands
from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.evaluation.operator_times import OperatorTime
from onnx_ecp.pruning.levels import LEVELS, SPAN, levels_of
from onnx_ecp.pruning.search import Point
from onnx_ecp.report import Report, html
from onnx_ecp.report.as_json import dumps
from onnx_ecp.report.evidence import Evidence, Histogram, LayerEvidence, OutputEvidence
from onnx_ecp.report.pictures.answer import answer, facts
from onnx_ecp.report.pictures.histogram import histogram
from onnx_ecp.report.pictures.operators import operators
from onnx_ecp.report.pictures.png import png
from onnx_ecp.report.pictures.scatter import scatter
from onnx_ecp.report.pictures.search import search
from onnx_ecp.units.rows import UnitRow
from tests.test_report import EVIDENCE, VARIANTS, layer, report

NET = """
<ir_version: 8, opset_import: ["": 17]>
net (float[n, 6] x) => (float[n, 5] y, float[n, 3] z)
{ h = MatMul(x, U) r = Relu(h) y = MatMul(r, V) z = MatMul(x, W) }
"""


@pytest.fixture
def made(tmp_path, rng):
    """(report with pictures, data, original's path, result's path) of a small model."""
    proto = onnx.parser.parse_model(NET)
    for name, shape in {"U": (6, 12), "V": (12, 5), "W": (6, 3)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for node, name in zip(
        [n for n in proto.graph.node if n.op_type == "MatMul"], ("<script>a", "b", "c"), strict=True
    ):
        node.name = name
    onnx.save(proto, tmp_path / "in.onnx")
    data = {"x": rng.standard_normal((80, 6)).astype(np.float32)}
    result = onnx_ecp.optimize(
        tmp_path / "in.onnx", data, output=tmp_path / "out.onnx", sparsity=0.5, cleanup=False,
        method="magnitude", compensation="none", report=[tmp_path / "r.html", tmp_path / "r.json"],
    )  # fmt: skip
    return result, tmp_path


def test_masks_and_histograms_count_what_went(made):
    result, _ = made
    by_name = {x.name: x for x in result.report.evidence.layers}
    for row in result.report.layers:
        found = by_name[row.name]
        keep = np.array([[digit == "f" for digit in line] for line in found.mask])
        assert keep.shape == row.shape
        assert int((~keep).sum()) == row.zeros_after
        drawn = found.histogram
        assert sum(drawn.gone) + drawn.nothing == row.zeros_after
        assert sum(drawn.kept) == row.weights - row.zeros_after


def test_the_cut_parts_what_a_global_ranking_parts(made):
    result, folder = made
    found = onnx_ecp.importance(folder / "in.onnx", method="magnitude")
    scores = np.sort(np.concatenate([x.reshape(-1) for x in found.values()]))
    [cut] = {x.histogram.cut for x in result.report.evidence.layers}
    gone, level = result.report.zeros_after, 2 ** (SPAN / LEVELS)
    assert scores[gone - 1] / level <= cut <= scores[gone] * level


def test_the_error_of_a_layer_alone_is_that_of_the_model_with_it_alone(made):
    result, _ = made
    errors = {x.name: x.error for x in result.report.evidence.layers}
    assert set(errors) == {"<script>a", "b", "c"}
    # Output z depends on layer c alone; the error of all is the root of the mean square of both.
    whole = {d.output: d.relative_error for d in result.report.gap.outputs}
    assert errors["c"] == pytest.approx(whole["z"] / math.sqrt(2), rel=1e-3)
    assert 0 < errors["b"] <= 1


def test_the_scatter_holds_outputs_of_both_models(made):
    result, _ = made
    found = result.report.evidence.outputs
    assert [x.name for x in found] == ["y", "z"]
    assert result.report.evidence.samples == result.report.calibration.held_out
    for x in found:
        assert len(x.original) == len(x.result) > 0
        assert len(x.columns) == {"y": 5, "z": 3}[x.name]
    deviations = {d.output: d for d in result.report.gap.outputs}
    for x in found:
        worst = max(deviations[x.name].worst, key=lambda c: c.relative_error)
        assert max(x.columns) == pytest.approx(worst.relative_error, rel=1e-3)
        assert x.columns.index(max(x.columns)) == worst.column


def test_a_page_is_written_with_everything_in_it(made):
    result, folder = made
    page = (folder / "r.html").read_text()
    assert len(page.encode()) < 500_000
    assert "<script" not in page
    assert page.count("data:image/png") == 3
    assert page.count('class="histogram"') == 3
    assert page.count('class="scatter"') == 2
    assert page.count('class="columns"') == 2
    assert Report.from_dict(json.loads((folder / "r.json").read_text())) == result.report


WHOLE = "g (float[n, 6] x) => (float[n, 3] y) { h = MatMul(x, U) r = Relu(h) y = MatMul(r, V) }"
KINDS = {
    "samples of several lengths": (
        "g (float[n, l, 6] x) => (float[n, l, 3] y) "
        "{ h = MatMul(x, U) r = Relu(h) y = MatMul(r, V) }",
        [(1 + k % 4, 6) for k in range(40)],
        1,
        {},
    ),
    "a fixed batch": (WHOLE.replace("n,", "4,"), [(4, 6)] * 40, 1, {}),
    "outputs that are classes": (
        "g (float[n, 6] x) => (int64[n] k) "
        "{ h = MatMul(x, U) r = Relu(h) y = MatMul(r, V) k = ArgMax<axis = 1, keepdims = 0>(y) }",
        [(6,)] * 40,
        0,
        {},
    ),
    "one sample": (WHOLE, [(6,)], 1, {}),
    "nothing left": (WHOLE, [(6,)] * 40, 1, {"sparsity": 1.0}),
    "units": (WHOLE, [(6,)] * 40, 1, {"speedup": 2.0}),
    "finite differences": (WHOLE, [(6,)] * 40, 1, {"gradients": "numeric"}),
}


@pytest.mark.parametrize(("text", "shapes", "outputs", "choices"), KINDS.values(), ids=KINDS)
def test_every_kind_of_run_has_a_page(text, shapes, outputs, choices, rng, tmp_path):
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, shape in {"U": (6, 12), "V": (12, 3)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    samples = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    alike = len(set(shapes)) == 1
    data = {"x": np.stack(samples) if alike else samples}
    paths = [tmp_path / "r.html", tmp_path / "r.json"]
    found = onnx_ecp.optimize(
        proto, data, report=paths, measure=False, effort="fast", **choices
    ).report
    evidence = found.evidence
    assert len(evidence.outputs) == outputs
    assert bool(evidence.unmeasured) == (outputs == 0)
    assert all((x.error is None) == (outputs == 0) for x in evidence.layers)
    assert (evidence.layers[0].histogram is None) == (len(shapes) == 1 or "speedup" in choices)
    page = paths[0].read_text()
    assert page.count("data:image/png") == 2
    assert page.count('class="scatter"') == outputs
    assert Report.from_dict(json.loads(paths[1].read_text())) == found


def test_pictures_are_measured_for_pages_alone(made):
    _, folder = made
    bare = onnx_ecp.optimize(
        folder / "in.onnx", method="magnitude", report=folder / "bare.json", sparsity=0.5
    )
    assert bare.report.evidence is None


# Sizes.


@pytest.mark.parametrize("layers", [1, 24, 25, 2000])
def test_a_page_of_many_layers_with_large_pictures_is_small(layers, rng):
    digits = np.array(list("0123456789abcdef"))
    cells = rng.integers(0, 16, (48, 64))
    mask = tuple("".join(row) for row in digits[cells])
    counts = tuple(int(n) for n in rng.integers(1, 10**9, 30))
    names = [f"<b>{k}" * 30 for k in range(layers)]
    whole = report(
        layers=tuple(layer(name, tensor=name, note="&" * 200) for name in names),
        units=tuple(UnitRow((name,), (name,), 1, 40, 20) for name in names),
        warnings=("&" * 600,) * 20,
        evidence=Evidence(
            samples=128,
            layers=tuple(
                LayerEvidence(n, mask, 0.1, Histogram(1e-15, 1.0, counts, counts, 7, 1e-6))
                for n in names
            ),
            outputs=(
                OutputEvidence(
                    "y", tuple(rng.normal(size=300)), tuple(rng.normal(size=300)), (0.123,) * 128, 8
                ),
            )
            * 4,
        ),
    )
    page = html.page(whole)
    assert len(page.encode()) < 500_000
    assert page.count("data:image/png") == min(layers, 24)
    assert ("layers with most weights" in page) == (layers > 24)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (5000, 3), (300, 300), (96, 97), (1, 10**6)])
def test_small_masks_hold_the_share_that_stays(shape, rng):
    keep = rng.random(shape) < 0.3
    for cells in (256, MOST):
        small = small_mask(keep, cells)
        rows, columns = len(small), len(small[0])
        assert (rows, columns) == small_shape(*shape, cells)
        assert max(rows, columns) <= SIDE
        assert rows * columns <= max(cells, 64)
        share = np.array([[int(digit, 16) / 15 for digit in row] for row in small])
        sizes = [
            np.diff(np.arange(n + 1) * s // n) for n, s in zip(share.shape, shape, strict=True)
        ]
        weighted = (share * np.outer(*sizes)).sum() / keep.size
        assert weighted == pytest.approx(keep.mean(), abs=1 / 30)
    assert CELLS >= MOST


# Single pictures.


def test_a_png_holds_its_pixels():
    rows = ("0123456", "fedcba9")
    data = png(rows, (1, 2, 3))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, rest = {}, data[8:]
    while rest:
        (size,), kind = struct.unpack(">I", rest[:4]), rest[4:8]
        body, check = rest[8 : 8 + size], rest[8 + size : 12 + size]
        assert struct.unpack(">I", check)[0] == zlib.crc32(kind + body)
        chunks[kind], rest = body, rest[12 + size :]
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (7, 2, 4, 3, 0, 0, 0)
    lines = zlib.decompress(chunks[b"IDAT"])
    assert [lines[k : k + 5].hex()[2:9] for k in (0, 5)] == list(rows)
    assert list(chunks[b"tRNS"])[::15] == [0, 255]


@pytest.mark.parametrize("whole", VARIANTS.values(), ids=VARIANTS)
def test_the_answer_says_what_is_known(whole):
    known = {fact.what.partition(" (")[0] for fact in facts(whole)}
    assert {"size", "size after gzip", "weights that are not zero"} <= known
    assert ("output error" in known) == (whole.gap is not None)
    assert ("latency" in known) == (whole.latency is not None)
    assert ("multiplications" in known) == (whole.work_before is not None)
    drawn = answer(whole)
    assert drawn.count('class="fact') == len(list(facts(whole)))
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", drawn)]
    assert all(0 <= width <= 100 for width in widths)
    assert f"×{whole.result.compressed_bytes / whole.original.compressed_bytes:.3g}" in drawn


def test_a_histogram_has_areas_of_its_counts():
    drawn = histogram(Histogram(1e-6, 1.0, (0, 10, 30), (20, 10, 0), 5, 1e-4))
    heights = {
        kind: [
            float(v) for v in re.findall(r"v([\d.]+)", re.search(rf'{kind}" d="([^"]*)', drawn)[1])
        ]
        for kind in ("gone", "kept")
    }
    assert heights["gone"][0] / heights["gone"][1] == pytest.approx(2, rel=0.01)
    assert heights["kept"][1] / heights["kept"][0] == pytest.approx(3, rel=0.01)
    assert 'class="cut" x1="100.0"' in drawn
    assert "5 have importance 0" in drawn
    assert histogram(None) == histogram(Histogram(0.0, 0.0, (0,), (0,))) == ""


def test_levels_keep_order_and_ratios(rng):
    scores = {"a": 10.0 ** rng.uniform(-10, 3, (20, 30)), "b": np.array([[0.0, 1e-30, 5.0]])}
    levels = levels_of(scores)
    values = np.concatenate([s.reshape(-1) for s in scores.values()])
    found = np.concatenate([s.reshape(-1) for s in levels.by_layer.values()])
    order = np.argsort(values)
    assert (np.diff(found[order].astype(int)) >= 0).all()
    assert list(levels.by_layer["b"][0][:2]) == [0, 1]
    assert found.max() == LEVELS
    edges, inside = levels.edges(), found > 1
    assert (values[inside] <= edges[found[inside]] * (1 + 1e-9)).all()
    assert (values[inside] >= edges[found[inside] - 1] * (1 - 1e-9)).all()


def test_what_is_not_finite_is_left_out_of_pictures():
    nothing = OutputEvidence("y", (math.nan,), (1.0,))
    assert scatter(nothing) == ""
    assert "2 elements" in scatter(EVIDENCE.outputs[0])
    assert search((Point(0.1, 0.1, None, True),)) == ""
    both = search((Point(0.1, 0.1, None, True), Point(0.5, 0.3, None, False)))
    assert (both.count('class="within"'), both.count('class="beyond"')) == (1, 1)


def test_warnings_and_how_to_repeat_it_are_on_the_page():
    page = html.page(VARIANTS["pictures"])
    assert '<section class="warnings">' in page
    assert '<pre class="command">onnx-ecp optimize in.onnx out.onnx</pre>' in page
    assert "no command repeats it" in html.page(report())
    assert "fc2" in dumps(VARIANTS["pictures"].to_dict())


# The command that repeats a run.

ASKED = {
    "nothing": {},
    "numbers and texts": {"sparsity": 0.8, "method": "ecp", "seed": 3, "damping": 1e-5},
    "a pattern": {"sparsity": "2:4", "permute": True},
    "switches": {"cleanup": False, "measure": True, "bound": True, "cbs_select": True},
    "lists": {"include": ("a b", "c"), "exclude": ("'d'",)},
    "pairs": {
        "layer_sparsity": {"fc=1": 0.5, "x": "2:4"},
        "output_weights": {"y:0": 2.0},
        "input_shapes": {"x:0": (1, 3), "s": ()},
    },
    "units": {"time_budget": "10m", "max_memory": "1.5G", "timeout": 90},
    "paths": {"labels": "my labels.npz", "masks": "m.npz", "force": True, "dry_run": True},
}


@pytest.mark.parametrize("choices", ASKED.values(), ids=ASKED)
def test_the_command_asks_for_the_same(choices):
    options = Options.of(**choices)
    line = command_line("in model.onnx", "data.npz", "out.onnx", options)
    program, name, *words = shlex.split(line)
    assert (program, name) == ("onnx-ecp", "optimize")
    command = commands.main.commands[name]
    given = command.make_context(name, words).params
    known = {field.name for field in dataclasses.fields(Options)}
    asked = {k: dict(v) if k in commands.PAIRS else v for k, v in given.items() if k in known}
    assert Options.of(**asked) == options
    assert (given["model"], given["output"]) == ("in model.onnx", "out.onnx")
    assert given["calibration"] == "data.npz"


def test_there_is_no_command_for_what_was_in_memory(rng):
    arrays = {"x": rng.standard_normal((4, 2))}
    assert command_line("m.onnx", arrays, None, Options()) == ""
    assert command_line(onnx.ModelProto(), None, None, Options()) == ""
    assert command_line("m.onnx", "d.npz", None, Options.of(labels=np.arange(4))) == ""
    assert "--dry-run" in command_line("m.onnx", "d.npz", None, Options())


def test_long_names_of_layers_are_told_apart_on_a_page_and_whole_behind_it():
    names = [f"/encoder/layer.{k}/{'attention/' * 9}query/MatMul" for k in range(40)]
    rows = tuple(layer(name, tensor=name) for name in names)
    evidence = dataclasses.replace(
        EVIDENCE, layers=tuple(LayerEvidence(name, ("f",), 0.1) for name in names)
    )
    page = html.page(report(layers=rows, evidence=evidence))
    drawn = re.findall(r'<span class="what" title="([^"]*)">([^<]*)</span>', page)
    assert [whole for whole, _ in drawn] == names
    assert len({shown for _, shown in drawn}) == len(names)
    assert max(len(shown) for _, shown in drawn) <= 34
    cards = re.findall(r'<h3 title="[^"]*">([^<]*)</h3>', page)
    assert len(set(cards)) == len(cards) == 24


# Latency by operator.


def test_the_time_of_operators_is_told_for_both_models(made):
    result, folder = made
    rows = {row.op: row for row in result.report.operators}
    assert set(rows) == {"MatMul", "Relu"}
    for row in rows.values():
        assert row.seconds_a > 0
        assert row.seconds_b > 0
    assert "Latency by operator" in (folder / "r.html").read_text()


def test_of_many_types_of_operators_the_last_are_added_up():
    rows = tuple(OperatorTime(f"Op{k}", 1e-3 * (20 - k), 1e-3) for k in range(12))
    latency = Latency(1e-3, 4.8e-4, 0.48, 2, 64)
    page = operators(dataclasses.replace(report(), operators=rows, latency=latency))
    assert page.count('class="layer two"') == 9
    assert "4 other types" in page
    assert "42 → 4 ms" in page


def test_without_a_measured_latency_there_is_no_time_of_operators(made):
    _, folder = made
    found = onnx_ecp.optimize(
        folder / "in.onnx", method="magnitude", report=folder / "n.html", measure=False
    )
    assert found.report.operators == ()
    assert "Latency by operator" not in (folder / "n.html").read_text()
