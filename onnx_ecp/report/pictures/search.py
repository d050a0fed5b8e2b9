"""The points of a search for a target: error over sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx_ecp.pruning.search import Point
from onnx_ecp.report.axes import Axis, linear
from onnx_ecp.report.pictures.text import short

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 560, 260, 56, 42, 12


def search(curve: Sequence[Point]) -> str:
    """A line through the points, those beyond the target hollow; nothing for a single one."""
    points = sorted((p for p in curve if math.isfinite(p.error)), key=lambda p: p.sparsity)
    if len(points) < 2:
        return ""
    across = linear([p.sparsity for p in points], _LEFT, _WIDTH - _MARGIN, (0, 1))
    up = linear([0.0, *(p.error for p in points)], _HEIGHT - _BOTTOM, _MARGIN, (0, math.inf))
    line = " ".join(f"{across.at(p.sparsity):.1f},{up.at(p.error):.1f}" for p in points)
    return (
        f'<figure><svg class="search" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Error over sparsity, step by step">'
        f'{_grid(across, up)}<polyline class="way" points="{line}"/>'
        f"{''.join(_dot(p, across, up) for p in points)}</svg>"
        '<figcaption class="key"><i class="after"></i> within the target '
        '<i class="hollow"></i> beyond it</figcaption></figure>'
    )


def _dot(point: Point, across: Axis, up: Axis) -> str:
    kind = "within" if point.within else "beyond"
    return (
        f'<circle class="{kind}" cx="{across.at(point.sparsity):.1f}" '
        f'cy="{up.at(point.error):.1f}" r="4.5"><title>{point.sparsity:.4f}: '
        f"{short(point.error)}</title></circle>"
    )


def _grid(across: Axis, up: Axis) -> str:
    lines = [
        f'<line class="grid" x1="{across.start:.1f}" x2="{across.end:.1f}" y1="{at:.1f}" '
        f'y2="{at:.1f}"/><text x="{across.start - 6:.1f}" y="{at + 4:.1f}" '
        f'text-anchor="end">{tick:g}</text>'
        for tick in up.ticks
        for at in [up.at(tick)]
    ]
    lines += [
        f'<text x="{across.at(tick):.1f}" y="{up.start + 17:.1f}" text-anchor="middle">{tick:g}'
        "</text>"
        for tick in across.ticks
    ]
    middle = (across.start + across.end) / 2
    lines.append(
        f'<text x="{middle:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">sparsity</text>'
        f'<text x="{across.start + 4:.1f}" y="{up.end + 12:.1f}">relative error</text>'
    )
    return "".join(lines)
