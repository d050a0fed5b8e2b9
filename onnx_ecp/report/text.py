"""Reports for the terminal: tables of at most 80 columns, readable without colour.

Names come from files that others made: they pass through ``printable``, and the console takes
nothing as markup.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from onnx_ecp.evaluation.bounds import Bounds
from onnx_ecp.evaluation.bounds.planning import Planning
from onnx_ecp.evaluation.compare import Comparison, Gap
from onnx_ecp.evaluation.facts import ModelFacts
from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.graph import printable
from onnx_ecp.layers.layer import Skip
from onnx_ecp.pruning.search import Point
from onnx_ecp.quantising.rows import Int8
from onnx_ecp.report import (
    CURVE_NOTE,
    INT8,
    ROUNDING,
    UNIT_WORDS,
    UNITS_STAY,
    WORK,
    WORST_COLUMNS,
    ForTarget,
    LayerRow,
    Recipe,
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
from onnx_ecp.report.diagnosis import Diagnosis
from onnx_ecp.report.headline import ADVICE
from onnx_ecp.report.inspection import Inspection, Prunable
from onnx_ecp.report.names import LEAST, Names, cut
from onnx_ecp.runtime.cache import Contents, age_text
from onnx_ecp.runtime.lazy import size_text
from onnx_ecp.units.rows import MEET, UnitGroup

WIDTH = 80
# Rows of a long table that are shown at its beginning and at its end.
_HEAD = _TAIL = 15
# Columns of an output that are shown.
_WORST = 3
# Characters of a name in a sentence, and of the name of a file.
_NAME, _FILE = 40, 24
# Characters of a sentence that are shown; names get fewer.
_SENTENCE = 400

Row = TypeVar("Row")


def show(renderable: RenderableType, file: TextIO | None = None) -> None:
    """Print tables on stdout, or into ``file``.

    Where that is no terminal, they are 80 columns wide, without colour and trailing blanks.
    """
    file = sys.stdout if file is None else file
    plain_text: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(file=file, **plain_text)
    if console.is_terminal:
        console.print(fitted(renderable, console))
        return
    console = Console(file=file, width=WIDTH, color_system=None, **plain_text)
    with console.capture() as captured:
        console.print(fitted(renderable, console))
    file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def fitted(renderable: RenderableType, console: Console) -> RenderableType:
    """The same without those last columns of tables for which the console is too narrow.

    Numbers are not cut and the first column keeps room for names; what was left out is told.
    """
    if isinstance(renderable, Group):
        return Group(*(fitted(part, console) for part in renderable.renderables))
    if not isinstance(renderable, Table) or not renderable.columns:
        return renderable
    table = copy.copy(renderable)
    table.columns = [
        _at_least(column, LEAST if k == 0 else None) for k, column in enumerate(table.columns)
    ]
    options = console.options.update(max_width=100 * WIDTH)  # a measurement ends there
    while Measurement.get(console, options, table).minimum > console.width and table.columns[2:]:
        table.columns = table.columns[:-1]
    gone = renderable.columns[len(table.columns) :]
    if not gone:
        return table
    titles = ", ".join(" ".join(str(column.header).split()) or "..." for column in gone)
    return Group(table, Text(f"no room for: {titles}\n"))


def _at_least(column: Column, most: int | None) -> Column:
    """A column as wide as its longest line, or as ``most``; others may wrap."""
    found = copy.copy(column)
    if most is not None or column.no_wrap:
        lines = [line for cell in (column.header, *column.cells) for line in str(cell).split("\n")]
        longest = max(map(cell_len, lines))
        found.min_width = longest if most is None else min(longest, most)
    return found


def plain(renderable: RenderableType) -> str:
    """What ``show`` writes into a file."""
    file = io.StringIO()
    show(renderable, file)
    return file.getvalue()


def ok_line(report: Report) -> str:
    """The last line on stdout: one record for scripts, ``key=value`` separated by blanks."""
    path = "(nothing written)" if report.result.path is None else printable(report.result.path)
    fields = {"sparsity": f"{report.sparsity:.4f}"}
    if report.gap is not None:
        fields["error"] = _number(report.gap.relative_error)
        if report.gap.agreement is not None:
            fields["agreement"] = f"{report.gap.agreement:.2f}"
    if report.speedup is not None:
        fields["speedup"] = f"{report.speedup.reached:.3f}"
    if report.int8 is not None:
        chosen = sum(row.int8 for row in report.int8.layers)
        fields["int8"] = f"{chosen}/{len(report.int8.layers)}"
    fields["zeros"] = f"{report.zeros_after}/{report.weights}"
    fields["bytes"] = str(report.result.bytes)
    fields["gzip"] = str(report.result.compressed_bytes)
    return " ".join(["OK", path, *(f"{name}={value}" for name, value in fields.items())])


def report_tables(report: Report, *, verbose: bool = False) -> Group:
    """Before and after, layer by layer, what was skipped and why, and what it is worth.

    Args:
        report: what to show.
        verbose: show all layers and skips, however many.
    """
    parts: list[RenderableType] = [Text(report.headline, style="bold")]
    if report.advice:
        parts.append(Text(f"{ADVICE} {report.advice}"))
    parts += [_summary(report), _layer_table(report, verbose)]
    if any(row.note for row in report.layers):
        parts.append(_notes(report.layers, verbose))
    if report.units:
        parts.append(_unit_table(report, verbose))
    if report.int8 is not None:
        parts.append(_int8_tables(report.int8, report.result, verbose))
    if report.target is not None:
        parts.append(target_tables(report.target, verbose=verbose))
    if report.dense:
        parts.append(_skip_table(report.dense, verbose))
    if report.staying:
        parts.append(_skip_table(report.staying, verbose, UNITS_STAY))
    if report.gap is not None:
        parts += [_gap_table(report.gap), *_column_tables(report.gap)]
    if report.curve:
        parts.append(_curve_table(report.curve))
    if report.bounds is not None:
        parts.append(bound_tables(report.bounds))
    parts.append(_facts(report))
    parts += [_warning(text) for text in report.warnings]
    return Group(*parts)


def inspection_tables(inspection: Inspection, *, verbose: bool = False) -> Group:
    """What is prunable, what is not and why."""
    parts: list[RenderableType] = [_signature_table(inspection)]
    stored = any(row.storage != "dense" for row in inspection.layers)
    columns = ["layer", "op", "out x in>", "weights>", "zeros>", "fits 2:4"]
    columns += [*(["stored"] if stored else []), "sensitivity"]
    table, name = _table("Prunable layers", *columns), Names()
    for row in _cut(inspection.layers, verbose):
        if isinstance(row, int):
            table.add_row(_omitted(row))
            continue
        zeros = f"{row.zeros:,} ({_percent(row.zeros, row.weights)})"
        two_four = f"no: {row.two_four}" if row.two_four else "yes"
        if row.tensorrt and not row.two_four:
            two_four = f"yes, but TensorRT: {row.tensorrt}"
        size = f"{row.weights:,}"
        cells: list[RenderableType] = [
            name(row.name),
            row.op,
            _shape(row.shape),
            size,
            zeros,
            two_four,
        ]
        table.add_row(*cells, *([row.storage] if stored else []), row.sensitivity)
    total, zeros_now = inspection.weights, inspection.zeros
    table.add_section()
    table.add_row(
        f"{len(inspection.layers)} layers", "", "", f"{total:,}",
        f"{zeros_now:,} ({_percent(zeros_now, total)})", "",
    )  # fmt: skip
    parts.append(table)
    parts += _blocked(inspection.layers)
    if inspection.unit_groups:
        parts += [_group_table(inspection.unit_groups, verbose), Text(f"{UNIT_WORDS}\n")]
    if inspection.skips:
        parts.append(_skip_table(inspection.skips, verbose))
    if inspection.unit_refusals:
        parts.append(_skip_table(inspection.unit_refusals, verbose, UNITS_STAY))
    if inspection.target is not None:
        parts.append(target_tables(inspection.target, verbose=verbose))
    parts += [_warning(text) for text in inspection.warnings]
    return Group(*parts)


# What the words of the column "sensitivity" mean for whoever wants to prune.
_WAYS = {
    "numeric": "sensitivity with differences through an operator that works element by element",
    "differences": "no sensitivity but by --gradients numeric",
    "none": "no sensitivity: only methods that need none, such as magnitude",
    "unknown": "not known whether there are sensitivities",
}


def _blocked(layers: Sequence[Prunable]) -> list[RenderableType]:
    """By way and reason, the layers that the reverse graph does not reach."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in layers:
        if row.sensitivity in _WAYS:
            found.setdefault((row.sensitivity, row.blocked), []).append(cut(row.name, _NAME))
    return [
        Text(
            f"{_WAYS[way]}: {names[0]}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            + f": {printable(reason, _SENTENCE)}\n"
        )
        for (way, reason), names in found.items()
    ]


