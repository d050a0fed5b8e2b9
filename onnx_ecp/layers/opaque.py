"""Operators that hold affine weights but are not pruned: named with a reason, never passed over."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_ecp.graph.operators import MICROSOFT
from onnx_ecp.layers.layer import Skip
from onnx_ecp.layers.trace import Scope
from onnx_ecp.layers.views import operator

_NOT_YET = "{op} is not supported yet: its weights stay as they are"
_INSIDE = "its weights are inside {op}, which is not taken apart"
_QUANTISED = "its weight is quantised ({op}); prune before quantising"
_LAYOUT = "{op} is tied to ONNX Runtime's own layout; prune before optimising at that level"

_REASONS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {
        _NOT_YET: ("DeformConv", "Einsum"),
        _INSIDE: ("LSTM", "GRU", "RNN"),
        _QUANTISED: ("QLinearMatMul", "QLinearConv", "MatMulInteger", "ConvInteger"),
    },
    "ai.onnx.ml": {_INSIDE: ("LinearClassifier", "LinearRegressor", "SVMClassifier")},
    MICROSOFT: {
        _NOT_YET: ("FusedMatMulActivation", "GemmFastGelu", "TransposeMatMul", "MoE"),
        _INSIDE: (
            "AttnLSTM",
            "DecoderAttention",
            "LongformerAttention",
            "PackedAttention",
            "WordConvEmbedding",
        ),
        _QUANTISED: (
            "DynamicQuantizeLSTM",
            "DynamicQuantizeMatMul",
            "GemmFloat8",
            "MatMulBnb4",
            "MatMulFpQ4",
            "MatMulInteger16",
            "MatMulIntegerToFloat",
            "MatMulNBits",
            "QAttention",
            "QGemm",
            "QLinearConv",
            "QMoE",
        ),
        _LAYOUT: ("NhwcConv", "NhwcFusedConv"),
    },
    "com.microsoft.nchwc": {_LAYOUT: ("Conv",)},
}

OPAQUE = {
    (domain, op): reason.format(op=op)
    for domain, reasons in _REASONS.items()
    for reason, ops in reasons.items()
    for op in ops
}


def match(node: gs.Node, scope: Scope) -> Skip | None:
    """The reason, if any input of the node is a stored tensor (or its weights are attributes)."""
    domain, op = operator(node)
    if domain != "ai.onnx.ml" and not any(scope.is_constant(t) for t in node.inputs if t.name):
        return None
    return scope.skip(node, OPAQUE[domain, op])
