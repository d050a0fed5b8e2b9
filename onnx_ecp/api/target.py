"""What a run does for the runtime that it is for: the rows of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from onnx_ecp.api.options import Options
from onnx_ecp.evaluation.targets import TARGETS, Eligible, Target, eligible
from onnx_ecp.evaluation.targets.onnxruntime import ONNXRUNTIME
from onnx_ecp.evaluation.worker import RUNTIMES
from onnx_ecp.graph import Model
from onnx_ecp.layers import Skip
from onnx_ecp.report import ForTarget
from onnx_ecp.units import Structure
from onnx_ecp.units.rows import UnitRow
from onnx_ecp.units.shrink import Smaller

# What every runtime gains from where units went, and what to run next in those that can be timed.
UNITS_GAIN = "whole units that are gone: latency follows the multiplications"
UNITS_NEXT = {
    name: f"onnx-ecp compare MODEL {{model}} -d DATA --runtime {name}" for name in RUNTIMES
}


def for_target(
    made: Smaller,
    floats: Model,
    given: Model,
    skips: Sequence[Skip],
    output: str | Path | None,
    options: Options,
) -> ForTarget | None:
    """What the runtime that was named makes of the result; with N:M TensorRT, else None.

    Args:
        made: the result.
        floats: the same before anything became int8, where layers are seen as such.
        given: the model.
        skips: layers that were not pruned, and those whose units stayed.
        output: where the result was written.
        options: what was asked for.
    """
    kernels = options.patterns and options.quantize is None  # TensorRT has none behind Q/DQ nodes
    name = options.target or ("tensorrt" if kernels else None)
    if name is None:
        return None
    target = TARGETS[name]
    layers = eligible(made.model if options.quantize is None else floats, target)
    only_units = options.by_units and not options.units_and_zeros
    if only_units or (options.by_units and target.granularity == "unit"):
        lost = {x for row in made.rows if row.after < row.before for x in _layers_of(row)}
        layers = tuple(_by_units(layers, lost, skips, "none of its units went"))
    before, after = given.proto.ir_version, made.model.proto.ir_version
    changes = ""
    if before != after:
        changes = f"IR version {after} instead of {before}, so that {target.title} takes the file."
    found = _for(name, layers, output, changes, int8=options.quantize is not None)
    if not only_units:
        return found
    step = _command(UNITS_NEXT.get(name, target.next_step), output)
    return replace(found, gains=UNITS_GAIN, evidence=ONNXRUNTIME.evidence, next_step=step)


def foreseen(model: Model, name: str, structure: Structure) -> ForTarget:
    """Which layers a runtime may gain from, before anything is pruned."""
    target = TARGETS[name]
    layers = eligible(model, target, pruned=False)
    if target.granularity == "unit":
        ends = {x for group in structure.groups for x in (*group.producers, *group.consumers)}
        layers = tuple(_by_units(layers, ends, structure.refusals, "it has no units"))
    return _for(name, layers, None, "")


def _for(
    name: str,
    layers: tuple[Eligible, ...],
    output: str | Path | None,
    changes: str,
    *,
    int8: bool = False,
) -> ForTarget:
    target: Target = TARGETS[name]
    step = target.after_int8 if int8 and target.after_int8 else target.next_step
    return ForTarget(
        name,
        target.title,
        target.gains,
        target.evidence,
        layers,
        _command(step, output),
        changes,
    )


def _command(step: str, output: str | Path | None) -> str:
    """A next step with the file in its place."""
    return step.replace("{model}", str(output or "OUTPUT"))


def _layers_of(row: UnitRow) -> tuple[str, ...]:
    return (*row.producers, *row.consumers)


def _by_units(
    layers: Iterable[Eligible], gaining: set[str], skips: Sequence[Skip], otherwise: str
) -> Iterable[Eligible]:
    """The layers, of which those gain that lose rows or columns."""
    reasons = {skip.name: skip.reason for skip in skips}
    for layer in layers:
        why = "" if layer.name in gaining else reasons.get(layer.name, otherwise)
        yield replace(layer, refused=why, advice="")
