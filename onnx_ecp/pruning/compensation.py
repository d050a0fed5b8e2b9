"""What stays makes good for what went: biases, layer after layer, or all weights at once.

Each way is asked with a problem of its own (``methods/method.py``); here the problems are put
together from what was measured, and solutions are held against samples that they have not seen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import lcm

import numpy as np

from onnx_ecp.layers import Layer
from onnx_ecp.methods import BlockProblem, LayerProblem, Solved, admm, bias_shift
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.pruning.selection import NM
from onnx_ecp.runtime.lazy import LazyArrays
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.collection import Measured, row_sensitivities
from onnx_ecp.statistics.forward import Segment
from onnx_ecp.statistics.gram import Gram, mean_shift
from onnx_ecp.statistics.layerwise import Network, matrix
from onnx_ecp.statistics.moments import Moments
from onnx_ecp.statistics.observer import State
from onnx_ecp.statistics.sharding import grams_of, walk

# Why a solution is not kept.
RAISED = "it raised the error on the validation samples"
# Two errors are the same that differ by no more than this share of the layer's squared outputs:
# their rounding in float32, squared.
ROUNDING = 1e-12


def compensate(
    network: Network,
    plan: Plan,
    before: State,
    after: State,
    measured: Measured,
    progress: Progress = silent,
    *,
    may_reselect: Collection[str] = (),
) -> tuple[State, dict[str, str]]:
    """Remove what ``after.keep`` says, and let shifts and kept weights make good for it.

    Args:
        network: what is pruned.
        plan: how.
        before: the state that was measured.
        after: the same with new keep masks.
        measured: what the measuring told.
        progress: called as work goes on.
        may_reselect: stored tensors of which other weights may stay, as long as equally many do.

    Returns:
        The new state, and by layer name remarks about its compensation.
    """
    if not any(newly_removed(layer, before, after.keep).any() for layer in network.layers):
        return before, {}
    repair, state = plan.method.repair, replace(after, weights=removed(network, before, after))
    if repair.shifts:
        for layer in network.layers:
            keep = after.keep[layer.weight.tensor]
            gap = bias_shift(matrix(layer, before), measured.moments[layer.name], keep)
            state = state.with_shift(layer.name, before.shifts[layer.name] + gap)
    if repair.update is not None:
        return update_blocks(network, plan, before, state, measured), {}
    if repair.solve is None:
        return state, {}
    return solve_layers(network, plan, before, state, measured, progress, may_reselect=may_reselect)


def update_blocks(
    network: Network, plan: Plan, before: State, state: State, measured: Measured
) -> State:
    """New kept weights of all layers at once, block by block of the curvature."""
    repair = plan.method.repair
    assert repair.update is not None, "the caller has looked"
    layers = {layer.weight.tensor: layer for layer in network.layers}
    for block in measured.curvature:
        problem = BlockProblem(
            weight={n: matrix(layers[n], before) for n in block.rows},
            keep=state.keep,
            curvature=block,
            damping=plan.damping or repair.damping,
        )
        for name, weight in repair.update(problem).items():
            state = _with_solution(state, layers[name], Solved(weight, state.keep[name]))
    return state


def solve_layers(
    network: Network,
    plan: Plan,
    before: State,
    state: State,
    measured: Measured,
    progress: Progress = silent,
    *,
    may_reselect: Collection[str] = (),
) -> tuple[State, dict[str, str]]:
    """Solve one layer after the other, each in the network that the layers before it make now.

    Where the compensation is guarded, a solution stays only if its error on the guard samples is
    not larger than that of ``state``, with its new shifts or without. Weights that several layers
    share are solved for first, see ``solve_shared``; in turn their layers get new shifts alone.

    Returns:
        The new state, and by layer name why a solution was not kept.
    """
    repair = plan.method.repair
    state, notes = solve_shared(network, plan, before, state, measured, may_reselect)
    fit = walk(network, network.train, with_original=repair.weighted)
    guard = _Guard(network, plan, state, measured) if repair.guarded else None
    for done, segment in enumerate(network.segments, 1):
        check_deadline()
        layer = segment.layer
        tensor = layer.weight.tensor
        weights = measured.weights[layer.name] if repair.weighted else None
        seen = fit.gram(segment, state, weights, repair.shrinkage)
        if network.uses[tensor] == 1:
            moments = [measured.moments[layer.name]] if repair.weighted else []
            solved = _solved(network, plan, before, state, layer, seen, may_reselect, moments)
        else:
            original, current = matrix(layer, network.original), matrix(layer, state)
            shift = mean_shift(seen, original, current) if repair.shifts else None
            solved = Solved(current, state.keep[tensor], shift)
        better = None if guard is None else guard.better(segment, before, state, solved)
        if better is None:
            state = _with_solution(state, layer, solved)
        else:
            if network.uses[tensor] == 1:
                what = "refit" if better is state.shifts[layer.name] else "refit and bias shift"
                notes[layer.name] = f"last {what} rejected: {RAISED}"
            state = state.with_shift(layer.name, better)
        progress("refit", done, len(network.segments))
    return state, notes


def solve_shared(
    network: Network,
    plan: Plan,
    before: State,
    state: State,
    measured: Measured,
    may_reselect: Collection[str] = (),
) -> tuple[State, dict[str, str]]:
    """Solve for each weight that several layers share, all of them at once, before the others.

    The normal equations of its layers are added up. They need the inputs of the last of them, so
    nothing else has been solved yet that these could depend on.

    Returns:
        The new state, and by layer name why a solution was not kept.
    """
    repair = plan.method.repair
    shared = {x.name: x for x in network.layers if network.uses[x.weight.tensor] > 1}
    if not shared:
        return state, {}
    sums: dict[str, Gram] = {}
    means: dict[str, Gram] = {}
    for layer, seen in grams_of(
        network,
        network.train,
        state,
        shared,
        weights=measured.weights if repair.weighted else None,
        shrink=repair.shrinkage,
        with_original=repair.weighted,
    ):
        tensor = layer.weight.tensor
        groups = lcm(*(x.groups for x in shared.values() if x.weight.tensor == tensor))
        part = _summable(seen, groups, about_mean=repair.shifts)
        sums[tensor] = sums[tensor] + part if tensor in sums else part
        nothing = np.empty((0, 0, 0))  # a view would keep the matrices alive
        means[layer.name] = replace(seen, gram=nothing, cross=nothing)
    found, shifts = {}, dict(state.shifts)
    for layer in shared.values():
        tensor = layer.weight.tensor
        if tensor not in found:
            users = [x.name for x in shared.values() if x.weight.tensor == tensor]
            moments = [measured.moments[n] for n in users] if repair.weighted else []
            found[tensor] = _solved(
                network, plan, before, state, layer, sums[tensor], may_reselect, moments
            )
        if repair.shifts:
            original = matrix(layer, network.original)
            shifts[layer.name] = mean_shift(means[layer.name], original, found[tensor].weight)
    worse = _worse(network, plan, state, shared, found, shifts) if repair.guarded else set()
    notes = {}
    for name, layer in shared.items():
        tensor = layer.weight.tensor
        if tensor in worse:
            notes[name] = f"last refit rejected: {RAISED}"
        else:
            state = _with_solution(state, layer, replace(found[tensor], shift=shifts[name]))
    return state, notes


def _summable(seen: Gram, groups: int, *, about_mean: bool) -> Gram:
    """Sums to be added to those of other layers: a shift of its own takes the means of each.

    Args:
        seen: of one layer.
        groups: into how many its rows are to be divided.
        about_mean: whether it has such a shift; else the sums are about zero.
    """
    weight = np.repeat(seen.weight, groups // len(seen.weight))
    second, cross = (
        np.repeat(x, groups // len(x), axis=0) * weight[:, None, None]
        for x in (seen.covariance if about_mean else seen.second_moments, seen.cross_covariance)
    )
    zero = np.zeros(second.shape[:2])
    return Gram(weight, zero, zero, second, cross, zero)


def _worse(
    network: Network,
    plan: Plan,
    state: State,
    shared: Mapping[str, Layer],
    found: Mapping[str, Solved],
    shifts: Mapping[str, np.ndarray],
) -> set[str]:
    """The stored tensors whose solution raises the error of the layers that share it, summed."""
    rise = dict.fromkeys(found, 0.0)
    weights = row_sensitivities(
        network.observer, state, network.validation, size=network.size, memory=network.share(8)
    )
    run, shrink = walk(network, network.validation), plan.method.repair.shrinkage
    for segment in run.stops(state, shared):
        layer = segment.layer
        tensor, name = layer.weight.tensor, layer.name
        candidates = [
            (matrix(layer, state), state.shifts[name][None]),
            (found[tensor].weight, shifts[name][None]),
        ]
        energy, errors = run.errors(segment, state, weights[name], shrink, candidates)
        (old,), (new,) = errors
        rise[tensor] += new - old - ROUNDING * energy
    return {tensor for tensor, much in rise.items() if much > 0}


def _solved(
    network: Network,
    plan: Plan,
    before: State,
    state: State,
    layer: Layer,
    seen: Gram,
    may_reselect: Collection[str],
    moments: Sequence[Moments],
) -> Solved:
    """What the plan's compensation makes of one layer, or of all that share its weight."""
    repair, tensor = plan.method.repair, layer.weight.tensor
    assert repair.solve is not None, "the caller has looked"
    block, order = _block_of(plan, tensor)
    problem = LayerProblem(
        weight=matrix(layer, before),
        original=matrix(layer, network.original),
        present=before.keep[tensor],
        keep=state.keep[tensor],
        may_reselect=tensor in may_reselect and plan.method.may_reselect,
        gram=seen,
        damping=plan.damping or repair.damping,
        block=block,
        order=order,
        sensitivity=sum((x.bb / x.count for x in moments), np.zeros(layer.shape[0])),
        candidates=network.original.keep[tensor],
    )
    if tensor in may_reselect and plan.method.support == "admm":
        problem = replace(problem, keep=admm.chosen(problem, brief=not plan.last))
    return repair.solve(problem)


