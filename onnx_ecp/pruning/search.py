"""Error targets: the largest sparsity whose error on held-out samples stays within a limit.

The loop of stages walks towards higher sparsity until the limit is crossed, then halves the last
step a few times, each time from the last state that was within: no guess starts anew. A tenth of
the fine-tuning follows every guess; where all of it makes room, the walk goes on from there, with
all of it after every guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.errors import CalibrationError, TargetError
from onnx_ecp.evaluation.compare import (
    DeviationSums,
    Target,
    deviation_sums,
    how_certain,
    overall,
    target_of,
)
from onnx_ecp.pruning.loop import Pruned, Step, jointly_refitted, kept, observe, stage, tuned
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.layerwise import Network
from onnx_ecp.statistics.observer import Observer, State

# Share of the remaining weights that stay after one step of the walk. 0.7 is about the step of an
# eight-stage run to 0.95; smaller steps are more accurate and take longer.
STEP = 0.7
# The walk ends where so little is left, after so many steps.
LEAST_DENSITY = 0.005
STEPS = int(np.ceil(np.log(LEAST_DENSITY) / np.log(STEP)))
# Halvings of the last step: it ends within 1/16 of a step of the limit.
HALVINGS = 4
LEAST_STRIDE = 0.5**HALVINGS


@dataclass(frozen=True)
class Limit:
    """What the result must not exceed.

    Args:
        error: relative output error, None for no limit.
        drop: loss of top-1 accuracy in percentage points, None for no limit.
    """

    error: float | None = None
    drop: float | None = None

    def allows(self, point: Point) -> bool:
        """Whether a point is within every limit."""
        return (self.error is None or point.error <= self.error) and (
            self.drop is None or (point.drop is not None and point.drop <= self.drop)
        )


@dataclass(frozen=True)
class Point:
    """One state on the way.

    Args:
        sparsity: share of zeros among the weights of the prunable layers.
        error: relative output error, the larger of those of the parts of the held-out samples.
        drop: loss of top-1 accuracy in percentage points; None without labels.
        within: whether it is within the limit.
        high: upper end of the interval of that error; None where it is not known. Limits are held
            against the error itself.
    """

    sparsity: float
    error: float
    drop: float | None
    within: bool = False
    high: float | None = None

    @property
    def described(self) -> str:
        """What it is, for messages."""
        text = f"at sparsity {self.sparsity:.4f} the relative error is {self.error:.4g}"
        if self.drop is not None:
            text += f" and the accuracy drop {self.drop:.2f} points"
        return text


# Of a batch: how many samples, and by name.
Outputs = tuple[int, dict[str, np.ndarray]]


class Judge:
    """Compares states with the original network on samples that no statistic has seen.

    Args:
        observer: of the network.
        original: the state that others are compared with.
        parts: held-out samples; the worst part counts. Labels they have must be class indices.
        size: batch size.
        seed: of the intervals.

    Raises:
        TargetError: the model has no output that an error could be measured at.
        CalibrationError: the labels fit no output.
    """

    def __init__(
        self,
        observer: Observer,
        original: State,
        parts: Sequence[Calibration],
        size: int,
        seed: int = 0,
    ) -> None:
        if not observer.outputs:
            raise TargetError(
                "no floating-point output depends on the layers: there is no error to limit.",
                hint="Give --sparsity instead of a target.",
            )
        self._observer, self._seed = observer, seed
        self._parts = [list(part.batches(size)) for part in parts]
        self._labels = [part.row_labels for part in parts if part.row_labels is not None]
        self._reference = [self._outputs(original, part) for part in self._parts]
        self._targets: list[Target] = []
        if self._labels:
            both = zip(self._reference, self._labels, strict=True)
            self._targets = [_class_scores(_joined(y) or y[0][1], known) for y, known in both]

    def point(self, state: State) -> Point:
        """Where a state stands; whether it is within a limit is the caller's to say."""
        outputs = [self._outputs(state, part) for part in self._parts]
        parts = zip(outputs, self._reference, strict=True)
        error, high = max((self._error(y, t) for y, t in parts), key=lambda found: found[0])
        drop = None
        if self._labels:
            labelled = zip(self._targets, self._labels, self._reference, outputs, strict=True)
            drop = max(_drop(t, known, _joined(a), _joined(b)) for t, known, a, b in labelled)
        kept = sum(int(np.count_nonzero(k)) for k in state.keep.values())
        size = sum(k.size for k in state.keep.values())
        return Point(1 - kept / size, error, drop, high=high)

    def _error(self, parts: list[Outputs], reference: list[Outputs]) -> tuple[float, float | None]:
        """Relative output error of all samples, and the upper end of its interval."""
        measure = self._observer.measure
        sums: dict[str, DeviationSums] = {}
        for (samples, y), (_, wanted) in zip(parts, reference, strict=True):
            for name, t in wanted.items():
                found = deviation_sums(t, y[name], 0, samples, measure.spreads[name].axis)
                sums[name] = sums[name] + found if name in sums else found
        known = how_certain(sums, measure, self._seed)
        return overall(sums, measure), None if known is None else known.high

    def _outputs(self, state: State, batches: Iterable[Batch]) -> list[Outputs]:
        found = []
        for batch in batches:
            seen = self._observer.predict(state, batch)
            found.append((batch.samples, {n: np.atleast_1d(y) for n, y in seen.items()}))
        return found