def _group_table(groups: Sequence[UnitGroup], verbose: bool) -> Table:
    table = _table("Units (--granularity unit)", "made by", "read by", "units>", "width>")
    maker, reader = Names(), Names()
    for group in _cut(groups, verbose):
        if isinstance(group, int):
            table.add_row(_omitted(group))
            continue
        ends = (group.producers, group.consumers or (MEET,))
        made, read = (" + ".join(names) for names in ends)
        table.add_row(maker(made), reader(read), f"{group.units:,}", f"{group.width:,}")
    return table


def comparison_tables(comparison: Comparison) -> Group:
    """Two models side by side."""
    table = _sides("A", "B")
    _size_rows(table, comparison.a, comparison.b)
    _score_rows(table, comparison.gap)
    if comparison.work_a is not None and comparison.work_b is not None:
        x, y = comparison.work_a.flops, comparison.work_b.flops
        table.add_row("multiplications of layers", f"{x:,}", f"{y:,}", _ratio(x, y))
    if comparison.latency is not None:
        _latency_rows(table, comparison.latency)
        table.add_row("B is", "", "", comparison.latency.verdict)
    if comparison.runtime is not None:
        there = comparison.runtime
        table.add_row("in", "", "", f"{there.name} {printable(there.version)}")
        differences = [_number(x) for x in (there.difference_a, there.difference_b)]
        table.add_row("differs from ONNX Runtime", *differences, "")
    gap = comparison.gap
    parts: list[RenderableType] = [table, _gap_table(gap), *_column_tables(gap)]
    if gap.certainty is not None:
        parts.append(Text(f"relative error {_number(gap.relative_error)} ({gap.certainty.told})"))
    parts += [_warning(text) for text in gap.warnings]
    return Group(*parts)


