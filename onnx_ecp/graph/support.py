"""Whether the installed ONNX Runtime is new enough for a model.

What it takes is not written anywhere that a program can read, so it is asked with a tiny model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import onnx

from onnx_ecp.errors import ProviderError
from onnx_ecp.graph.printable import printable


def runtime_support(proto: onnx.ModelProto) -> str | None:
    """Why the installed ONNX Runtime will not take this model; None if IR and opsets are fine.

    Raises:
        ProviderError: there is no ONNX Runtime.
    """
    if not _runtime_takes("", 13, proto.ir_version):
        return (
            f"the model has IR version {proto.ir_version}, but the installed ONNX Runtime takes "
            f"at most {_newest_ir()}."
        )
    opsets = [*proto.opset_import, *(o for f in proto.functions for o in f.opset_import)]
    for opset in opsets:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if not _runtime_takes(domain, opset.version):
            return (
                f"the model has opset {opset.version} of domain {printable(domain or 'ai.onnx')}, "
                f"but the installed ONNX Runtime takes at most {_newest_opset(domain)}."
            )
    return None


@cache
def _newest_ir() -> int:
    return _newest(lambda version: _runtime_takes("", 13, version))


@cache
def _newest_opset(domain: str) -> int:
    return _newest(lambda version: _runtime_takes(domain, version))


def _newest(takes: Callable[[int], bool]) -> int:
    """The largest version that is taken, by bisection: what is taken up to there is taken below."""
    low, high = 1, 2**16
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(middle) else (low, middle)
    return low


@cache
def _runtime_takes(domain: str, opset: int, ir_version: int = 8) -> bool:
    """Whether a session opens on a model of one Identity with these versions."""
    from onnx_ecp.runtime.limits import check_deadline
    from onnx_ecp.runtime.session import Session, onnxruntime

    onnxruntime()
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> tiny (float[1] x) => (float[1] y) '
        "{ y = Identity(x) }"
    )
    model.ir_version = ir_version
    if domain:
        model.opset_import.add(domain=domain)
    model.opset_import[-1].version = opset
    try:
        Session(model, threads=1)
    except ProviderError:
        check_deadline()  # time that is over says nothing about versions
        return False
    return True
