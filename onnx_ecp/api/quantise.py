"""int8 behind pruning: what the stage is asked, and what the report says of it."""

from __future__ import annotations

from dataclasses import replace

from onnx_ecp.api.options import Options
from onnx_ecp.api.preparation import Data, unwanted
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.errors import QualityError
from onnx_ecp.evaluation.compare import Gap, measure_gap
from onnx_ecp.evaluation.facts import model_facts
from onnx_ecp.graph import Model
from onnx_ecp.pruning.search import Point
from onnx_ecp.quantising.compensation import Settings
from onnx_ecp.quantising.rows import Int8
from onnx_ecp.quantising.stage import Quantised, Samples, quantised
from onnx_ecp.runtime.limits import free_memory
from onnx_ecp.runtime.progress import Progress
from onnx_ecp.statistics.columns import Measure

# int8 may move the outputs of the validation samples by this share of their spread, or by half of
# what pruning has moved them, where that is more.
ALLOWED, OF_PRUNING = 0.05, 0.5


def in_int8(
    given: Model, pruned: Model, data: Data, options: Options, measure: Measure, progress: Progress
) -> Quantised:
    """The pruned model with its layers in int8.

    Args:
        given: the model.
        pruned: what pruning has made of it.
        data: the samples.
        options: what was asked for.
        measure: how errors of the outputs are told.
        progress: called as work goes on.

    Raises:
        TargetError: no layer can be int8, or none without moving the outputs too far.
        ModelError: the model cannot be quantised at all.
    """
    settings = Settings(
        metric=options.resolved_metric,
        provider=options.provider,
        threads=options.threads,
        seed=options.seed,
        batch=options.batch_size,
        memory=options.max_memory or free_memory() // 2,
        output_weights=options.output_weights,
        reverse=options.gradients == "vjp",
    )
    moved = _gap(given, pruned, data.validation, options, measure).relative_error
    allowed = max(ALLOWED, OF_PRUNING * moved)
    samples = Samples(data.train, data.validation, allowed, measure)

    def left_alone(name: str) -> str:
        return unwanted(name, options)

    return quantised(pruned, samples, settings, left_alone, progress)


def gate(
    given: Model, result: Model, floats: Point, data: Data, options: Options, measure: Measure
) -> Point:
    """The point where the result in int8 stands, from that where the pruned model did.

    Raises:
        QualityError: it is beyond the limit.
    """
    limit = options.limit
    assert limit is not None, "a point is held against a limit"
    gaps = [_gap(given, result, part, options, measure) for part in (data.validation, data.test)]
    drops = [s.a - s.b for gap in gaps for s in gap.scores if s.metric == "accuracy"]
    worst = max(gaps, key=lambda gap: gap.relative_error)
    high = None if worst.certainty is None else worst.certainty.high
    point = Point(floats.sparsity, worst.relative_error, max(drops, default=None), high=high)
    if not limit.allows(point):
        raise QualityError(
            f"the result in int8 misses the target: {point.described}.",
            hint="Nothing was written. Lower the sparsity, or leave --quantize out.",
        )
    return replace(point, within=True)


def told(
    found: Quantised, both: Gap, given: Model, data: Data, options: Options, measure: Measure
) -> Int8:
    """What the report says: the errors on the held-out samples, and the sizes.

    Args:
        found: the result of the stage.
        both: the gap of the original and the result.
        given: the model.
        data: the samples.
        options: what was asked for.
        measure: how errors of the outputs are told.
    """
    pruned = found.pruned
    zeros, rounding, uncompensated = (
        _gap(a, b, data.test, options, measure).relative_error
        for a, b in (
            (given, pruned),
            (pruned, found.model),
            (pruned, found.plain),
        )
    )
    facts = model_facts(found.pruned)
    return Int8(
        found.rows,
        zeros,
        rounding,
        both.relative_error,
        uncompensated,
        found.compensated,
        facts.bytes,
        facts.compressed_bytes,
    )


def _gap(a: Model, b: Model, data: Calibration, options: Options, measure: Measure) -> Gap:
    return measure_gap(
        a,
        b,
        data,
        data.row_labels,
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
        measure=measure,
        seed=options.seed,
    )
