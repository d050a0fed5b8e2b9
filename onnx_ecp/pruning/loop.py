"""The loop: observe, score, select, compensate; repeated in stages on the current network.

One-shot pruning is one stage. Nothing here knows files or reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Protocol

import numpy as np

from onnx_ecp.errors import ModelError, UsageError
from onnx_ecp.gradients.cotangents import SQUARED
from onnx_ecp.graph import printable
from onnx_ecp.layers import Layer
from onnx_ecp.methods import MaskProblem, View
from onnx_ecp.pruning.compensation import compensate, newly_removed, removed
from onnx_ecp.pruning.effects import Effects
from onnx_ecp.pruning.finetune import finetune
from onnx_ecp.pruning.joint_refit import ROUNDS, memory_needed, refit_jointly
from onnx_ecp.pruning.levels import Levels, levels_of
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.pruning.selection import NM, select
from onnx_ecp.pruning.standing import is_worse
from onnx_ecp.runtime.cache import Asked, recalled
from onnx_ecp.runtime.lazy import LazyArrays, Spill, size_text
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.collection import (
    Measured,
    measure,
    measure_activations,
)
from onnx_ecp.statistics.curvature import Curvature, CurvatureObserver, Full, Outer
from onnx_ecp.statistics.gram import Gram
from onnx_ecp.statistics.layerwise import GRANTED, Network, matrix
from onnx_ecp.statistics.moments import Moments
from onnx_ecp.statistics.objective import BATCH
from onnx_ecp.statistics.observer import State
from onnx_ecp.statistics.sharding import grams_of


@dataclass(frozen=True)
class Pruned:
    """What a run of the loop gave.

    Args:
        state: the pruned and compensated network.
        removed: by layer name, the sum of the importances of the weights at their removal.
        ess: by layer name, effective sample size in the last stage.
        notes: by layer name, remarks such as a refit that was not kept.
        warnings: about the network as a whole.
        levels: importances of the original's weights, where the plan asks for them and a stage
            ranked single weights.
    """

    state: State
    removed: dict[str, float] = field(default_factory=dict)
    ess: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    levels: Levels | None = None

    def removes_no_more_than(self, other: Pruned) -> bool:
        """Whether the same is gone as there."""
        return all(np.array_equal(k, other.state.keep[n]) for n, k in self.state.keep.items())


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
        now = replace(plan, last=share == 1.0)
        result = taken(step, network, now, result, share, progress, measured=measured)
        measured = None  # it is of the original: later stages look at what they have made
    progress("stages", plan.method.stages, plan.method.stages)
    return result


def taken(
    step: Step,
    network: Network,
    plan: Plan,
    before: Pruned,
    share: float,
    progress: Progress = silent,
    *,
    measured: Measured | None = None,
) -> Pruned:
    """The result of a stage and of what follows it; see ``stage``.

    Where there is a cache it is kept: a run that was ended goes on behind what was whole.
    """

    def staged() -> Pruned:
        return step(network, plan, before, share, progress, measured=measured)

    # Other steps keep what they make themselves.
    found = kept(network, plan, before, share, staged) if step is stage else staged()

    def repaired() -> Pruned:
        if plan.last:
            return polished(network, plan, found, progress)
        return tuned(network, plan, found, last=False, progress=progress)

    joint = plan.last and plan.method.repair.joint
    if not (joint or plan.finetune_steps):
        return repaired()
    return kept(network, plan, found, "repaired", repaired)


def kept(
    network: Network,
    plan: Plan,
    before: Pruned,
    how: object,
    result: Callable[[], Pruned],
) -> Pruned:
    """A result from the cache, or computed and kept there.

    Args:
        network: what is pruned.
        plan: how.
        before: where it begins.
        how: far it goes, or whatever else makes it.
        result: computes it.
    """
    return recalled(
        (
            f"a stage of {len(network.layers)} layers",
            lambda: (network.identity, plan, plan.method.repair, before, how),
        ),
        result,
        (Pruned, type(before), State, Levels),
        lambda found: _same_names(found, before),
    )


def _same_names(found: Pruned, other: Pruned) -> bool:
    """Whether both are of the same layers."""
    a, b = found.state, other.state
    return (
        list(a.weights) == list(b.weights)
        and a.shifts.keys() == b.shifts.keys()
        and {n: k.shape for n, k in a.keep.items()} == {n: k.shape for n, k in b.keep.items()}
    )


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
        network.train,
        network.validation,
        steps=steps,
        size=min(BATCH, network.size),
        seed=plan.seed,
        progress=progress,
    )
    # Labels may lead away from the original's outputs: then the loss decides, as it has.
    learns_outputs = network.observer.metric != "loss"
    if learns_outputs and is_worse(network, found.state, result.state):
        if not last:
            return result
        text = (
            "fine-tuning was rejected: on the validation samples fewer classes were right after "
            "it, or the error of the outputs was larger where they are no classes."
        )
        return _warned(result, text)
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
    needed = memory_needed(network.layers, result.state)
    if needed > network.granted // 2:
        text = (
            f"the joint refit was left out: it takes {size_text(needed)}, more than half of "
            f"--max-memory, which is {size_text(network.granted)} ({size_text(GRANTED)} where none "
            f"is given). With --max-memory {size_text(2 * needed)} it is done."
        )
        return _warned(result, text)
    found = refit_jointly(
        network.objective,
        result.state,
        network.train,
        network.validation,
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
    scores = importances(network, plan, state, measured, progress)
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
        may_reselect=free,
    )
    removed = {
        layer.name: before.removed.get(layer.name, 0.0)
        + float(scores[layer.name][newly_removed(layer, state, after.keep)].sum())
        for layer in network.layers
    }
    ess = measured.sample_sizes
    warnings = before.warnings
    if state is network.original:  # later on, pruning itself may have cut a layer off
        warnings = tuple(_blind(network.layers, state, scores))
    levels = before.levels
    if plan.with_levels and state is network.original:
        levels = levels_of(scores)
    return Pruned(after, removed, ess, notes, warnings, levels)


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
    weight = {x.weight.tensor: matrix(x, state) for x in network.layers}

    def error(masks: Mapping[str, np.ndarray]) -> float:
        tried = replace(state, keep={**keep, **masks})
        tried = replace(tried, weights=removed(network, state, tried))
        return network.objective.loss(tried, network.train, network.size)

    for number, group in enumerate(plan.groups):
        if group.masks is not None:
            continue
        gone = {n: np.where(keep[n], 0.0, w) for n, w in weight.items() if n not in group.tensors}
        problem = MaskProblem(
            weight={n: weight[n] for n in group.tensors},
            present=state.keep,
            start={n: keep[n] for n in group.tensors},
            blocks=measured.curvature,
            elsewhere=gone,
            error=error,
            rng=np.random.default_rng([plan.seed, number]),
            block=group.sparsity.m if isinstance(group.sparsity, NM) else 0,
            orders=group.orders,
        )
        keep = keep | plan.method.search(problem)
    return keep


def observe(
    network: Network,
    plan: Plan,
    state: State,
    progress: Progress = silent,
    *,
    rows: bool | None = None,
) -> Measured:
    """Measure what the method needs to know, no more.

    What the original network gives is kept where there is a cache: it is the same whatever the
    sparsity.

    Args:
        network: that is observed.
        plan: with the method.
        state: of the network.
        progress: called as work goes on.
        rows: whether the sensitivities of rows will be read; None: what the method reads.
    """
    needs = plan.method.measures
    if needs == "nothing":
        return Measured()
    if state is not network.original:
        return _observed(network, plan, state, progress)
    observer = network.observer if plan.last else network.observer.rough
    layers = {layer.name for layer in network.layers} - observer.blocked.keys()
    rows = reads_rows(plan) if rows is None else rows

    def of(needs: str, rows: bool) -> Asked:
        samples = network.train
        return (
            f"{needs} of {len(layers)} layers on {len(samples)} samples",
            lambda: (
                *(observer.identity, state, samples.identity, network.size),
                *(plan.positions, plan.blocks, rows),
            ),
        )

    def found() -> Measured:
        measured = _observed(network, plan, state, progress)
        return measured if rows else replace(measured, weights={}, known=measured.sample_sizes)

    # Means are among the sensitivities, and nothing is among less.
    others = [of(needs, True), of("sensitivities", rows), of("sensitivities", True)]
    return recalled(
        of(needs, rows),
        found,
        (Measured, Moments, Curvature, Outer, Full),
        lambda measured: measured.moments.keys() == layers,
        others if needs == "means" else [] if rows else others[:1],
    )


def reads_rows(plan: Plan) -> bool:
    """Whether the sensitivities of rows are read, which are the larger part by far."""
    method = plan.method
    return method.repair.weighted or method.needs_gram or method.measures == "curvature"


def _observed(network: Network, plan: Plan, state: State, progress: Progress) -> Measured:
    """What a look at a state tells."""
    needs = plan.method.measures
    observer = network.observer if plan.last else network.observer.rough
    if needs == "activations":
        return measure_activations(
            observer, state, network.train, size=network.size, progress=progress
        )
    if needs != "curvature":
        return measure(
            observer,
            state,
            network.train,
            size=network.size,
            positions=plan.positions,
            with_squares=needs != "means",
            with_gradient=needs == "gradients",
            memory=network.share(2),
            progress=progress,
        )
    rows = CurvatureObserver(network.layers)
    measured = measure(
        network.observer,
        state,
        network.train,
        size=network.size if network.observer.one_position else 1,
        positions=plan.positions,
        visit=rows,
        memory=network.share(2),
        progress=progress,
    )
    unit = 1.0
    if network.observer.metric in SQUARED:
        unit = network.observer.output_energy or 1.0
    whole = rows.curvature(state.keep, len(network.train), unit)
    return replace(measured, curvature=whole.blocks() if plan.blocks == "layer" else (whole,))


def importances(
    network: Network,
    plan: Plan,
    state: State,
    measured: Measured,
    progress: Progress = silent,
) -> Mapping[str, np.ndarray]:
    """Importance (out, in) by layer name, in the method's own unit.

    Raises:
        ModelError: one is NaN or infinite, which no ranking could bear.
    """
    method, scores = plan.method, Spill(network.share(4))
    index = {layer.name: i for i, layer in enumerate(network.layers)}
    blocks = {n: block for block in measured.curvature for n in block.rows}
    effects = Effects(network, state, progress) if method.needs_effects else None
    for layer, gram in with_grams(network, plan, state, measured):
        moments = measured.moments.get(layer.name)
        if moments is not None and method.shrinkage and plan.positions == "expand":
            moments = moments.shrunk(method.shrinkage)
        rng = np.random.default_rng([plan.seed, index[layer.name]])
        tensor = layer.weight.tensor
        view = View(
            matrix(layer, state),
            moments,
            rng,
            gram,
            plan.damping or method.damping,
            tensor,
            network.uses[tensor],
            blocks.get(tensor),
            None if effects is None else effects.of(layer, measured.moments[layer.name]),
        )
        score = method.importance(view)
        _check_scores(layer, score)
        scores[layer.name] = score
    return scores


def _check_scores(layer: Layer, scores: np.ndarray) -> None:
    if np.shape(scores) != layer.shape:
        raise UsageError(
            f"the method gives layer {printable(layer.name)!r} importances of shape "
            f"{np.shape(scores)}: its weights are {layer.shape}, (out, in).",
            hint="An importance has the shape of View.weight.",
        )
    if not np.isfinite(scores).all():
        raise not_finite(layer)


def not_finite(layer: Layer) -> ModelError:
    """No ranking can bear what a layer saw on these samples."""
    return ModelError(
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
    yield from grams_of(
        network,
        network.train,
        state,
        [layer.name for layer in network.layers],
        weights=measured.weights,
        shrink=plan.method.shrinkage,
    )


def summed(layers: Sequence[Layer], scores: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Importances by stored tensor: the sum over the layers that share it."""
    users: dict[str, list[str]] = {}
    for layer in layers:
        users.setdefault(layer.weight.tensor, []).append(layer.name)
    return LazyArrays(users, lambda tensor: reduce(add, (scores[name] for name in users[tensor])))


def relative_sizes(layers: Sequence[Layer], state: State) -> Mapping[str, np.ndarray]:
    """|W| (out, in) by stored tensor, in units of its own mean: what decides between equal scores.

    They are equal mostly where nothing is known: an input that never varies, a single sample.
    """
    views = {layer.weight.tensor: layer.weight for layer in layers}

    def sizes(name: str) -> np.ndarray:
        size = np.abs(views[name].matrix(state.weights[name]).astype(np.float64))
        kept = size[state.keep[name]]
        return np.asarray(size / ((kept.mean() if kept.size else 0.0) or 1.0))

    return LazyArrays(views, sizes)
