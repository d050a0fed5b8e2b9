"""Optimal Brain Surgeon on every layer's own output (Hassibi & Stork 1993, arXiv:1705.07565).

    I_ij = E[s_i] W_ij^2 / [H^-1]_jj

H is the weighted covariance of the layer's input in the current network, so the score is what the
removal of one weight costs after the refit of all others of its row; ECP's score allows for the
bias alone. The mean sensitivity of the unit makes layers comparable.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.methods.method import Method, View


def importance(view: View) -> np.ndarray:
    """(out, in): the output error that the best change of the rest of the row leaves."""
    assert view.gram is not None, "needs_gram has it measured"
    covariance = view.gram.covariance
    ridge = view.damping * np.trace(covariance, axis1=1, axis2=2) / covariance.shape[1]
    ridge = np.maximum(ridge, np.finfo(np.float64).tiny)
    damped = covariance + ridge[:, None, None] * np.eye(covariance.shape[1])
    freedom = np.diagonal(np.linalg.inv(damped), axis1=1, axis2=2)
    sensitivity = view.seen.bb / view.seen.rows
    return np.asarray(sensitivity[:, None] * view.weight**2 / view.per_row(freedom))


OBS = Method(
    importance,
    compensation="refit",
    needs="sensitivities",
    needs_gram=True,
    stages=16,
    shrinkage=0.3,
    floor=0.2,
    summary="optimal brain surgeon on each layer's output, in stages with refit (arXiv:1705.07565)",
)
