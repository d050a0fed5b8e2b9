"""Pruning methods: one file each, one row here; and a row for a compensation of its own."""

from onnx_ecp.methods import cbs, ecp, ecp_refit, nonlinear, obc, obs, simple, sparsegpt, woodfisher
from onnx_ecp.methods.effort import EFFORTS, Effort
from onnx_ecp.methods.method import (
    COMPENSATIONS,
    FORWARD,
    NEEDS,
    SUPPORTS,
    BlockProblem,
    Compensation,
    Importance,
    LayerProblem,
    MaskProblem,
    Method,
    Solved,
    View,
    bias_shift,
)

METHODS: dict[str, Method] = {
    "ecp-refit": ecp_refit.ECP_REFIT,
    "ecp": ecp.ECP,
    "obs": obs.OBS,
    "magnitude": simple.MAGNITUDE,
    "random": simple.RANDOM,
    "nonlinear": nonlinear.NONLINEAR,
    "gradient-magnitude": simple.GRADIENT_MAGNITUDE,
    "wanda": simple.WANDA,
    "flap": simple.FLAP,
    "obd": simple.OBD,
    "sparsegpt": sparsegpt.SPARSEGPT,
    "obc": obc.OBC,
    "woodfisher": woodfisher.WOODFISHER,
    "cbs": cbs.CBS,
}
COMPENSATIONS["cbs"] = cbs.COMPENSATION
COMPENSATIONS["obc"] = obc.COMPENSATION
COMPENSATIONS["sparsegpt"] = sparsegpt.COMPENSATION
COMPENSATIONS["woodfisher"] = woodfisher.COMPENSATION

__all__ = [
    "COMPENSATIONS",
    "EFFORTS",
    "FORWARD",
    "METHODS",
    "NEEDS",
    "SUPPORTS",
    "BlockProblem",
    "Compensation",
    "Effort",
    "Importance",
    "LayerProblem",
    "MaskProblem",
    "Method",
    "Solved",
    "View",
    "bias_shift",
]
