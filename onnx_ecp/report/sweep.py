"""What a sweep found: the values that are shown."""

from __future__ import annotations

from collections.abc import Mapping
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
    def methods(self) -> dict[str, tuple[SweepPoint, ...]]:
        """The points by method, in the order asked for."""
        names = dict.fromkeys(point.method for point in self.points)
        return {name: tuple(p for p in self.points if p.method == name) for name in names}
