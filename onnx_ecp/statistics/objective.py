"""What pruning should leave as it was, and how that depends on all that may still change.

Loss per sample, with y of the pruned and t of the original network:

    l2   sum_k s_k^2 (y_k - t_k)^2 / 2, s as in ``columns``; l2-raw: one s for each output
    kl   KL(softmax(t) || softmax(y)), whose gradient is softmax(y) - softmax(t)
    loss the cross-entropy with labels, which take the place of softmax(t)

The kept weights and the shifts of a state are one vector theta. The reverse graph gives adjoints g
of every pre-activation, so dL/dW = g^T a on the mask and dL/db = sum g. No training framework takes
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.gradients.cotangents import SQUARED, one_hot
from onnx_ecp.layers import Layer
from onnx_ecp.runtime.lazy import LazyArrays, Spill
from onnx_ecp.statistics.observer import Observer, State

BATCH = 128


@dataclass(frozen=True)
class Objective:
    """The loss of a pruned network, in the metric of its observer.

    Args:
        observer: of the network, with reverse graph where gradients are asked for.
        original: the state whose outputs are wanted back.
    """

    observer: Observer
    original: State

    def loss(self, state: State, data: Calibration, size: int = BATCH) -> float:
        """Mean loss per sample, computed ``size`` samples at a time."""
        return self.loss_over(state, ((x, self.targets(x)) for x in data.batches(size)))

    def loss_over(
        self, state: State, samples: Iterable[tuple[Batch, Mapping[str, np.ndarray]]]
    ) -> float:
        """The same, over batches with what is wanted of them; such as ``Wanted``."""
        total, count = 0.0, 0
        for batch, target in samples:
            y = self.observer.heads(state, batch)
            total += sum(self._loss(name, y[name], target[name]) for name in y)
            count += batch.samples
        return total / count

    def targets(self, batch: Batch) -> dict[str, np.ndarray]:
        """By head, what is wanted: outputs under l2, else probabilities."""
        y = self.observer.heads(self.original, batch)
        if self.observer.metric in SQUARED:
            return y
        if self.observer.metric == "kl":
            return {name: self._probabilities(name, out) for name, out in y.items()}
        assert batch.labels is not None, "the observer has looked"
        return {name: one_hot(batch.labels, out) for name, out in y.items()}

    def slopes(
        self, y: Mapping[str, np.ndarray], target: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """By head, dL/dy, float64."""
        if self.observer.metric not in SQUARED:
            return {name: self._probabilities(name, out) - target[name] for name, out in y.items()}
        return {
            name: (out.astype(np.float64) - target[name]) * self.observer.scale(name) ** 2
            for name, out in y.items()
        }

    def bends(
        self, y: Mapping[str, np.ndarray], change: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """By head, d2L/dy2 times a change of y, float64."""
        if self.observer.metric in SQUARED:
            return {name: u * self.observer.scale(name) ** 2 for name, u in change.items()}
        return {
            name: self.observer.link(name).bend(u, self._probabilities(name, y[name]))
            for name, u in change.items()
        }

    def gradient(
        self, state: State, batch: Batch, slopes: Mapping[str, np.ndarray], theta: Parameters
    ) -> np.ndarray:
        """(theta.size,): sum over a batch of J^T times slopes that its heads have."""
        kinds = {name: self.observer.facts[name].dtype for name in slopes}
        seeds = {name: slope[None].astype(kinds[name]) for name, slope in slopes.items()}
        seen = self.observer.pull(state, batch, seeds)
        weights: dict[str, np.ndarray] = {}
        shifts = {}
        for layer in self.observer.layers:
            a, g = seen.inputs[layer.name], seen.adjoints[layer.name][0]
            by_matrix = np.asarray(g.swapaxes(1, 2) @ a).reshape(layer.shape)
            tensor = layer.weight.tensor
            part = theta.kept(tensor, layer.weight.layout(by_matrix)) * layer.weight.scale
            weights[tensor] = weights[tensor] + part if tensor in weights else part
            shifts[layer.name] = g.sum(axis=1, dtype=np.float64).reshape(-1)
            if layer.name in state.held:
                shifts[layer.name][state.held[layer.name]] = 0
        return theta.vector(weights, shifts)

    def _probabilities(self, head: str, y: np.ndarray) -> np.ndarray:
        return self.observer.link(head).probabilities(y)

    def _loss(self, name: str, y: np.ndarray, target: np.ndarray) -> float:
        if self.observer.metric not in SQUARED:
            return self.observer.link(name).divergence(target, self._probabilities(name, y))
        difference = (y.astype(np.float64) - target) * self.observer.scale(name)
        return float(np.square(difference).sum() / 2)


class Wanted:
    """Batches of samples with what is wanted of them, which is computed once.

    Args:
        objective: whose targets they are.
        data: the samples.
        size: of a batch.
        memory: bytes that the targets may take; beyond, they lie in a temporary file.
    """

    def __init__(
        self, objective: Objective, data: Calibration, size: int, memory: int | None
    ) -> None:
        self.batches = list(data.batches(size))
        self._targets = Spill(memory)
        for number, batch in enumerate(self.batches):
            for name, target in objective.targets(batch).items():
                self._targets[number, name] = target
        self._names = objective.observer.scales

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Every batch with its targets by head."""
        for number, batch in enumerate(self.batches):
            yield batch, {name: self._targets[number, name] for name in self._names}


