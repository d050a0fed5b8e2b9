"""Refit the weights of a layer to the outputs it had: weighted least squares on their support."""

from __future__ import annotations

import numpy as np

from onnx_ecp.linalg.masked import damped, ridge_of, solve
from onnx_ecp.statistics.gram import Gram, _rows, mean_shift


def refit(
    gram: Gram,
    target: np.ndarray,
    keep: np.ndarray,
    damping: float,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights on their support and bias shift that come closest to the original layer.

    Args:
        gram: of the layer.
        target: W, (out, in), the original weights.
        keep: (out, in), True where the weight stays.
        damping: ridge as a share of the mean diagonal of the covariance; > 0.
        start: (out, in), near the solution, such as that of the stage before; None: W.

    Returns:
        Weights (out, in), zero where not kept; shift (out,) against the original bias.
    """
    groups = len(gram.weight)
    weight = np.zeros_like(target)
    start = target if start is None else start
    for h, k, rows in zip(
        gram.covariance, gram.cross_covariance, _rows(target, groups), strict=True
    ):
        system = damped(h, damping)
        right = target[rows] @ k + ridge_of(h, damping) * target[rows]
        weight[rows] = solve(system, right, keep[rows], start=start[rows])
    return weight, mean_shift(gram, target, weight)
