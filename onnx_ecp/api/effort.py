"""The best effort that fits in a time budget, from a first stage whose time is taken."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from onnx_ecp.api.options import Options
from onnx_ecp.api.preparation import Job, make_plan
from onnx_ecp.methods import EFFORTS
from onnx_ecp.pruning.joint_refit import ROUNDS, STEPS
from onnx_ecp.pruning.loop import Pruned, observe, prune
from onnx_ecp.runtime.progress import Progress, silent

# A step of the joint refit takes two passes over the samples and a look at others; so many
# times what observing takes.
PASSES = 2.0
# What estimates may be short by.
MARGIN = 1.2


@dataclass(frozen=True)
class Chosen:
    """What a time budget made of a run.

    Args:
        options: with the effort that fits.
        ready: with the plan of these options.
        found: the result, where nothing better than the first stage fits; else None.
        told: what was chosen and what was left out, for the user.
    """

    options: Options
    ready: Job
    found: Pruned | None
    told: str


def within_budget(
    ready: Job, options: Options, elapsed: float, progress: Progress = silent
) -> Chosen:
    """Run the shortest recipe, and choose the best one that the rest of the budget allows.

    Args:
        ready: what is pruned.
        options: with a time budget.
        elapsed: seconds that are gone already.
        progress: called as work goes on.
    """
    assert options.time_budget is not None, "the caller has looked"
    began = time.monotonic()
    fast = _with_effort(options, "fast")
    drawn = ready.plan.with_levels
    plan = replace(make_plan(ready.network.layers, fast), with_levels=drawn)
    measured = observe(ready.network, plan, ready.network.original, progress)
    observing = time.monotonic() - began
    found = prune(ready.network, plan, progress, measured=measured, step=ready.step)
    took = time.monotonic() - began
    left = options.time_budget - elapsed - took
    times = _estimates(options, took / plan.method.stages, observing)
    fitting = [name for name, seconds in times.items() if seconds <= left]
    best = fitting[-1] if fitting else "fast"
    chosen = _with_effort(options, best)
    told = _told(options.time_budget, best, {n: s for n, s in times.items() if n not in fitting})
    if best == "fast":
        return Chosen(chosen, replace(ready, plan=plan), found, told)
    plan = replace(make_plan(ready.network.layers, chosen), with_levels=drawn)
    return Chosen(chosen, replace(ready, plan=plan), None, told)


def _estimates(options: Options, stage: float, observing: float) -> dict[str, float]:
    """Seconds by name of the efforts above the first, the shortest first."""
    found = {}
    for name, effort in list(EFFORTS.items())[1:]:
        stages = effort.unit_stages if options.by_units else effort.stages
        joint = PASSES * observing * STEPS * min(ROUNDS, stages)
        found[name] = MARGIN * (stages * stage + joint * (effort.compensation == "joint"))
    return found


def _with_effort(options: Options, name: str) -> Options:
    return replace(options, effort=name, time_budget=None)


def _told(budget: float, best: str, left_out: dict[str, float]) -> str:
    text = f"of {budget:g} s the effort {best} fits"
    if left_out:
        listed = ", ".join(f"{name} (about {seconds:.0f} s)" for name, seconds in left_out.items())
        text += f"; left out: {listed}"
    return text
