"""Optimal Brain Surgeon on every layer's own output (Hassibi & Stork 1993, arXiv:1705.07565).

    I_ij = E[s_i] W_ij^2 / [H^-1]_jj

H is the weighted covariance of the layer's input in the current network, on the columns that the
row still has: the score is what the removal of one weight costs after the refit of the others of
its row; ECP's score allows for the bias alone. The mean sensitivity of the unit makes layers
comparable.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.methods.method import Method, View
from onnx_ecp.refit import damped, inverse_diagonal


def importance(view: View) -> np.ndarray:
    """(out, in): the output error that the best change of the rest of the row leaves."""
    assert view.gram is not None, "needs_gram has it measured"
    sensitivity = view.seen.bb / view.seen.count
    cost = np.zeros_like(view.weight)
    rows = np.split(np.arange(len(view.weight)), len(view.gram.weight))
    for covariance, group in zip(view.gram.covariance, rows, strict=True):
        there = view.weight[group] != 0
        freedom = inverse_diagonal(damped(covariance, view.damping), there)
        refitted = np.divide(1.0, freedom, out=np.zeros_like(freedom), where=there)
        # The bias alone leaves the variance; the damping must not make a refit look worse.
        cost[group] = np.minimum(refitted, np.diagonal(covariance))
    return np.asarray(sensitivity[:, None] * view.weight**2 * np.maximum(cost, 0))


OBS = Method(
    importance,
    compensation="refit",
    needs="sensitivities",
    needs_gram=True,
    shrinkage=0.3,
    floor=0.2,
    summary="optimal brain surgeon on each layer's output, one stage, refit (arXiv:1705.07565)",
)