def _block_of(plan: Plan, tensor: str) -> tuple[int, np.ndarray | None]:
    """M and the order of columns where the tensor is to have an N:M pattern."""
    group = next(group for group in plan.groups if tensor in group.tensors)
    if isinstance(group.sparsity, NM) and group.masks is None:
        return group.sparsity.m, group.orders[tensor]
    return 0, None


def _with_solution(state: State, layer: Layer, solved: Solved) -> State:
    tensor = layer.weight.tensor
    stored = layer.weight.unmatrix(solved.weight).astype(state.weights[tensor].dtype)
    shift = state.shifts[layer.name] if solved.shift is None else solved.shift
    state = replace(state, keep={**state.keep, tensor: solved.keep})
    return state.with_layer(layer, stored, shift)


class _Guard:
    """Judges solutions on samples that they were not fitted to."""

    def __init__(self, network: Network, plan: Plan, state: State, measured: Measured) -> None:
        self._shrink, self._measured = plan.method.repair.shrinkage, measured
        self._run = walk(network, network.validation)
        self._weights = row_sensitivities(
            network.observer, state, network.validation, size=network.size, memory=network.share(8)
        )

    def better(
        self, segment: Segment, before: State, state: State, solved: Solved
    ) -> np.ndarray | None:
        """The shift with which the layer's weighted error is lower without the solution, if any.

        Args:
            segment: that ends with the layer's input.
            before: the state before anything went, whose shift may be better than a new one.
            state: with the shifts of ``bias_shift``, and what the layers before it became.
            solved: the solution.
        """
        name, current = segment.layer.name, matrix(segment.layer, state)
        shift, old = state.shifts[name], before.shifts[name]
        new = shift if solved.shift is None else solved.shift
        candidates = [(solved.weight, new[None]), (current, np.stack([shift, old]))]
        energy, errors = self._run.errors(
            segment, state, self._weights[name], self._shrink, candidates, self._units(name)
        )
        (found,), (with_shift, without) = errors
        # Where nothing went, and nothing before it changed, all are the same but for rounding.
        rounding = ROUNDING * energy
        if found <= min(with_shift, without) + rounding:
            return None
        return old if without < with_shift - rounding else shift

    def _units(self, name: str) -> np.ndarray | None:
        """(out,): mean sensitivity of each unit, so that units of any scale count as outputs do."""
        moments = self._measured.moments.get(name)
        return None if moments is None or not moments.bb.any() else moments.bb / moments.bb.mean()


def newly_removed(layer: Layer, before: State, keep: dict[str, np.ndarray]) -> np.ndarray:
    """(out, in) bool: what was there before and goes now."""
    tensor = layer.weight.tensor
    return np.asarray(before.keep[tensor] & ~keep[tensor])


def removed(network: Network, before: State, after: State) -> LazyArrays:
    """Stored tensors with zeros where the new masks say so, everything else bit by bit the same.

    Those that lie in an external file are masked when they are asked for.
    """
    weights = {layer.weight.tensor: layer.weight for layer in network.layers}
    values, keep = before.weights, after.keep  # nothing else of the states is held on to

    def masked(name: str) -> np.ndarray:
        stored = values[name]
        return np.where(weights[name].layout(keep[name]), stored, stored.dtype.type(0))

    in_memory = {name: masked(name) for name in weights if before.weights.knows(name)}
    return LazyArrays(weights, masked, in_memory)
