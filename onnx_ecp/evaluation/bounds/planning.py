"""Before pruning: what random and magnitude pruning cost at most, without any data.

In the setting of Qian & Klabjan (ICML 2021, arXiv:2105.10065). With W' = W + dW and Lipschitz
constants L_l, an induction over the layers gives

    ||F(x) - f(x)|| <= R(x) (prod_l (1 + ||dW_l|| / ||W_l||) - 1)

where R(x) is the bound on ||f(x)|| that the norms of the original's layers give (without biases
prod_l L_l ||W_l|| ||x||; of a convolution the norm of its matrix times the root of the number of
windows that an element can lie in). The relative gap is the gap over R(x). What is random is
||dW_l||:

- random: every weight is dropped with probability r. dW = -r W + X, X with independent entries of
  mean 0 and variance r (1 - r) W_ij^2; the probability is over the masks, W is the given one.
- magnitude: the weights of a layer are independent draws from a symmetric distribution, fitted to
  the layer; those up to the threshold t are dropped, so dW has independent entries of mean 0, at
  most t, of variance E[w^2; |w| <= t]; the probability is over the weights.

Matrix Bernstein (Tropp, 2012) bounds a matrix X of independent entries of mean 0 that are at most
M, with v the largest sum of variances of a row or column:

    E ||X|| <= sqrt(2 v log(m + n)) + M log(m + n) / 3
    P(||X|| >= s) <= (m + n) exp(-s^2 / (2 v + 2 M s / 3))

and Bernstein for sums of numbers bounds ||dW||_F >= ||dW||; the smaller of the two counts, each
with half of the probability to fail. For iid entries of variance u, ||X|| is typically near
sqrt(u) (sqrt(m) + sqrt(n)) (Bai & Yin, 1993):
(2 K / sqrt 3) r^(1/2) for random and (2 K / sqrt 3) r^(3/2) for magnitude pruning of a d x d matrix
that is uniform on [-K / sqrt d, K / sqrt d].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_ecp.errors import UsageError, did_you_mean
from onnx_ecp.evaluation.bounds.norms import matrix_norm

RELATIVE = "the gap is relative to R(x), the bound on ||f(x)|| from the norms of the layers of f"
LIPSCHITZ = "what lies between the layers is the same in both networks"
EACH_ALONE = "every weight is dropped independently of all others, with the same probability"
DRAWN = (
    "the weights of a layer are independent draws from a symmetric distribution whose absolute "
    "values have the quantiles seen in the layer"
)


@dataclass(frozen=True)
class Spread:
    """The norm of what pruning takes from one layer, relative to the layer's own norm.

    Args:
        name: of the layer.
        shape: (out, in).
        share: of its weights that go.
        typical: near which the norm lies for large layers of iid weights.
        expected: the expectation is at most this.
        limit: the norm is at most this, with the layer's part of the confidence.
    """

    name: str
    shape: tuple[int, int]
    share: float
    typical: float
    expected: float
    limit: float


@dataclass(frozen=True)
class Planning:
    """What pruning a network to a sparsity costs at most.

    Args:
        method: "random" or "magnitude".
        sparsity: share of all weights that go.
        weights: how many those are.
        confidence: with which ``gap`` holds.
        typical: relative gap with the typical norms; no bound.
        expected: the expected relative gap is at most this (random: of independent layers).
        gap: the relative gap is at most this, with the confidence, for all inputs at once.
        eps: the relative gap that is allowed, or None.
        largest_sparsity: up to which ``gap`` is at most eps.
        largest_weights: how many weights that is.
        layers: one row per layer.
        assumptions: what must be true.
        vacuous: whether ``gap`` is 1 or more, which holds for a network whose outputs are all zero
            as well.
    """

    method: str
    sparsity: float
    weights: int
    confidence: float
    typical: float
    expected: float
    gap: float
    eps: float | None
    largest_sparsity: float | None
    largest_weights: int | None
    layers: tuple[Spread, ...]
    assumptions: tuple[str, ...]
    vacuous: bool


def plan(
    matrices: Mapping[str, np.ndarray],
    method: str,
    sparsity: float,
    confidence: float,
    eps: float | None = None,
) -> Planning:
    """Bounds for pruning these layers, one after the other in a network.

    Args:
        matrices: W (out, in) by layer name.
        method: "random" or "magnitude".
        sparsity: share of zeros, in [0, 1].
        confidence: in (0, 1).
        eps: relative gap that is allowed; adds the largest sparsity that keeps to it.

    Raises:
        UsageError: another method.
    """
    if method not in _REMOVALS:
        raise UsageError(
            f"no probabilistic bound is known for method {method!r}.",
            hint=did_you_mean(method, _REMOVALS),
        )
    total = sum(w.size for w in matrices.values())
    norms = {name: matrix_norm(w) for name, w in matrices.items()}

    def layers(share: float) -> tuple[Spread, ...]:
        delta = (1 - confidence) / len(matrices)
        removals = _REMOVALS[method](matrices, norms, share)
        return tuple(x.relative_to(norms[x.name], delta) for x in removals)

    rows = layers(sparsity)
    largest = None
    if eps is not None:
        largest = _largest(lambda share: _product(x.limit for x in layers(share)) <= eps)
    gap = _product(x.limit for x in rows)
    return Planning(
        method=method,
        sparsity=sparsity,
        weights=round(sparsity * total),
        confidence=confidence,
        typical=_product(x.typical for x in rows),
        expected=_product(x.expected for x in rows),
        gap=gap,
        eps=eps,
        largest_sparsity=largest,
        largest_weights=None if largest is None else math.floor(largest * total),
        layers=rows,
        assumptions=(EACH_ALONE if method == "random" else DRAWN, LIPSCHITZ, RELATIVE),
        vacuous=gap >= 1,
    )


def bernstein_mean(variance: float, largest: float, size: int) -> float:
    """Upper bound of E||X||; ``size`` is rows + columns."""
    log = math.log(size)
    return math.sqrt(2 * variance * log) + largest * log / 3


def bernstein_limit(variance: float, largest: float, size: int, delta: float) -> float:
    """The s that ||X|| exceeds with probability at most delta: the tail, solved for s.

    With ``size`` 1 that of a sum of independent numbers.
    """
    log = math.log(size / delta)
    linear = largest * log / 3
    return linear + math.sqrt(linear**2 + 2 * variance * log)


@dataclass(frozen=True)
class Removal:
    """What is random about dW of one layer: dW = mean + X.

    Args:
        name: of the layer.
        shape: (out, in).
        share: of the weights that go.
        second: mean square of the entries of dW.
        mean: norm of the mean.
        variance: v of the module's formula.
        largest: M of the module's formula.
        fourth: sum of the variances of the squared entries of dW.
    """

    name: str
    shape: tuple[int, ...]
    share: float
    second: float
    mean: float
    variance: float
    largest: float
    fourth: float

    def relative_to(self, norm: float, delta: float) -> Spread:
        """Its norms in units of the layer's, which fail with probability delta."""
        norm, size = norm or math.inf, sum(self.shape)
        typical = math.sqrt(self.second) * sum(math.sqrt(n) for n in self.shape)
        square = self.second * math.prod(self.shape)
        expected = self.mean + bernstein_mean(self.variance, self.largest, size)
        expected = min(expected, math.sqrt(square))
        limit = self.mean + bernstein_limit(self.variance, self.largest, size, delta / 2)
        above = bernstein_limit(self.fourth, self.largest**2, 1, delta / 2)
        limit = min(limit, math.sqrt(square + above))
        shape = (self.shape[0], self.shape[1])
        return Spread(self.name, shape, self.share, typical / norm, expected / norm, limit / norm)


