"""Elimination-compensation pruning as published (arXiv:2602.20467).

    I_ij = min_d E sum_k (W_ij dy_k/dW_ij - d dy_k/db_i)^2 = W_ij^2 (ww_ij - wb_ij^2 / bb_i)

Deviation: the scalar form printed in the paper has E[dy/db]^2 in the denominator; its derivation
and its vector form need E[(dy/db)^2], which is what stands here.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.methods.method import Method, View


def importance(view: View) -> np.ndarray:
    """What remains of the output error when the best bias shift has been made, (out, in)."""
    return np.asarray(view.weight**2 * view.seen.variance)


ECP = Method(
    importance,
    compensation="bias",
    needs="sensitivities",
    in_output_units=True,
    unit_score="bias",
    summary="output error that the best bias shift leaves, as published (arXiv:2602.20467)",
)
