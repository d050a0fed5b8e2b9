"""What is pruned and how; and walks along its layers that sum up what each of them is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.gradients.cotangents import SQUARED
from onnx_ecp.layers import Layer
from onnx_ecp.runtime.digest import digest
from onnx_ecp.statistics.drawing import Rows, drawn
from onnx_ecp.statistics.forward import ForwardPass, Segment, segments
from onnx_ecp.statistics.gram import BLOCK, Gram, outputs, squared_errors
from onnx_ecp.statistics.objective import Objective
from onnx_ecp.statistics.observer import Observer, State

# Rows are looked at in blocks: of BLOCK rows, or as many as take so much memory.
BLOCK_BYTES = 64 * 2**20
# What is left out for want of memory is decided by this many bytes where nobody says how many.
GRANTED = 8 * 2**30


@dataclass(frozen=True)
class Network:
    """What is pruned, and the data it is pruned on.

    Args:
        observer: of the layers.
        original: the state before pruning; layers are fitted to what they make of it.
        train: calibration samples for importance and compensation.
        validation: other calibration samples, on which a refit must not be worse than a bias shift.
        size: batch size.
        memory: bytes that statistics and activations may take, None for any number: half of it
            goes to moments and the sensitivities of rows, a quarter to scores and a quarter to the
            activations of a walk. What does not fit lies in temporary files.
        granted: bytes by which it is decided what is left out: what was asked for, or the same on
            every machine.
        aim: the state whose outputs pruning should keep; None: the original.
    """

    observer: Observer
    original: State
    train: Calibration
    validation: Calibration
    size: int
    memory: int | None = None
    granted: int = GRANTED
    aim: State | None = None

    def share(self, part: int) -> int | None:
        """One of so many equal parts of the memory."""
        return None if self.memory is None else self.memory // part

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are pruned."""
        return self.observer.layers

    @property
    def objective(self) -> Objective:
        """What pruning should leave as it was."""
        return Objective(self.observer, self.wanted)

    @property
    def wanted(self) -> State:
        """The state whose outputs pruning should keep."""
        return self.original if self.aim is None else self.aim

    @cached_property
    def identity(self) -> str:
        """A digest of all that decides what stages and refits make of a state."""
        own = (self.original, self.aim, self.train.identity, self.validation.identity)
        return digest(self.observer.identity, *own, self.size, self.granted)

    @cached_property
    def uses(self) -> Counter[str]:
        """By stored tensor, how many layers share it."""
        return Counter(layer.weight.tensor for layer in self.layers)

    @cached_property
    def segments(self) -> list[Segment]:
        """The cuts of the graph that a refit walks along."""
        return segments(self.observer, self.layers)


def matrix(layer: Layer, state: State) -> np.ndarray:
    """W (out, in) of a layer as a state has it, float64."""
    return layer.weight.matrix(state.weights[layer.weight.tensor]).astype(np.float64)


