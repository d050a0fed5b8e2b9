"""The loop one level up: observe, score, select and compensate, with whole units for weights.

The network under observation keeps its size: of a removed unit only the columns of its consumers
go, so that nothing sees the rows of its producers any longer. The graph is cut once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_ecp.errors import TargetError
from onnx_ecp.pruning.compensation import compensate
from onnx_ecp.pruning.levels import Levels
from onnx_ecp.pruning.loop import Pruned, importances, not_finite, observe, with_grams
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.runtime.cache import recalled
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.collection import Measured, Visit, measure
from onnx_ecp.statistics.layerwise import Network, matrix
from onnx_ecp.statistics.observer import State
from onnx_ecp.units.choice import Budget, budget, choose, in_order, last_ones, multiples
from onnx_ecp.units.elimination import (
    OutputMetric,
    scores_of_keys,
    scores_of_reader,
    scores_of_summed,
    steps_of,
)
from onnx_ecp.units.groups import STAYS, Group, Structure
from onnx_ecp.units.importance import UnitObserver, met_by_unit, read_by_unit
from onnx_ecp.units.latency import BLOCK, Watch, liked

# A model is chosen to be faster than asked for by so much: two measurements differ.
MARGIN = 0.98


@dataclass(frozen=True)
class Goal:
    """How much is to go, and what is given for it.

    Args:
        share: of the cost that goes.
        target: cost that the share is of, a name in COSTS.
        cost: what importance is divided by, a name in COSTS.
        multiple: the number of units that stay in a group is a multiple of it; None: one that
            kernels like.
        block: with None, channels that a block of the machine's convolutions has.
        required: whether less is an error, or the share is only where a search ends at the latest.
    """

    share: float
    target: str = "params"
    cost: str = "params"
    multiple: int | None = 1
    required: bool = True
    block: int = BLOCK


@dataclass(frozen=True)
class PrunedUnits(Pruned):
    """What a stage gave.

    Args:
        keep: (units,) bool, True where a unit stays.
    """

    keep: np.ndarray = field(default_factory=lambda: np.ones(0, np.bool_))

    def removes_no_more_than(self, other: Pruned) -> bool:
        """Whether the same units are gone; weights that were zero before tell nothing."""
        if isinstance(other, PrunedUnits):
            return np.array_equal(self.keep, other.keep)
        return bool(self.keep.all())


@dataclass(frozen=True)
class _Staged:
    """A stage as it is kept: what it gave, and by group how many units stay in the end."""

    found: PrunedUnits
    planned: tuple[int, ...]


class UnitStep:
    """One stage of removing units: the ``step`` of ``prune`` and ``seek``.

    Where the target is speed, the first stage plans how many units of every group stay in the end:
    in steps that kernels like, or by the clock. All stages are on the way there.

    Args:
        network: what is pruned; its layers are those of the structure.
        structure: its units.
        goal: what a share of 1 is.
        watch: for costs in time.
        biases: by layer name, (out,): of the layers whose units are summed.
        margin: of the latency that is the target, what units are chosen to take.
    """

    def __init__(
        self,
        network: Network,
        structure: Structure,
        goal: Goal,
        watch: Watch | None = None,
        margin: float = MARGIN,
        biases: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        positions = positions_of(network)

        def counted(cost: str) -> Budget:
            if cost != "latency":
                return budget(structure, network.layers, cost, positions)
            assert watch is not None, "costs in time need one"
            return Budget(structure, watch.times, stepped=True)

        self.structure, self.goal, self._network = structure, goal, network
        self._watch, self._margin = watch, margin
        self._biases = biases or {}
        self.costs, self._ranked_by = counted(goal.target), counted(goal.cost)
        self._convolutions = {x.name for x in network.layers if "Conv" in x.op}
        self._planned: list[int] = []  # how many units of every group stay in the end

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
        """Observe, score, select and compensate once; see ``pruning.stage``.

        The result is kept where there is a cache, but for what depends on the clock.
        """

        def result() -> _Staged:
            found = self._stage(network, plan, before, share, progress)
            return _Staged(found, tuple(self._planned))

        if self._watch is not None:
            return result().found
        staged = recalled(
            (
                f"a stage of {self.structure.units} units",
                lambda: (
                    *(network.identity, plan, plan.method.repair, before, share),
                    *(self.structure, self.goal, self._biases, self._planned),
                ),
            ),
            result,
            (_Staged, PrunedUnits, State, Levels),
            lambda staged: staged.found.keep.shape == (self.structure.units,),
        )
        self._planned = list(staged.planned)
        return staged.found

    def _stage(
        self, network: Network, plan: Plan, before: Pruned, share: float, progress: Progress
    ) -> PrunedUnits:
        whole = np.ones(self.structure.units, np.bool_)
        keep = before.keep if isinstance(before, PrunedUnits) else whole
        left = 1 - share * self.goal.share
        going = max(1 - left * self.costs.total(whole) / self.costs.total(keep), 0.0)
        measured, scores = _scores(
            network, plan, self.structure, self._biases, before.state, keep, going, progress
        )
        steps = self.goal.multiple is None and self.goal.target == "flops"
        if steps or self.goal.target == "latency":
            self._planned = self._planned or self._sizes(plan, scores, keep)
            rest = self._on_the_way(scores, keep, share)
        else:
            rest = self._within(plan, scores, keep, left)
        state, notes = _without(
            network, plan, self.structure, self._biases, before.state, rest, measured, progress
        )
        ess = measured.sample_sizes
        removed = dict(before.removed)
        for group in self.structure.groups:  # heads and their dimensions have the same producers
            first, units = group.producers[0], group.units[(keep & ~rest)[group.units]]
            removed[first] = removed.get(first, 0.0) + float(scores[units].sum())
        return PrunedUnits(state, removed, ess, notes, before.warnings, keep=rest)

    def _left(self, keep: np.ndarray) -> float:
        """What is left of the goal's cost; of weights, those that were zero before count as gone.

        So a share of zeros is counted as it is with single weights, and as the report counts it. A
        search for a limit counts none: units without weights are to go first.
        """
        network = self._network
        counted = self.goal.required and self.goal.target == "params"
        if not counted or all(x.all() for x in network.original.keep.values()):
            return self.costs.total(keep)
        left = masks(self.structure, network, keep)
        return float(sum(np.count_nonzero(left[x.weight.tensor]) for x in network.layers))

    def _sizes(self, plan: Plan, scores: np.ndarray, keep: np.ndarray) -> list[int]:
        """By group, how many units stay in the end."""
        if self.goal.target == "latency":
            return self._by_clock(plan, scores, keep)
        rest = self._within(plan, scores, keep, 1 - self.goal.share)
        return [int(rest[group.units].sum()) for group in self.structure.groups]

    def _within(self, plan: Plan, scores: np.ndarray, keep: np.ndarray, left: float) -> np.ndarray:
        """(units,) bool: what stays, where a share of the cost is left."""
        target = left * self.costs.total(np.ones_like(keep))
        floor = plan.method.floor * left
        return self._chosen(scores, keep, lambda x: self._left(x) <= target, floor)

    def _chosen(
        self,
        scores: np.ndarray,
        keep: np.ndarray,
        fits: Callable[[np.ndarray], bool],
        floor: float,
    ) -> np.ndarray:
        """(units,) bool: what stays; see ``choose``."""
        groups = self.structure.groups
        return choose(scores, keep, groups, self._ranked_by, fits, floor=floor, stops=self._stops)

    def _stops(self, group: Group) -> np.ndarray:
        """(k,): numbers of units at which a group may stop."""
        if self.goal.multiple is not None:
            return multiples(group, self.goal.multiple)
        of_convolutions = self._convolutions & {*group.producers, *group.consumers}
        return liked(group, self.goal.block if of_convolutions else BLOCK)

    def _by_clock(self, plan: Plan, scores: np.ndarray, keep: np.ndarray) -> list[int]:
        """By group, how many units stay in a model that is fast enough, or as fast as can be.

        Raises:
            TargetError: it is not fast enough, whatever goes, and that is required.
        """
        assert self._watch is not None, "a target in time needs one"
        ratio, wanted = self._watch.ratio, 1 - self.goal.share
        floor = plan.method.floor * wanted
        least = ratio(self._chosen(scores, keep, lambda rest: False, floor))
        if least > wanted and self.goal.required:
            raise too_slow(1 / wanted, least)
        rest = self._chosen(scores, keep, lambda x: ratio(x) <= self._margin * wanted, floor)
        return [int(rest[group.units].sum()) for group in self.structure.groups]

    def _on_the_way(self, scores: np.ndarray, keep: np.ndarray, share: float) -> np.ndarray:
        """(units,) bool: what stays at this share of the way to what is planned."""
        rest, held = keep.copy(), last_ones(self.structure, scores, keep)
        for group, planned in zip(self.structure.groups, self._planned, strict=True):
            worst, least = in_order(group, scores, keep, held)
            number = len(group.units) - round(share * (len(group.units) - planned))
            rest[worst[: max(len(worst) - max(number, least), 0)]] = False
        return rest

    def predicted(self, keep: np.ndarray) -> float:
        """How many times as fast the layers are that lose units, by the costs of each alone."""
        return self.costs.total(np.ones_like(keep)) / self.costs.total(keep)

    def with_more(self, ratio: float) -> UnitStep:
        """The same step towards a model that is faster still: the last one took ``ratio``."""
        margin = self._margin * min((1 - self.goal.share) / ratio, MARGIN)
        given = (self._network, self.structure, self.goal, self._watch, margin)
        return UnitStep(*given, self._biases)

    def check_reached(self, keep: np.ndarray) -> None:
        """TargetError where the floors kept more than a required goal allows, but of time."""
        if not self.goal.required:
            return
        whole, left = self.costs.total(np.ones_like(keep)), self._left(keep)
        if self.goal.target != "latency" and left > (1 - self.goal.share) * whole:
            what = {"params": "weights", "flops": "multiplications"}[self.goal.target]
            raise TargetError(
                f"{100 * self.goal.share:.4g} % of the {what} cannot go with whole units: "
                f"{100 * (1 - left / whole):.4g} % is the most, since something stays everywhere.",
                hint="Ask for less, or use --granularity weight.",
            )


def too_slow(asked: float, ratio: float) -> TargetError:
    """The error that says how fast a model could become.

    Args:
        asked: times as fast as the original.
        ratio: of the latencies, the least that was measured.
    """
    return TargetError(
        f"the model cannot be {asked:g} times as fast by removing units: {1 / ratio:.3g} times "
        "is the most that was measured.",
        hint="Ask for less. What is no Gemm, MatMul or Conv stays as slow as it is, and other "
        "work on the machine makes measurements uncertain.",
    )


def masks(
    structure: Structure, network: Network, keep: np.ndarray, *, rows: bool = True
) -> dict[str, np.ndarray]:
    """Keep masks of weights, (out, in) by stored tensor, from those of units (units,).

    Without ``rows`` those of the producers are left in, but for queries and keys.
    """
    found = {}
    for layer in network.layers:
        mask = network.original.keep[layer.weight.tensor] & structure.columns_kept(layer.name, keep)
        there = structure.rows_kept if rows else structure.rows_read
        mask &= there(layer.name, keep)[:, None]
        found[layer.weight.tensor] = mask
    return found


def _scores(
    network: Network,
    plan: Plan,
    structure: Structure,
    biases: Mapping[str, np.ndarray],
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
        biases: by layer name, (out,): of the layers whose units are summed.
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
            network.train,
            size=network.size,
            positions=plan.positions,
            visit=visit,
            memory=network.share(2),
            progress=progress,
        )

    if method.unit_score == "bias":
        units = UnitObserver(structure, network.layers, state)
        measured = measured_with(units)
        read = units.importance(measured.moments, method.shrinkage)
        weights = importances(network, plan, state, measured)
        return measured, read + met_by_unit(structure, weights)
    if method.unit_score == "refit":
        metric = OutputMetric.of(structure)
        measured = measured_with(metric)
        return measured, _after_refit(
            network, plan, structure, biases, state, keep, going, measured, metric
        )
    measured = observe(network, plan, state, progress)
    weights = importances(network, plan, state, measured)
    return measured, read_by_unit(structure, weights) + met_by_unit(structure, weights)


def _after_refit(
    network: Network,
    plan: Plan,
    structure: Structure,
    biases: Mapping[str, np.ndarray],
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
        weight = matrix(layer, state)
        sensitivity = metric.sums[layer.name] / measured.moments[layer.name].count
        if not (np.isfinite(sensitivity).all() and np.isfinite(gram.covariance).all()):
            raise not_finite(layer)
        for units in structure.units_at(structure.columns[layer.name]):
            if not np.any(units >= 0):
                continue
            found = scores_of_reader(
                weight,
                gram,
                sensitivity,
                units,
                structure.columns_kept(layer.name, keep),
                plan.damping or plan.method.damping,
                steps_of(structure, layer, units, keep, going),
            )
            total[list(found)] += list(found.values())
        if structure.keys[layer.name].any():
            keys = np.where(structure.keys[layer.name], structure.dimensions(layer.name), STAYS)
            total += scores_of_keys(weight, gram, sensitivity, keys, len(total))
        if structure.silent[layer.name].any():
            rows = np.where(structure.silent[layer.name], structure.rows[layer.name], STAYS)
            bias = biases[layer.name] + state.shifts[layer.name]
            units = structure.units_at(rows)[0]
            total += scores_of_summed(weight, gram, bias, sensitivity, units, len(total))
    return total


def _without(
    network: Network,
    plan: Plan,
    structure: Structure,
    biases: Mapping[str, np.ndarray],
    state: State,
    keep: np.ndarray,
    measured: Measured,
    progress: Progress,
) -> tuple[State, dict[str, str]]:
    """The network without the units that went in one stage, and remarks by layer name."""
    read = masks(structure, network, keep, rows=False)
    zero = {
        name: rows & ~structure.rows_kept(name, keep)
        for name, rows in structure.silent.items()
        if rows.any()
    }
    shifts = {n: np.where(rows, -biases[n], state.shifts[n]) for n, rows in zero.items()}
    without = replace(state, keep=read, shifts=state.shifts | shifts, held=zero)
    after, notes = compensate(network, plan, state, without, measured, progress)
    return replace(after, keep=masks(structure, network, keep)), notes


def positions_of(network: Network) -> dict[str, int]:
    """By layer name, how often a sample applies it."""
    facts = network.observer.facts

    def of_one(tensor: str) -> tuple[int, ...]:
        return (1, *facts[tensor].shape[1:])

    return {
        layer.name: max(layer.uses(of_one(layer.input), of_one(layer.output)), 1)
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
