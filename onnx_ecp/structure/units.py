"""The loop one level up: observe, score, select and compensate, with whole units for weights.

The network under observation keeps its size: of a removed unit only the columns of its consumers
go, so that nothing sees the rows of its producers any longer. The graph is cut once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_ecp.errors import TargetError
from onnx_ecp.gradients.observer import State
from onnx_ecp.measurement import (
    Measured,
    Progress,
    Visit,
    effective_sample_size,
    measure,
    silent,
)
from onnx_ecp.methods import METHODS
from onnx_ecp.pruning import (
    Network,
    Plan,
    Pruned,
    compensate,
    importances,
    observe,
    with_grams,
)
from onnx_ecp.structure.elimination import OutputMetric, scores_of_reader, steps_of
from onnx_ecp.structure.groups import Structure
from onnx_ecp.structure.importance import UnitObserver, by_unit
from onnx_ecp.structure.selection import budget, choose


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


@dataclass(frozen=True)
class PrunedUnits(Pruned):
    """What a stage gave.

    Args:
        keep: (units,) bool, True where a unit stays.
    """

    keep: np.ndarray = field(default_factory=lambda: np.ones(0, np.bool_))


class UnitStep:
    """One stage of removing units: the ``step`` of ``prune`` and ``seek``.

    Args:
        network: what is pruned; its layers are those of the structure.
        structure: its units.
        goal: what a share of 1 is.
    """

    def __init__(self, network: Network, structure: Structure, goal: Goal) -> None:
        positions = positions_of(network)
        self.structure, self.goal = structure, goal
        self.costs = budget(structure, network.layers, goal.target, positions)
        self._ranked_by = budget(structure, network.layers, goal.cost, positions)

    def __call__(
        self,
        network: Network,
        plan: Plan,
        before: Pruned,
        share: float,
        progress: Progress = silent,
        *,
        measured: Measured | None = None,
    ) -> PrunedUnits:
        """Observe, score, select and compensate once; see ``pruning.stage``."""
        whole = np.ones(self.structure.units, np.bool_)
        keep = before.keep if isinstance(before, PrunedUnits) else whole
        left = 1 - self.goal.share * share
        going = 1 - left * self.costs.total(whole) / self.costs.total(keep)
        measured, scores = _scores(
            network, plan, self.structure, before.state, keep, going, progress
        )
        rest = choose(
            scores,
            keep,
            self.structure.groups,
            self.costs,
            self._ranked_by,
            target=left * self.costs.total(whole),
            floor=plan.method.floor * left,
            multiple=self.goal.multiple,
        )
        state, notes = _without(
            network, plan, self.structure, before.state, rest, measured, progress
        )
        ess = {name: effective_sample_size(s) for name, s in measured.weights.items()}
        gone = {
            group.producers[0]: before.removed.get(group.producers[0], 0.0)
            + float(scores[group.units][(keep & ~rest)[group.units]].sum())
            for group in self.structure.groups
        }
        return PrunedUnits(state, gone, ess, notes, keep=rest)

    def check_reached(self, keep: np.ndarray) -> None:
        """TargetError where the floors kept more than the goal allows."""
        whole, left = self.costs.total(np.ones_like(keep)), self.costs.total(keep)
        if left > (1 - self.goal.share) * whole:
            what = {"params": "weights", "flops": "multiplications"}[self.goal.target]
            raise TargetError(
                f"{100 * self.goal.share:.4g} % of the {what} cannot go with whole units: "
                f"{100 * (1 - left / whole):.4g} % is the most, since something stays everywhere.",
                hint="Ask for less, or use --granularity weight.",
            )


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
    network: Network,
    plan: Plan,
    structure: Structure,
    state: State,
    keep: np.ndarray,
    going: float,
    progress: Progress,
) -> tuple[Measured, np.ndarray]:
    """What was measured, and the importance of every unit (units,).

    Args:
        network: what is pruned.
        plan: how.
        structure: its units.
        state: what is observed.
        keep: (units,) bool, what is still there.
        going: share of the cost that is to go in this stage.
        progress: called as work goes on.
    """
    method = plan.method

    def measured_with(visit: Visit) -> Measured:
        return measure(
            network.observer,
            state,
            network.fit,
            size=network.size,
            positions=plan.positions,
            visit=visit,
            memory=network.share(2),
            progress=progress,
        )

    if method.importance is METHODS["ecp"].importance:
        units = UnitObserver(structure, network.layers, state)
        measured = measured_with(units)
        return measured, units.importance(measured.moments, method.shrinkage)
    if method.importance is METHODS["obs"].importance:
        metric = OutputMetric.of(structure)
        measured = measured_with(metric)
        return measured, _after_refit(
            network, plan, structure, state, keep, going, measured, metric
        )
    measured = observe(network, plan, state, progress)
    return measured, by_unit(structure, importances(network, plan, state, measured))


def _after_refit(
    network: Network,
    plan: Plan,
    structure: Structure,
    state: State,
    keep: np.ndarray,
    going: float,
    measured: Measured,
    metric: OutputMetric,
) -> np.ndarray:
    """(units,): importance when readers are refitted, summed over them; see ``elimination``."""
    total = np.zeros(structure.units)
    for layer, gram in with_grams(network, plan, state, measured):
        if layer.name not in metric.readers:
            continue
        assert gram is not None, "the method needs Gram matrices"
        found = scores_of_reader(
            layer.weight.matrix(state.weights[layer.weight.tensor]).astype(np.float64),
            gram,
            metric.sums[layer.name] / measured.moments[layer.name].count,
            structure.columns[layer.name],
            structure.columns_kept(layer.name, keep),
            plan.damping or plan.method.damping,
            steps_of(structure, layer, keep, going),
        )
        total[list(found)] += list(found.values())
    return total


def _without(
    network: Network,
    plan: Plan,
    structure: Structure,
    state: State,
    keep: np.ndarray,
    measured: Measured,
    progress: Progress,
) -> tuple[State, dict[str, str]]:
    """The network without the units that went in one stage, and remarks by layer name."""
    read = masks(structure, network, keep, rows=False)
    after, notes = compensate(network, plan, state, replace(state, keep=read), measured, progress)
    return replace(after, keep=masks(structure, network, keep)), notes


def positions_of(network: Network) -> dict[str, int]:
    """By layer name, how often a sample applies it."""
    facts = network.observer.facts
    return {
        layer.name: max(int(np.prod(facts[layer.output].shape[1:])) // layer.shape[0], 1)
        for layer in network.layers
    }


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
