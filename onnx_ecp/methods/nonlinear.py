"""The true change of the outputs: what ECP's importance approximates (arXiv:2602.20467).

    I_ij = E[ |y(W_ij = 0, b_i + W_ij E[a_j]) - y|^2 ]

The weight's mean signal goes to the bias, then the network is run (``pruning/effects.py``). It is
the strategy that the paper calls non-linear; a forward pass for every weight makes it one for small
networks.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.methods.method import Method, View


def importance(view: View) -> np.ndarray:
    """(out, in): the mean squared change of the outputs."""
    assert view.effects is not None, "needs_effects has them measured"
    return view.effects


NONLINEAR = Method(
    importance,
    compensation="bias",
    needs="activations",
    needs_effects=True,
    summary="output change when removed, run by run (arXiv:2602.20467), for small networks",
)
