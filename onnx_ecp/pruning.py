"""The loop: observe, score, select, compensate; repeated in stages on the current network.

One-shot pruning is one stage. Nothing here knows files or reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from math import lcm
from operator import add
from typing import Protocol

import numpy as np

from onnx_ecp.calibration import Calibration
from onnx_ecp.curvature import CurvatureObserver
from onnx_ecp.errors import ModelError
from onnx_ecp.finetune import finetune
from onnx_ecp.gradients.observer import Observer, State
from onnx_ecp.joint import ROUNDS, memory_needed, refit_jointly
from onnx_ecp.layers import Layer
from onnx_ecp.measurement import (
    Measured,
    Progress,
    effective_sample_size,
    measure,
    measure_activations,
    row_sensitivities,
    silent,
)
from onnx_ecp.methods import (
    BlockProblem,
    LayerProblem,
    MaskProblem,
    Method,
    Solved,
    View,
    bias_shift,
)
from onnx_ecp.model import printable
from onnx_ecp.objective import BATCH, Objective
from onnx_ecp.refit import Gram, excess, mean_shift
from onnx_ecp.runtime import check_deadline
from onnx_ecp.selection import NM, Group, select
from onnx_ecp.shelf import Computed, Shelf
from onnx_ecp.walk import Passage, Segment, segments

# What the curvature couples: all weights of the network, or those of a stored tensor.
BLOCKS = ("network", "layer")
# Why a solution is not kept.
RAISED = "it raised the error on the samples that judge it"


@dataclass(frozen=True)
class Network:
    """What is pruned, and the data it is pruned on.

    Args:
        observer: of the layers.
        original: the state before pruning.
        fit: calibration samples for importance and compensation.
        guard: other calibration samples, on which a refit must not be worse than a bias shift.
        size: batch size.
        memory: bytes that statistics and activations may take, None for any number: half of it
            goes to moments and the sensitivities of rows, a quarter to scores and a quarter to the
            activations of a walk. What does not fit lies in temporary files.
    """

    observer: Observer
    original: State
    fit: Calibration
    guard: Calibration
    size: int
    memory: int | None = None

    def share(self, part: int) -> int | None:
        """One of so many equal parts of the memory."""
        return None if self.memory is None else self.memory // part

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are pruned."""
        return self.observer.layers

    @property
    def objective(self) -> Objective:
        """What pruning should leave as it was."""
        return Objective(self.observer, self.original)

    @cached_property
    def segments(self) -> list[Segment]:
        """The cuts of the graph that a refit walks along."""
        return segments(self.observer, self.layers)


@dataclass(frozen=True)
class Plan:
    """How a network is pruned.

    Args:
        method: importance, compensation, stages.
        groups: which stored tensors are ranked together, and to what sparsity.
        positions: "expand" or "reduce".
        damping: ridge of importance and compensation; None leaves each its own.
        seed: of the methods' random numbers.
        finetune_steps: of fine-tuning after the last stage; a tenth of it after every other one.
        blocks: what the curvature couples: a name in BLOCKS.
    """

    method: Method
    groups: tuple[Group, ...]
    positions: str = "expand"
    damping: float | None = None
    seed: int = 0
    finetune_steps: int = 0
    blocks: str = "network"


@dataclass(frozen=True)
class Pruned:
    """What a run of the loop gave.

    Args:
        state: the pruned and compensated network.
        removed: by layer name, the sum of the importances of the weights at their removal.
        ess: by layer name, effective sample size in the last stage.
        notes: by layer name, remarks such as a refit that was not kept.
        warnings: about the network as a whole.
    """

    state: State
    removed: dict[str, float] = field(default_factory=dict)
    ess: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Step(Protocol):
    """One stage of pruning: ``stage`` for single weights, or the same for something larger."""

    def __call__(
        self,
        network: Network,
        plan: Plan,
        before: Pruned,
        share: float,
        progress: Progress,
        *,
        measured: Measured | None,
    ) -> Pruned:
        """The result of the stage; see ``stage``."""


