"""Pruning methods: one file each, one row here; and a row for a compensation of its own."""

from onnx_ecp.methods import ecp, ecp_refit, obc, obs, simple, sparsegpt
from onnx_ecp.methods.method import (
    COMPENSATIONS,
    NEEDS,
    Compensation,
    Importance,
    LayerProblem,
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
    "gradient-magnitude": simple.GRADIENT_MAGNITUDE,
    "wanda": simple.WANDA,
    "flap": simple.FLAP,
    "obd": simple.OBD,
    "sparsegpt": sparsegpt.SPARSEGPT,
    "obc": obc.OBC,
}
COMPENSATIONS["obc"] = obc.COMPENSATION
COMPENSATIONS["sparsegpt"] = sparsegpt.COMPENSATION

__all__ = [
    "COMPENSATIONS",
    "METHODS",
    "NEEDS",
    "Compensation",
    "Importance",
    "LayerProblem",
    "Method",
    "Solved",
    "View",
    "bias_shift",
]
