"""What the text and the HTML report say of bounds: rows, and what their words mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx_ecp.evaluation.bounds import Bounds
from onnx_ecp.evaluation.bounds.planning import Planning

GAP = (
    "gap: distance of the pruned model's outputs from the original's for one input, every column "
    "in units of its own standard deviation; its root mean square is the relative error."
)
PLAIN_GAP = "gap: L2 norm of the pruned model's outputs minus the original's, for one input."
PLAN_GAP = (
    "gap: L2 norm of the pruned model's outputs minus the original's, for one input, relative to "
    "what the norms of the layers allow the outputs."
)
VACUOUS = "vacuous: it would hold for a model of constant outputs as well."
COLUMNS = ("bound", "for", "value>")


def rows(bounds: Bounds) -> Iterator[tuple[str, str, str]]:
    """(what is bounded, for which inputs, the number), bounds that say nothing marked."""
    chance = f"{bounds.confidence:.6g}"

    def marked(field: str, value: str) -> str:
        return f"{value} (vacuous)" if field in bounds.vacuous else value

    if bounds.measured is not None and bounds.output_norm is not None:
        seen = f"largest of {bounds.samples:,}"
        yield "gap of constant outputs", seen, f"{bounds.output_norm:.4g}"
        yield "gap, measured", seen, f"{bounds.measured:.4g}"
    if bounds.conformal is not None:
        one = f"one new input, with probability {chance}"
        yield "gap (conformal)", one, marked("conformal", f"{bounds.conformal.gap:.4g}")
    for field, share in (("above", bounds.above), ("flips", bounds.flips)):
        if share is not None:
            what = share.what if share.eps is None else f"gap above {share.eps:g}"
            seen = f"share of inputs, confidence {chance}; {share.count}/{share.samples} seen"
            yield f"{what} (Clopper-Pearson)", seen, marked(field, f"{100 * share.limit:.3g} %")
    for field, x in (("per_sample", bounds.per_sample), ("box", bounds.box)):
        if x is not None:
            note = "" if x.ratio is None else f" ({x.ratio:.3g} times the measured one)"
            value = "none" if x.gap is None else marked(field, f"{x.gap:.4g}")
            yield "gap (deterministic)", f"{x.inputs}{note}", value


def terms(found: Bounds | Planning) -> list[str]:
    """What the words of the table mean."""
    gap = PLAN_GAP
    if isinstance(found, Bounds):
        gap = PLAIN_GAP if found.plain else GAP
    return [gap, VACUOUS] if found.vacuous else [gap]


def warnings(bounds: Bounds) -> Iterator[str]:
    """Why a bound is missing or infinite."""
    few = bounds.conformal
    if few is not None and few.samples < few.samples_needed:
        yield (
            f"{few.samples} samples bound no gap with probability {bounds.confidence:.6g}: "
            f"{few.samples_needed} are needed."
        )
    found = (bounds.per_sample, bounds.box)
    yield from dict.fromkeys(x.refused for x in found if x is not None and x.refused)


def assumptions(bounds: Bounds) -> Iterable[str]:
    """What must be true for the bounds to hold, each once."""
    fields = (bounds.conformal, bounds.above, bounds.flips, bounds.per_sample, bounds.box)
    return dict.fromkeys(a for x in fields if x is not None for a in x.assumptions)
