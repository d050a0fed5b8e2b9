"""A report as one HTML page: no network, no script, names escaped, light and dark.

It stays under 500 kB: of very many layers the middle is left out, as the page says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from onnx_ecp.graph import printable
from onnx_ecp.report import (
    CURVE_NOTE,
    INT8,
    ROUNDING,
    UNITS_STAY,
    WORK,
    WORST_COLUMNS,
    ForTarget,
    LayerRow,
    Report,
    bounding,
    column_of,
    counted,
    curve_title,
    fate,
    int8_errors,
    int8_layer,
    latency_rows,
)
from onnx_ecp.report.as_json import dumps, encode
from onnx_ecp.report.document import document, number, table, warning_box, with_code
from onnx_ecp.report.headline import ADVICE
from onnx_ecp.report.pictures.answer import answer
from onnx_ecp.report.pictures.cards import cards
from onnx_ecp.report.pictures.layers import layers
from onnx_ecp.report.pictures.operators import operators
from onnx_ecp.report.pictures.outputs import outputs
from onnx_ecp.report.pictures.search import search
from onnx_ecp.report.pictures.text import shown
from onnx_ecp.report.pictures.units import units
from onnx_ecp.units.rows import MEET


def page(report: Report) -> str:
    """The page as text."""
    title = f"onnx-ecp: {shown(report.original.path or 'model in memory', 200)}"
    parts = [
        f"<h1>{title}</h1>",
        answer(report),
        warning_box(report.warnings),
        _headline(report),
        layers(report),
        units(report),
        operators(report),
        cards(report),
        outputs(report),
        _outputs(report),
        _scores(report),
        _curve(report),
        _bounds(report),
        _layers(report),
        _units(report),
        _int8(report),
        _target(report.target),
        _skips(report),
        _files(report),
        _origin(report),
    ]
    return document(title, parts)


def _headline(report: Report) -> str:
    error = ""
    if report.gap is not None:
        error = (
            f" Relative output error on {counted(report.gap.samples, 'held-out sample')}: "
            f"<b>{report.gap.relative_error:.4g}</b>"
            f"{'' if report.gap.certainty is None else f' ({report.gap.certainty.told})'}."
        )
    advice = f"<p>{shown(f'{ADVICE} {report.advice}', 500)}</p>\n" if report.advice else ""
    return (
        f"<p><b>{shown(report.headline, 200)}</b></p>\n{advice}"
        f"<p><b>{100 * report.sparsity:.2f} %</b> of {report.weights:,} prunable weights are "
        f"{'zero' if report.gone == 'zeros' else 'removed'} "
        f"({100 * report.zeros_before / max(report.weights, 1):.2f} % before).{error}</p>\n"
        f"<p>{with_code(shown(report.speed, 500))}</p>"
    )


def _files(report: Report) -> str:
    a, b = report.original, report.result
    rows = [
        ["file", shown(a.path or "in memory", 200), shown(b.path or "not written", 200), ""],
        ["sha256", a.sha256, b.sha256, ""],
    ]
    counts = {
        "parameters": (a.parameters, b.parameters),
        "zeros": (a.zeros, b.zeros),
        "bytes": (a.bytes, b.bytes),
        "bytes after gzip": (a.compressed_bytes, b.compressed_bytes),
    }
    for name, (before, after) in counts.items():
        ratio = f"x{after / before:.3f}" if before else ""
        rows.append([name, f"{before:,}", f"{after:,}", ratio])
    if report.latency is not None:
        for name, x, y in latency_rows(report.latency):
            what = f"{name}, {report.latency.conditions}"
            rows.append([what, f"{1e3 * x:.3g} ms", f"{1e3 * y:.3g} ms", f"x{y / x:.2f}"])
    return table("Files", ["", "original", "result", "change>"], rows)


def _scores(report: Report) -> str:
    rows = []
    for score in () if report.gap is None else report.gap.scores:
        unit = " %" if score.metric == "accuracy" else ""
        change = f"{score.b - score.a:+.4g}{unit and ' points'}"
        values = [f"{value:.5g}{unit}" for value in (score.a, score.b)]
        rows.append([shown(score.output), score.metric, *values, change])
    return table("On labels", ["output", "metric", "original>", "result>", "change>"], rows)


def _outputs(report: Report) -> str:
    agrees = report.gap is not None and report.gap.agreement is not None
    rows = [
        [
            shown(d.output),
            f"{d.relative_error:.4g}",
            f"{d.raw_error:.4g}",
            f"{d.mean_squared_error:.4g}",
            f"{d.largest:.4g}",
            str(d.largest_at),
            *(["" if d.agreement is None else f"{d.agreement:.2f} %"] if agrees else []),
        ]
        for d in (() if report.gap is None else report.gap.outputs)
    ]
    columns = ["output", "relative error>", "in one unit>", "mean squared error>"]
    columns += ["largest deviation>"]
    columns += ["at sample>", *(["top-1 agreement>"] if agrees else [])]
    return table("Outputs in numbers", columns, rows) + _columns(report)


def _columns(report: Report) -> str:
    """The worst columns of the outputs that have several."""
    rows = [
        [shown(d.output), column_of(d, c), f"{c.relative_error:.4g}", f"{c.spread:.4g}"]
        for d in (() if report.gap is None else report.gap.outputs)
        for c in d.worst
    ]
    titles = ["output", "column>", "relative error>", "standard deviation>"]
    return table(WORST_COLUMNS, titles, rows) if rows else ""


def _curve(report: Report) -> str:
    """The points of a search."""
    dropped = any(point.drop is not None for point in report.curve)
    rows = []
    for point in report.curve:
        drop = [f"{point.drop:.2f} points"] if point.drop is not None else []
        verdict = "within" if point.within else "beyond"
        share = f"{100 * point.sparsity:.2f} %"
        high = "" if point.high is None else f"{point.high:.4g}"
        rows.append([share, f"{point.error:.4g}", high, *drop, verdict])
    if not rows:
        return ""
    columns = ["sparsity>", "relative error>", "up to (95 %)>"]
    columns += [*(["accuracy drop>"] if dropped else []), "target"]
    told = table(curve_title(report.curve), columns, rows)
    return f"{told}\n<p>{CURVE_NOTE}</p>\n{search(report.curve)}"


def _bounds(report: Report) -> str:
    if report.bounds is None:
        return ""
    rows = [[shown(cell, 200) for cell in row] for row in bounding.rows(report.bounds)]
    words = [*bounding.terms(report.bounds), *bounding.warnings(report.bounds)]
    words += [f"assumed: {sentence}" for sentence in bounding.assumptions(report.bounds)]
    notes = "\n".join(f"<p>{shown(sentence, 300)}</p>" for sentence in words)
    return f"{table('Bounds', bounding.COLUMNS, rows)}\n{notes}"


def _layers(report: Report) -> str:
    after = "zeros after>" if report.gone == "zeros" else "removed>"
    columns = ["layer", "op", "out x in>", "zeros before>", after, "sparsity>"]
    columns += ["importance removed>", "largest bias shift>", "effective samples>", "note"]
    return table("Layers in numbers", *_used(columns, [_layer(row) for row in report.layers]))


def _used(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The columns and rows without those columns in which no row says anything."""
    used = [k for k in range(len(columns)) if any(row[k] not in ("", "0") for row in rows)]
    return [columns[k] for k in used], [[row[k] for k in used] for row in rows]


