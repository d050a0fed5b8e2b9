"""A sweep as one HTML page: curves over sparsity and over size, and all points in a table.

No network, no script; names escaped; light and dark. A method is told by its colour (Okabe and Ito,
which the colour-blind can tell apart), its marker and its name at the end of its line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from onnx_ecp.graph import printable
from onnx_ecp.report.as_json import encode
from onnx_ecp.report.axes import Axis, linear, logarithmic
from onnx_ecp.report.document import document, number, table, warning_box
from onnx_ecp.report.pictures.text import shown
from onnx_ecp.report.sweep import Sweep, SweepPoint, front

_WIDTH, _HEIGHT = 800, 400
_LEFT, _TOP, _BOTTOM = 62, 16, 46
# Width of a character of a label, and the least distance between two labels.
_CHARACTER, _LINE = 8.3, 17.0
_NAME = 24
# Beyond so many points a curve has no markers: the page stays under 500 kB.
_MARKED = 400

# Light and dark; lines of text and markers reach a contrast of 3 with the background.
COLOURS = (
    ("#0072b2", "#4aa8e0"),
    ("#d55e00", "#f0803c"),
    ("#00855f", "#2fc79b"),
    ("#b0508a", "#e08fbe"),
    ("#8f6a00", "#e6b422"),
    ("#2f2f2f", "#e8e8e8"),
    ("#3a9bd4", "#8cd0f5"),
    ("#767676", "#9c9c9c"),
)
# Drawn around (0, 0), about 10 wide.
MARKERS = (
    '<circle r="4.5"/>',
    '<path d="M-4.2-4.2h8.4v8.4h-8.4z"/>',
    '<path d="M0-5.6 5.2 3.8h-10.4z"/>',
    '<path d="M0-6 6 0 0 6-6 0z"/>',
    '<path d="M0 5.6 5.2-3.8h-10.4z"/>',
    '<path d="M-1.7-5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5v-3.4h3.3z"/>',
    '<path d="M0-5.8 5.5-1.8 3.4 4.7h-6.8L-5.5-1.8z"/>',
    '<path d="M-5-3-3-5 0-2 3-5 5-3 2 0 5 3 3 5 0 2-3 5-5 3-2 0z"/>',
)

_STYLE = """
figure { margin: 1rem 0 2rem; } figure p { margin: .2rem 0; font-size: .9em; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
svg.curves { width: 100%; min-width: 36rem; max-width: 56rem; height: auto; }
svg.curves text { fill: var(--fg); font: 13px system-ui, sans-serif; }
svg.curves .grid { stroke: var(--soft); }
svg.curves .dense { stroke: var(--fg); stroke-dasharray: 2 4; }
svg.curves polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg.curves .front { fill: none; stroke: var(--fg); stroke-width: 1.2; opacity: .7; }
svg.curves .leader { stroke-width: 1; opacity: .6; }
td:first-child { white-space: nowrap; }
"""


def page(sweep: Sweep) -> str:
    """The page as text."""
    title = f"onnx-ecp sweep: {shown(sweep.original.path or 'model in memory', 200)}"
    parts = [
        f"<h1>{title}</h1>",
        _origin(sweep),
        *(chart(measure, sweep) for measure in measures(sweep)),
        *(chart(replace(measure, across=SIZE), sweep) for measure in measures(sweep)),
        warning_box(sweep.warnings),
        _points(sweep),
        _setup(sweep),
    ]
    return document(title, parts, _STYLE + _colours())


@dataclass(frozen=True)
class Across:
    """What lies on the axis across.

    Args:
        name: in the title of a chart.
        title: below the axis.
        value: of a point.
        cost: of a point, the less the better.
        tick: a value for people.
        within: least and greatest value that there can be.
    """

    name: str
    title: str
    value: Callable[[SweepPoint], float]
    cost: Callable[[SweepPoint], float]
    tick: Callable[[float], str] = "{:g}".format
    within: tuple[float, float] = (0, math.inf)


def _decimal(count: float) -> str:
    """Bytes in decimal units: ticks stay round.

    >>> _decimal(20_000.0), _decimal(2.5e6)
    ('20 kB', '2.5 MB')
    """
    exponent = next((e for e in (9, 6, 3) if count >= 10**e), 0)
    unit = {0: "B", 3: "kB", 6: "MB", 9: "GB"}[exponent]
    return f"{count / 10**exponent:g} {unit}"


SPARSITY = Across(
    name="sparsity",
    title="sparsity: share of zeros in the pruned layers",
    value=lambda p: p.sparsity,
    cost=lambda p: -p.sparsity,
    within=(0, 1),
)
SIZE = Across(
    name="size",
    title="size after gzip",
    value=lambda p: p.compressed_bytes,
    cost=lambda p: p.compressed_bytes,
    tick=_decimal,
)


@dataclass(frozen=True)
class Measure:
    """What a chart shows.

    Args:
        title: above the chart.
        value: of a point; None where it has none.
        dense: of the original, drawn as a line across; None for none.
        text: a value for people.
        within: least and greatest value that there can be.
        log: whether the axis is logarithmic.
        across: what lies on the other axis.
    """

    title: str
    value: Callable[[SweepPoint], float | None]
    dense: float | None
    text: Callable[[float], str]
    within: tuple[float, float] = (-math.inf, math.inf)
    log: bool = False
    across: Across = SPARSITY

    @property
    def name(self) -> str:
        """What it is, over what."""
        return f"{self.title} over {self.across.name}"

    def front(self, points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
        """The points worth having of those that are drawn."""
        sign = 1.0 if self.log else -1.0  # of all measures the error alone is to be small

        def loss(point: SweepPoint) -> float | None:
            value = self.value(point)
            return None if value is None else sign * value

        return front(points, self.across.cost, loss)

    def drawable(self, point: SweepPoint) -> bool:
        """Whether a point has a place on the axis."""
        value = self.value(point)
        return value is not None and math.isfinite(value) and (value > 0 or not self.log)


def measures(sweep: Sweep) -> Iterator[Measure]:
    """How good the results are, on labels if there are any, and how far from the original."""
    percent, plain = "{:.4g} %".format, "{:.4g}".format
    if sweep.accuracy is not None:
        yield Measure("Accuracy (%)", lambda p: p.accuracy, sweep.accuracy, percent, (0, 100))
    elif sweep.r2 is not None:
        yield Measure("R2", lambda p: p.r2, sweep.r2, plain, (-math.inf, 1))
    elif any(point.agreement is not None for point in sweep.points):
        title = "Same largest output as the original (%)"
        yield Measure(title, lambda p: p.agreement, None, percent, (0, 100))
    title = "Relative output error (logarithmic)"
    yield Measure(title, lambda p: p.relative_error, None, plain, log=True)


@dataclass(frozen=True)
class Frame:
    """Where a chart's axes are.

    Args:
        x: what lies across.
        y: the measure.
        height: of the whole chart.
    """

    x: Axis
    y: Axis
    height: float


def chart(measure: Measure, sweep: Sweep) -> str:
    """One curve per method; "" where no point can be drawn."""
    curves = {
        name: [p for p in points if measure.drawable(p)] for name, points in sweep.methods.items()
    }
    drawn = [point for points in curves.values() for point in points]
    if not drawn:
        return ""
    frame = _frame(measure, drawn, list(curves))
    parts = [_grid(frame, measure.across), _dense(measure, frame)]
    marked = len(drawn) <= _MARKED
    numbered = list(enumerate(curves.values()))
    # What was named first is the most interesting: it lies on top.
    parts += [_curve(i, points, measure, frame, marked=marked) for i, points in numbered[::-1]]
    parts += [_ring(point, measure, frame) for point in measure.front(drawn) if marked]
    parts.append(_labels(curves, measure, frame))
    left_out = len(sweep.points) - len(drawn)
    notes = [f"{left_out} points without a place on this axis are left out."] * bool(left_out)
    notes += ["Hollow markers: N:M."] * any(_is_pattern(point) for point in drawn)
    notes += ["Ringed: worth having, no other point here is better in both."] * marked
    note = f"<p>{' '.join(notes)}</p>" if notes else ""
    box = f"0 0 {_WIDTH} {frame.height:.0f}"
    body = "\n".join(parts)
    return (
        f'<figure><figcaption>{measure.name}</figcaption>\n<div class="wide">'
        f'<svg class="curves" viewBox="{box}" role="img" aria-label="{measure.name}, by method">\n'
        f"{body}\n</svg></div>{note}</figure>"
    )


def _frame(measure: Measure, drawn: Sequence[SweepPoint], names: Sequence[str]) -> Frame:
    """Room at the right for the longest name, and as high as all names need."""
    labels = [*map(_name, names), "original 98.76 %"]
    right = 32 + _CHARACTER * max(map(len, labels))
    height = max(_HEIGHT, _TOP + _BOTTOM + _LINE * len(labels))
    values = [v for p in drawn if (v := measure.value(p)) is not None]
    values += [measure.dense] if measure.dense is not None else []
    along = [measure.across.value(p) for p in drawn]
    if min(along) == max(along):  # a single one stands at the right, beside the names
        along.append(max(0.0, along[0] - 0.1))
    x = linear(along, _LEFT, _WIDTH - right, measure.across.within)
    bottom = height - _BOTTOM
    if measure.log:
        return Frame(x, logarithmic(values, bottom, _TOP), height)
    return Frame(x, linear(values, bottom, _TOP, measure.within), height)


def _grid(frame: Frame, across: Across) -> str:
    x, y = frame.x, frame.y
    lines = [
        f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text x="{x.start - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in y.ticks
        for at in [y.at(tick)]
    ]
    lines += [
        f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.end:.1f}"/>'
        f'<text x="{at:.1f}" y="{y.start + 18:.1f}" text-anchor="middle">{across.tick(tick)}</text>'
        for tick in x.ticks
        for at in [x.at(tick)]
    ]
    middle = (x.start + x.end) / 2
    lines.append(
        f'<text x="{middle:.1f}" y="{frame.height - 6:.1f}" text-anchor="middle">'
        f"{across.title}</text>"
    )
    return "\n".join(lines)


def _dense(measure: Measure, frame: Frame) -> str:
    """The original, as a line across."""
    if measure.dense is None:
        return ""
    x, at = frame.x, frame.y.at(measure.dense)
    return f'<line class="dense" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _curve(
    i: int, points: Sequence[SweepPoint], measure: Measure, frame: Frame, *, marked: bool
) -> str:
    """A line through the points of method number ``i``, and a marker with a tooltip at each."""
    line = sorted((p for p in points if not _is_pattern(p)), key=measure.across.value)
    track = " ".join("{:.1f},{:.1f}".format(*_place(p, measure, frame)) for p in line)
    dashes = f' stroke-dasharray="{5 + i // len(COLOURS)} 3"' if i >= len(COLOURS) else ""
    parts = [f'<polyline class="{_colour(i)}"{dashes} points="{track}"/>']
    parts += [_marker(i, p, measure, frame) for p in points] if marked else []
    return "\n".join(parts)


def _marker(i: int, point: SweepPoint, measure: Measure, frame: Frame) -> str:
    x, y = _place(point, measure, frame)
    value = measure.value(point)
    assert value is not None, "only what is drawable is drawn"
    kind = "hollow" if _is_pattern(point) else "mark"
    return (
        f'<g class="{_colour(i)} {kind}" transform="translate({x:.1f} {y:.1f})"><title>'
        f"{shown(point.method)} {shown(point.target)}: {measure.text(value)}</title>{_shape(i)}</g>"
    )


def _ring(point: SweepPoint, measure: Measure, frame: Frame) -> str:
    """What marks a point worth having."""
    x, y = _place(point, measure, frame)
    return f'<circle class="front" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'


def _labels(curves: Mapping[str, Sequence[SweepPoint]], measure: Measure, frame: Frame) -> str:
    """The names at the right of their lines' ends, none on top of another."""
    ends = [
        (_place(_last(points, measure.across), measure, frame), _colour(i), _shape(i), _name(name))
        for i, (name, points) in enumerate(curves.items())
        if points
    ]
    if measure.dense is not None:
        end = (frame.x.end, frame.y.at(measure.dense))
        ends.append((end, "dense", "", f"original {measure.text(measure.dense)}"))
    rows = spread([y for (_, y), *_ in ends], _LINE, _TOP, frame.y.start)
    x = frame.x.end + 22
    return "\n".join(
        f'<polyline class="{kind} leader" points="{x0:.1f},{y0:.1f} {x - 8:.1f},{row:.1f}"/>'
        f'<g class="{kind} mark" transform="translate({x:.1f} {row:.1f})">{shape}</g>'
        f'<text x="{x + 10:.1f}" y="{row + 4.5:.1f}">{escape(text)}</text>'
        for ((x0, y0), kind, shape, text), row in zip(ends, rows, strict=True)
    )


def _last(points: Sequence[SweepPoint], across: Across) -> SweepPoint:
    """The right end of the line, or of several N:M points the rightmost."""
    return max(points, key=lambda p: (not _is_pattern(p), across.value(p)))


def _place(point: SweepPoint, measure: Measure, frame: Frame) -> tuple[float, float]:
    value = measure.value(point)
    assert value is not None, "only what is drawable is drawn"
    return frame.x.at(measure.across.value(point)), frame.y.at(value)


def _is_pattern(point: SweepPoint) -> bool:
    """Whether it is an N:M point, which belongs to no line."""
    return ":" in point.target


def _name(method: str) -> str:
    return printable(method, _NAME)


def _colour(i: int) -> str:
    return f"m{i % len(COLOURS)}"


def _shape(i: int) -> str:
    """The marker of method number ``i``: with a colour that comes again goes another marker."""
    return MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def _colours() -> str:
    """CSS of the methods' colours in both modes."""
    light, dark = (
        "".join(f"--m{i}: {pair[mode]}; " for i, pair in enumerate(COLOURS)) for mode in (0, 1)
    )
    uses = "".join(
        f".m{i} {{ stroke: var(--m{i}); fill: var(--m{i}); }}\n" for i in range(len(COLOURS))
    )
    return (
        f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n{uses}"
        ".mark { stroke: var(--bg); } .hollow { fill: var(--bg); stroke-width: 1.8; }\n"
    )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as may be to those wanted, in their order, ``gap`` apart, within the ends.

    >>> spread([10, 11, 50], 10, 0, 100)
    [5.5, 15.5, 50.0]

    Args:
        wanted: positions, in any order.
        gap: least distance; less where there is no room.
        low: least position.
        high: greatest position.
    """
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Labels that touch form a block, which stands around the mean of what its labels want.
    blocks: list[list[int]] = []
    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and (
            _top(blocks[-1], wanted, gap, low, high)
            < _top(blocks[-2], wanted, gap, low, high) + gap * len(blocks[-2])
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = list(wanted)
    for block in blocks:
        top = _top(block, wanted, gap, low, high)
        for k, i in enumerate(block):
            placed[i] = top + k * gap
    return placed


def _top(
    block: Sequence[int], wanted: Sequence[float], gap: float, low: float, high: float
) -> float:
    length = gap * (len(block) - 1)
    middle = sum(wanted[i] for i in block) / len(block)
    return max(low, min(middle - length / 2, high - length))


def _origin(sweep: Sweep) -> str:
    """What was calibrated and judged on."""
    data = sweep.calibration
    made_up = " (made-up inputs)" if data.synthetic else ""
    return (
        f"<p>Calibrated on {shown(data.source, 200)}{made_up}: {data}.<br>\n"
        + f"Judged on {shown(sweep.evaluation, 400)}.</p>"
    )


def _points(sweep: Sweep) -> str:
    original = sweep.original
    dense = ["original", "", "", f"{original.zeros:,}", "", ""]
    dense += [_percent(sweep.accuracy), number(sweep.r2), f"{original.compressed_bytes:,}", ""]
    worth = sweep.worth_having
    rows = [[*dense, ""]]
    rows += [[*_row(point), "yes" if point in worth else ""] for point in sweep.points]
    columns = ["method", "target>", "sparsity>", "zeros>", "relative error>", "top-1 agreement, %>"]
    columns += ["accuracy, %>", "R2>", "bytes after gzip>", "seconds>", "worth having"]
    used = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    return table("Points", [columns[k] for k in used], [[row[k] for k in used] for row in rows])


def _row(point: SweepPoint) -> list[str]:
    return [
        shown(point.method),
        shown(point.target),
        f"{point.sparsity:.4f}",
        f"{point.zeros:,}",
        number(point.relative_error),
        _percent(point.agreement),
        _percent(point.accuracy),
        number(point.r2),
        f"{point.compressed_bytes:,}",
        f"{point.seconds:.3f}",
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _setup(sweep: Sweep) -> str:
    """Everything that is needed to repeat the sweep."""
    rows = {name: value for name, value in sweep.options.items() if value not in (None, [], {})}
    rows |= {f"{name} version": value for name, value in encode(sweep.versions).items()}
    rows["seconds"] = (
        f"{sweep.seconds:.1f}, of which shared by all points {sweep.shared_seconds:.1f}"
    )
    return table(
        "How", ["", ""], [[shown(k.replace("_", " ")), shown(v, 300)] for k, v in rows.items()]
    )
