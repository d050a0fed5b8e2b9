"""Prune trained ONNX models without labels or training: remove weights, compensate, verify."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime's Linux wheels look up a host of their maker and keep a database of model and node
# names under the home folder; only this, before it is loaded, stops both. Who wants them sets 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from onnx_ecp.api.inspect import inspect
    from onnx_ecp.api.optimize import Result, importance, optimize
    from onnx_ecp.data.calibration import Calibration
    from onnx_ecp.errors import OnnxEcpError
    from onnx_ecp.evaluation.compare import compare
    from onnx_ecp.methods import METHODS, Method
    from onnx_ecp.report import Report

    __version__: str

__all__ = [
    "METHODS",
    "Calibration",
    "Method",
    "OnnxEcpError",
    "Report",
    "Result",
    "__version__",
    "compare",
    "importance",
    "inspect",
    "optimize",
]

# Where each public name lives: loaded when it is used first, so that importing costs nothing.
_HOMES = {
    "__version__": "runtime.versions",
    "METHODS": "methods",
    "Calibration": "data.calibration",
    "Method": "methods",
    "OnnxEcpError": "errors",
    "Report": "report",
    "Result": "api.optimize",
    "compare": "evaluation.compare",
    "importance": "api.optimize",
    "inspect": "api.inspect",
    "optimize": "api.optimize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
