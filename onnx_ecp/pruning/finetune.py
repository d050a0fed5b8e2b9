"""Fine-tuning: the pruned network learns the original's outputs on calibration inputs, or labels.

Adam (Kingma & Ba, arXiv:1412.6980) moves kept weights and shifts down the loss of ``objective``, in
coordinates in which inputs have mean zero: an offset of the inputs would otherwise be in every
gradient, and a step of the weights a larger one of what the shift makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.layers import Layer
from onnx_ecp.linalg.rows import per_row
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.collection import measure_activations
from onnx_ecp.statistics.layerwise import matrix
from onnx_ecp.statistics.moments import Moments
from onnx_ecp.statistics.objective import BATCH, Centred, Objective, Parameters
from onnx_ecp.statistics.observer import State

# Adam's step as a share of each tensor's own root mean square, falling to zero along a half cosine;
# of shifts no larger than a share of what the layer's inputs make its outputs vary.
STEP = 2e-2
BETAS = (0.9, 0.999)
# The loss on held-out samples is looked at this often; the best state seen is what comes back.
CHECKS = 20


@dataclass(frozen=True)
class Tuned:
    """What learning the original outputs gave.

    Args:
        state: the best state on the held-out samples, perhaps the one it began with.
        before: mean loss per held-out sample in the beginning.
        after: mean loss per held-out sample of ``state``.
    """

    state: State
    before: float
    after: float


def finetune(
    objective: Objective,
    state: State,
    fit: Calibration,
    guard: Calibration,
    *,
    steps: int,
    size: int = BATCH,
    seed: int = 0,
    progress: Progress = silent,
) -> Tuned:
    """Fit kept weights and shifts to the original outputs; masks stay as they are.

    Args:
        objective: what is learnt.
        state: where to begin.
        fit: samples to learn from.
        guard: other samples, for early stopping.
        steps: how many, of BATCH samples each; of one where samples cannot be put together.
        size: how many samples are computed at a time. It says how much memory that takes, and
            changes no step but for rounding.
        seed: of the order of samples.
        progress: called after every step.
    """
    rng = np.random.default_rng(seed)
    theta = Parameters(objective.observer.layers, state.keep)
    start, layers = state, objective.observer.layers
    seen = measure_activations(objective.observer, state, fit, size=size).moments
    centred = Centred(theta, layers, lambda x: per_row(seen[x.name].mean, x.shape[0]))
    begin = theta.of(state)
    scale = _scales(theta, begin, {x.name: _spread(x, state, seen[x.name]) for x in layers})
    moved, first, second = np.zeros((3, begin.size))
    best, best_loss = state, objective.loss(state, guard, size)
    before = best_loss
    for step in range(1, steps + 1):
        check_deadline()
        g = centred.pulled(_gradient(objective, state, _draw(fit, rng), size, theta))
        rate = STEP * 0.5 * (1 + np.cos(np.pi * step / steps))
        first += (1 - BETAS[0]) * (g - first)
        second += (1 - BETAS[1]) * (g * g - second)
        corrected = first / (1 - BETAS[0] ** step)
        spread = np.sqrt(second / (1 - BETAS[1] ** step))
        moved -= rate * scale * corrected / (spread + 1e-12)
        state = theta.state(start, begin + centred.moved(moved))
        if step % max(steps // CHECKS, 1) == 0 or step == steps:
            now = objective.loss(state, guard, size)
            if now < best_loss:
                best, best_loss = state, now
        progress("fine-tuning", step, steps)
    return Tuned(best, before, best_loss)


def _gradient(
    objective: Objective, state: State, data: Calibration, size: int, theta: Parameters
) -> np.ndarray:
    """(theta.size,): mean gradient per sample, summed over parts of ``size`` samples."""

    def part(batch: Batch) -> np.ndarray:
        y = objective.observer.heads(state, batch)
        slopes = objective.slopes(y, objective.targets(batch))
        return objective.gradient(state, batch, slopes, theta)

    return np.asarray(sum(map(part, data.batches(size))) / len(data))


def _scales(theta: Parameters, values: np.ndarray, spreads: Mapping[str, float]) -> np.ndarray:
    """(theta.size,): in which unit each of the values moves; 1 where nothing tells."""
    weights, shifts = theta.named(values)

    def of_shift(name: str) -> float:
        sizes = (_root_mean_square(shifts[name]), spreads[name])
        return min((x for x in sizes if x), default=1.0)

    return theta.vector(
        {name: np.full(x.size, _root_mean_square(x) or 1.0) for name, x in weights.items()},
        {name: np.full(x.size, of_shift(name)) for name, x in shifts.items()},
    )


def _spread(layer: Layer, state: State, moments: Moments) -> float:
    """Deviation of a layer's outputs, of all units together, if its inputs were independent."""
    variance = (matrix(layer, state) ** 2 * per_row(moments.spread, layer.shape[0])).sum(axis=1)
    return float(np.sqrt(variance.mean()))


def _root_mean_square(values: np.ndarray) -> float:
    """Of the elements that are not zero; 0 where there are none."""
    there = values[values != 0]
    return float(np.sqrt(np.square(there).mean())) if there.size else 0.0


def _draw(data: Calibration, rng: np.random.Generator) -> Calibration:
    """Random samples for one step; a single one where samples cannot be put together."""
    number = min(BATCH, len(data)) if data.stacked else 1
    return data.take(rng.choice(len(data), number, replace=False))
