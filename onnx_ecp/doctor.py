"""What is installed here, what really works, and what to do about what does not."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata

import onnx_ecp
from onnx_ecp.errors import OnnxEcpError

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
_INSTALL = 'pip install "onnx-ecp[cpu]", or "onnx-ecp[gpu]" for NVIDIA GPUs'
# One Identity on a vector: loads on every provider, or the provider is not usable.
_TINY_MODEL = (
    '<ir_version: 8, opset_import: ["": 13]> tiny (float[2] x) => (float[2] y) { y = Identity(x) }'
)


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Args:
        name: what.
        found: its version, number or state.
        ok: whether onnx-ecp can work with it.
        advice: what to do, or empty.
    """

    name: str
    found: str
    ok: bool = True
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in the order of reading."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.ok for check in self.checks)


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
        onnx_ecp=onnx_ecp.__version__,
        onnx=version("onnx"),
        onnxruntime=", ".join(f"{name} {number}" for name, number in runtimes().items()),
        numpy=version("numpy"),
        python=platform.python_version(),
    )


def diagnose() -> Diagnosis:
    """Look at this installation and machine; never raises for what it finds."""
    checks = [Check("python", f"{platform.python_version()} on {platform.platform(terse=True)}")]
    checks += [_package(name) for name in PACKAGES]
    checks += [_runtime(runtimes())]
    checks += _providers()
    checks += [Check("CPU threads", str(threads())), Check("memory", _gibibytes(memory()))]
    return Diagnosis(tuple(checks))


def version(distribution: str) -> str:
    """Version of an installed distribution, or an empty string."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def runtimes() -> dict[str, str]:
    """The installed distributions of ONNX Runtime and their versions; more than one is a fault."""
    return {name: number for name in RUNTIMES if (number := version(name))}


def threads() -> int:
    """CPU threads that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of memory of this machine, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _package(name: str) -> Check:
    if found := version(name):
        return Check(name, found)
    if name == "onnx-ecp":
        return Check(name, "not installed: this is its source")
    return Check(name, "not installed", ok=False, advice=f"pip install {name}")


def _runtime(installed: dict[str, str]) -> Check:
    found = ", ".join(f"{name} {number}" for name, number in installed.items())
    if not installed:
        return Check("ONNX Runtime", "not installed", ok=False, advice=_INSTALL)
    if len(installed) > 1:
        advice = (
            f"{' and '.join(installed)} overwrite each other: uninstall all of them "
            f"(pip uninstall {' '.join(installed)}), then {_INSTALL}"
        )
        return Check("ONNX Runtime", found, ok=False, advice=advice)
    return Check("ONNX Runtime", found)


def _providers() -> list[Check]:
    """One check for every provider that ONNX Runtime claims: only a session tells."""
    from onnx_ecp.runtime import available_providers

    try:
        return [_provider(name) for name in available_providers()]
    except OnnxEcpError as error:
        return [Check("execution providers", error.message, ok=False, advice=error.hint)]


def _provider(name: str) -> Check:
    import onnx.parser

    from onnx_ecp.runtime import Session

    try:
        Session(onnx.parser.parse_model(_TINY_MODEL), provider=name)
    except OnnxEcpError as error:
        # Claimed but absent hardware is the normal state of onnxruntime-gpu on a CPU machine.
        return Check(name, f"not usable: {error.message}", ok="CPU" not in name)
    return Check(name, "usable")


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
