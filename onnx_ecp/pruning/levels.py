"""Importances in steps of equal ratio: a byte a weight, enough to draw what went and what stayed.

Level 0 is an importance of 0; level 1 + floor((log2 s - log2 low) / step) any other importance s,
and 1 all that lies below ``low``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# Levels besides that of 0, over so many powers of two below the largest importance: 1e12.
LEVELS, SPAN = 60, 40.0


@dataclass(frozen=True)
class Levels:
    """The importances of the original network's weights.

    Args:
        high: the largest importance; 0 where all are 0.
        by_layer: by layer name, (out, in) uint8, 0 to LEVELS.
    """

    high: float = 0.0
    by_layer: Mapping[str, np.ndarray] = field(default_factory=dict)

    def edges(self) -> np.ndarray:
        """(LEVELS + 1,), where levels 1 to LEVELS begin and end."""
        return np.asarray(self.high * np.exp2(np.linspace(-SPAN, 0.0, LEVELS + 1)))


def levels_of(scores: Mapping[str, np.ndarray]) -> Levels:
    """The levels of the importances of all layers, which have one scale.

    Args:
        scores: by layer name, (out, in), >= 0.
    """
    high = max((float(score.max(initial=0.0)) for score in scores.values()), default=0.0)
    if high <= 0.0:
        return Levels(0.0, {n: np.zeros(np.shape(s), np.uint8) for n, s in scores.items()})
    return Levels(high, {name: _level(score, high) for name, score in scores.items()})


def _level(score: np.ndarray, high: float) -> np.ndarray:
    below = np.log2(np.maximum(score / high, 2.0**-SPAN))  # in [-SPAN, 0]
    steps = np.minimum((below + SPAN) * (LEVELS / SPAN), LEVELS - 1)
    return np.where(score > 0.0, 1 + steps, 0.0).astype(np.uint8)
