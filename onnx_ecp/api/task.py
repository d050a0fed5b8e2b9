"""A run, from what was asked for to all that is known before anything is removed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx_ecp.api.effort import within_budget
from onnx_ecp.api.metric import settle_metric
from onnx_ecp.api.options import Options
from onnx_ecp.api.output import check_outputs
from onnx_ecp.api.preparation import Data, Job, choose_layers, gather, prepare
from onnx_ecp.data import calibration as calibrating
from onnx_ecp.errors import CalibrationError
from onnx_ecp.evaluation.targets import check_taken
from onnx_ecp.graph import Model
from onnx_ecp.layers import Skip
from onnx_ecp.pruning.loop import Pruned
from onnx_ecp.pruning.search import Judge
from onnx_ecp.report import is_drawn
from onnx_ecp.runtime.progress import Progress
from onnx_ecp.statistics.columns import Measure
from onnx_ecp.statistics.layerwise import Network


@dataclass(frozen=True)
class Task:
    """What is to be done, and to what.

    Args:
        given: the model.
        options: what was asked for, with the metric and the effort that were chosen.
        skips: layers that were not wanted.
        data: the samples.
        ready: the network, and how it is pruned.
        judge: says how far a state is from the original; None where there is no limit.
        drawn: whether pictures are made of it.
        began: when all began, by ``time.monotonic``.
        progress: called as work goes on.
        found: the result, where a time budget allows nothing better than its first stage.
        budget: what a time budget allows, for the user.
    """

    given: Model
    options: Options
    skips: tuple[Skip, ...]
    data: Data
    ready: Job
    judge: Judge | None
    drawn: bool
    began: float
    progress: Progress
    found: Pruned | None = None
    budget: str = ""

    @property
    def network(self) -> Network:
        """What is pruned."""
        return self.ready.network

    @property
    def measure(self) -> Measure:
        """The spreads of the outputs, in units of which errors are told."""
        return self.network.observer.measure

    @property
    def seconds(self) -> float:
        """That it all took so far."""
        return time.monotonic() - self.began


def prepared(
    given: Model,
    calibration: Any,
    output: str | Path | None,
    reports: Sequence[str | Path],
    options: Options,
    progress: Progress,
    began: float,
) -> Task:
    """Look at the model and the samples; whatever cannot be done is refused here.

    Raises:
        OnnxEcpError: it cannot be done.
    """
    check_outputs(given, calibration, output, reports, options)
    check_taken(given, options.target)
    layers, skips = choose_layers(given, options)
    data = gather(given, calibration, options)
    options = settle_metric(given, layers, data, options, progress)
    ready = prepare(given, layers, data, options, progress)
    drawn = any(is_drawn(path) for path in reports)
    # A stage that is kept serves runs with pictures and without.
    levels = drawn or options.cache is not None
    ready = replace(ready, plan=replace(ready.plan, with_levels=levels))
    judge = judge_of(ready.network, data, options)
    task = Task(given, options, tuple(skips), data, ready, judge, drawn, began, progress)
    return task if options.time_budget is None else _within_budget(task)


def _within_budget(task: Task) -> Task:
    """With the best effort that a time budget allows."""
    chosen = within_budget(task.ready, task.options, task.seconds, task.progress)
    return replace(
        task, options=chosen.options, ready=chosen.ready, found=chosen.found, budget=chosen.told
    )


def judge_of(network: Network, data: Data, options: Options) -> Judge | None:
    """What says how far a state is from the original; None where no limit was asked for.

    Raises:
        TargetError: the model has no output that an error could be measured at.
        CalibrationError: the labels fit no output.
    """
    if options.limit is None:
        return None
    parts = (data.validation, data.test)
    try:
        return Judge(network.observer, network.original, parts, network.size, options.seed)
    except CalibrationError as error:
        assert options.labels is not None, "they fit no output"
        name = calibrating.labels_name(options.labels)
        raise CalibrationError(f"{name}: {error.message}", hint=error.hint) from error
