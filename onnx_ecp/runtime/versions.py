"""The versions of what computes here."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

PACKAGES = ("onnx-ecp", "onnx", "onnx-graphsurgeon", "numpy", "click", "rich")
# These two put files of the same names into the same directory: the last one installed wins, and
# uninstalling either breaks the other. The others exist for some platforms, with the same habit.
RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-qnn",
    "onnxruntime-silicon",
)


@dataclass(frozen=True)
class Versions:
    """What computes here; ``onnxruntime`` with its distribution, "onnxruntime-gpu 1.24.1"."""

    onnx_ecp: str
    onnx: str
    onnxruntime: str
    numpy: str
    python: str


def versions() -> Versions:
    """The versions of this installation; empty where a distribution is missing."""
    return Versions(
        onnx_ecp=__version__,
        onnx=version("onnx"),
        onnxruntime=", ".join(f"{name} {number}" for name, number in runtimes().items()),
        numpy=version("numpy"),
        python=platform.python_version(),
    )


def version(distribution: str) -> str:
    """Version of an installed distribution, or an empty string."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def runtimes() -> dict[str, str]:
    """The installed distributions of ONNX Runtime and their versions; more than one is a fault."""
    return {name: number for name in RUNTIMES if (number := version(name))}


__version__ = version("onnx-ecp") or "0+source"  # run from a checkout that is not installed