def seek(
    network: Network,
    plan: Plan,
    limit: Limit,
    judge: Judge,
    progress: Progress = silent,
    *,
    step: Step = stage,
) -> tuple[Pruned, tuple[Point, ...]]:
    """Prune as far as the limit allows.

    Args:
        network: what is pruned.
        plan: how; the sparsities of its groups are where the walk ends at the latest.
        limit: what the result must not exceed.
        judge: measures it.
        progress: called as work goes on.
        step: what one step of the walk does.

    Returns:
        The last state within the limit, and all points of the walk in the order of visits.

    Raises:
        TargetError: not even the first step is within the limit.
    """
    walk = _Walk(network, plan, limit, judge, progress, step)
    start = Pruned(network.original)
    best, at = walk.along(start, 0.0, stride=1.0)
    if best.removes_no_more_than(start):
        if all(point.within for point in walk.points):
            raise TargetError(
                "nothing can be removed, whatever the target.",
                hint="A smaller --unit-multiple, or single weights, leave more to choose from.",
            )
        refits = plan.method.repair.joint
        raise TargetError(
            f"no sparsity meets the target: {walk.points[-1].described} already.",
            hint="Allow a larger error, or give more calibration samples"
            + ("." if refits else "; --compensation joint lets the other weights make good."),
        )
    if plan.finetune_steps:
        best = walk.tuned_along(best, at)
    return best, tuple(walk.points)


