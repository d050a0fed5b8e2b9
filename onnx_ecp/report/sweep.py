"""What a sweep found: the values that are shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx_ecp.evaluation.facts import ModelFacts
from onnx_ecp.report import CalibrationFacts, counted
from onnx_ecp.runtime.versions import Versions


@dataclass(frozen=True)
class SweepPoint:
    """What one method makes of the network at one target.

    Args:
        method: its name.
        target: what was asked for: "0.9" or "2:4".
        sparsity: share of zeros among the weights of the pruned layers.
        zeros: their number.
        weights: number of those weights; shared ones count once.
        relative_error: of the outputs on the evaluation samples.
        agreement: percent of samples with the same top class as the original, None where the
            outputs are no class scores.
        accuracy: percent top-1 on the labels; None without class labels.
        r2: coefficient of determination on the labels; None without targets of a regression.
        compressed_bytes: size of the model after gzip.
        seconds: to prune, without what several points share.
    """

    method: str
    target: str
    sparsity: float
    zeros: int
    weights: int
    relative_error: float
    agreement: float | None
    accuracy: float | None
    r2: float | None
    compressed_bytes: int
    seconds: float


def front(
    points: Sequence[SweepPoint],
    cost: Callable[[SweepPoint], float],
    loss: Callable[[SweepPoint], float | None],
) -> tuple[SweepPoint, ...]:
    """The points worth having (the Pareto front): no other is as good in both, and better in one.

    Args:
        points: to choose from, in any order; the front keeps it.
        cost: of a point, the less the better.
        loss: of a point, the less the better; points without one, or with NaN, are left out.
    """
    known = [(p, cost(p), v) for p in points if (v := loss(p)) is not None and not math.isnan(v)]
    best, least = set(), math.inf
    for _, same_cost in itertools.groupby(sorted(known, key=_both), key=lambda row: row[1]):
        rows = list(same_cost)
        if rows[0][2] < least:
            least = rows[0][2]
            best |= {id(p) for p, _, value in rows if value == least}
    return tuple(p for p in points if id(p) in best)


def _both(row: tuple[SweepPoint, float, float]) -> tuple[float, float]:
    return row[1], row[2]


@dataclass(frozen=True)
class EvaluationFacts:
    """What the points were judged on.

    Args:
        source: path or description of the samples.
        samples: their number.
        held_out: whether they are the held-out part of the calibration data.
        labels: path of the labels, or None.
    """

    source: str
    samples: int
    held_out: bool
    labels: str | None

    def __str__(self) -> str:
        """One phrase for people."""
        part = "held-out part of " if self.held_out else ""
        labels = f", labels {self.labels}" if self.labels else ", no labels"
        return f"{part}{self.source}: {counted(self.samples, 'sample')}{labels}"


@dataclass(frozen=True)
class Sweep:
    """All points, and what a reader needs to believe or repeat them.

    Args:
        original: the given model.
        accuracy: of the original on the labels, percent; None without class labels.
        r2: the same for targets of a regression.
        calibration: where the inputs came from.
        evaluation: what the points were judged on.
        points: method by method, in the order asked for.
        options: that all points have in common: name to a JSON value.
        versions: what computed it.
        shared_seconds: to load, build the sessions and observe, once for all points.
        seconds: elapsed time, evaluation included.
        warnings: what the user must know, one sentence each.
    """

    original: ModelFacts
    accuracy: float | None
    r2: float | None
    calibration: CalibrationFacts
    evaluation: EvaluationFacts
    points: tuple[SweepPoint, ...]
    options: Mapping[str, Any]
    versions: Versions
    shared_seconds: float
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def worth_having(self) -> tuple[SweepPoint, ...]:
        """Points such that none is smaller after gzip and as good, or better and as small.

        Good is what has a high accuracy or R2 on the labels; without labels a low output error.
        """
        return front(self.points, lambda p: p.compressed_bytes, self.loss)

    def loss(self, point: SweepPoint) -> float | None:
        """What a point lost, in the best measure that there is."""
        if self.accuracy is not None:
            return None if point.accuracy is None else -point.accuracy
        if self.r2 is not None:
            return None if point.r2 is None else -point.r2
        return point.relative_error

    @property
    def methods(self) -> dict[str, tuple[SweepPoint, ...]]:
        """The points by method, in the order asked for."""
        names = dict.fromkeys(point.method for point in self.points)
        return {name: tuple(p for p in self.points if p.method == name) for name in names}
