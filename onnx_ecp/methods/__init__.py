"""Pruning methods: one file each, one row here."""

from onnx_ecp.methods import ecp, ecp_refit, obs, simple
from onnx_ecp.methods.method import COMPENSATIONS, NEEDS, Importance, Method, View, bias_shift

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
}

__all__ = ["COMPENSATIONS", "METHODS", "NEEDS", "Importance", "Method", "View", "bias_shift"]
