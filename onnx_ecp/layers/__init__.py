"""Affine layers in a graph: one file per spelling, one row each in ``MATCHES``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.graph.operators import MICROSOFT
from onnx_ecp.layers import attention, conv, conv_transpose, fused, gemm, matmul, opaque
from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.fused import preactivation
from onnx_ecp.layers.inlined import Inlined, inlined
from onnx_ecp.layers.layer import Found, Layer, Skip, Weight
from onnx_ecp.layers.sharing import refuse_shared
from onnx_ecp.layers.trace import Scope, body_scope, function_scope, main_scope
from onnx_ecp.layers.versions import once
from onnx_ecp.layers.views import operator

__all__ = [
    "MATCHES",
    "Found",
    "Layer",
    "Skip",
    "Weight",
    "find_layers",
    "layer_of",
    "preactivation",
]

Match = Callable[[gs.Node, Scope], Affine | Skip | None]

MATCHES: dict[tuple[str, str], Match] = {
    ("", "Gemm"): gemm.match,
    ("", "MatMul"): matmul.match,
    ("", "Conv"): conv.match,
    ("", "ConvTranspose"): conv_transpose.match,
    (MICROSOFT, "FusedGemm"): fused.match_gemm,
    (MICROSOFT, "FusedMatMul"): matmul.match,
    (MICROSOFT, "FusedConv"): fused.match_conv,
    (MICROSOFT, "Attention"): attention.match,
    **dict.fromkeys(opaque.OPAQUE, opaque.match),
}


def layer_of(node: gs.Node, scope: Scope) -> Affine | Skip | None:
    """The layer that one node is, why it is none, or None where it is no candidate."""
    match = MATCHES.get(operator(node))
    return None if match is None else match(node, scope)


def find_layers(proto: onnx.ModelProto) -> Found:
    """All affine layers of a model, and every candidate that is not pruned with its reason.

    Weights are not loaded: names, shapes and types suffice, so they may lie in external data.

    Args:
        proto: a valid model; sparse initializers are decoded already. It is not changed.
    """
    return once("layers", proto, lambda: _found(proto), heavy=False)


def _found(proto: onnx.ModelProto) -> Found:
    whole = inlined(proto)
    scope = main_scope(whole.proto)
    answers = list(_answers(scope, _functions(scope.graph), whole, seen=set()))
    layers = [answer for answer in answers if not isinstance(answer, Skip)]
    refused = refuse_shared(layers, scope)
    settled = [refused.get(answer.name, answer) for answer in answers]
    return Found(
        layers=tuple(answer for answer in settled if not isinstance(answer, Skip)),
        skips=tuple(answer for answer in settled if isinstance(answer, Skip)),
    )


_Functions = dict[tuple[str, str], gs.Function]


def _functions(graph: gs.Graph) -> _Functions:
    return {(function.domain or "", function.name): function for function in graph.functions}


def _answers(
    scope: Scope, functions: _Functions, whole: Inlined, seen: set[int]
) -> Iterator[Layer | Skip]:
    """What every node is, in graph order, those in bodies included.

    ``seen`` holds the functions visited already: each is looked at in its first call only, which
    bounds the work whatever calls whatever.
    """
    for node in scope.graph.nodes:
        function = functions.get(operator(node))
        if function is not None and id(function) not in seen:
            seen.add(id(function))
            yield from _answers(function_scope(scope, function, node), functions, whole, seen)
        answer = None if function is not None else layer_of(node, scope)
        if answer is not None and scope.refusal:
            yield scope.skip(node, scope.refusal)
        elif isinstance(answer, Affine):
            yield whole.settled(scope, node, answer)
        elif answer is not None:
            yield answer
        for attribute, body in node.attrs.items():
            if isinstance(body, gs.Graph):
                yield from _answers(body_scope(scope, node, attribute), functions, whole, seen)
