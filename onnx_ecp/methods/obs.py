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


def importance(view: View) -> np.ndarray:
    """(out, in): the output error that the best change of the rest of the row leaves."""
    assert view.gram is not None, "needs_gram has it measured"
    sensitivity = view.seen.bb / view.seen.count
    covariance = view.gram.covariance
    # The bias alone leaves the variance; the damping must not make a refit look worse.
    variance = view.per_row(np.diagonal(covariance, axis1=1, axis2=2))
    cost = np.minimum(view.removal_cost(covariance), variance)
    return np.asarray(sensitivity[:, None] * view.weight**2 * np.maximum(cost, 0))


OBS = Method(
    importance,
    compensation="refit",
    needs="means",
    needs_gram=True,
    shrinkage=0.3,
    floor=0.2,
    unit_score="refit",
    summary="the same (optimal brain surgeon, arXiv:1705.07565), in one stage",
)