def bound_tables(bounds: Bounds) -> Group:
    """What can be said about the gap of two models, and what it assumes."""
    table = _table(None, *bounding.COLUMNS)
    for row in bounding.rows(bounds):
        table.add_row(*(printable(cell, _SENTENCE) for cell in row))
    words = Text("\n".join(bounding.terms(bounds)))
    warned = map(_warning, bounding.warnings(bounds))
    return Group(table, words, *warned, _assumptions(bounding.assumptions(bounds)))


def planning_tables(plan: Planning) -> Group:
    """What pruning costs at most, layer by layer."""
    columns = ["layer", "out x in>", "share>", "typical>", "expected <=>", "limit>"]
    table, name = _table("Norm of what goes, relative to the layer", *columns), Names()
    for row in _cut(plan.layers, verbose=False):
        if isinstance(row, int):
            table.add_row(_omitted(row))
            continue
        numbers = [_number(x) for x in (row.typical, row.expected, row.limit)]
        share = f"{100 * row.share:.2f} %"
        table.add_row(name(row.name), _shape(row.shape), share, *numbers)
    facts = Table.grid(padding=(0, 2))
    vacuous = " (vacuous)" if plan.vacuous else ""
    gap = f"{_number(plan.gap)}{vacuous} with probability {plan.confidence:.6g}"
    facts.add_row("relative gap at most", gap)
    facts.add_row(
        "expected at most", f"{_number(plan.expected)} (typical: {_number(plan.typical)})"
    )
    if plan.eps is not None and plan.largest_sparsity is not None:
        most = f"{plan.largest_weights:,} weights, sparsity {plan.largest_sparsity:.4f}"
        facts.add_row(f"may go for eps {plan.eps:g}", most)
    words = Text("\n".join(bounding.terms(plan)))
    return Group(table, facts, words, _assumptions(plan.assumptions))


def _assumptions(assumptions: Iterable[str]) -> Text:
    return Text("\n".join(["assumed:", *(f"  - {sentence}" for sentence in assumptions)]))


def diagnosis_tables(diagnosis: Diagnosis) -> Group:
    """What is installed, and what to do about what is wrong."""
    table = _table(None, "", "found", "")
    for check in diagnosis.checks:
        table.add_row(
            check.name, printable(check.found, _SENTENCE), "ok" if check.ok else "PROBLEM"
        )
    advice = [_warning(check.advice) for check in diagnosis.checks if check.advice]
    return Group(table, *advice)


