"""Where the time goes: latency by type of operator, before and after."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_ecp.evaluation.operator_times import OperatorTime
from onnx_ecp.report import Report
from onnx_ecp.report.pictures.text import percent, shown

# Types that have a row of their own.
MOST = 8
_NOTE = (
    "One run of each model, by ONNX Runtime's own profile, which adds a little to every node. It "
    "fuses some nodes into others and may choose other kernels for the result."
)


def operators(report: Report) -> str:
    """Two bars for every type of operator; nothing where they were not measured."""
    if not report.operators or report.latency is None:
        return ""
    rows = _few(report.operators)
    most = max(max(row.seconds_a, row.seconds_b) for row in rows) or 1.0
    body = "\n".join(_row(row, most) for row in rows)
    return (
        f'<h2>Latency by operator, {shown(report.latency.conditions)}</h2>\n<div class="layers '
        f'times">\n{body}\n</div>\n<p class="key"><i class="before"></i> original '
        f'<i class="after"></i> result. {_NOTE}</p>'
    )


def _few(rows: Sequence[OperatorTime]) -> list[OperatorTime]:
    """The first ones, and the sum of the others."""
    few, others = list(rows[:MOST]), rows[MOST:]
    if others:
        sums = (sum(r.seconds_a for r in others), sum(r.seconds_b for r in others))
        few.append(OperatorTime(f"{len(others)} other types", *sums))
    return few


def _row(row: OperatorTime, most: float) -> str:
    before, after = 1e3 * row.seconds_a, 1e3 * row.seconds_b
    return (
        f'<div class="layer two"><span class="what">{shown(row.op)}</span><span><small>ms</small>'
        f'<span class="track"><i class="before" style="width:{percent(row.seconds_a / most)}"></i>'
        f'<i class="after" style="width:{percent(row.seconds_b / most)}"></i></span>'
        f"<b>{before:.3g} → {after:.3g} ms</b></span></div>"
    )
