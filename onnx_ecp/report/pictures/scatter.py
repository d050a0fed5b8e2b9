"""Outputs of the result over those of the original: on the diagonal where nothing changed."""

from __future__ import annotations

import math

from onnx_ecp.report.axes import Axis, linear
from onnx_ecp.report.evidence import OutputEvidence
from onnx_ecp.report.pictures.text import shown

_SIDE, _LEFT, _BOTTOM, _MARGIN = 340, 52, 40, 10


def scatter(found: OutputEvidence) -> str:
    """A dot for every element; nothing where none is finite."""
    pairs = [
        (x, y)
        for x, y in zip(found.original, found.result, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if not pairs:
        return ""
    values = [value for pair in pairs for value in pair]
    across = linear(values, _LEFT, _SIDE - _MARGIN)
    up = linear(values, _SIDE - _BOTTOM, _MARGIN)
    dots = "".join(f"M{across.at(x):.1f} {up.at(y):.1f}h0" for x, y in pairs)
    low, high = across.low, across.high
    return (
        f'<figure><svg class="scatter" viewBox="0 0 {_SIDE} {_SIDE}" role="img" '
        f'aria-label="Result over original, {len(pairs)} elements of {shown(found.name)}">'
        f"{_grid(across, up)}"
        f'<line class="dense" x1="{across.at(low):.1f}" y1="{up.at(low):.1f}" '
        f'x2="{across.at(high):.1f}" y2="{up.at(high):.1f}"/>'
        f'<path class="dots" d="{dots}"/></svg>'
        f"<figcaption>result over original, {len(pairs):,} elements</figcaption></figure>"
    )


def _grid(across: Axis, up: Axis) -> str:
    bottom = up.start
    lines = [
        f'<line class="grid" x1="{across.start:.1f}" x2="{across.end:.1f}" y1="{at:.1f}" '
        f'y2="{at:.1f}"/><text x="{across.start - 6:.1f}" y="{at + 4:.1f}" '
        f'text-anchor="end">{tick:g}</text>'
        for tick in up.ticks
        for at in [up.at(tick)]
    ]
    lines += [
        f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{up.end:.1f}"/>'
        f'<text x="{at:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{tick:g}</text>'
        for tick in across.ticks
        for at in [across.at(tick)]
    ]
    middle = (across.start + across.end) / 2
    lines.append(f'<text x="{middle:.1f}" y="{_SIDE - 4}" text-anchor="middle">original</text>')
    return "".join(lines)
