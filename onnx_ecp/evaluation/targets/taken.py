"""Whether a runtime takes a model, and the model in a version that it takes."""

from __future__ import annotations

from dataclasses import replace

from onnx_ecp.errors import ModelError
from onnx_ecp.evaluation.targets.rows import TARGETS
from onnx_ecp.graph import Model, printable
from onnx_ecp.graph.lowest_ir import lowered, lowest_ir

_STANDARD_DOMAINS = ("", "ai.onnx")


def check_taken(model: Model, name: str | None) -> None:
    """Find out before the long work whether a runtime takes a model.

    Raises:
        ModelError: it does not, with what it takes.
    """
    if name is None:
        return
    target, file = TARGETS[name], printable(model.path or "model")
    for opset in model.proto.opset_import:
        standard = opset.domain in _STANDARD_DOMAINS
        if standard and target.opset is not None and opset.version > target.opset:
            raise ModelError(
                f"{file}: the model has opset {opset.version}; {target.title} takes at most "
                f"{target.opset}.",
                hint="Export it for an older opset, or try onnx.version_converter.",
            )
    foreign = next(
        (node for node in model.proto.graph.node if node.domain not in _STANDARD_DOMAINS), None
    )
    if target.standard and foreign is not None:
        raise ModelError(
            f"{file}: {printable(foreign.domain)}.{printable(foreign.op_type)} is no operator that "
            f"{target.title} knows.",
            hint="Give the model as it was exported, not as a runtime has optimized it.",
        )
    least, why = lowest_ir(model.proto)
    if target.ir is not None and least > target.ir:
        raise ModelError(
            f"{file}: the model needs IR version {least} ({why}); {target.title} takes at most "
            f"{target.ir}.",
            hint="Export it for an older opset, in plain floating point.",
        )


def taken(model: Model, name: str | None) -> Model:
    """The model with an IR version that the runtime takes."""
    most = None if name is None else TARGETS[name].ir
    if most is None or model.proto.ir_version <= most:
        return model
    return replace(model, proto=lowered(model.proto, most))
