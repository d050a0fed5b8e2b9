"""Importances of a layer's weights: removed, kept, and the threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx_ecp.report.evidence import Histogram
from onnx_ecp.report.pictures.text import short

_WIDTH, _HEIGHT, _FOOT = 300, 130, 18
# Share of the weights that the bins at the left have together that are left out.
TAIL = 0.01


def histogram(found: Histogram | None) -> str:
    """Bars over importance, logarithmic; nothing where weights were not ranked."""
    if found is None or not any((*found.kept, *found.gone)):
        return ""
    first, last = _used(found)
    kept, gone = found.kept[first:last], found.gone[first:last]
    most = max(a + b for a, b in zip(kept, gone, strict=True))
    edges = [_edge(found, k) for k in (first, last)]
    words = f"Importances from {short(edges[0])} to {short(edges[1])}: what went, what stayed"
    return (
        f'<figure><svg class="histogram" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{words}">'
        f'<path class="gone" d="{_bars(gone, [0] * len(gone), most)}"/>'
        f'<path class="kept" d="{_bars(kept, gone, most)}"/>{_cut(found, first, last)}'
        f'<text x="0" y="{_HEIGHT - 4}">{short(edges[0], 1)}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{short(edges[1], 1)}</text>'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">importance</text>'
        f"</svg>{_caption(found)}</figure>"
    )


def _used(found: Histogram) -> tuple[int, int]:
    """The first bin that is drawn, and the one behind the last; a thin tail is left out."""
    both = [a + b for a, b in zip(found.kept, found.gone, strict=True)]
    total, seen, first = sum(both), 0, 0
    while seen + both[first] < TAIL * total:
        seen += both[first]
        first += 1
    last = max(k for k, n in enumerate(both) if n) + 1
    return first, last


def _edge(found: Histogram, k: int) -> float:
    """Where bin number k begins."""
    share = k / len(found.kept)
    return found.low ** (1 - share) * found.high**share


def _bars(counts: Sequence[int], below: Sequence[int], most: int) -> str:
    """The bars of a path, each on top of another."""
    step, room = _WIDTH / len(counts), _HEIGHT - _FOOT
    parts = []
    for k, (count, base) in enumerate(zip(counts, below, strict=True)):
        if count:
            top, high = room * (1 - (base + count) / most), room * count / most
            parts.append(f"M{k * step:.1f} {top:.1f}h{step - 1:.1f}v{high:.1f}h-{step - 1:.1f}z")
    return "".join(parts)


def _cut(found: Histogram, first: int, last: int) -> str:
    """A line at the cut, where it is in the picture."""
    if found.cut is None or found.cut <= 0.0:
        return ""
    low, high = (math.log(_edge(found, k)) for k in (first, last))
    at = _WIDTH * (math.log(found.cut) - low) / (high - low)
    if not 0 <= at <= _WIDTH:
        return ""
    return f'<line class="cut" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT - _FOOT}"/>'


def _caption(found: Histogram) -> str:
    cut = (
        ""
        if found.cut is None
        else ' <i class="cut"></i> threshold: as many weights lie below it as were removed'
    )
    nothing = f"; {found.nothing:,} have importance 0" if found.nothing else ""
    return (
        f'<figcaption class="key"><i class="gone"></i> removed <i class="kept"></i> kept{cut}'
        f"{nothing}</figcaption>"
    )
