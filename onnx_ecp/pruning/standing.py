"""Where a state stands: how far its outputs are from the original's on the validation samples.

By the measure that the report states, whatever the metric that pruning works with. It decides
between ways that led to different states; the test samples are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_ecp.evaluation.compare import DeviationSums, deviation_sums, overall
from onnx_ecp.statistics.layerwise import Network
from onnx_ecp.statistics.observer import State


@dataclass(frozen=True)
class Standing:
    """How far a state is from the original on the validation samples.

    Args:
        error: relative output error; infinite where an output is not finite.
        correct: by output of class scores, how many samples have the class of the label, or without
            labels that of the original.
    """

    error: float
    correct: tuple[int, ...] = ()

    def is_worse_than(self, other: Standing) -> bool:
        """Whether fewer classes are right at an output; without classes, the error is larger.

        Where classes are what an output is for, a larger distance of scores is no harm by itself.
        """
        if self.correct:
            return any(a < b for a, b in zip(self.correct, other.correct, strict=True))
        return self.error > other.error


def standing(network: Network, state: State) -> Standing:
    """Compare a state with the original, batch by batch."""
    observer = network.observer
    axes = {name: spread.axis for name, spread in observer.measure.spreads.items()}
    sums: dict[str, DeviationSums] = {}
    correct: dict[str, int] = {}
    for batch in network.validation.batches(network.size):
        reference, outputs = (
            observer.predict(network.wanted, batch),
            observer.predict(state, batch),
        )
        for name, wanted in reference.items():
            y = outputs[name]
            part = deviation_sums(wanted, y, 0, batch.samples, axes.get(name))
            sums[name] = sums[name] + part if name in sums else part
            right = _right(wanted, y, batch.labels)
            if right is not None:
                correct[name] = correct.get(name, 0) + right
    if not sums:
        return Standing(0.0)
    error = overall(sums, observer.measure)
    return Standing(np.inf if np.isnan(error) else error, tuple(correct.values()))


def _right(wanted: np.ndarray, y: np.ndarray, labels: np.ndarray | None) -> int | None:
    """How many samples have the right class; None where the output holds no class scores."""
    if wanted.ndim != 2 or wanted.shape[1] < 2:
        return None
    classes = wanted.argmax(axis=1)
    if labels is not None and labels.shape == classes.shape and labels.dtype.kind in "iu":
        classes = labels
    return int((y.argmax(axis=1) == classes).sum())


def is_worse(network: Network, state: State, other: State) -> bool:
    """Whether a state stands worse than another on the validation samples."""
    return standing(network, state).is_worse_than(standing(network, other))
