"""What is installed here, what really works, and what to do about what does not."""

from __future__ import annotations

import os
import platform

from onnx_ecp.errors import OnnxEcpError
from onnx_ecp.report.diagnosis import Check, Diagnosis
from onnx_ecp.runtime.versions import PACKAGES, runtimes, version

_INSTALL = 'pip install "onnx-ecp[cpu]", or "onnx-ecp[gpu]" for NVIDIA GPUs'
# One Identity on a vector: loads on every provider, or the provider is not usable.
_TINY_MODEL = (
    '<ir_version: 8, opset_import: ["": 13]> tiny (float[2] x) => (float[2] y) { y = Identity(x) }'
)


def diagnose() -> Diagnosis:
    """Look at this installation and machine; never raises for what it finds."""
    checks = [Check("python", f"{platform.python_version()} on {platform.platform(terse=True)}")]
    checks += [_package(name) for name in PACKAGES]
    checks += [_runtime(runtimes())]
    checks += _providers()
    checks += [Check("CPU threads", str(threads())), Check("memory", _gibibytes(memory()))]
    return Diagnosis(tuple(checks))


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
    from onnx_ecp.runtime.session import available_providers

    try:
        return [_provider(name) for name in available_providers()]
    except OnnxEcpError as error:
        return [Check("execution providers", error.message, ok=False, advice=error.hint)]


def _provider(name: str) -> Check:
    import onnx.parser

    from onnx_ecp.runtime.session import Session

    try:
        Session(onnx.parser.parse_model(_TINY_MODEL), provider=name)
    except OnnxEcpError as error:
        # Claimed but absent hardware is the normal state of onnxruntime-gpu on a CPU machine.
        return Check(name, f"not usable: {error.message}", ok="CPU" not in name)
    return Check(name, "usable")


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
