"""Whole units before and after."""

from __future__ import annotations

from onnx_ecp.report import Report
from onnx_ecp.report.pictures.text import percent, shown

# Groups at either end that are drawn.
ENDS = 30


def units(report: Report) -> str:
    """A bar for every group that lost units; nothing where none did."""
    rows = [row for row in report.units if row.after != row.before]
    if not rows:
        return ""
    drawn = [
        f'<div class="layer two"><span class="what">{shown(" + ".join(row.producers))}</span>'
        f'<span><small>units</small><span class="track"><i class="before" style="width:100%"></i>'
        f'<i class="after" style="width:{percent(row.after / max(row.before, 1))}"></i></span>'
        f"<b>{row.before:,} → {row.after:,}</b></span></div>"
        for row in rows
    ]
    if len(drawn) > 2 * ENDS:
        gap = f'<p class="omitted">... {len(drawn) - 2 * ENDS:,} more</p>'
        drawn = [*drawn[:ENDS], gap, *drawn[-ENDS:]]
    body = "\n".join(drawn)
    return f'<h2>Neurons, channels and heads kept</h2>\n<div class="layers">\n{body}\n</div>'
