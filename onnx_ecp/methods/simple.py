"""The rankings that everything else must beat."""

from __future__ import annotations

import numpy as np

from onnx_ecp.methods.method import Method, View

RANDOM = Method(
    lambda view: view.rng.random(view.weight.shape),
    summary="uniformly random: the control",
)

MAGNITUDE = Method(
    lambda view: np.abs(view.weight),
    summary="|W| (Han et al., arXiv:1506.02626)",
)

GRADIENT_MAGNITUDE = Method(
    lambda view: np.abs(view.weight) * _mean_gradient(view),
    needs="gradients",
    summary="|W| times the mean gradient of the outputs, or of the loss with --labels",
)

WANDA = Method(
    lambda view: np.abs(view.weight) * view.per_row(view.seen.norms),
    needs="activations",
    summary="|W_ij| ||a_j||_2 (Sun et al., arXiv:2306.11695)",
)

FLAP = Method(
    lambda view: view.weight**2 * view.per_row(view.seen.spread),
    compensation="bias",
    needs="activations",
    summary="W_ij^2 Var(a_j) (FLAP, An et al., arXiv:2312.11983)",
)

OBD = Method(
    lambda view: view.weight**2 * _mean_square_gradient(view),
    needs="sensitivities",
    in_output_units=True,
    summary="W^2 E[(dy/dW)^2], the diagonal of the output metric (LeCun et al., 1989)",
)


def _mean_gradient(view: View) -> np.ndarray:
    """sqrt(sum_k E[dy_k/dW_ij]^2): one mean per output, since without labels there is no loss."""
    gradient = view.seen.gradient
    assert gradient is not None, "needs='gradients' has them summed"
    return np.sqrt(np.square(gradient / view.seen.count).sum(axis=0))


def _mean_square_gradient(view: View) -> np.ndarray:
    zero = view.seen.recentred(np.zeros_like(view.seen.centre))
    # A sum of squares; rounding while the centre moves may make zeros negative.
    return np.maximum(zero.squares, 0) / zero.count
