"""The control: is the result better than what the size of the weights alone gives?

Magnitude pruning costs one ranking. Where it leaves a smaller error on the validation samples, at
the same sparsity and by the measure that the report states, its masks take the place of the
method's, with or without the method's compensation, whichever stands better.
"""

from __future__ import annotations

from dataclasses import replace

from onnx_ecp.methods import METHODS
from onnx_ecp.pruning.loop import Pruned, Step, prune
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.pruning.standing import standing
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.layerwise import Network

CONTROL = "magnitude"


def not_behind_magnitude(
    network: Network,
    plan: Plan,
    found: Pruned,
    progress: Progress = silent,
    *,
    step: Step | None = None,
) -> Pruned:
    """Keep what was found, or what magnitude makes of the network where that stands better.

    Args:
        network: that was pruned.
        plan: how; its targets hold for the control too.
        found: by the plan's own method.
        progress: called as work goes on.
        step: what a stage does; None for single weights.
    """
    own = standing(network, found.state).error
    plain = replace(plan, method=METHODS[CONTROL], finetune_steps=0)
    control = prune(network, plain, step=step)
    least = standing(network, control.state).error
    if own <= least:
        return found
    repair = replace(METHODS[CONTROL], compensation=plan.method.compensation)
    repaired = prune(network, replace(plan, method=repair), progress, step=step)
    if standing(network, repaired.state).error < least:
        control = repaired
    text = (
        f"the masks are those of {CONTROL} pruning: on the validation samples the error was "
        f"{own:.3g} with the method's own masks and {least:.3g} with these; more calibration data "
        "help the method."
    )
    return replace(control, warnings=(*found.warnings, text))
