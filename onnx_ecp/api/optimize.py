"""The whole way, from a file to a smaller one and a report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import onnx

from onnx_ecp.api.account import account_of
from onnx_ecp.api.choices import Choices
from onnx_ecp.api.command import command_line
from onnx_ecp.api.metric import settle_metric
from onnx_ecp.api.options import Options
from onnx_ecp.api.outcome import carried_out
from onnx_ecp.api.output import archived, stored_masks, written
from onnx_ecp.api.preparation import choose_layers, gather, load, make_plan, observe_network
from onnx_ecp.api.result import written_beside
from onnx_ecp.api.task import prepared
from onnx_ecp.graph import remove
from onnx_ecp.graph.staging import Staging
from onnx_ecp.layers.versions import one_look_each
from onnx_ecp.pruning.loop import importances, observe
from onnx_ecp.report import Report, rendered
from onnx_ecp.runtime.cache import caching
from onnx_ecp.runtime.limits import deadline, threads_of
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.runtime.workers import working


@dataclass(frozen=True)
class Result:
    """What ``optimize`` gives back.

    Args:
        model: the pruned model; in memory also where it was written.
        report: what was done and what it did.
        masks: by stored tensor of the given model, True where the weight stays, in the stored
            layout. None where none would fit it: ``permute`` puts inputs in another order, and
            units are removed from heads in other bases, unless a file of ``masks`` is asked for.
    """

    model: onnx.ModelProto
    report: Report
    masks: dict[str, np.ndarray] | None


def optimize(
    model: str | Path | onnx.ModelProto,
    calibration: Any = None,
    *,
    output: str | Path | None = None,
    report: str | Path | Sequence[str | Path] = (),
    progress: Progress = silent,
    executor: Executor | Sequence[Executor] | None = None,
    **choices: Unpack[Choices],
) -> Result:
    """Prune a model, compensate for the removed weights, verify, and write the result.

    Args:
        model: path or proto; a proto is not changed.
        calibration: see ``calibration.load``; None takes MODEL.npz beside the model, else made-up
            inputs, which the report warns of.
        output: where to write; None writes nothing.
        report: where to write the report, .json, .html or .toml (settings); one path or several.
        progress: called with (what, done, of) as work goes on.
        executor: looks at parts of the data; one of ``concurrent.futures``, or better several with
            one worker each.
        choices: see ``Choices``, such as ``method="ecp", sparsity=0.8``.

    Raises:
        OnnxEcpError: one subclass per exit code of the command line; nothing was written.
    """
    began = time.monotonic()
    options = Options.of(**choices)
    reports = [report] if isinstance(report, str | Path) else list(report)
    command = command_line(model, calibration, output, options)
    with running(options, executor), Staging() as staging:
        given = load(model)
        task = prepared(given, calibration, output, reports, options, progress, began)
        outcome = carried_out(task)
        with written_beside(task, outcome, output, staging) as result:
            account = account_of(task, outcome, result, output, command)
            masks = stored_masks(task.network.layers, result.pruned.state)
            if options.masks is not None:
                written(Path(options.masks), archived(masks), staging)
            for path in reports:
                written(Path(path), rendered(account, path), staging)
            final = result.final
        staging.commit()
        remove(result.stale)
    return Result(final.proto, account, masks if task.ready.source is given else None)


@contextmanager
def running(
    options: Options, executor: Executor | Sequence[Executor] | None = None
) -> Iterator[None]:
    """Within the limits of time and threads, with the workers and the cache that were asked for."""
    with (
        deadline(options.timeout),
        threads_of(options.threads),
        working(options.workers, options.dask, executor, options.threads),
        caching(options.cache, options.cache_limit),
        one_look_each(),
    ):
        yield


def importance(
    model: str | Path | onnx.ModelProto, calibration: Any = None, **choices: Unpack[Choices]
) -> dict[str, np.ndarray]:
    """Importance of every weight of the prunable layers, by layer name, (out, in), float64 >= 0.

    Args:
        model: path or proto.
        calibration: as for ``optimize``.
        choices: see ``Choices``, such as ``method="ecp"``.

    Raises:
        OnnxEcpError: as ``optimize`` does.
    """
    options = Options.of(**choices)
    with running(options):
        source = load(model)
        layers, _ = choose_layers(source, options)
        data = gather(source, calibration, options)
        options = settle_metric(source, layers, data, options)
        network, _ = observe_network(source, layers, data, options)
        plan = make_plan(network.layers, options)
        measured = observe(network, plan, network.original)
        return dict(importances(network, plan, network.original, measured))