def prune(
    network: Network,
    plan: Plan,
    progress: Progress = silent,
    *,
    measured: Measured | None = None,
    step: Step | None = None,
) -> Pruned:
    """Prune a network to the targets of a plan, in as many stages as its method wants.

    Args:
        network: what is pruned.
        plan: how.
        progress: called as work goes on.
        measured: what ``observe`` told of the original, where that is known already.
        step: what a stage does; None for ``stage``.
    """
    step = step or stage
    result = Pruned(network.original)
    for done, share in enumerate(schedule(plan.method.stages)):
        progress("stages", done, plan.method.stages)
        check_deadline()
        result = step(network, plan, result, share, progress, measured=measured)
        measured = None  # it is of the original: later stages look at what they have made
        if share == 1.0:
            result = polished(network, plan, result, progress)
        else:
            result = tuned(network, plan, result, last=False, progress=progress)
    progress("stages", plan.method.stages, plan.method.stages)
    return result


def polished(network: Network, plan: Plan, result: Pruned, progress: Progress = silent) -> Pruned:
    """What follows the last stage: the joint refit, then fine-tuning."""
    result = jointly_refitted(network, plan, result, progress)
    return tuned(network, plan, result, last=True, progress=progress)


def tuned(
    network: Network, plan: Plan, result: Pruned, *, last: bool, progress: Progress = silent
) -> Pruned:
    """Fine-tune between two stages, or after the last one."""
    steps = plan.finetune_steps if last else plan.finetune_steps // 10
    if not steps:
        return result
    found = finetune(
        network.objective,
        result.state,
        network.fit,
        network.guard,
        steps=steps,
        size=min(BATCH, network.size),
        seed=plan.seed,
        progress=progress,
    )
    return replace(result, state=found.state)


def jointly_refitted(
    network: Network, plan: Plan, result: Pruned, progress: Progress = silent
) -> Pruned:
    """The joint refit of all layers, where the method wants it and its vectors fit in memory.

    Finite differences at every layer would take too long for it: with them it is left out.
    """
    if not plan.method.repair.joint:
        return result
    if not network.observer.reverses:
        text = "the joint refit was left out: it would take too long by finite differences."
        return _warned(result, text)
    needed = memory_needed(network.layers, result.state.keep)
    share = network.share(2)
    if share is not None and needed > share:
        text = (
            f"the joint refit was left out: it takes {needed / 2**20:.3g} MiB, and half of "
            f"--max-memory is {share / 2**20:.3g} MiB."
        )
        return _warned(result, text)
    found = refit_jointly(
        network.objective,
        result.state,
        network.fit,
        network.guard,
        size=network.size,
        damping=plan.damping or plan.method.repair.damping,
        rounds=min(ROUNDS, plan.method.stages),  # who asks for fewer stages has less time
        memory=network.share(4),
        progress=progress,
    )
    return replace(result, state=found.state)


def _warned(result: Pruned, text: str) -> Pruned:
    """With one more warning, unless it was there already."""
    return replace(result, warnings=tuple(dict.fromkeys((*result.warnings, text))))


def schedule(stages: int) -> list[float]:
    """Shares of the way to the target after each stage: 1 - (1 - t/T)^3.

    >>> schedule(2)
    [0.875, 1.0]
    """
    return [1 - (1 - t / stages) ** 3 for t in range(1, stages + 1)]


def stage(
    network: Network,
    plan: Plan,
    before: Pruned,
    share: float,
    progress: Progress = silent,
    *,
    measured: Measured | None = None,
) -> Pruned:
    """Observe, score, select and compensate once.

    Args:
        network: what is pruned.
        plan: how.
        before: the result of the stage before.
        share: how far to go towards the targets, 1 = all the way.
        progress: called as work goes on.
        measured: what ``observe`` told of the state before, where that is known already.
    """
    state = before.state
    measured = measured or observe(network, plan, state, progress)
    scores = importances(network, plan, state, measured)
    by_tensor = summed(network.layers, scores)
    sizes = relative_sizes(network.layers, state)
    keep: dict[str, np.ndarray] = {}
    for group in plan.groups:
        keep |= select(
            group,
            by_tensor,
            state.keep,
            network.original.keep,
            share=share,
            floor=plan.method.floor,
            sizes=sizes,
        )
    if plan.method.search is not None:
        keep = searched(network, plan, state, keep, measured)
    free = {n for group in plan.groups if group.masks is None for n in group.tensors}
    after, notes = compensate(
        network,
        plan,
        state,
        replace(state, keep=keep),
        measured,
        progress,
        free=free if plan.method.free else (),
    )
    removed = {
        layer.name: before.removed.get(layer.name, 0.0)
        + float(scores[layer.name][_victims(layer, state, after.keep)].sum())
        for layer in network.layers
    }
    ess = {name: effective_sample_size(s) for name, s in measured.weights.items()}
    warnings = before.warnings
    if state is network.original:  # later on, pruning itself may have cut a layer off
        warnings = tuple(_blind(network.layers, state, scores))
    return Pruned(after, removed, ess, notes, warnings)


