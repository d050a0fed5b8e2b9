"""Samples of one input that differ in shape: sentences, images, graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Ragged:
    """Arrays of one rank and type, one per sample; indexed like an array of samples.

    Args:
        parts: one array per sample, at least one.
    """

    parts: tuple[np.ndarray, ...]

    @staticmethod
    def joined(pieces: Sequence[Samples]) -> Samples:
        """Samples of several arrays, one after the other: an array where all have one shape."""
        shapes = {part.shape for piece in pieces for part in _parts(piece)}
        if len(shapes) > 1:
            return Ragged(tuple(part for piece in pieces for part in _parts(piece)))
        arrays = [x if isinstance(x, np.ndarray) else np.stack(x.parts) for x in pieces]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.parts)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The samples in order."""
        return iter(self.parts)

    def take(self, indices: np.ndarray) -> Samples:
        """The samples with these indices; an array where they have one shape."""
        chosen = tuple(self.parts[i] for i in indices)
        return np.stack(chosen) if len({x.shape for x in chosen}) == 1 else Ragged(chosen)

    @property
    def dtype(self) -> np.dtype:
        """Of all samples."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Of all samples together."""
        return sum(part.nbytes for part in self.parts)


# An array (samples, ...), or what takes its place where samples differ in shape.
Samples = np.ndarray | Ragged


def shape_of(samples: Samples, index: int = 0) -> tuple[int, ...]:
    """Of one sample."""
    return samples.shape[1:] if isinstance(samples, np.ndarray) else samples.parts[index].shape


def taken(samples: Samples, indices: np.ndarray) -> Samples:
    """The samples with these indices, in this order."""
    return samples[indices] if isinstance(samples, np.ndarray) else samples.take(indices)


def one(samples: Samples, index: int) -> np.ndarray:
    """One sample; a scalar stays an array."""
    return samples[index, ...] if isinstance(samples, np.ndarray) else samples.parts[index]


def run(samples: Samples, start: int, stop: int) -> np.ndarray:
    """(stop - start, ...), samples of one shape."""
    if isinstance(samples, np.ndarray):
        return samples[start:stop]
    return np.stack(samples.parts[start:stop])


def with_axis(samples: Samples) -> Samples:
    """Every sample with a first axis of one more."""
    if isinstance(samples, np.ndarray):
        return samples[:, None]
    return Ragged(tuple(part[None] for part in samples.parts))


def without_axis(samples: Samples) -> Samples:
    """Every sample without its first axis, which is one."""
    if isinstance(samples, np.ndarray):
        return samples[:, 0]
    return Ragged(tuple(part[0] for part in samples.parts))


def largest_bytes(samples: Samples) -> int:
    """Of the largest sample."""
    if isinstance(samples, np.ndarray):
        return samples.nbytes // len(samples)
    return max(part.nbytes for part in samples.parts)


def _parts(samples: Samples) -> Sequence[np.ndarray]:
    return (
        samples.parts
        if isinstance(samples, Ragged)
        else [samples[i, ...] for i in range(len(samples))]
    )