def _layer(row: LayerRow) -> list[str]:
    return [
        shown(row.name),
        shown(row.op, 30),
        f"{row.shape[0]} x {row.shape[1]}",
        f"{row.zeros_before:,}",
        f"{row.zeros_after:,}",
        f"{100 * row.sparsity:.2f} %",
        number(row.importance_removed),
        number(row.largest_shift if row.largest_shift > ROUNDING else 0.0),
        "" if row.ess is None else f"{row.ess:,.0f}",
        shown("; ".join(["bias created"] * row.bias_created + [row.note] * bool(row.note)), 120),
    ]


def _units(report: Report) -> str:
    rows = []
    for row in report.units:
        ends = (row.producers, row.consumers or (MEET,))
        made, read = (shown(" + ".join(names), 200) for names in ends)
        rows.append([made, read, f"{row.before:,}", f"{row.after:,}", fate(row)])
    before, after = report.work_before, report.work_after
    if before is not None and after is not None:
        for what, field in WORK.items():
            x, y = getattr(before, field), getattr(after, field)
            rows.append([f"{what} of the layers", "", f"{x:,}", f"{y:,}", f"x{y / max(x, 1):.3f}"])
    return table("Units", ["made by", "read by", "before>", "after>", ""], rows)


def _int8(report: Report) -> str:
    int8 = report.int8
    if int8 is None:
        return ""
    rows = [
        [
            shown(row.name),
            shown(row.op, 30),
            f"{row.weights:,}",
            int8_layer(row),
            number(row.error),
            shown(row.note, 200),
        ]
        for row in int8.layers
    ]
    layers = table(INT8, ["layer", "op", "weights>", "type", "error>", "why"], rows)
    worth = [[what, number(error)] for what, error in int8_errors(int8)]
    worth += [
        ["bytes in floats", f"{int8.bytes:,}"],
        ["bytes in floats after gzip", f"{int8.compressed_bytes:,}"],
    ]
    return layers + table("Zeros and rounding", ["", ">"], worth)


