"""Fine-tuning: the pruned network learns the original's outputs on calibration inputs, or labels.

Loss per sample, with y of the pruned and t of the original network:

    l2   sum_k (y_k - t_k)^2 / 2
    kl   KL(softmax(t) || softmax(y)), whose gradient is softmax(y) - softmax(t)
    loss the cross-entropy with labels, which take the place of softmax(t)

The reverse graph gives adjoints g of every pre-activation, so dL/dW = g^T a on the mask and
dL/db = sum g; Adam (Kingma & Ba, arXiv:1412.6980) moves kept weights and shifts. No training
framework takes part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnx_ecp.calibration import Batch, Calibration
from onnx_ecp.gradients.observer import Observer, State
from onnx_ecp.gradients.seeds import one_hot, softmax
from onnx_ecp.measurement import Progress, silent
from onnx_ecp.runtime import check_deadline
from onnx_ecp.shelf import Computed

BATCH = 128
# Adam's step as a share of each tensor's own root mean square, falling to zero along a half cosine.
STEP = 2e-2
BETAS = (0.9, 0.999)
# The loss on held-out samples is looked at this often; the best state seen is what comes back.
CHECKS = 20


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning gave.

    Args:
        state: the best state on the held-out samples, perhaps the one it began with.
        before: mean loss per held-out sample in the beginning.
        after: mean loss per held-out sample of ``state``.
    """

    state: State
    before: float
    after: float


def finetune(
    observer: Observer,
    original: State,
    state: State,
    fit: Calibration,
    guard: Calibration,
    *,
    steps: int,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress = silent,
) -> Tuned:
    """Fit kept weights and shifts to the original outputs; masks stay as they are.

    Args:
        observer: of the network, with reverse graph.
        original: the state whose outputs are learnt.
        state: where to begin.
        fit: samples to learn from.
        guard: other samples, for early stopping.
        steps: batches.
        batch: samples in one.
        seed: of the order of samples.
        progress: called after every step.
    """
    rng = np.random.default_rng(seed)
    values = _parameters(observer, state)
    scale = {name: _root_mean_square(v) for name, v in values.items()}
    moments = {name: (np.zeros_like(v), np.zeros_like(v)) for name, v in values.items()}
    best, best_loss = state, loss(observer, original, state, guard, batch)
    before = best_loss
    for step in range(1, steps + 1):
        check_deadline()
        gradient = _gradients(observer, original, state, _draw(fit, batch, rng))
        rate = STEP * 0.5 * (1 + np.cos(np.pi * step / steps))
        for name, g in gradient.items():
            first, second = moments[name]
            first += (1 - BETAS[0]) * (g - first)
            second += (1 - BETAS[1]) * (g * g - second)
            corrected = first / (1 - BETAS[0] ** step)
            spread = np.sqrt(second / (1 - BETAS[1] ** step))
            values[name] = values[name] - rate * scale[name] * corrected / (spread + 1e-12)
        state = _with_parameters(observer, state, values)
        if step % max(steps // CHECKS, 1) == 0 or step == steps:
            now = loss(observer, original, state, guard, batch)
            if now < best_loss:
                best, best_loss = state, now
        progress("fine-tuning", step, steps)
    return Tuned(best, before, best_loss)


def loss(
    observer: Observer, original: State, state: State, data: Calibration, size: int = BATCH
) -> float:
    """Mean loss per sample, computed ``size`` samples at a time."""
    total, count = 0.0, 0
    for batch in data.batches(size):
        target, y = _targets(observer, original, batch), observer.heads(state, batch)
        total += sum(_loss(observer, name, y[name], target[name]) for name in y)
        count += batch.samples
    return total / count


def _targets(observer: Observer, original: State, batch: Batch) -> dict[str, np.ndarray]:
    """By head, what is to be learnt: outputs under l2, else probabilities."""
    y = observer.heads(original, batch)
    if observer.metric == "l2":
        return y
    if observer.metric == "kl":
        return {name: softmax(out) for name, out in y.items()}
    assert batch.labels is not None, "the observer has looked"
    return {name: one_hot(batch.labels, out) for name, out in y.items()}


def _loss(observer: Observer, name: str, y: np.ndarray, target: np.ndarray) -> float:
    if observer.metric != "l2":
        p, q = target, softmax(y)
        tiny = np.finfo(np.float64).tiny
        return float((p * (np.log(p + tiny) - np.log(q + tiny))).sum())
    difference = (y.astype(np.float64) - target) * observer.scales[name]
    return float(np.square(difference).sum() / 2)


def _gradients(
    observer: Observer, original: State, state: State, batch: Batch
) -> dict[str, np.ndarray]:
    """Mean gradient per sample, by the names of ``_parameters``."""
    target, y = _targets(observer, original, batch), observer.heads(state, batch)
    seeds = {}
    for name, out in y.items():
        if observer.metric != "l2":
            seed = softmax(out) - target[name]
        else:
            seed = (out.astype(np.float64) - target[name]) * observer.scales[name] ** 2
        seeds[name] = (seed / batch.samples)[None].astype(out.dtype)
    seen = observer.pull(state, batch, seeds)
    gradients: dict[str, np.ndarray] = {}
    for layer in observer.layers:
        a, g = seen.inputs[layer.name], seen.adjoints[layer.name][0]
        weight = layer.weight
        by_matrix = (g.swapaxes(1, 2) @ a).reshape(layer.shape) * state.keep[weight.tensor]
        stored = weight.layout(by_matrix.astype(np.float64)) * weight.scale
        gradients[weight.tensor] = gradients.get(weight.tensor, 0.0) + stored
        gradients[_shift(layer.name)] = g.sum(axis=1, dtype=np.float64).reshape(-1)
    return gradients


def _parameters(observer: Observer, state: State) -> dict[str, np.ndarray]:
    """What is moved, float64: stored tensors by name, shifts by layer."""
    values = {n: w.astype(np.float64) for n, w in state.weights.items()}
    return values | {_shift(x.name): state.shifts[x.name] for x in observer.layers}


def _with_parameters(observer: Observer, state: State, values: Mapping[str, np.ndarray]) -> State:
    weights = {n: values[n].astype(w.dtype) for n, w in state.weights.items()}
    shifts = {x.name: values[_shift(x.name)] for x in observer.layers}
    return replace(state, weights=Computed.of(weights), shifts=shifts)


def _shift(layer: str) -> str:
    return f"shift of {layer}"


def _root_mean_square(values: np.ndarray) -> float:
    """Of the elements that are not zero; 1 where there are none, as for shifts that begin at 0."""
    there = values[values != 0]
    return float(np.sqrt(np.square(there).mean())) if there.size else 1.0


def _draw(data: Calibration, size: int, rng: np.random.Generator) -> Batch:
    """A random batch; a single sample where samples cannot be put together."""
    size = min(size, len(data)) if data.stacked else 1
    return next(data.take(rng.choice(len(data), size, replace=False)).batches(size))
