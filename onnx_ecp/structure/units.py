"""The loop one level up: observe, score, select and compensate, with whole units for weights.

The network under observation keeps its size: of a removed unit only the columns of its consumers
go, so that nothing sees the rows of its producers any longer. The graph is cut once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnx_ecp.errors import TargetError
from onnx_ecp.gradients.observer import State
from onnx_ecp.measurement import Measured, Progress, effective_sample_size, measure, silent
from onnx_ecp.methods import METHODS
from onnx_ecp.pruning import (
    Network,
    Plan,
    Pruned,
    compensate,
    importances,
    observe,
    schedule,
)
from onnx_ecp.runtime import check_deadline
from onnx_ecp.structure.groups import Structure
from onnx_ecp.structure.importance import UnitObserver, by_unit
from onnx_ecp.structure.selection import Budget, budget, choose


@dataclass(frozen=True)
class Goal:
    """How much is to go, and what is given for it.

    Args:
        share: of the cost that goes.
        target: cost that the share is of, a name in COSTS.
        cost: what importance is divided by, a name in COSTS.
        multiple: the number of units that stay in a group is a multiple of it.
    """

    share: float
    target: str = "params"
    cost: str = "params"
    multiple: int = 1


def remove_units(
    network: Network, plan: Plan, structure: Structure, goal: Goal, progress: Progress = silent
) -> tuple[Pruned, np.ndarray]:
    """Remove units until the goal is reached, in as many stages as the method wants.

    Args:
        network: what is pruned; its layers are those of the structure.
        plan: its method, positions, damping and seed; its groups are of weights and not used.
        structure: the units.
        goal: how much goes.
        progress: called as work goes on.

    Returns:
        The pruned network, and which units stay: (units,) bool.

    Raises:
        TargetError: so much cannot go.
    """
    positions = _positions(network)
    costs = budget(structure, network.layers, goal.target, positions)
    ranked_by = budget(structure, network.layers, goal.cost, positions)
    keep = np.ones(structure.units, np.bool_)
    whole, result = costs.total(keep), Pruned(network.original)
    for share in schedule(plan.method.stages):
        check_deadline()
        measured, scores = _scores(network, plan, structure, result.state, progress)
        left = 1 - goal.share * share
        keep = choose(
            scores,
            keep,
            structure.groups,
            costs,
            ranked_by,
            target=left * whole,
            floor=plan.method.floor * left,
            multiple=goal.multiple,
        )
        result = _compensated(network, plan, structure, result, keep, measured, progress)
    _check_reached(costs, keep, goal)
    state = replace(result.state, keep=masks(structure, network, keep))
    return replace(result, state=state), keep


def masks(
    structure: Structure, network: Network, keep: np.ndarray, *, rows: bool = True
) -> dict[str, np.ndarray]:
    """Keep masks of weights, (out, in) by stored tensor, from those of units (units,).

    Without ``rows`` those of the producers are left in.
    """
    found = {}
    for layer in network.layers:
        mask = network.original.keep[layer.weight.tensor] & structure.columns_kept(layer.name, keep)
        if rows:
            mask &= structure.rows_kept(layer.name, keep)[:, None]
        found[layer.weight.tensor] = mask
    return found


def _scores(
    network: Network, plan: Plan, structure: Structure, state: State, progress: Progress
) -> tuple[Measured, np.ndarray]:
    """What was measured, and the importance of every unit (units,)."""
    method = plan.method
    if method.importance is not METHODS["ecp"].importance:
        measured = observe(network, plan, state, progress)
        return measured, by_unit(structure, importances(network, plan, state, measured))
    units = UnitObserver(structure, network.layers, state)
    measured = measure(
        network.observer,
        state,
        network.fit,
        size=network.size,
        positions=plan.positions,
        visit=units,
        progress=progress,
    )
    return measured, units.importance(measured.moments, method.shrinkage)


def _compensated(
    network: Network,
    plan: Plan,
    structure: Structure,
    before: Pruned,
    keep: np.ndarray,
    measured: Measured,
    progress: Progress,
) -> Pruned:
    """The network without the units that went in one stage."""
    state = before.state
    after = replace(state, keep=masks(structure, network, keep, rows=False))
    state, notes = compensate(network, plan, state, after, measured, progress)
    ess = {name: effective_sample_size(s) for name, s in measured.weights.items()}
    return Pruned(state, {}, ess, before.notes | notes)


def _positions(network: Network) -> dict[str, int]:
    """By layer name, how often a sample applies it."""
    facts = network.observer.facts
    return {
        layer.name: max(int(np.prod(facts[layer.output].shape[1:])) // layer.shape[0], 1)
        for layer in network.layers
    }


def _check_reached(costs: Budget, keep: np.ndarray, goal: Goal) -> None:
    whole, left = costs.total(np.ones_like(keep)), costs.total(keep)
    if left <= (1 - goal.share) * whole or not len(keep):
        return
    raise TargetError(
        f"{goal.share:.4g} of the {goal.target} cannot go with whole units: "
        f"{1 - left / whole:.4g} is the most.",
        hint="Ask for less, or use --granularity weight.",
    )


def kept_weights(
    network: Network, structure: Structure, state: State, keep: np.ndarray
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Weights (out, in) and shifts (out,) of what stays, by layer name: what ``store`` takes."""
    weights, shifts = {}, {}
    for layer in network.layers:
        rows = structure.rows_kept(layer.name, keep)
        columns = structure.columns_kept(layer.name, keep)
        matrix = layer.weight.matrix(state.weights[layer.weight.tensor])
        weights[layer.name] = matrix[rows][:, columns]
        shifts[layer.name] = state.shifts[layer.name][rows]
    return weights, shifts
