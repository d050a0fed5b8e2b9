"""WoodFisher (Singh & Alistarh 2020, arXiv:2004.14340): OBS with the empirical Fisher matrix.

With H = E[g g^T] over samples, damped by l (``curvature``), and its inverse by Woodbury's identity:

    I_q = w_q^2 / [H^-1]_qq          w <- w - sum_q H^-1_:q w_q / [H^-1]_qq

The update is the sum of what each removed weight asks for on its own: how removals act together is
left out (``cbs`` takes it in). With labels g is the gradient of a sample's cross-entropy; without,
of its outputs in the metric, along one random direction.

Deviation: the identity is used for all samples at once instead of sample by sample, which gives the
same matrix.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.methods.method import BlockProblem, Compensation, Method, View

# The ridge of the rows of MLPNet in the tables of arXiv:2203.04466.
DAMPING = 1e-3


def importance(view: View) -> np.ndarray:
    """``w^2 / [H^-1]_qq`` (out, in); layers that share a tensor have a part of it each."""
    assert view.curvature is not None, "needs='curvature' has it measured"
    diagonal = view.curvature.inverse(view.damping).diagonal[view.tensor]
    present = diagonal > 0
    cost = np.divide(view.weight**2, diagonal, out=np.zeros_like(diagonal), where=present)
    return np.asarray(cost / view.uses)


def update(problem: BlockProblem) -> dict[str, np.ndarray]:
    """The weights (out, in) that stay after the sum of all single updates."""
    inverse = problem.curvature.inverse(problem.damping)
    asked = {
        n: np.divide(w, inverse.diagonal[n], out=np.zeros_like(w), where=inverse.diagonal[n] > 0)
        for n, w in problem.removed.items()
    }
    moved = inverse.times(asked)
    return {n: np.where(problem.keep[n], w - moved[n], 0.0) for n, w in problem.weight.items()}


COMPENSATION = Compensation(
    "curvature",
    update=update,
    damping=DAMPING,
    summary="the sum of the changes that each removed weight asks for",
)

WOODFISHER = Method(
    importance,
    compensation="woodfisher",
    needs="curvature",
    damping=DAMPING,
    summary="optimal brain surgeon with the empirical Fisher matrix (arXiv:2004.14340)",
)
