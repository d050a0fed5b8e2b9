"""Zeros in what whole units left: the second half of one plan, towards the outputs of the original.

Units bring speed, zeros bring bytes. What is refitted is still the network under observation, with
the units that went as zeros; the graph is cut once, when both are done. Layers are fitted to what
they make of the network without the units, since there the layers make good for each other, and all
of them at once to the outputs of the original.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_ecp.pruning.control import not_behind_magnitude
from onnx_ecp.pruning.loop import Pruned, kept, prune, stage
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.collection import Measured
from onnx_ecp.statistics.layerwise import Network
from onnx_ecp.units.groups import Structure
from onnx_ecp.units.stages import PrunedUnits, masks


def with_zeros(
    network: Network,
    plan: Plan,
    structure: Structure,
    pruned: PrunedUnits,
    sparsity: float,
    progress: Progress = silent,
    *,
    controlled: bool = False,
) -> PrunedUnits:
    """Remove single weights of a network that lost units, in the stages of the plan.

    Args:
        network: what was pruned.
        plan: how; its targets are shares of all weights.
        structure: the units.
        pruned: without some of them.
        sparsity: share of all weights that is to be gone in the end, those of units included.
        progress: called as work goes on.
        controlled: whether the masks of magnitude take the place of those that stand behind them.
    """
    there = masks(structure, network, pruned.keep)
    gone = 1 - sum(map(np.count_nonzero, there.values())) / sum(x.size for x in there.values())
    if gone >= sparsity:
        text = f"whole units took {gone:.4g} of the weights, so no zeros were needed beside them."
        return replace(pruned, warnings=(*pruned.warnings, text))
    state = replace(pruned.state, keep=there)
    within = replace(network, original=state, aim=network.wanted)
    begin = Pruned(state, pruned.removed, pruned.ess, pruned.notes, pruned.warnings)

    def step(
        network: Network,
        plan: Plan,
        before: Pruned,
        share: float,
        progress: Progress,
        *,
        measured: Measured | None,
    ) -> Pruned:
        """A stage on the way from the share that units took."""
        start = begin if before.state is state else before
        way = (gone + share * (sparsity - gone)) / sparsity
        return kept(network, plan, start, way, lambda: stage(network, plan, start, way, progress))

    found = prune(within, plan, progress, step=step)
    if controlled:
        found = not_behind_magnitude(within, plan, found, progress, step=step)
    return PrunedUnits(
        found.state, found.removed, found.ess, found.notes, found.warnings, keep=pruned.keep
    )
