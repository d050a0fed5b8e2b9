"""A pass of onnx_ir that prunes: one more step between others of its passes."""

from __future__ import annotations

from typing import Any, Unpack

import onnx_ir as ir

from onnx_ecp.api.choices import Choices
from onnx_ecp.api.optimize import optimize
from onnx_ecp.report import Report


class PrunePass(ir.passes.FunctionalPass):  # type: ignore[misc, unused-ignore]  # may be untyped
    """Prune, compensate and verify; the given model is not changed.

    Args:
        calibration: as for ``onnx_ecp.optimize``; None: made-up inputs, which the report warns of.
        choices: see ``onnx_ecp.api.choices.Choices``, such as ``sparsity=0.8``.

    Attributes:
        report: of the last model that went through; None before.

    Raises:
        OnnxEcpError: when it is called, as ``onnx_ecp.optimize`` does.

    Example:
        ``ir.passes.Sequential(PrunePass({"x": samples}, sparsity=0.8), OtherPass())(model)``
    """

    def __init__(self, calibration: Any = None, **choices: Unpack[Choices]) -> None:
        self.calibration = calibration
        self.choices = choices
        self.report: Report | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """The pruned model; modified where it holds other weights than the given one."""
        result = optimize(ir.to_proto(model), self.calibration, **self.choices)
        self.report = result.report
        return ir.passes.PassResult(ir.from_proto(result.model), modified=True)
