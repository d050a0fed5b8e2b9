"""From a task to a pruned network, and the model that it makes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx_ecp.api.build_report import predicted_error
from onnx_ecp.api.evidence import gather_evidence
from onnx_ecp.api.output import finished
from onnx_ecp.api.preparation import timed_batch
from onnx_ecp.api.task import Task
from onnx_ecp.errors import QualityError
from onnx_ecp.evaluation.latency import measure_latency
from onnx_ecp.pruning.control import not_behind_magnitude
from onnx_ecp.pruning.loop import Pruned, polished, prune, stage
from onnx_ecp.pruning.search import Point, seek
from onnx_ecp.pruning.selection import NM
from onnx_ecp.report.evidence import Evidence
from onnx_ecp.units.rows import Speedup
from onnx_ecp.units.shrink import Smaller
from onnx_ecp.units.stages import PrunedUnits, too_slow
from onnx_ecp.units.zeros import with_zeros

# How often a model that is not fast enough yet is pruned further.
ATTEMPTS = 5
# Seconds for which a model that seems to miss its target is measured once more.
LONGER = 3.0


@dataclass(frozen=True)
class Outcome:
    """Where pruning ended.

    Args:
        pruned: the state of the network.
        made: the model that it makes, in memory.
        speedup: what was asked for and measured, where latency is the target.
        curve: points of a search, or of a gate.
        predicted: relative output error that the importances expect, if they expect one.
        evidence: for pictures, where they are wanted.
    """

    pruned: Pruned
    made: Smaller
    speedup: Speedup | None
    curve: tuple[Point, ...]
    predicted: float | None
    evidence: Evidence | None


def carried_out(task: Task) -> Outcome:
    """Prune, refit, and cut what the task asks for.

    Raises:
        OnnxEcpError: a target cannot be met.
    """
    options, ready, network = task.options, task.ready, task.network
    pruned, curve = (task.found, ()) if task.found else prune_within(task)
    if options.is_controlled:
        pruned = not_behind_magnitude(network, ready.plan, pruned, task.progress, step=ready.step)
    made, speedup = finished(ready, pruned, options), None
    if ready.by_clock:
        pruned, made, speedup = fast_enough(task, pruned, made)
    if options.units_and_zeros:
        pruned = zeros_beside_units(task, pruned)
        made = finished(ready, pruned, options)
    curve = curve or gate(task, pruned)
    predicted = predicted_error(network, ready.plan, pruned)
    evidence = None
    if task.drawn:
        evidence = gather_evidence(
            network, ready.plan, pruned, task.data.test, seconds=task.seconds,
            progress=task.progress,
        )  # fmt: skip
    network.observer.close()
    return Outcome(pruned, made, speedup, curve, predicted, evidence)


def prune_within(task: Task) -> tuple[Pruned, tuple[Point, ...]]:
    """Prune to what was asked for, or as far as the limit allows; and the points of that search.

    Raises:
        TargetError: no sparsity meets the limit.
    """
    network, plan, step, limit = task.network, task.ready.plan, task.ready.step, task.options.limit
    if not task.options.searches:
        return prune(network, plan, task.progress, step=step), ()
    assert task.judge is not None, "a search has a limit"
    assert limit is not None, "a search has a limit"
    return seek(network, plan, limit, task.judge, task.progress, step=step or stage)


def gate(task: Task, pruned: Pruned) -> tuple[Point, ...]:
    """The point where the result stands, where a limit goes with another target; else none.

    Raises:
        QualityError: it is beyond the limit.
    """
    options = task.options
    if task.judge is None or options.limit is None or options.searches:
        return ()
    point = task.judge.point(pruned.state)
    if not options.limit.allows(point):
        target = "--sparsity" if options.speedup is None else "--speedup"
        raise QualityError(
            f"the result misses the target: {point.described}.",
            hint=f"Nothing was written. Lower {target}, or leave it out to go as far as the limit "
            "allows.",
        )
    return (replace(point, within=True),)


def fast_enough(task: Task, pruned: Pruned, made: Smaller) -> tuple[Pruned, Smaller, Speedup]:
    """Measure what was made, and prune on until it is as fast as was asked for.

    Raises:
        TargetError: it is not, after ATTEMPTS.
    """
    ready, options = task.ready, task.options
    assert ready.step is not None, "a target in time is one of units"
    assert options.speedup is not None, "the target of the step"
    source, step = ready.source, ready.step
    wanted, closest = 1 / options.speedup, 1.0
    batch = timed_batch(task.data, options)
    for attempt in range(ATTEMPTS + 1):
        assert isinstance(pruned, PrunedUnits), "a UnitStep gives them"
        latency = measure_latency(source, made.model, batch, **options.session)
        if latency.ratio > wanted:  # before more goes: was it other work on the machine?
            latency = measure_latency(source, made.model, batch, seconds=LONGER, **options.session)
        if latency.ratio <= wanted:
            return pruned, made, Speedup(options.speedup, step.predicted(pruned.keep), latency)
        closest = min(closest, latency.ratio)
        if attempt == ATTEMPTS:
            break
        step = step.with_more(latency.ratio)
        again = step(ready.network, ready.plan, pruned, 1.0, task.progress)
        pruned = polished(ready.network, ready.plan, again, task.progress)
        made = finished(replace(ready, step=step), pruned, options)
    raise too_slow(options.speedup, closest)


def zeros_beside_units(task: Task, pruned: Pruned) -> PrunedUnits:
    """The network that lost units, with zeros in the weights that remain; see ``units.zeros``."""
    ready, options = task.ready, task.options
    assert ready.step is not None, "Options asks for a speedup"
    assert isinstance(pruned, PrunedUnits), "a UnitStep gives them"
    assert not isinstance(options.end, NM), "Options refuses N:M of units"
    return with_zeros(
        ready.network,
        ready.plan,
        ready.step.structure,
        pruned,
        options.end,
        task.progress,
        controlled=options.is_controlled,
    )