class _Walk:
    """Takes steps and keeps the points."""

    def __init__(
        self,
        network: Network,
        plan: Plan,
        limit: Limit,
        judge: Judge,
        progress: Progress,
        step: Step,
    ) -> None:
        self._network, self._plan, self._limit = network, plan, limit
        self._judge, self._progress, self._step = judge, progress, step
        self.points: list[Point] = []
        self._refused: tuple[Pruned | None, Pruned | None] = None, None  # from where, what
        tuning = bool(plan.finetune_steps)
        self._most = STEPS + HALVINGS + tuning * (STEPS + 2 * HALVINGS + 1)
        # A one-stage method ranks the original network, whatever the sparsity: one look is enough.
        self._first = None
        if plan.method.stages == 1:
            self._first = observe(network, plan, network.original, progress)

    def along(
        self, best: Pruned, at: float, *, stride: float, last: bool = False
    ) -> tuple[Pruned, float]:
        """Go on until the limit is crossed, in strides that double up to 1; then halve the last.

        Args:
            best: a state within the limit.
            at: where it is, in steps.
            stride: the first one, in steps.
            last: whether all of the fine-tuning follows every guess.

        Returns:
            The last state within the limit, and where it is.
        """
        outside = None
        while outside is None and at < STEPS:
            ahead = min(at + stride, STEPS)
            found = self._go(best, ahead, last)
            if found is None:
                outside = ahead
            else:
                best, at, stride = found, ahead, min(2 * stride, 1.0)
        while outside is not None and outside - at > LEAST_STRIDE:
            middle = (at + outside) / 2
            found = self._go(best, middle, last)
            if found is None:
                outside = middle
            else:
                best, at = found, middle
        return best, at

    def tuned_along(self, best: Pruned, at: float) -> Pruned:
        """What all steps of fine-tuning make of a state, and of those that it makes room for.

        They are taken for every guess, of which there is one where there is no room.
        """
        tried = tuned(self._network, self._plan, best, last=True, progress=self._progress)
        if not self._is_within(tried):
            return best
        return self.along(tried, at, stride=LEAST_STRIDE, last=True)[0]

    def _go(self, before: Pruned, at: float, last: bool) -> Pruned | None:
        """The state after so many steps if it is within the limit.

        Where no more goes than before, as where whole units are too large for the stride, that is
        the state before; and what was refused once is not tried again.
        """
        check_deadline()
        self._progress("steps, at most", len(self.points), self._most)
        network = self._network
        origin = before if self._first is None else Pruned(network.original)
        share = 1 - STEP**at
        found = self._one(origin, share)
        if self.points and found.removes_no_more_than(before):
            return before
        start, refused = self._refused
        if before is start and refused is not None and found.removes_no_more_than(refused):
            return None
        found = self._repaired(found, last)
        if self._is_within(found):
            return found
        # What went is all that is asked of it: its weights need not stay in memory.
        emptied = replace(found.state, weights=network.original.weights)
        self._refused = before, replace(found, state=emptied)
        return None

    def _one(self, origin: Pruned, share: float) -> Pruned:
        """What a step makes of a state."""
        network, plan = self._network, self._plan

        def result() -> Pruned:
            return self._step(network, plan, origin, share, self._progress, measured=self._first)

        return kept(network, plan, origin, share, result) if self._step is stage else result()

    def _repaired(self, found: Pruned, last: bool) -> Pruned:
        """What the joint refit and fine-tuning make of a state."""
        network, plan = self._network, self._plan

        def result() -> Pruned:
            refitted = jointly_refitted(network, plan, found, self._progress)
            return tuned(network, plan, refitted, last=last, progress=self._progress)

        if not (plan.method.repair.joint or plan.finetune_steps):
            return result()
        return kept(network, plan, found, ("repaired", last), result)

    def _is_within(self, found: Pruned) -> bool:
        point = self._judge.point(found.state)
        within = self._limit.allows(point)
        self.points.append(replace(point, within=within))
        return within


def _joined(parts: list[Outputs]) -> dict[str, np.ndarray]:
    """Outputs of all batches; of those alone whose batches have one shape."""
    names = parts[0][1]
    alike = [n for n in names if len({y[n].shape[1:] for _, y in parts}) == 1]
    return {n: np.concatenate([y[n] for _, y in parts]) for n in alike}


def _drop(
    target: Target,
    labels: np.ndarray,
    reference: dict[str, np.ndarray],
    y: dict[str, np.ndarray],
) -> float:
    """Loss of accuracy in percentage points."""
    (score,) = target.scores(labels, target.prediction(reference), target.prediction(y))
    return score.a - score.b


def _class_scores(outputs: dict[str, np.ndarray], labels: np.ndarray) -> Target:
    """The output that class labels are about."""
    target = target_of(outputs, labels) if labels.dtype.kind in "iu" else None
    if target is None or not target.classes:
        raise CalibrationError(
            "an accuracy drop needs class scores as output and one class index per sample.",
            hint="Use --max-error for a regression.",
        )
    return target
