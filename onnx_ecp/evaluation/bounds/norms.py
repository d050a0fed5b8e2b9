"""Upper bounds of how much a linear operator can lengthen a vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Above this many elements of its spectrum a convolution is bounded by its matrix alone.
_SPECTRUM = 2**24


@dataclass(frozen=True)
class Kernel:
    """How a convolution or pooling window moves over the spatial axes.

    Args:
        size: of the window, per spatial axis.
        strides: step per spatial axis.
        dilations: distance of the window's elements per spatial axis.
        groups: groups of channels that do not mix.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int = 1

    @staticmethod
    def of(attributes: dict, size: Sequence[int]) -> Kernel:
        """From a node's attributes and the size of its window."""
        ones = [1] * len(size)
        return Kernel(
            tuple(size),
            tuple(attributes.get("strides", ones)),
            tuple(attributes.get("dilations", ones)),
            int(attributes.get("group", 1)),
        )

    @property
    def overlap(self) -> int:
        """In how many positions of the window one input element can lie."""
        return math.prod(
            # Elements j of the window with x - j * dilation divisible by the stride.
            math.ceil(k / (s // math.gcd(s, d)))
            for k, s, d in zip(self.size, self.strides, self.dilations, strict=True)
        )


def matrix_norm(w: np.ndarray) -> float:
    """The largest singular value of a matrix."""
    return float(np.linalg.norm(w.astype(np.float64), 2)) if w.size else 0.0


def convolution_norm(w: np.ndarray, kernel: Kernel, spatial: Sequence[int]) -> float:
    """An upper bound of the operator norm of a convolution with zero padding.

    The smaller of two: a patch is multiplied by the matrix W, and every input element is in at
    most ``overlap`` patches, so ||conv|| <= sqrt(overlap) ||W||; and with zero padding the outputs
    are among those of a circular convolution on a grid large enough not to wrap around, whose norm
    is the largest ||W^(frequency)||.

    Args:
        w: (out, in per group, *kernel).
        kernel: how it moves.
        spatial: size of the input's spatial axes.
    """
    parts = np.split(w.astype(np.float64), kernel.groups)
    return max(_group_norm(part, kernel, spatial) for part in parts)


def _group_norm(w: np.ndarray, kernel: Kernel, spatial: Sequence[int]) -> float:
    by_matrix = math.sqrt(kernel.overlap) * matrix_norm(w.reshape(len(w), -1))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.size, kernel.dilations, strict=True)]
    grid = [n + e - 1 for n, e in zip(spatial, extent, strict=True)]
    if math.prod(grid) * w.shape[0] * w.shape[1] > _SPECTRUM:
        return by_matrix
    dilated = np.zeros((*w.shape[:2], *extent))
    dilated[(slice(None), slice(None), *(slice(None, None, d) for d in kernel.dilations))] = w
    axes = tuple(range(2, w.ndim))
    spectrum = np.moveaxis(np.fft.fftn(dilated, grid, axes), (0, 1), (-2, -1))
    return min(by_matrix, float(np.linalg.norm(spectrum, 2, axis=(-2, -1)).max()))