class LayerwiseForward:
    """Both versions of the network on their way along the segments with the same samples.

    Without the original, the current version stands for both.
    """

    def __init__(self, network: Network, data: Calibration, *, with_original: bool = True) -> None:
        batches = list(data.batches(network.size))
        self._original, self._segments = network.original, network.segments
        # Under a metric of probabilities, samples whose classes are sure weigh nothing as a whole.
        self._samples, self._skips = len(data), network.observer.metric in SQUARED
        limit = network.share(8)
        self._before = ForwardPass(network.observer, batches, limit) if with_original else None
        self._now = ForwardPass(network.observer, batches, limit)

    def stops(self, state: State, names: Collection[str]) -> Iterator[Segment]:
        """Segments that end with the inputs of some layers, each to be looked at before the next.

        Args:
            state: the same all along the way.
            names: of the layers.
        """
        left = set(names)
        for segment in self._segments:
            name = segment.layer.name
            if name in left:
                left.remove(name)
                yield segment
            else:
                self.skip(segment, state)
            if not left:
                return

    def skip(self, segment: Segment, state: State) -> None:
        """Walk along a segment that nobody looks at."""
        for _ in self._rows(segment, state):
            pass

    def gram(
        self, segment: Segment, state: State, weights: np.ndarray | None, shrink: float
    ) -> Gram:
        """Sums of the next layer's inputs over all samples.

        Args:
            segment: that ends with the layer's input.
            state: the network that the layers before it make now.
            weights: of the rows (groups, rows), their sensitivities; None weighs all alike.
            shrink: share of the mean weight that every row gets.
        """
        total = self.gram_of(segment, state, self.looked_at(segment, weights, shrink))
        assert total is not None, "a calibration has at least one sample"
        return total

    def gram_of(self, segment: Segment, state: State, some: Rows | None) -> Gram | None:
        """Likewise, of some rows, or of all; None where there are none among these samples."""
        total = None
        for before, now, s in self._weighted(segment, state, some):
            centre = now.mean(axis=1, dtype=np.float64) if total is None else total.centre
            part = Gram.of(now, before, s, centre)
            total = part if total is None else total + part
        return total

    def errors(
        self,
        segment: Segment,
        state: State,
        weights: np.ndarray | None,
        shrink: float,
        candidates: Sequence[tuple[np.ndarray, np.ndarray]],
        units: np.ndarray | None = None,
    ) -> tuple[float, list[np.ndarray]]:
        """Squared errors of what the next layer could become, summed over all samples and units.

        Products are taken in the type of the rows, at least float32, and squares in float64.

        Args:
            segment: see ``gram``.
            state: see ``gram``.
            weights: see ``gram``.
            shrink: see ``gram``.
            candidates: weights (out, in) and shifts (k, out) that go with them.
            units: (out,), how much the squared error of each unit counts; None: all alike.

        Returns:
            The squares of what is wanted, summed likewise; for each candidate its errors (k,).
        """
        some = self.looked_at(segment, weights, shrink)
        return self.errors_of(segment, state, some, candidates, units)

    def errors_of(
        self,
        segment: Segment,
        state: State,
        some: Rows | None,
        candidates: Sequence[tuple[np.ndarray, np.ndarray]],
        units: np.ndarray | None = None,
    ) -> tuple[float, list[np.ndarray]]:
        """Likewise, of some rows, or of all."""
        target = matrix(segment.layer, self._original)
        if units is not None:
            root = np.sqrt(units)
            target = target * root[:, None]
            candidates = [(w * root[:, None], shifts * root) for w, shifts in candidates]
        nothing = np.zeros((1, len(target)))
        energy, totals = 0.0, [np.zeros(len(shifts)) for _, shifts in candidates]
        step = int(np.clip(BLOCK_BYTES // target[:, 0].nbytes, 1, BLOCK))
        for before, now, s in self._weighted(segment, state, some):
            for first in range(0, now.shape[1], step):
                rows = (slice(None), slice(first, first + step))
                wanted = outputs(before[rows], target)
                energy += float(squared_errors(wanted, s[rows], nothing)[0])
                for total, (weight, shifts) in zip(totals, candidates, strict=True):
                    total += squared_errors(outputs(now[rows], weight) - wanted, s[rows], shifts)
        return energy, totals

    def looked_at(self, segment: Segment, weights: np.ndarray | None, shrink: float) -> Rows | None:
        """The rows that are looked at, and how much each counts; None for all alike."""
        if weights is None:
            return None
        padded = self._skips and weights.shape[1] > self._samples
        return drawn(weights, shrink, segment.layer.shape[1], skip_unread=padded)

    def _weighted(
        self, segment: Segment, state: State, some: Rows | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows of both versions and their weights, in blocks that products are fast with."""
        first = 0
        at = None if some is None else some.at
        for before, now in _blocks(self._rows(segment, state, at)):
            end = first + now.shape[1]
            s = np.ones(now.shape[:2]) if some is None else some.weights[:, first:end]
            yield before, now, s
            first = end

    def _rows(
        self, segment: Segment, state: State, at: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        now = self._now.advance(segment, state, at)
        if self._before is None:
            yield from ((a, a) for a in now)
        else:
            yield from zip(self._before.advance(segment, self._original, at), now, strict=True)


def _blocks(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows (groups, rows, in) of small batches put together, until they are large enough."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    rows = size = 0
    for before, now in pairs:
        if not now.shape[1]:
            continue  # none of its rows was drawn
        held.append((before, now))
        rows, size = rows + now.shape[1], size + now.nbytes
        if rows >= BLOCK or size >= BLOCK_BYTES:
            block, held, rows, size = _together(held), [], 0, 0
            del before, now  # nothing but the block is held while it is looked at
            yield block
    if held:
        yield _together(held)


def _together(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if len(pairs) == 1:
        return pairs[0]
    now = np.concatenate([now for _, now in pairs], axis=1)
    if all(before is now for before, now in pairs):
        return now, now
    return np.concatenate([before for before, _ in pairs], axis=1), now