def _blind(
    layers: Sequence[Layer], state: State, scores: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """What the user must know of layers whose importances are all zero."""
    names = []
    for layer in layers:
        keep = state.keep[layer.weight.tensor]
        if keep.any() and not scores[layer.name][keep].any():
            names.append(layer.name)
    if names:
        yield (
            f"all importances of {len(names)} layers, such as {printable(names[0])}, are zero: on "
            "these samples their inputs never vary, or the outputs do not depend on them. Only "
            "their size ranks their weights; give more calibration data."
        )


def searched(
    network: Network, plan: Plan, state: State, keep: dict[str, np.ndarray], measured: Measured
) -> dict[str, np.ndarray]:
    """Keep masks that the method's search finds, group by group, from those of the ranking."""
    assert plan.method.search is not None, "the caller has looked"
    weight = {x.weight.tensor: _matrix(x, state) for x in network.layers}

    def error(masks: Mapping[str, np.ndarray]) -> float:
        tried = replace(state, keep={**keep, **masks})
        tried = replace(tried, weights=_removed(network, state, tried))
        return network.objective.loss(tried, network.fit, network.size)

    for number, group in enumerate(plan.groups):
        if group.masks is not None:
            continue
        gone = {n: np.where(keep[n], 0.0, w) for n, w in weight.items() if n not in group.tensors}
        problem = MaskProblem(
            weight={n: weight[n] for n in group.tensors},
            there=state.keep,
            start={n: keep[n] for n in group.tensors},
            blocks=measured.curvature,
            elsewhere=gone,
            error=error,
            rng=np.random.default_rng([plan.seed, number]),
            run=group.sparsity.m if isinstance(group.sparsity, NM) else 0,
            orders=group.orders,
        )
        keep = keep | plan.method.search(problem)
    return keep


def observe(network: Network, plan: Plan, state: State, progress: Progress = silent) -> Measured:
    """Measure what the method needs to know, no more."""
    needs = plan.method.measures
    if needs == "nothing":
        return Measured()
    if needs == "activations":
        return measure_activations(
            network.observer, state, network.fit, size=network.size, progress=progress
        )
    if needs != "curvature":
        return measure(
            network.observer,
            state,
            network.fit,
            size=network.size,
            positions=plan.positions,
            with_gradient=needs == "gradients",
            memory=network.share(2),
            progress=progress,
        )
    rows = CurvatureObserver(network.layers)
    measured = measure(
        network.observer,
        state,
        network.fit,
        size=network.size if network.observer.one_position else 1,
        positions=plan.positions,
        visit=rows,
        memory=network.share(2),
        progress=progress,
    )
    unit = 1.0
    if network.observer.metric == "l2":
        batches = network.fit.batches(network.size)
        unit = network.observer.output_energy(network.original, batches) or 1.0
    whole = rows.curvature(state.keep, len(network.fit), unit)
    return replace(measured, curvature=whole.blocks() if plan.blocks == "layer" else (whole,))


def importances(
    network: Network, plan: Plan, state: State, measured: Measured
) -> Mapping[str, np.ndarray]:
    """Importance (out, in) by layer name, in the method's own unit.

    Raises:
        ModelError: one is NaN or infinite, which no ranking could bear.
    """
    method, scores = plan.method, Shelf(network.share(4))
    index = {layer.name: i for i, layer in enumerate(network.layers)}
    uses = Counter(layer.weight.tensor for layer in network.layers)
    blocks = {n: block for block in measured.curvature for n in block.rows}
    for layer, gram in with_grams(network, plan, state, measured):
        moments = measured.moments.get(layer.name)
        if moments is not None and method.shrinkage and plan.positions == "expand":
            moments = moments.shrunk(method.shrinkage)
        rng = np.random.default_rng([plan.seed, index[layer.name]])
        tensor = layer.weight.tensor
        view = View(
            _matrix(layer, state),
            moments,
            rng,
            gram,
            plan.damping or method.damping,
            tensor,
            uses[tensor],
            blocks.get(tensor),
        )
        score = method.importance(view)
        _check_finite(layer, score)
        scores[layer.name] = score
    return scores


def _check_finite(layer: Layer, scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise ModelError(
            f"the importance of layer {printable(layer.name)!r} is NaN or infinite: on these "
            "samples its inputs, the outputs or their derivatives are.",
            hint="Check the calibration data, leave the layer out with --exclude, or use a "
            "--method that needs no sensitivities.",
        )


def with_grams(
    network: Network, plan: Plan, state: State, measured: Measured
) -> Iterator[tuple[Layer, Gram | None]]:
    """Every layer, with the Gram matrix of its input where the method reads it; one at a time."""
    if not plan.method.needs_gram:
        yield from ((layer, None) for layer in network.layers)
        return
    yield from _grams(
        network,
        network.fit,
        state,
        [layer.name for layer in network.layers],
        weights=measured.weights,
        shrink=plan.method.shrinkage,
    )


def plain_grams(network: Network, names: Collection[str]) -> dict[str, Gram]:
    """By layer name, sums of the original inputs of some layers, all rows weighing alike."""
    found = _grams(network, network.fit, network.original, names)
    return {layer.name: gram for layer, gram in found}


def _grams(
    network: Network,
    data: Calibration,
    state: State,
    names: Collection[str],
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    shrink: float = 0.0,
    with_original: bool = False,
) -> Iterator[tuple[Layer, Gram]]:
    """Some layers in graph order, each with the sums of its inputs in one state.

    Args:
        network: whose layers they are.
        data: the samples.
        state: the same all along the walk.
        names: of the layers.
        weights: by layer name, of the rows; where there are none all rows weigh alike.
        shrink: share of the mean weight that every row gets.
        with_original: whether the inputs in the original network are looked at, too.
    """
    run, left = _Run(network, data, with_original=with_original), set(names)
    for segment in network.segments:
        name = segment.layer.name
        if name in left:
            left.remove(name)
            yield segment.layer, run.gram(segment, state, (weights or {}).get(name), shrink)
        else:
            run.skip(segment, state)
        if not left:
            return


def summed(layers: Sequence[Layer], scores: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Importances by stored tensor: the sum over the layers that share it."""
    users: dict[str, list[str]] = {}
    for layer in layers:
        users.setdefault(layer.weight.tensor, []).append(layer.name)
    return Computed(users, lambda tensor: reduce(add, (scores[name] for name in users[tensor])))


def relative_sizes(layers: Sequence[Layer], state: State) -> Mapping[str, np.ndarray]:
    """|W| (out, in) by stored tensor, in units of its own mean: what decides between equal scores.

    They are equal mostly where nothing is known: an input that never varies, a single sample.
    """
    views = {layer.weight.tensor: layer.weight for layer in layers}

    def sizes(name: str) -> np.ndarray:
        size = np.abs(views[name].matrix(state.weights[name]).astype(np.float64))
        return np.asarray(size / (size[state.keep[name]].mean() if state.keep[name].any() else 1))

    return Computed(views, sizes)


def compensate(
    network: Network,
    plan: Plan,
    before: State,
    after: State,
    measured: Measured,
    progress: Progress = silent,
    *,
    free: Collection[str] = (),
) -> tuple[State, dict[str, str]]:
    """Remove what ``after.keep`` says, and let shifts and kept weights make good for it.

    Args:
        network: what is pruned.
        plan: how.
        before: the state that was measured.
        after: the same with new keep masks.
        measured: what the measuring told.
        progress: called as work goes on.
        free: stored tensors of which other weights may stay, as long as equally many do.

    Returns:
        The new state, and by layer name remarks about its compensation.
    """
    if not any(_victims(layer, before, after.keep).any() for layer in network.layers):
        return before, {}
    repair, shifts = plan.method.repair, dict(before.shifts)
    if repair.shifts:
        for layer in network.layers:
            keep = after.keep[layer.weight.tensor]
            gap = bias_shift(_matrix(layer, before), measured.moments[layer.name], keep)
            shifts[layer.name] = before.shifts[layer.name] + gap
    state = replace(after, weights=_removed(network, before, after), shifts=shifts)
    if repair.update is not None:
        return update_blocks(network, plan, before, state, measured), {}
    if repair.solve is None:
        return state, {}
    return solve_layers(network, plan, before, state, measured, progress, free=free)


def update_blocks(
    network: Network, plan: Plan, before: State, state: State, measured: Measured
) -> State:
    """New kept weights of all layers at once, block by block of the curvature."""
    repair = plan.method.repair
    assert repair.update is not None, "the caller has looked"
    layers = {layer.weight.tensor: layer for layer in network.layers}
    for block in measured.curvature:
        problem = BlockProblem(
            weight={n: _matrix(layers[n], before) for n in block.rows},
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
    free: Collection[str] = (),
) -> tuple[State, dict[str, str]]:
    """Solve one layer after the other, each in the network that the layers before it make now.

    Where the compensation is guarded, a solution stays only if its error on the guard samples is
    not larger than that of ``state``, with its new shifts or without. Weights that several layers
    share are solved for first, see ``solve_shared``; in turn their layers get new shifts alone.

    Returns:
        The new state, and by layer name why a solution was not kept.
    """
    repair = plan.method.repair
    state, notes = solve_shared(network, plan, before, state, measured, free)
    fit = _Run(network, network.fit, with_original=repair.weighted)
    guard = _Guard(network, plan, state) if repair.guarded else None
    uses = Counter(layer.weight.tensor for layer in network.layers)
    for done, segment in enumerate(network.segments, 1):
        check_deadline()
        layer = segment.layer
        tensor = layer.weight.tensor
        weights = measured.weights[layer.name] if repair.weighted else None
        seen = fit.gram(segment, state, weights, repair.shrinkage)
        original, current = _matrix(layer, network.original), _matrix(layer, state)
        if uses[tensor] == 1:
            solved = _solved(network, plan, before, state, layer, seen, free)
        else:
            shift = mean_shift(seen, original, current) if repair.shifts else None
            solved = Solved(current, state.keep[tensor], shift)
        better = None if guard is None else guard.better(segment, before, state, solved)
        if better is None:
            state = _with_solution(state, layer, solved)
        else:
            if uses[tensor] == 1:
                what = "refit" if better is state.shifts[layer.name] else "refit and bias shift"
                notes[layer.name] = f"last {what} not kept: {RAISED}"
            state = replace(state, shifts={**state.shifts, layer.name: better})
        progress("refit", done, len(network.segments))
    return state, notes


def solve_shared(
    network: Network,
    plan: Plan,
    before: State,
    state: State,
    measured: Measured,
    free: Collection[str] = (),
) -> tuple[State, dict[str, str]]:
    """Solve for each weight that several layers share, all of them at once, before the others.

    The normal equations of its layers are added up. They need the inputs of the last of them, so
    nothing else has been solved yet that these could depend on.

    Returns:
        The new state, and by layer name why a solution was not kept.
    """
    repair = plan.method.repair
    uses = Counter(layer.weight.tensor for layer in network.layers)
    shared = {layer.name: layer for layer in network.layers if uses[layer.weight.tensor] > 1}
    if not shared:
        return state, {}
    sums: dict[str, Gram] = {}
    means: dict[str, Gram] = {}
    for layer, seen in _grams(
        network,
        network.fit,
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
        means[layer.name] = replace(seen, gram=seen.gram[:0], cross=seen.cross[:0])
    found, shifts = {}, dict(state.shifts)
    for layer in shared.values():
        tensor = layer.weight.tensor
        if tensor not in found:
            found[tensor] = _solved(network, plan, before, state, layer, sums[tensor], free)
        if repair.shifts:
            original = _matrix(layer, network.original)
            shifts[layer.name] = mean_shift(means[layer.name], original, found[tensor].weight)
    worse = _worse(network, plan, state, shared, found, shifts) if repair.guarded else set()
    notes = {}
    for name, layer in shared.items():
        tensor = layer.weight.tensor
        if tensor in worse:
            notes[name] = f"last refit not kept: {RAISED}"
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
        network.observer, state, network.guard, size=network.size, memory=network.share(8)
    )
    for layer, seen in _grams(
        network,
        network.guard,
        state,
        shared,
        weights=weights,
        shrink=plan.method.repair.shrinkage,
        with_original=True,
    ):
        tensor, original = layer.weight.tensor, _matrix(layer, network.original)
        old = excess(seen, original, _matrix(layer, state), state.shifts[layer.name])
        new = excess(seen, original, found[tensor].weight, shifts[layer.name])
        share = np.repeat(seen.weight, len(old) // len(seen.weight))
        rise[tensor] += float(share @ (new - old)) - 1e-12 * float(share @ np.abs(old))
    return {tensor for tensor, much in rise.items() if much > 0}


def _solved(
    network: Network,
    plan: Plan,
    before: State,
    state: State,
    layer: Layer,
    seen: Gram,
    free: Collection[str],
) -> Solved:
    """What the plan's compensation makes of one layer, or of all that share its weight."""
    repair, tensor = plan.method.repair, layer.weight.tensor
    assert repair.solve is not None, "the caller has looked"
    run, order = _runs(plan, tensor)
    return repair.solve(
        LayerProblem(
            weight=_matrix(layer, before),
            original=_matrix(layer, network.original),
            there=before.keep[tensor],
            keep=state.keep[tensor],
            free=tensor in free,
            gram=seen,
            damping=plan.damping or repair.damping,
            run=run,
            order=order,
        )
    )


def _runs(plan: Plan, tensor: str) -> tuple[int, np.ndarray | None]:
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

    def __init__(self, network: Network, plan: Plan, state: State) -> None:
        self._network, self._shrink = network, plan.method.repair.shrinkage
        self._run = _Run(network, network.guard)
        self._weights = row_sensitivities(
            network.observer, state, network.guard, size=network.size, memory=network.share(8)
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
        layer = segment.layer
        seen = self._run.gram(segment, state, self._weights[layer.name], self._shrink)
        target, current = _matrix(layer, self._network.original), _matrix(layer, state)
        shift, old = state.shifts[layer.name], before.shifts[layer.name]
        new = shift if solved.shift is None else solved.shift
        found = excess(seen, target, solved.weight, new).sum()
        with_shift, without = (excess(seen, target, current, d) for d in (shift, old))
        # Where nothing went, and nothing before it changed, all are the same but for rounding.
        rounding = 1e-12 * np.abs(with_shift).sum()
        if found <= min(with_shift.sum(), without.sum()) + rounding:
            return None
        return old if without.sum() < with_shift.sum() - rounding else shift


class _Run:
    """Both versions of the network on their way along the segments with the same samples.

    Without the original, the current version stands for both.
    """

    def __init__(self, network: Network, data: Calibration, *, with_original: bool = True) -> None:
        batches = list(data.batches(network.size))
        self._original = network.original
        limit = network.share(8)
        self._before = Passage(network.observer, batches, limit) if with_original else None
        self._now = Passage(network.observer, batches, limit)

    def gram(
        self, segment: Segment, state: State, weights: np.ndarray | None, shrink: float
    ) -> Gram:
        """Sums of the next layer's inputs over all samples.

        Args:
            segment: that ends with the layer's input.
            state: the network that the layers before it make now.
            weights: of the rows (groups, rows), their sensitivities; None weighs all alike.
            shrink: share of the mean weight that every row gets.
        """
        total, first = None, 0
        for before, now in self._rows(segment, state):
            rows = now.shape[1]
            if weights is None:
                s = np.ones(now.shape[:2])
            else:
                s = (1 - shrink) * weights[:, first : first + rows]
                s = s + shrink * weights.mean(axis=1, keepdims=True)
            centre = now.mean(axis=1, dtype=np.float64) if total is None else total.centre
            part = Gram.of(now, before, s, centre)
            total = part if total is None else total + part
            first += rows
        assert total is not None, "a calibration has at least one sample"
        return total

    def skip(self, segment: Segment, state: State) -> None:
        """Go on past the next layer without looking at its inputs."""
        for _ in self._rows(segment, state):
            pass

    def _rows(self, segment: Segment, state: State) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        now = self._now.advance(segment, state)
        if self._before is None:
            yield from ((a, a) for a in now)
        else:
            yield from zip(self._before.advance(segment, self._original), now, strict=True)


def _matrix(layer: Layer, state: State) -> np.ndarray:
    return layer.weight.matrix(state.weights[layer.weight.tensor]).astype(np.float64)


def _victims(layer: Layer, before: State, keep: dict[str, np.ndarray]) -> np.ndarray:
    """(out, in) bool: what was there before and goes now."""
    tensor = layer.weight.tensor
    return np.asarray(before.keep[tensor] & ~keep[tensor])


def _removed(network: Network, before: State, after: State) -> Computed:
    """Stored tensors with zeros where the new masks say so, everything else bit by bit the same.

    Those that lie in an external file are masked when they are asked for.
    """
    weights = {layer.weight.tensor: layer.weight for layer in network.layers}

    def masked(name: str) -> np.ndarray:
        stored = before.weights[name]
        return np.where(weights[name].layout(after.keep[name]), stored, stored.dtype.type(0))

    in_memory = {name: masked(name) for name in weights if before.weights.knows(name)}
    return Computed(weights, masked, in_memory)