def cache_tables(found: Contents) -> Group:
    """What a cache keeps, the oldest first."""
    table = _table(None, "entry", "holds", "size>", "used", "")
    for entry in found.entries:
        table.add_row(
            printable(entry.name, 24) if entry.state == "foreign" else entry.name[:12],
            printable(entry.what, _SENTENCE),
            size_text(entry.bytes) if entry.bytes else "0",
            f"{age_text(entry)} ago",
            entry.state,
        )
    return Group(table) if found.entries else Group()


def cache_line(found: Contents) -> str:
    """The last line of the command cache."""
    size = size_text(found.bytes) if found.bytes else "0"
    where = f"{'removed from' if found.removed else 'in'} {printable(found.folder, 200)}"
    return f"OK {counted(len(found.entries), 'file')} of {size} {where}"


def _summary(report: Report) -> Table:
    table = _sides("original", "result")
    _size_rows(table, report.original, report.result)
    total = report.weights
    table.add_row(
        f"{report.gone} {'in' if report.gone == 'zeros' else 'from'} prunable layers",
        f"{report.zeros_before:,} ({_percent(report.zeros_before, total)})",
        f"{report.zeros_after:,} ({_percent(report.zeros_after, total)})",
        f"of {total:,}",
    )
    if report.gap is not None:
        _score_rows(table, report.gap)
    if report.latency is not None:
        _latency_rows(table, report.latency)
    return table


def _sides(a: str, b: str) -> Table:
    return _table(None, "", f"{a}>", f"{b}>", "change>")


def _size_rows(table: Table, a: ModelFacts, b: ModelFacts) -> None:
    table.add_row("file", _path(a), _path(b), "")
    table.add_row("sha256", a.sha256[:12], b.sha256[:12], "")
    table.add_row("parameters", f"{a.parameters:,}", f"{b.parameters:,}", "")
    table.add_row("zeros", f"{a.zeros:,}", f"{b.zeros:,}", "")
    table.add_row("size", _bytes(a.bytes), _bytes(b.bytes), _ratio(a.bytes, b.bytes))
    packed_a, packed_b = a.compressed_bytes, b.compressed_bytes
    table.add_row("size, gzip", _bytes(packed_a), _bytes(packed_b), _ratio(packed_a, packed_b))


def _score_rows(table: Table, gap: Gap) -> None:
    for score in gap.scores:
        unit = " %" if score.metric == "accuracy" else ""
        change = f"{score.b - score.a:+.4g}{unit and ' points'}"
        table.add_row(score.metric, f"{score.a:.5g}{unit}", f"{score.b:.5g}{unit}", change)


def _latency_rows(table: Table, latency: Latency) -> None:
    for what, x, y in latency_rows(latency):
        table.add_row(what, f"{1e3 * x:.3g} ms", f"{1e3 * y:.3g} ms", f"x{y / x:.2f}")
    table.add_row("measured with", "", latency.conditions, "")


def _layer_table(report: Report, verbose: bool) -> Table:
    """Columns that would be empty or all zeros are left out: names need the room."""
    pruned_before = any(row.zeros_before for row in report.layers)
    has_ess = any(row.ess is not None for row in report.layers)
    columns = ["layer", "op", "out x in>", *(["zeros\nbefore>"] if pruned_before else [])]
    columns += ["zeros\nafter>" if report.gone == "zeros" else "removed>"]
    columns += ["sparsity>", "imp.\nremoved>", "bias\nshift>"]
    table = _table("Layers", *columns, *(["effective\nsamples>"] if has_ess else []))
    name = Names()

    def add(
        layer: RenderableType, op: str, shape: str, before: int, after: int, *rest: str
    ) -> None:
        table.add_row(layer, op, shape, *([f"{before:,}"] * pruned_before), f"{after:,}", *rest)

    for row in _cut(report.layers, verbose):
        if isinstance(row, int):
            table.add_row(_omitted(row))
            continue
        shift = f"{'new ' if row.bias_created else ''}{_optional(row.largest_shift)}"
        rest = [
            _optional(row.importance_removed),
            shift,
            *(["" if row.ess is None else f"{row.ess:,.0f}"] if has_ess else []),
        ]
        share = _percent(row.zeros_after, row.weights)
        add(
            name(row.name), printable(row.op), _shape(row.shape),
            row.zeros_before, row.zeros_after, share, *rest,
        )  # fmt: skip
    table.add_section()
    share = _percent(report.zeros_after, report.weights)
    total = f"{report.weights:,}"
    add(f"{len(report.layers)} layers", "", total, report.zeros_before, report.zeros_after, share)
    return table