def _random(
    matrices: Mapping[str, np.ndarray], norms: Mapping[str, float], share: float
) -> list[Removal]:
    rows = []
    for name, w in matrices.items():
        squares = np.square(w.astype(np.float64))
        spread = share * (1 - share)
        v = spread * float(max(squares.sum(axis=0).max(), squares.sum(axis=1).max()))
        most = float(np.abs(w).max()) if spread else 0.0
        second, fourth = share * float(squares.mean()), spread * float(np.square(squares).sum())
        rows.append(Removal(name, w.shape, share, second, share * norms[name], v, most, fourth))
    return rows


def _magnitude(
    matrices: Mapping[str, np.ndarray], norms: Mapping[str, float], share: float
) -> list[Removal]:
    flat = np.sort(np.concatenate([np.abs(w).ravel() for w in matrices.values()]))
    number = math.ceil(share * flat.size)
    threshold = float(flat[number - 1]) if number else -1.0
    rows = []
    for name, w in matrices.items():
        gone = np.abs(w) <= threshold
        variance = float(np.square(np.where(gone, w, 0.0), dtype=np.float64).mean())
        v, most = variance * max(w.shape), threshold if gone.any() else 0.0
        fourth = variance * most**2 * w.size  # Var(d^2) <= E[d^4] <= M^2 E[d^2]
        rows.append(Removal(name, w.shape, float(gone.mean()), variance, 0.0, v, most, fourth))
    return rows


_REMOVALS: dict[str, Callable[..., list[Removal]]] = {"random": _random, "magnitude": _magnitude}


def _product(shares: Iterable[float]) -> float:
    return math.prod(1 + x for x in shares) - 1


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest share in [0, 1] for which a property holds that holds for all smaller ones."""
    low, high = 0.0, 1.0
    if holds(high):
        return high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
