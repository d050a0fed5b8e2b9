"""What rounding takes away is made good for, layer after layer: by weights on the grid and biases.

Two networks go side by side along the same samples: the pruned one in floats, and the one whose
activations are rounded as the result will round them, with every layer before this one on its grid
already. With ``a`` the input of a layer in the first, ``a'`` in the second, and E weighing rows by
their sensitivities as in pruning, a layer becomes

    W*   = argmin E |(w a' - E w a') - (W a - E W a)|^2   on the support of W  (methods/refit.py)
    s q  = the point of the grid near W* in that metric                        (grid.py)
    d    = E W a - E s q a'                                                    the bias shift

and stays so if its error on the validation samples is not larger than that of the nearest integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.graph import Model
from onnx_ecp.layers import Layer
from onnx_ecp.linalg.masked import damped
from onnx_ecp.methods.refit import refit
from onnx_ecp.quantising.grid import best_scales, fitting_scales, nearest, on_grid
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.collection import batch_size, row_sensitivities
from onnx_ecp.statistics.forward import ForwardPass, Segment, segments
from onnx_ecp.statistics.gram import Gram, mean_shift
from onnx_ecp.statistics.layerwise import LayerwiseForward, Network, matrix
from onnx_ecp.statistics.observer import Observer, State, original_state

# Ridge of the refit, and share of the mean that every row's weight gets: those of pruning.
DAMPING, SHRINKAGE = 1e-2, 0.3
# Where the writer's scale is larger than fits the weights, it makes room for a large bias.
_ROOM = 1 + 1e-4


@dataclass(frozen=True)
class Settings:
    """How networks are observed.

    Args:
        metric: distance of outputs.
        provider: execution provider.
        threads: of ONNX Runtime.
        seed: of random directions.
        batch: samples a run, None for as many as fit.
        memory: bytes for statistics and activations.
        output_weights: see ``Measure.of``.
        reverse: whether rows are weighted by their sensitivities.
    """

    metric: str = "l2"
    provider: str = "cpu"
    threads: int | None = None
    seed: int = 0
    batch: int | None = None
    memory: int | None = None
    output_weights: Mapping[str, float] = field(default_factory=dict)
    reverse: bool = True

    @property
    def session(self) -> dict:
        """The settings of every ONNX Runtime session."""
        return {"provider": self.provider, "threads": self.threads}


@dataclass(frozen=True)
class Fitted:
    """What a layer becomes.

    Args:
        weight: stored tensor on its grid, float32.
        scale: (out,) float32.
        shift: (out,) of the bias.
        error: of its outputs on the validation samples, as a share of their root mean square.
        fitted: whether the refit was kept, and not the nearest integers.
    """

    weight: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    error: float
    fitted: bool


def observed(
    model: Model,
    layers: Sequence[Layer],
    train: Calibration,
    validation: Calibration,
    settings: Settings,
    *,
    reverse: bool,
    rounds: bool = False,
) -> Network:
    """A network with some of its layers under observation.

    Args:
        model: the network.
        layers: of it.
        train: samples for compensation.
        validation: samples that judge it.
        settings: how it is observed.
        reverse: whether sensitivities will be asked for.
        rounds: whether it rounds activations.
    """
    observer = Observer(
        model,
        layers,
        next(train.batches(2)),
        metric=settings.metric if reverse else "l2",
        seed=settings.seed,
        provider=settings.provider,
        threads=settings.threads,
        reverse=reverse,
        statistics="host",
        other=train.another(),
        proves=not rounds,
    )
    original = original_state(model, layers)
    size = batch_size(observer, original, train, settings.batch)
    if reverse:
        observer.normalise_outputs(original, train.batches(size), settings.output_weights)
    return Network(observer, original, train, validation, size, settings.memory)


def compensated(
    pruned: Network,
    rounded: Network,
    room: Mapping[str, np.ndarray],
    progress: Progress = silent,
) -> dict[str, Fitted]:
    """Every layer on its grid, by name, each in the network that the layers before it make.

    Args:
        pruned: in floats.
        rounded: the same layers, with activations rounded.
        room: by layer name, (out,): scales that the writer would take.
        progress: called as work goes on.
    """
    fit, guard = (SideBySide(pruned, rounded, data) for data in (pruned.train, pruned.validation))
    weights = _sensitivities(pruned, pruned.train), _sensitivities(pruned, pruned.validation)
    state, found = rounded.original, dict[str, Fitted]()
    tensors = {layer.name: layer.weight.tensor for layer in pruned.layers}
    shared: dict[str, np.ndarray] = {}
    for done, (segment, judged) in enumerate(zip(fit.segments, guard.segments, strict=True), 1):
        check_deadline()
        layer = segment.layer
        of_fit, of_guard = (w.get(layer.name) for w in weights)
        gram = fit.gram(segment, state, of_fit, SHRINKAGE)
        target, tensor = matrix(layer, rounded.original), tensors[layer.name]
        if pruned.uses[tensor] == 1:
            tries = _tries(gram, target, room[layer.name])
        else:  # one scale for all that share it, and the nearest integers
            scale = shared.setdefault(tensor, _scales(target, room[layer.name]))
            tries = [_plain(gram, target, scale)]
        found[layer.name] = _chosen(guard, judged, state, of_guard, tries)
        state = state.with_layer(layer, found[layer.name].weight, found[layer.name].shift)
        progress("int8", done, len(fit.segments))
    return found


Try = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Weights (out, in) on a grid, its scales (out,), and shifts (k, out) to choose from."""