def _notes(layers: Sequence[LayerRow], verbose: bool) -> Text:
    noted = [row for row in layers if row.note]
    lines = [
        _omitted(row)
        if isinstance(row, int)
        else f"{cut(row.name, _NAME)}: {printable(row.note, _SENTENCE)}"
        for row in _cut(noted, verbose)
    ]
    return Text("\n".join([*lines, ""]))


def _unit_table(report: Report, verbose: bool) -> Table:
    table = _table("Units", "made by", "read by", "before>", "after>", "why")
    maker, reader = Names(), Names()
    for row in _cut(report.units, verbose):
        if isinstance(row, int):
            table.add_row(_omitted(row))
            continue
        ends = (row.producers, row.consumers or (MEET,))
        made, read = (" + ".join(names) for names in ends)
        table.add_row(maker(made), reader(read), f"{row.before:,}", f"{row.after:,}", fate(row))
    before, after = report.work_before, report.work_after
    if before is not None and after is not None:
        table.add_section()
        for what, field in WORK.items():
            x, y = getattr(before, field), getattr(after, field)
            table.add_row(f"{what} of the layers", "", f"{x:,}", f"{y:,}", f"x{y / max(x, 1):.3f}")
    return table


def _int8_tables(int8: Int8, result: ModelFacts, verbose: bool) -> Group:
    table = _table(INT8, "layer", "op", "weights>", "type", "error>", "why")
    for row in _cut(int8.layers, verbose):
        if isinstance(row, int):
            table.add_row(_omitted(row))
            continue
        error = "" if row.error is None else _number(row.error)
        cells = [printable(row.name), row.op, f"{row.weights:,}", int8_layer(row), error]
        table.add_row(*cells, printable(row.note, _SENTENCE))
    worth = Table.grid(padding=(0, 2))
    for what, share in int8_errors(int8):
        worth.add_row(what, _number(share))
    sizes = {"size": (int8.bytes, result.bytes)}
    sizes["size, gzip"] = int8.compressed_bytes, result.compressed_bytes
    for what, (x, y) in sizes.items():
        worth.add_row(f"{what} in floats, in int8", f"{_bytes(x)}, {_bytes(y)} ({_ratio(x, y)})")
    return Group(table, worth, Text(""))


def target_tables(target: ForTarget, *, verbose: bool = False) -> Group:
    """Which layers a runtime gains from, why not from the others, and what to run next."""
    table, name = _table(target.heading, "layer", "op", "zeros>", "gains", "why"), Names()
    for row in _cut(target.layers, verbose):
        if isinstance(row, int):
            table.add_row(_omitted(row))
        else:
            why = printable(row.refused or row.advice, _SENTENCE)
            gains, zeros = "no" if row.refused else "yes", f"{100 * row.zeros:.0f} %"
            table.add_row(name(row.name), row.op, zeros, gains, why)
    words = (printable(sentence, _SENTENCE) for sentence in target.words)
    return Group(table, Text("\n".join([*words, ""])))


def _skip_table(skips: Sequence[Skip], verbose: bool, title: str = "Not pruned") -> Table:
    table, name = _table(title, "node", "op", "reason"), Names()
    for skip in _cut(skips, verbose):
        if isinstance(skip, int):
            table.add_row(_omitted(skip))
        else:
            reason = printable(skip.reason, _SENTENCE)
            table.add_row(name(skip.name), printable(skip.op), reason)
    return table


def _gap_table(gap: Gap) -> Table:
    columns = ["output", "relative\nerror>", "mean squared\nerror>", "largest\ndeviation>"]
    agrees = gap.agreement is not None
    title, name = f"Outputs on {counted(gap.samples, 'sample')}", Names()
    table = _table(title, *columns, *(["top-1\nagreement>"] if agrees else []))
    for d in gap.outputs:
        largest = f"{_number(d.largest)} (sample {d.largest_at})"
        agreement = "" if d.agreement is None else f"{d.agreement:.2f} %"
        error, squared = _number(d.relative_error), _number(d.mean_squared_error)
        table.add_row(name(d.output), error, squared, largest, *([agreement] if agrees else []))
    if len(gap.outputs) > 1:
        table.add_section()
        table.add_row("all", _number(gap.relative_error))
    return table


