"""The loss over samples, and products with J and J^T around a state, here or by workers.

J = dy/dtheta is nowhere written down: ``J d`` is a difference of two forward runs, ``J^T u`` one
run of the reverse graph, summed over samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import add
from typing import Any, Protocol

import numpy as np

from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.runtime.digest import digest
from onnx_ecp.runtime.lazy import Spill
from onnx_ecp.runtime.workers import Crew, Held, Job, crew, held_here
from onnx_ecp.statistics.objective import Objective, Parameters, Wanted
from onnx_ecp.statistics.observer import Observer, State
from onnx_ecp.statistics.parts import held_observer, held_part, held_state, parts_of

Outputs = Mapping[str, np.ndarray]


class Around(Protocol):
    """The network linearised at a state."""

    def slope(self) -> np.ndarray:
        """(theta.size,): the sum over samples of J^T slope."""

    def product(self, moved: State, step: float) -> np.ndarray:
        """(theta.size,): the sum over samples of J^T H J d, where ``moved`` is ``step`` d away."""


class Samples(Protocol):
    """Samples with what is wanted of them."""

    def __len__(self) -> int:
        """How many there are."""

    def loss(self, state: State) -> float:
        """Mean loss per sample."""

    def around(self, state: State, theta: Parameters, memory: int | None) -> Around:
        """The network linearised at a state.

        Args:
            state: the point.
            theta: what moves.
            memory: bytes that outputs may take; beyond, they lie in a temporary file.
        """


def samples_of(
    objective: Objective, data: Calibration, size: int, memory: int | None = None
) -> Samples:
    """Samples with what is wanted of them, held by workers where there are any.

    Args:
        objective: that says what is wanted.
        data: the samples.
        size: of a batch.
        memory: bytes that targets may take; beyond, they lie in a temporary file.
    """
    workers = crew()
    if workers is None:
        return _Own(objective, data, size, memory)
    return _Shared(objective, data, size, memory, workers)


class _Own:
    """Samples that this process looks at."""

    def __init__(
        self, objective: Objective, data: Calibration, size: int, memory: int | None
    ) -> None:
        self.objective, self._count = objective, len(data)
        self.wanted = Wanted(objective, data, size, memory)

    def __len__(self) -> int:
        return self._count

    def loss(self, state: State) -> float:
        return self.objective.loss_over(state, self.wanted)

    def around(self, state: State, theta: Parameters, memory: int | None) -> _AroundOwn:
        return _AroundOwn(self, state, theta, memory)


class _AroundOwn:
    """The outputs that a state makes of samples here."""

    def __init__(self, samples: _Own, state: State, theta: Parameters, memory: int | None) -> None:
        self._objective, self._samples = samples.objective, samples.wanted
        self._state, self._theta = state, theta
        self._outputs = Spill(memory)
        for number, batch in enumerate(self._samples.batches):
            for name, y in self._objective.observer.heads(state, batch).items():
                self._outputs[number, name] = y

    def slope(self) -> np.ndarray:
        total = np.zeros(self._theta.size)
        for (batch, y), (_, targets) in zip(self._seen(), self._samples, strict=True):
            slopes = self._objective.slopes(y, targets)
            total += self._objective.gradient(self._state, batch, slopes, self._theta)
        return total

    def product(self, moved: State, step: float) -> np.ndarray:
        total = np.zeros(self._theta.size)
        for batch, y in self._seen():
            there = self._objective.observer.heads(moved, batch)
            change = {n: (there[n].astype(np.float64) - y[n]) / step for n in y}
            bends = self._objective.bends(y, change)
            total += self._objective.gradient(self._state, batch, bends, self._theta)
        return total

    def _seen(self) -> Iterator[tuple[Batch, Outputs]]:
        """Every batch with the outputs that the state makes of it."""
        heads = self._objective.observer.scales
        for number, batch in enumerate(self._samples.batches):
            yield batch, {name: self._outputs[number, name] for name in heads}


class _Shared:
    """Samples that workers look at, part by part."""

    def __init__(
        self,
        objective: Objective,
        data: Calibration,
        size: int,
        memory: int | None,
        workers: Crew,
    ) -> None:
        parts = parts_of(data)
        self._count, self._crew = len(data), workers
        self._size, self._memory = size, None if memory is None else memory // len(parts)
        self._common = held_observer(objective.observer, workers), held_state(objective.original)
        self._parts = [held_part(part) for part in parts]

    def __len__(self) -> int:
        return self._count

    def loss(self, state: State) -> float:
        return float(self.asked("loss", [held_state(state)])) / self._count

    def around(self, state: State, theta: Parameters, memory: int | None) -> _AroundShared:
        return _AroundShared(self, held_state(state), Held(digest("theta", theta.content), theta))

    def asked(self, what: str, held: Sequence[Held], *given: Any) -> Any:
        """The sum of what all parts answer."""
        common = (*self._common, *held)
        keys = [x.key for x in common]
        jobs = [
            Job((part,), ((*keys, part.key), what, self._size, self._memory, *given))
            for part in self._parts
        ]
        return self._crew.total(_answer, common, jobs, add)


class _AroundShared:
    """The outputs that a state makes of samples at workers."""

    def __init__(self, samples: _Shared, state: Held, theta: Held) -> None:
        self._samples, self._state, self._theta = samples, state, theta

    def slope(self) -> np.ndarray:
        return self._sum("slope", [])

    def product(self, moved: State, step: float) -> np.ndarray:
        return self._sum("product", [held_state(moved)], step)

    def _sum(self, what: str, held: Sequence[Held], *given: Any) -> np.ndarray:
        held = [self._state, self._theta, *held]
        total: np.ndarray = self._samples.asked(what, held, *given)
        return total


def _answer(observer: Observer, wanted: State, *values: Any) -> Any:
    """What one part tells, on a worker: its loss, its slope or a product."""
    number = next(i for i, value in enumerate(values) if isinstance(value, Calibration))
    held, part = values[:number], values[number]
    keys, what, size, memory, *given = values[number + 1 :]
    about = sum(array.nbytes for array in part.arrays.values())
    ours = (keys[0], keys[1], keys[-1], size)
    own = held_here(
        digest("samples", *ours),
        lambda: _Own(Objective(observer, wanted), part, size, memory),
        about,
    )
    if what == "loss":
        return own.loss(held[0]) * len(own)
    state, theta, *moved = held
    around = held_here(
        digest("around", *ours, keys[2], keys[3]),
        lambda: own.around(state, theta, memory),
        about,
    )
    return around.slope() if what == "slope" else around.product(*moved, *given)
