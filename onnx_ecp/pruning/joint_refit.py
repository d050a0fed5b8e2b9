"""All weights that stay, and all biases, at once: Gauss-Newton steps on the outputs themselves.

The refit brings every layer close to the original layer; what the layers make together is nobody's
concern there. Here the kept weights and shifts of all layers, theta, are moved so that the outputs
y come close to the original ones:

    min over d of  E[ |J d|_H^2 / 2 + slope(y)^T J d ] + |d|_R^2 / 2

with J = dy/dtheta, H the curvature of the loss in y and R a ridge (docs/method.md, section 3).
Conjugate gradients need products with J and J^T alone: J d is a difference of two forward runs,
J^T u one run of the reverse graph (Schraudolph 2002; Martens 2010, "Hessian-free optimization").
What ECP measures, the variance that a weight adds to the outputs beside its bias, is the diagonal
of the system, and preconditions it. Samples that no step has seen say where to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.layers import Layer
from onnx_ecp.linalg.sums import dot
from onnx_ecp.pruning.finetune import Tuned
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.runtime.workers import PARTS, crew
from onnx_ecp.statistics.collection import measure
from onnx_ecp.statistics.layerwise import matrix
from onnx_ecp.statistics.linearised import Samples, samples_of
from onnx_ecp.statistics.objective import Centred, Objective, Parameters
from onnx_ecp.statistics.observer import State

# The network is linearised so many times at most, with so many steps of conjugate gradients each.
ROUNDS = 3
STEPS = 16
# A round ends after so many steps without a better state; the last round is one that lowers the
# loss by less than this share of it.
PATIENCE = 4
LEAST_GAIN = 0.05
# The loss on held-out samples is looked at every so many steps.
CHECK = 2
# The ridge in units of that of one layer's refit. On training digits held out, over six networks, 1
# to 10 leave the same error on average; with 1 no step is short enough to be taken on a narrow
# network of seven layers with 2:4.
RIDGE = 10.0
# Norms of rows of W below this share of the largest count as this much.
LEAST_NORM = 1e-12
# Size of the disturbance that J d is measured with, as a share of the weights, both in units of the
# outputs: float32 outputs have seven digits, of which a difference this small keeps four.
DISTURBANCE = 3e-3
# Vectors as long as theta, and states with all weights, that are in memory at a time, sums of a
# batch included: as measured, with some to spare.
VECTORS, STATES = 15, 3


def memory_needed(layers: Sequence[Layer], state: State) -> int:
    """Bytes that ``refit_jointly`` takes for weights, whatever the samples.

    Args:
        layers: that are refitted.
        state: whose weights they are.
    """
    dense = sum(state.keep[name].size for name in {layer.weight.tensor for layer in layers})
    length = Parameters.count(layers, state.keep)
    # Sums over parts, in float64, wait for each other.
    sums = 8 * PARTS * length if crew() is not None else 0
    return sums + precision(layers, state).itemsize * (VECTORS * length + STATES * dense)


def precision(layers: Sequence[Layer], state: State) -> np.dtype:
    """Type of the vectors: that of the weights, float32 at least.

    Sums over weights and samples are taken in float64 whatever it is. The products with J are
    differences of outputs in the type of the weights, so more digits in between add none.
    """
    kinds = {state.weights[layer.weight.tensor].dtype for layer in layers}
    return np.result_type(np.float32, *kinds)


def refit_jointly(
    objective: Objective,
    state: State,
    fit: Calibration,
    guard: Calibration,
    *,
    size: int,
    damping: float,
    rounds: int = ROUNDS,
    memory: int | None = None,
    progress: Progress = silent,
) -> Tuned:
    """Move kept weights and shifts of all layers towards the original outputs; masks stay.

    Args:
        objective: whose loss is lowered.
        state: where to begin.
        fit: samples to learn from.
        guard: other samples: the best state on them is what comes back.
        size: batch size.
        damping: a tenth of the ridge, as a share of the mean diagonal of the system, tensor by
            tensor: what a layer's refit calls damping.
        rounds: how many times the network is linearised, at most.
        memory: bytes that outputs of all samples may take; beyond, they lie in a temporary file.
        progress: called after every step.
    """
    layers = objective.observer.layers
    theta = Parameters(layers, state.keep, precision(layers, state))
    centred, diagonal = _coordinates(objective, state, fit, size, memory, theta)
    quarter = None if memory is None else memory // 4
    learnt, others = (samples_of(objective, data, size, quarter) for data in (fit, guard))
    best, best_loss = state, others.loss(state)
    before, fit_loss = best_loss, learnt.loss(state)
    for turn in range(rounds):
        system, around = None, best_loss  # one linearisation is in memory at a time
        ridge, half = RIDGE * damping, None if memory is None else memory // 2
        system = _System(objective, best, learnt, theta, centred, diagonal, ridge, half)
        found = 0
        for step, d in enumerate(system.steps(), 1):
            progress("joint refit", turn * STEPS + step, rounds * STEPS)
            if step % CHECK:
                continue
            tried = theta.state(system.state, system.point + centred.moved(d))
            loss = others.loss(tried)
            # A step may go so far that the network is no longer what it was linearised to: a few
            # of the samples to learn from tell, where those on guard are not among the few.
            if loss < best_loss and (fitted := learnt.loss(tried)) < fit_loss:
                best, best_loss, fit_loss, found = tried, loss, fitted, step
            if step == STEPS or step - found >= PATIENCE:
                break
        if best_loss > (1 - LEAST_GAIN) * around:
            break
    progress("joint refit", rounds * STEPS, rounds * STEPS)
    return Tuned(best, before, best_loss)


def _coordinates(
    objective: Objective,
    state: State,
    fit: Calibration,
    size: int,
    memory: int | None,
    theta: Parameters,
) -> tuple[Centred, np.ndarray]:
    """Centred coordinates, and (theta.size,) the diagonal E[(dy/dd)^2] in them.

    The diagonal is in the metric, and summed over the outputs.
    """
    observer = objective.observer
    measured = measure(observer.rough, state, fit, size=size, memory=memory)
    weights: dict[str, np.ndarray] = {}
    shifts = {}
    for layer in observer.layers:
        moments, view = measured.moments[layer.name], layer.weight
        part = theta.kept(view.tensor, view.layout(moments.variance)) * view.scale**2
        weights[view.tensor] = weights.get(view.tensor, 0.0) + part
        shifts[layer.name] = moments.bb / moments.count
    # The means are weighted by the sensitivities of every unit, as in ECP's bias shift.
    centred = Centred(theta, observer.layers, lambda layer: measured.moments[layer.name].gain)
    return centred, theta.vector(weights, shifts)


def _ridge(
    objective: Objective, theta: Parameters, centred: Centred, diagonal: np.ndarray
) -> np.ndarray:
    """(theta.size,): the mean diagonal of each stored tensor and each layer's shifts.

    One mean for all would hold back the layers that move the outputs least per unit. Values are
    taken in units of the norms of their rows of W, so that no unit of an output column counts.
    """
    norms = {}
    for layer in objective.observer.layers:
        tensor = layer.weight.tensor
        norm = np.linalg.norm(matrix(layer, objective.original).astype(np.float64), axis=1)
        norm = np.where(norm > 0, norm, norm.mean() or 1.0)
        # Only their ratios count; the square of the least must be a number in single precision.
        norms[tensor] = np.maximum(norm / norm.max(), LEAST_NORM)
    squares = np.square(centred.by_row(norms))
    for ridge, own in zip(theta.parts(squares), theta.parts(diagonal), strict=True):
        if ridge.size:
            np.divide(dot(own, ridge) / ridge.size, ridge, out=ridge)
    return squares


class _System:
    """The linearised problem around one state: ``(E[J^T H J] + R) d = -E[J^T slope]``.

    Args:
        objective: whose loss it is.
        state: the point.
        samples: all of them.
        theta: what may move.
        centred: the coordinates of d.
        diagonal: of E[J^T H J], about.
        damping: ridge as a share of the diagonal; see ``_ridge``.
        memory: bytes that the outputs may take.
    """

    def __init__(
        self,
        objective: Objective,
        state: State,
        samples: Samples,
        theta: Parameters,
        centred: Centred,
        diagonal: np.ndarray,
        damping: float,
        memory: int | None,
    ) -> None:
        self.state, self.point = state, theta.of(state)
        self._theta, self._count = theta, len(samples)
        self._centred, self._diagonal = centred, diagonal
        self._ridge = _ridge(objective, theta, centred, diagonal)
        self._ridge *= damping
        (points, _), (parts, _) = theta.named(self.point), theta.named(diagonal)
        self._whole = float(np.sqrt(sum(dot(x, x, parts[name]) for name, x in points.items())))
        self._around = samples.around(state, theta, memory)

    def steps(self) -> Iterator[np.ndarray]:
        """Better and better solutions d: preconditioned conjugate gradients from d = 0."""
        d = np.zeros_like(self.point)
        residual = -self._slope()
        direction = np.zeros_like(d)
        before = np.inf
        while True:
            check_deadline()
            z = self._preconditioned(residual)
            now = dot(residual, z)
            direction *= direction.dtype.type(now / before)
            direction += z
            del z
            image = self._times(direction)
            curvature = dot(direction, image)
            if not curvature > 0:  # rounding, or nothing left to gain
                return
            step = direction.dtype.type(now / curvature)
            d = d + step * direction
            image *= step
            residual -= image
            del image
            before = now
            yield d

    def _preconditioned(self, residual: np.ndarray) -> np.ndarray:
        """The residual over the diagonal of the system; 0 where that is."""
        scale = self._diagonal + self._ridge
        return np.divide(residual, scale, out=np.zeros_like(residual), where=scale > 0)

    def _slope(self) -> np.ndarray:
        """E[J^T slope]."""
        return self._centred.pulled(self._around.slope() / self._count)

    def _times(self, d: np.ndarray) -> np.ndarray:
        """(E[J^T H J] + R) d."""
        size = float(np.sqrt(dot(d, d, self._diagonal)))
        if not size * self._whole > 0:  # nothing moves, or there is nothing to take a share of
            return np.zeros_like(d)
        step = DISTURBANCE * self._whole / size
        moved = self._theta.state(
            self.state, self.point + d.dtype.type(step) * self._centred.moved(d)
        )
        total = self._around.product(moved, step)
        total /= self._count
        pulled = self._centred.pulled(total)
        pulled += self._ridge * d
        return pulled
