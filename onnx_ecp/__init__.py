"""Prune trained ONNX models without labels or training: remove weights, compensate, verify."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_ecp.calibration import Calibration
    from onnx_ecp.errors import OnnxEcpError
    from onnx_ecp.evaluate import compare
    from onnx_ecp.inspection import inspect
    from onnx_ecp.methods import METHODS, Method
    from onnx_ecp.pipeline import Result, importance, optimize
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
    "METHODS": "methods",
    "Calibration": "calibration",
    "Method": "methods",
    "OnnxEcpError": "errors",
    "Report": "report",
    "Result": "pipeline",
    "compare": "evaluate",
    "importance": "pipeline",
    "inspect": "inspection",
    "optimize": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("onnx-ecp")
    except metadata.PackageNotFoundError:
        return "0+source"  # run from a checkout that is not installed