def _tries(gram: Gram, target: np.ndarray, room: np.ndarray) -> list[Try]:
    """The nearest integers, and the refit on the grid."""
    keep = target != 0
    wanted, _ = refit(gram, target, keep, DAMPING)
    weight, scale = np.zeros_like(target), np.ones(len(target), np.float32)
    rows_of = np.arange(len(target)).reshape(len(gram.weight), -1)
    for covariance, rows in zip(gram.covariance, rows_of, strict=True):
        system = damped(covariance, DAMPING)
        part = np.maximum(best_scales(wanted[rows], system), _floor(target[rows], room[rows]))
        q = on_grid(wanted[rows], system, keep[rows], part)
        weight[rows], scale[rows] = q * part.astype(np.float64)[:, None], part
    shift = mean_shift(gram, target, _stored(weight))
    return [_plain(gram, target, _scales(target, room)), (weight, scale, shift[None])]


def _plain(gram: Gram, target: np.ndarray, scale: np.ndarray) -> Try:
    """The nearest integers, without a shift and with."""
    weight = nearest(target, scale) * scale.astype(np.float64)[:, None]
    shift = mean_shift(gram, target, _stored(weight))
    return weight, scale, np.stack([np.zeros_like(shift), shift])


def _stored(weight: np.ndarray) -> np.ndarray:
    """The weights as float32 holds them."""
    return weight.astype(np.float32).astype(np.float64)


def _scales(target: np.ndarray, room: np.ndarray) -> np.ndarray:
    return np.maximum(fitting_scales(target), _floor(target, room))


def _floor(target: np.ndarray, room: np.ndarray) -> np.ndarray:
    """(out,): the least scale with which the bias fits into int32; 0 where any does."""
    return np.where(room > fitting_scales(target) * _ROOM, room, 0).astype(np.float32)


def _chosen(
    guard: SideBySide,
    segment: Segment,
    state: State,
    s: np.ndarray | None,
    tries: Sequence[Try],
) -> Fitted:
    """The try with the least error on the validation samples; the later one of equals."""
    candidates = [(_stored(weight), shifts) for weight, _, shifts in tries]
    energy, errors = guard.errors(segment, state, s, SHRINKAGE, candidates)
    least = min(float(e.min()) for e in errors)
    best = max(i for i, e in enumerate(errors) if e.min() == least)
    weight, scale, shifts = tries[best]
    return Fitted(
        segment.layer.weight.unmatrix(weight).astype(np.float32),
        scale,
        shifts[int(errors[best].argmin())],
        float(np.sqrt(least / energy)) if energy else 0.0,
        len(tries) > 1 and best == len(tries) - 1,
    )


def _sensitivities(network: Network, data: Calibration) -> Mapping[str, np.ndarray]:
    """By layer name, how much its rows count; nothing where the reverse graph is not there."""
    observer = network.observer
    if not observer.reverses:
        return {}
    found = row_sensitivities(
        observer, network.original, data, size=network.size, memory=network.share(8)
    )
    return {name: found[name] for name in found}


class SideBySide(LayerwiseForward):
    """Two networks of the same layers on their way with the same samples.

    Args:
        pruned: whose inputs and weights are wanted.
        rounded: whose layers become something else.
        data: the samples.
    """

    def __init__(self, pruned: Network, rounded: Network, data: Calibration) -> None:
        super().__init__(rounded, data, with_original=False)
        order = {s.layer.name: k for k, s in enumerate(rounded.segments)}
        layers = sorted(pruned.layers, key=lambda layer: order[layer.name])
        self.segments = rounded.segments
        self._beside = dict(
            zip(order, segments(pruned.observer, layers, in_order=True), strict=True)
        )
        batches = list(data.batches(rounded.size))
        self._pruned = ForwardPass(pruned.observer, batches, pruned.share(8))
        self._state = pruned.original

    def _rows(
        self, segment: Segment, state: State, at: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        beside = self._beside[segment.layer.name]
        yield from zip(
            self._pruned.advance(beside, self._state, at),
            self._now.advance(segment, state, at),
            strict=True,
        )
