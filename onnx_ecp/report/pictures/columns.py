"""The error of every column of an output."""

from __future__ import annotations

import math

from onnx_ecp.report.evidence import OutputEvidence
from onnx_ecp.report.pictures.text import short, shown

_WIDTH, _HEIGHT, _FOOT, _HEAD = 480, 200, 18, 16


def columns(found: OutputEvidence) -> str:
    """A bar for every column; nothing for a single one."""
    finite = [v for v in found.columns if v is not None and math.isfinite(v)]
    if not finite:
        return ""
    most, step = max(finite) or 1.0, _WIDTH / len(found.columns)
    room = _HEIGHT - _FOOT - _HEAD
    bars = []
    for k, value in enumerate(found.columns):
        if value is not None:
            share = value / most if math.isfinite(value) else 1.0
            high = room * share
            top, wide = _HEAD + room - high, max(step - 1.5, 0.6 * step)
            bars.append(f"M{k * step:.1f} {top:.1f}h{wide:.1f}v{high:.1f}h-{wide:.1f}z")
    last = (len(found.columns) - 1) * found.width
    bundled = f", the largest of {found.width} a bar" if found.width > 1 else ""
    return (
        f'<figure><svg class="columns" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Errors of the columns of {shown(found.name)}, up to {short(most)}">'
        f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{_HEAD}" y2="{_HEAD}"/>'
        f'<text x="{_WIDTH}" y="{_HEAD - 4}" text-anchor="end">{short(most)}</text>'
        f'<path class="error" d="{"".join(bars)}"/>'
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT - _FOOT}" y2="{_HEIGHT - _FOOT}"/>'
        f'<text x="0" y="{_HEIGHT - 4}">0</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{last}</text>'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">column</text></svg>'
        f"<figcaption>relative error by column{bundled}</figcaption></figure>"
    )
