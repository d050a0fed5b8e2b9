"""Layers at a glance: zeros before and after, and the error that each adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx_ecp.report import LayerRow, Report
from onnx_ecp.report.evidence import LayerEvidence
from onnx_ecp.report.names import told_apart
from onnx_ecp.report.pictures.text import percent, short, shown

# Layers at either end that are drawn.
ENDS = 30
# Characters of a name that a row has room for.
NAME = 34


def layers(report: Report) -> str:
    """A row for every layer; nothing where there are none."""
    if not report.layers:
        return ""
    known = {x.name: x for x in report.evidence.layers} if report.evidence else {}
    errors = [x.error for x in known.values() if x.error is not None and math.isfinite(x.error)]
    most = max(errors, default=0.0) or 1.0
    what = "zeros" if report.gone == "zeros" else "removed"
    drawn = report.layers
    if len(drawn) > 2 * ENDS:
        drawn = (*drawn[:ENDS], *drawn[-ENDS:])
    named = zip(drawn, told_apart((row.name for row in drawn), NAME), strict=True)
    rows = [_row(row, name, known, most, what) for row, name in named]
    if len(drawn) < len(report.layers):
        left = len(report.layers) - len(drawn)
        rows.insert(ENDS, f'<p class="omitted">... {left:,} more, all in the JSON report</p>')
    head = (
        '<div class="layer head"><span class="what">layer</span>'
        f"<span>{what}, before and after</span><span>error of this layer alone</span></div>"
    )
    body = "\n".join([head, *rows])
    return f'<h2>Layer by layer</h2>\n<div class="layers">\n{body}\n</div>\n{_note(report)}'


def _row(
    row: LayerRow, name: str, known: Mapping[str, LayerEvidence], most: float, what: str
) -> str:
    before = row.zeros_before / row.weights if row.weights else 0.0
    zeros = (
        f'<small>{what}</small><span class="track"><i class="after" '
        f'style="width:{percent(row.sparsity)}"></i>'
        f'<i class="before" style="width:{percent(before)}"></i></span>'
        f"<b>{100 * row.sparsity:.1f} %</b>"
    )
    error = known[row.name].error if row.name in known else None
    bar = "" if error is None else _error(error, error / most)
    return (
        f'<div class="layer"><span class="what" title="{shown(row.name, 200)}">{shown(name)}'
        f"</span><span>{zeros}</span><span>{bar}</span></div>"
    )


def _error(error: float, share: float) -> str:
    return (
        f'<small>error</small><span class="track"><i class="error" style="width:{percent(share)}">'
        f"</i></span><b>{short(error)}</b>"
    )


def _note(report: Report) -> str:
    evidence = report.evidence
    if evidence is None:
        return ""
    words = [
        "Error of a layer alone: that of the outputs where every other layer is as it was, on "
        f"{evidence.samples:,} held-out samples. Refits of several layers compensate for each "
        "other, so the error of the whole may be smaller than one of these."
    ]
    if report.int8 is not None:
        words.append("They are of the pruned layers in floats, before int8.")
    if evidence.unmeasured:
        words.append(f"Some were not measured: {evidence.unmeasured}.")
    return f"<p>{shown(' '.join(words), 600)}</p>"


def largest(rows: Sequence[LayerRow], count: int) -> list[LayerRow]:
    """The layers with most weights, in graph order."""
    order = sorted(range(len(rows)), key=lambda k: -rows[k].weights)[:count]
    return [rows[k] for k in sorted(order)]
