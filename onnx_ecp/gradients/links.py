"""What makes probabilities of logits: the pieces of the KL divergence that depend on it.

Of logits y with probabilities p, and a second network's q:

    softmax   p over the classes of the last axis    F = diag(p) - p p^T
    sigmoid   each element for itself                F = diag(p (1 - p))

F is the second derivative of KL(p || q) in the logits; R with R^T R = F gives its sensitivities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Link:
    """From logits to probabilities.

    Args:
        probabilities: p of y, float64.
        root: (v, p) -> R^T v, for rows v of the shape of y.
        bend: (u, p) -> F u.
        divergence: (p, q) -> KL(p || q), summed.
    """

    probabilities: Callable[[np.ndarray], np.ndarray]
    root: Callable[[np.ndarray, np.ndarray], np.ndarray]
    bend: Callable[[np.ndarray, np.ndarray], np.ndarray]
    divergence: Callable[[np.ndarray, np.ndarray], float]


def softmax(y: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64.

    >>> softmax(np.zeros((1, 2))).tolist()
    [[0.5, 0.5]]
    """
    z = y.astype(np.float64)
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(z / z.sum(axis=-1, keepdims=True))


def sigmoid(y: np.ndarray) -> np.ndarray:
    """Logistic function, in float64; exact far out on both sides.

    >>> sigmoid(np.array([0.0, -800.0])).tolist()
    [0.5, 0.0]
    """
    z = np.exp(-np.abs(y.astype(np.float64)))
    return np.asarray(np.where(y >= 0, 1.0, z) / (1.0 + z))


def _softmax_root(v: np.ndarray, p: np.ndarray) -> np.ndarray:
    # Rows R_k = sqrt(p_k) (e_k - p)
    u = v * np.sqrt(p)
    return np.asarray(u - p * u.sum(axis=-1, keepdims=True))


def _softmax_bend(u: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.asarray(p * (u - (p * u).sum(axis=-1, keepdims=True)))


def _entropy_gap(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p + TINY) - np.log(q + TINY))).sum())


LINKS: dict[str, Link] = {
    "Softmax": Link(softmax, _softmax_root, _softmax_bend, _entropy_gap),
    "Sigmoid": Link(
        sigmoid,
        lambda v, p: v * np.sqrt(p * (1 - p)),
        lambda u, p: u * p * (1 - p),
        lambda p, q: _entropy_gap(p, q) + _entropy_gap(1 - p, 1 - q),
    ),
}
LINKS["LogSoftmax"] = LINKS["Softmax"]
