"""Which weights of a layer stay, for a given number: least squares with a cardinality constraint.

With the quadratic of a refit, H and r, rows of W that share it, and a factor s_i per row,

    min over W with k nonzeros of  sum_i s_i (w_i H w_i^T / 2 - r_i w_i^T)

is solved about by ADMM (ALPS, Meng et al. 2024, arXiv:2406.07831): a copy Y of W has the zeros, and
V holds the two together,

    U <- (R - V + rho Y) (H + rho I)^-1    Y <- the k largest of U + V / rho    V <- V + rho (U - Y)

with rho raised as the support of Y settles. One eigendecomposition of H serves every rho. Columns
are scaled to a unit diagonal of H first, as in the paper, and rows by s_i^(1/2), which makes H that
of all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnx_ecp.runtime.limits import check_deadline

# From a Z (rows, in) to the mask of what stays of it.
Projection = Callable[[np.ndarray], np.ndarray]


# The first penalty, in units of the diagonal of H. It leaves within 5 % of what a third of it does,
# in two thirds of the iterations (some 40), on training digits with five layers of 25 to 784 inputs
# at .9 to .98; three times as large a one leaves a fifth more.
RHO = 0.1
# Iterations between two looks at the support, and the factors by which the penalty is then raised,
# where at least that share of the support is new: the paper's but for the last one.
EVERY = 3
FACTORS = ((0.1, 1.3), (0.005, 1.2), (1e-12, 1.1), (0.0, 1.5))
MOST = 300
# A brief search has one penalty and so many iterations, with one inverse of half of the cost of the
# eigenvectors. With it in all stages but the last, the last leaves what it leaves after full ones:
# .96 to 1.01 of it, on training digits with the networks of benchmarks/engine.py.
BRIEF_RHO, BRIEF = 0.3, 12


def support(
    system: np.ndarray,
    right: np.ndarray,
    start: np.ndarray,
    scale: np.ndarray,
    project: Projection,
    *,
    brief: bool = False,
) -> np.ndarray:
    """Keep mask (rows, in) of the weights with which the quadratic becomes about the smallest.

    Args:
        system: H, (in, in), symmetric positive definite.
        right: r, (rows, in).
        start: (rows, in), where the iteration begins.
        scale: s, (rows,) >= 0.
        project: chooses what stays.
        brief: whether a mask on the way there is enough.
    """
    unit = np.sqrt(np.diagonal(system))
    scaled = (system / unit / unit[:, None]).astype(np.float32)
    resolvent: Callable[[np.ndarray, np.float32], np.ndarray]
    resolvent = _Inverse(scaled) if brief else _Eigenvectors(scaled)
    root = np.sqrt(scale / (scale.mean() or 1.0))[:, None]
    wanted = (root * right / unit).astype(np.float32)
    y = (root * start * unit).astype(np.float32)
    v, rho = np.zeros_like(y), np.float32(BRIEF_RHO if brief else RHO)
    keep = project(y)
    number, before = max(int(np.count_nonzero(keep)), 1), keep
    for step in range(1, (BRIEF if brief else MOST) + 1):
        check_deadline()
        u = resolvent(wanted - v + rho * y, rho)
        z = u + v / rho
        keep = project(z)
        y = np.where(keep, z, np.float32(0))
        v += rho * (u - y)
        if not brief and step % EVERY == 0:
            new = np.count_nonzero(keep & ~before) / number
            # With a penalty below the diagonal of H what left may still come back by itself.
            if not new and rho >= 1:
                break
            rho *= np.float32(next(f for share, f in FACTORS if new >= share))
            before = keep
    return keep


class _Eigenvectors:
    """Products with (H + rho I)^-1, for any rho."""

    def __init__(self, system: np.ndarray) -> None:
        try:
            self._values, self._vectors = np.linalg.eigh(system)
        except np.linalg.LinAlgError:  # in single precision the iteration may not converge
            found = np.linalg.eigh(system.astype(np.float64))
            self._values, self._vectors = (part.astype(np.float32) for part in found)

    def __call__(self, right: np.ndarray, rho: np.float32) -> np.ndarray:
        """(rows, in): the solution for each row on the right."""
        return np.asarray((right @ self._vectors / (self._values + rho)) @ self._vectors.T)


class _Inverse:
    """The same for one rho."""

    def __init__(self, system: np.ndarray) -> None:
        system.flat[:: len(system) + 1] += np.float32(BRIEF_RHO)
        self._inverse = np.linalg.inv(system)

    def __call__(self, right: np.ndarray, rho: np.float32) -> np.ndarray:
        """(rows, in): the solution for each row on the right."""
        assert rho == np.float32(BRIEF_RHO), "a brief search has one penalty"
        return np.asarray(right @ self._inverse)
