"""The answer in one picture: what there was, what there is now, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx_ecp.report import Report
from onnx_ecp.report.pictures.text import percent, short, shown, size


@dataclass(frozen=True)
class Fact:
    """One number before and after.

    Args:
        what: its name.
        before: of the original, as a share of the longest bar.
        after: of the result, likewise.
        words: both, for people.
        change: in few characters.
        kind: "cost", of which less is better, "error", or "quality".
    """

    what: str
    before: float
    after: float
    words: str
    change: str
    kind: str = "cost"


def answer(report: Report) -> str:
    """A row of two bars for every fact that is known."""
    rows = "\n".join(_row(fact) for fact in facts(report))
    legend = '<p class="key"><i class="before"></i> original <i class="after"></i> result</p>'
    return f'<section class="answer" aria-label="Before and after">\n{rows}\n{legend}\n</section>'


def facts(report: Report) -> Iterator[Fact]:
    """Size, work, latency, weights; then the error and how good both are."""
    a, b = report.original, report.result
    yield _cost("size", a.bytes, b.bytes, size)
    yield _cost("size after gzip", a.compressed_bytes, b.compressed_bytes, size)
    left = [report.weights - zeros for zeros in (report.zeros_before, report.zeros_after)]
    yield _cost("weights that are not zero", left[0], left[1], "{:,}".format)
    if report.work_before is not None and report.work_after is not None:
        work = report.work_before.flops, report.work_after.flops
        yield _cost("multiplications", *work, "{:,}".format)
    if report.latency is not None:
        x, y = report.latency.median_a, report.latency.median_b
        if x is None or y is None:
            x, y = report.latency.seconds_a, report.latency.seconds_b
        yield _cost(f"latency ({report.latency.verdict})", x, y, lambda s: f"{1e3 * s:.3g} ms")
    yield from _qualities(report)


def _cost(what: str, before: float, after: float, words: object) -> Fact:
    assert callable(words), "it writes a number"
    most = max(before, after) or 1
    change = f"×{after / before:.3g}" if before else ""
    told = f"{words(before)} → {words(after)}"
    return Fact(what, before / most, after / most, told, change)


def _qualities(report: Report) -> Iterator[Fact]:
    gap = report.gap
    if gap is None:
        return
    interval = "" if gap.certainty is None else f" ({gap.certainty.told})"
    words = f"0 is none, 1 a constant output{interval}"
    error = gap.relative_error
    yield Fact("output error", 0.0, error, words, short(error), "error")
    if gap.agreement is not None:
        share = gap.agreement / 100
        words = "of the samples have the same largest output"
        yield Fact("top-1 agreement", 1.0, share, words, f"{gap.agreement:.2f} %", "quality")
    for score in gap.scores:
        unit = " %" if score.metric == "accuracy" else ""
        most = 100.0 if unit else max(abs(score.a), abs(score.b)) or 1.0
        words = f"{score.a:.4g}{unit} → {score.b:.4g}{unit}"
        change = f"{score.b - score.a:+.3g}{' points' * bool(unit)}"
        yield Fact(score.metric, score.a / most, score.b / most, words, change, "quality")


def _row(fact: Fact) -> str:
    return (
        f'<div class="fact {fact.kind}"><span class="what">{shown(fact.what)}</span>'
        f'<b>{shown(fact.change)}</b><span class="track">'
        f'<i class="before" style="width:{percent(fact.before)}"></i>'
        f'<i class="after" style="width:{percent(fact.after)}"></i></span>'
        f'<span class="words">{shown(fact.words, 200)}</span></div>'
    )