def _target(target: ForTarget | None) -> str:
    if target is None:
        return ""
    rows = [
        [
            shown(x.name),
            shown(x.op, 30),
            f"{100 * x.zeros:.0f} %",
            "no" if x.refused else "yes",
            shown(x.refused or x.advice, 200),
        ]
        for x in target.layers
    ]
    notes = "\n".join(f"<p>{shown(sentence, 500)}</p>" for sentence in target.words)
    columns = ["layer", "op", "zeros>", "gains", "why"]
    return f"{table(target.heading, columns, rows)}\n{notes}"


def _skips(report: Report) -> str:
    lists = {"Not pruned": report.dense, UNITS_STAY: report.staying}
    return "\n".join(
        table(
            title,
            ["node", "op", "reason"],
            [[shown(s.name), shown(s.op, 30), shown(s.reason, 120)] for s in skips],
        )
        for title, skips in lists.items()
        if skips
    )


def _origin(report: Report) -> str:
    """Everything that is needed to repeat the run."""
    data = report.calibration
    rows = {
        "calibration": f"{printable(data.source, 200)}"
        + (" (made-up inputs)" if data.synthetic else ""),
        "samples": str(data),
        **{name: str(value) for name, value in _recipe(report).items()},
        "seed": str(report.seed),
        "predicted error": number(report.predicted_error),
        "error on the samples it learnt from": number(report.learnt_error),
        "seconds": f"{report.seconds:.1f}",
        **{f"{name} version": value for name, value in encode(report.versions).items()},
    }
    told = [[shown(k.replace("_", " ")), shown(v, 300)] for k, v in rows.items() if v]
    return table("How", ["", ""], told) + _command(report.command) + _options(report.options)


def _command(command: str) -> str:
    """What repeats it."""
    if not command:
        return "<p>The model or its inputs were in memory: no command repeats it.</p>"
    return f'<h2>Repeat it</h2>\n<pre class="command">{shown(command, 4000)}</pre>\n'


def _recipe(report: Report) -> Mapping[str, object]:
    """The recipe; of a search, its steps in the place of stages."""
    recipe: dict[str, object] = encode(report.recipe)
    if report.searched:
        recipe["stages"] = f"{len(report.curve)} steps of the search"
    return recipe


def _options(options: Mapping[str, object]) -> str:
    text = "".join(
        f"{printable(line, 300)}\n" for line in dumps(encode(options)).splitlines()[:200]
    )
    return f"<details><summary>Options</summary><pre>{escape(text)}</pre></details>"