class Parameters:
    """The kept weights and the shifts of a state as one vector.

    Args:
        layers: whose weights and shifts they are.
        keep: by stored tensor, (out, in), True where the weight stays.
        dtype: of the vector.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        keep: Mapping[str, np.ndarray],
        dtype: np.typing.DTypeLike = np.float64,
    ) -> None:
        self.dtype = np.dtype(dtype)
        views = {x.weight.tensor: x.weight for x in layers}
        self._kept = {name: view.layout(keep[name]) for name, view in views.items()}
        self._units = {layer.name: layer.shape[0] for layer in layers}

    @property
    def size(self) -> int:
        """How long the vector is."""
        kept = sum(int(np.count_nonzero(kept)) for kept in self._kept.values())
        return kept + sum(self._units.values())

    @property
    def content(self) -> tuple[object, ...]:
        """All that it is made of."""
        return self.dtype, self._kept, self._units

    @staticmethod
    def count(layers: Sequence[Layer], keep: Mapping[str, np.ndarray]) -> int:
        """How long the vector would be."""
        tensors = {layer.weight.tensor for layer in layers}
        kept = sum(int(np.count_nonzero(keep[name])) for name in tensors)
        return kept + sum(layer.shape[0] for layer in layers)

    def vector(
        self, weights: Mapping[str, np.ndarray], shifts: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Kept values by stored tensor, see ``kept``, and by layer name (out,), as one vector."""
        parts = [weights[name] for name in self._kept]
        parts += [shifts[name] for name in self._units]
        return np.concatenate(parts, dtype=self.dtype)

    def kept(
        self, tensor: str, values: np.ndarray, dtype: np.typing.DTypeLike | None = None
    ) -> np.ndarray:
        """(kept,): of values in the layout of a stored tensor, those of kept weights."""
        return values[self._kept[tensor]].astype(dtype or self.dtype, copy=False)

    def of(self, state: State) -> np.ndarray:
        """The vector of a state."""
        weights = {name: self.kept(name, state.weights[name]) for name in self._kept}
        return self.vector(weights, state.shifts)

    def parts(self, vector: np.ndarray) -> Iterator[np.ndarray]:
        """The vector's views of each stored tensor and each layer's shift."""
        sizes = [int(np.count_nonzero(kept)) for kept in self._kept.values()]
        ends = np.cumsum([*sizes, *self._units.values()])
        yield from np.split(vector, ends[:-1])

    def named(self, vector: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The vector's views by stored tensor, and by layer name: what ``vector`` takes."""
        parts = self.parts(vector)
        return {name: next(parts) for name in self._kept}, {n: next(parts) for n in self._units}

    def state(self, state: State, vector: np.ndarray) -> State:
        """The state with the values of a vector; what was removed stays as it is."""
        parts = self.parts(vector)
        weights = {}
        for name, kept in self._kept.items():
            weights[name] = state.weights[name].copy()
            weights[name][kept] = next(parts)
        state = replace(state, weights=LazyArrays.of(weights))
        for name in self._units:
            state = state.with_shift(name, next(parts).astype(np.float64))
        return state


class Centred:
    """Displacements d of theta in coordinates whose shifts are those at the mean input.

    There a layer is ``z = W (a - m) + b'``: a change of W is none of b' as well, whatever the mean
    of its inputs, and the system is as well conditioned as if they had none.

    Args:
        theta: what moves.
        layers: of the network.
        mean: of a layer, (out, in), the mean input m of every weight.
    """

    def __init__(
        self, theta: Parameters, layers: Sequence[Layer], mean: Callable[[Layer], np.ndarray]
    ) -> None:
        self._theta, self._tensor = theta, {x.name: x.weight.tensor for x in layers}
        self._means, self._units = {}, {}
        for layer in layers:
            view = layer.weight
            mean_input = theta.kept(view.tensor, view.layout(mean(layer)))
            self._means[layer.name] = mean_input * view.scale
            rows = np.broadcast_to(np.arange(layer.shape[0])[:, None], layer.shape)
            self._units[view.tensor] = theta.kept(view.tensor, view.layout(rows), np.int32)

    def moved(self, d: np.ndarray) -> np.ndarray:
        """(theta.size,): how d moves theta, b = b' - W m."""
        weights, shifts = self._theta.named(d)
        for name, tensor in self._tensor.items():
            units = self._units[tensor]
            lost = np.bincount(units, weights[tensor] * self._means[name], len(shifts[name]))
            shifts[name] = shifts[name] - lost
        return self._theta.vector(weights, shifts)

    def by_row(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """(theta.size,): values (out,) by stored tensor, for the weights and shifts of each row."""
        weights = {tensor: values[tensor][units] for tensor, units in self._units.items()}
        shifts = {name: values[tensor] for name, tensor in self._tensor.items()}
        return self._theta.vector(weights, shifts)

    def pulled(self, gradient: np.ndarray) -> np.ndarray:
        """(theta.size,): the gradient in d, from that in theta."""
        weights, shifts = self._theta.named(gradient)
        for name, tensor in self._tensor.items():
            units = self._units[tensor]
            weights[tensor] = weights[tensor] - shifts[name][units] * self._means[name]
        return self._theta.vector(weights, shifts)