def _column_tables(gap: Gap) -> list[Table]:
    """The worst columns of the outputs that have several."""
    columns = ["output", "column>", "relative error>", "standard deviation>"]
    table, name = _table(WORST_COLUMNS, *columns), Names()
    for d in gap.outputs:
        for c in d.worst[:_WORST]:
            spread, error = _number(c.spread), _number(c.relative_error)
            table.add_row(name(d.output), column_of(d, c), error, spread)
    return [table] if table.row_count else []


def _curve_table(curve: Sequence[Point]) -> Group:
    dropped = any(point.drop is not None for point in curve)
    columns = ["sparsity>", "relative error>", "up to (95 %)>"]
    columns += [*(["accuracy drop>"] if dropped else []), "target"]
    table = _table(curve_title(curve), *columns)
    for point in curve:
        drop = [] if point.drop is None else [f"{point.drop:.2f} points"]
        verdict = "within" if point.within else "beyond"
        high = "" if point.high is None else _number(point.high)
        share = f"{100 * point.sparsity:.2f} %"
        table.add_row(share, _number(point.error), high, *drop, verdict)
    return Group(table, Text(f"{CURVE_NOTE}\n"))


def _why(recipe: Recipe) -> str:
    return f" ({recipe.metric_reason})" if recipe.metric_reason else ""


def _support(recipe: Recipe) -> str:
    return "" if recipe.support == "ranking" else f"weights within a layer {recipe.support}, "


def _facts(report: Report) -> Table:
    recipe, data = report.recipe, report.calibration
    known = [f"{name} {words}" for name, words in report.errors.items()]
    origin = printable(data.source, _SENTENCE)
    stages = f"{len(report.curve)} steps" if report.searched else f"stages {recipe.stages}"
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "method",
        f"{recipe.method}: importance {recipe.importance}, {_support(recipe)}compensation "
        f"{recipe.compensation}, metric {recipe.metric}{_why(recipe)}, {stages}",
    )
    if recipe.effort:
        table.add_row("effort", f"{recipe.effort}{': ' * bool(recipe.budget)}{recipe.budget}")
    table.add_row("calibration", f"{origin}: {data}")
    table.add_row("output error", ", ".join(known) or "not measured")
    table.add_row("speed", report.speed)
    table.add_row("time", f"{report.seconds:.1f} s")
    return table


def _warning(text: str) -> Text:
    return Text(f"warning: {printable(text, _SENTENCE)}", style="bold yellow")


def _table(title: str | None, *columns: str) -> Table:
    """An empty table; a column whose title ends in ``>`` holds numbers.

    Numbers and operator types never wrap; names and sentences do where the room is short.
    """
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for column in columns:
        number = column.endswith(">")
        table.add_column(
            column.rstrip(">"),
            justify="right" if number else "left",
            no_wrap=number or column == "op",
            overflow="fold",
        )
    return table


def _cut(rows: Sequence[Row], verbose: bool) -> Iterable[Row | int]:
    """All rows; of a long table the first and last ones, with the number left out between."""
    if verbose or len(rows) <= _HEAD + _TAIL:
        return rows
    return [*rows[:_HEAD], len(rows) - _HEAD - _TAIL, *rows[-_TAIL:]]


def _omitted(count: int) -> str:
    return f"... {count} more (-v)"


def _signature_table(inspection: Inspection) -> Group:
    path = Text(printable(inspection.path or "model in memory", _SENTENCE), style="bold")
    table, name = _table(None, "", "name", "type", "shape"), Names()
    for role, values in (("input", inspection.inputs), ("output", inspection.outputs)):
        for value in values:
            table.add_row(role, name(value.name), str(value.dtype or "other"), _axes(value.shape))
    return Group(path, table)


def _axes(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "unknown"
    return " x ".join("?" if size is None else printable(size) for size in shape) or "scalar"


def _path(facts: ModelFacts) -> str:
    if facts.path is None:
        return "(in memory)"
    return cut(Path(facts.path).name, _FILE)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.2f} %" if whole else "0.00 %"


def _ratio(before: int, after: int) -> str:
    return f"x{after / before:.3f}" if before else ""


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _optional(value: float | None) -> str:
    """Three digits; nothing for None, 0 for what is only rounding."""
    return "" if value is None else f"{value if abs(value) > ROUNDING else 0.0:.3g}"
