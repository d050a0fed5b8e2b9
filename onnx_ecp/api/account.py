"""What a run did: measured on the result as written, on samples that nothing else has seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onnx_ecp.api import quantise
from onnx_ecp.api.build_report import build_report
from onnx_ecp.api.gain import gain
from onnx_ecp.api.options import Options
from onnx_ecp.api.outcome import Outcome
from onnx_ecp.api.preparation import Data
from onnx_ecp.api.result import Written
from onnx_ecp.api.task import Task
from onnx_ecp.evaluation import bounds
from onnx_ecp.evaluation import compare as evaluate
from onnx_ecp.evaluation.compare import Comparison
from onnx_ecp.evaluation.facts import ModelFacts, model_facts
from onnx_ecp.graph import Model
from onnx_ecp.report import Report
from onnx_ecp.statistics.columns import Measure

# So many of the samples that the result was computed from are looked at again.
LEARNT = 1024


def account_of(
    task: Task, outcome: Outcome, written: Written, output: str | Path | None, command: str
) -> Report:
    """Compare both models, measure what the result is worth, and put the report together.

    Args:
        task: what was asked for.
        outcome: where pruning ended.
        written: the result.
        output: the file that was asked for, if any.
        command: what repeats the run, where a command can.
    """
    given, data, options, measure = task.given, task.data, task.options, task.measure
    original = model_facts(given)  # now: the output may be the same file
    comparison = compare(given, written.model, data, options, original, measure)
    known = None if outcome.speedup is None else outcome.speedup.measured
    worth = gain(
        given, written.made, data, options, measured=known, drawn=task.drawn, began=task.began
    )
    place = None if written.place is None else str(written.place)
    comparison = replace(comparison, b=replace(comparison.b, path=place))
    learnt = learnt_error(given, written.model, data, options, measure)
    bounded = bound(given, written.model, data, options, measure) if options.bound else None
    int8 = None
    if written.int8 is not None:
        int8 = quantise.told(written.int8, comparison.gap, given, data, options, measure)
    return build_report(
        given,
        task.ready,
        task.skips,
        data,
        written.pruned,
        written.made,
        comparison,
        options,
        floats=written.floats,
        output=output,
        predicted=outcome.predicted,
        worth=worth,
        learnt=learnt,
        speedup=outcome.speedup,
        curve=written.curve,
        bounded=bounded,
        int8=int8,
        budget=task.budget,
        evidence=outcome.evidence,
        command=command,
        seconds=task.seconds,
    )


def compare(
    source: Model,
    result: Model,
    data: Data,
    options: Options,
    original: ModelFacts,
    measure: Measure,
) -> Comparison:
    """Original against result, through ONNX Runtime, on samples that nothing else has seen."""
    gap = evaluate.measure_gap(
        source,
        result,
        data.test,
        data.test.row_labels,
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
        measure=measure,
        seed=options.seed,
    )
    return Comparison(original, model_facts(result), gap)


def learnt_error(
    source: Model, result: Model, data: Data, options: Options, measure: Measure
) -> float | None:
    """The error on samples that the result was computed from, LEARNT at most.

    It is mostly smaller than the error of others. Where it is larger than the held-out samples
    allow, these lack what makes it. None where there is one sample only.
    """
    if data.test is data.train:
        return None
    gap = evaluate.measure_gap(
        source,
        result,
        data.train.limit(LEARNT, options.seed),
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
        measure=measure,
    )
    return gap.relative_error


def bound(
    source: Model, result: Model, data: Data, options: Options, measure: Measure
) -> bounds.Bounds:
    """How far the outputs can be apart on inputs like the held-out samples."""
    return bounds.bound(
        source,
        result,
        data.test,
        provider=options.provider,
        threads=options.threads,
        batch_size=options.batch_size,
        metric="l2-raw" if options.resolved_metric == "l2-raw" else "l2",
        measure=measure,
    )
