"""What a runtime is as a target: what turns zeros into speed there, and for which layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_ecp.graph import (
    LARGEST_DENSE,
    Model,
    constants,
    decode_sparse,
    packed_tensors,
    read_tensor,
    sparse_tensors,
)
from onnx_ecp.layers import Layer, find_layers

FLOATS = (onnx.TensorProto.FLOAT,)
# The operators of the ONNX standard that runtimes have kernels for which skip zeros.
STANDARD = ("Gemm", "MatMul", "Conv")

# By name, why a layer of a model gains nothing; empty where it may gain.
Refusals = Callable[[onnx.ModelProto, Sequence[Layer]], Mapping[str, str]]


def each(refusal: Callable[[Layer], str]) -> Refusals:
    """The refusals of layers that are judged one by one, whatever is around them."""

    def refusals(proto: onnx.ModelProto, layers: Sequence[Layer]) -> Mapping[str, str]:
        return {layer.name: refusal(layer) for layer in layers}

    return refusals


def nothing(layer: Layer, weight: np.ndarray) -> str:
    """No layer has zeros of a wrong kind."""
    return ""


def other_operator(layer: Layer) -> str:
    """What speaks against an operator that is not in ``STANDARD``."""
    if onnx.defs.has(layer.op):
        return f"op: no kernel of {layer.op} skips zeros"
    return f"op: {layer.op} is ONNX Runtime's own"


def in_groups(layer: Layer) -> str:
    """What speaks against a layer of several groups."""
    what = "convolution" if layer.op == "Conv" else "product"
    return f"op: a {what} of {layer.groups} groups"


def no_advice(layer: Layer) -> str:
    """There is nothing to add."""
    return ""


@dataclass(frozen=True)
class Target:
    """A runtime: one row of the table.

    Args:
        title: its name for people.
        gains: what turns zeros into speed there, one sentence.
        evidence: where that is from, one sentence.
        next_step: what to run next, ``{model}`` in the place of the file.
        after_int8: the same for a file in int8; empty where it is no other.
        refuses_int8: why it does not take what ``--quantize int8`` makes; empty where it does.
        refusals: of layers that gain nothing whatever their zeros.
        granularity: what is removed unless told otherwise: "weight" or "unit".
        sparsity: how much unless told otherwise: a share such as "0.8", or N:M.
        scope: over what weights are ranked unless told otherwise: "layer" where every layer must
            have its share; None: the method's own.
        least: share of zeros from which a layer gains.
        together: whether ``least`` is of all layers that may gain, not of each.
        pattern: why the zeros of a weight (out, in) are of a wrong kind; empty where they are not.
        advice: what else a layer takes, or what speaks against it.
        types: element types of the weights that gain.
        formats: in which the file may be stored, see ``optimize --format``.
        ir: newest IR version that it takes; None: no limit that is known.
        opset: newest opset likewise.
        standard: whether it takes standard operators only.
    """

    title: str
    gains: str
    evidence: str
    next_step: str
    refusals: Refusals
    granularity: str = "weight"
    sparsity: str | None = None
    scope: str | None = None
    least: float = 0.0
    together: bool = False
    pattern: Callable[[Layer, np.ndarray], str] = nothing
    advice: Callable[[Layer], str] = no_advice
    types: tuple[int, ...] = FLOATS
    formats: tuple[str, ...] = ("dense",)
    ir: int | None = None
    opset: int | None = None
    standard: bool = True
    after_int8: str = ""
    refuses_int8: str = ""

    def refused(self, proto: onnx.ModelProto, layers: Sequence[Layer]) -> dict[str, str]:
        """By name, why a layer gains nothing whatever its zeros; empty where it may gain."""
        found = self.refusals(proto, layers)
        return {layer.name: found[layer.name] or self._wrong_type(layer) for layer in layers}

    def _wrong_type(self, layer: Layer) -> str:
        name = onnx.TensorProto.DataType.Name(layer.dtype)
        return "" if layer.dtype in self.types else f"precision: {name}"


@dataclass(frozen=True)
class Eligible:
    """Whether a layer's zeros turn into speed.

    Args:
        name: of the layer.
        op: operator type.
        refused: why they do not; empty where they may.
        advice: what it takes, or speaks against it, where they may.
        zeros: their share of its weights now.
    """

    name: str
    op: str
    refused: str
    advice: str = ""
    zeros: float = 0.0


def eligible(model: Model, target: Target, *, pruned: bool = True) -> tuple[Eligible, ...]:
    """All layers of a model, in graph order.

    Args:
        model: whose layers are looked at.
        target: the runtime.
        pruned: whether their zeros are judged, not only what they may become.
    """
    dense = replace(model, proto=decode_sparse(model.proto))
    stored, forms = constants(dense.proto), storage(model.proto)
    layers = find_layers(dense.proto).layers
    refused = target.refused(dense.proto, layers)
    rows = []
    for layer in layers:
        tensor = layer.weight.tensor
        weight = layer.weight.matrix(read_tensor(dense, stored[tensor]))
        form, why = forms.get(tensor, "dense"), refused[layer.name]
        if not why and form not in target.formats:
            why = f"format: the weight is stored {form}"
        if not why and pruned:
            why = target.pattern(layer, weight)
        zeros = 1 - np.count_nonzero(weight) / max(weight.size, 1)
        rows.append((layer, why, zeros, weight.size))
    share = _share([(zeros, size) for _, why, zeros, size in rows if not why])
    found = []
    for layer, why, zeros, _ in rows:
        seen, of = (share, " over all of them") if target.together else (zeros, "")
        if not why and pruned and seen < target.least:
            why = f"zeros: {100 * seen:.0f} %{of}, {100 * target.least:.0f} % wanted"
        advice = "" if why else target.advice(layer)
        found.append(Eligible(layer.name, layer.op, why, advice, round(float(zeros), 4)))
    return tuple(found)


def _share(parts: Sequence[tuple[float, int]]) -> float:
    """Share of zeros over several weights, of their shares and sizes."""
    size = sum(size for _, size in parts)
    return sum(zeros * size for zeros, size in parts) / max(size, 1)


def storage(proto: onnx.ModelProto) -> dict[str, str]:
    """By name, how the stored tensors are stored that are not dense: "sparse" or "packed"."""
    sparse = dict.fromkeys((name for name, _ in sparse_tensors(proto)), "sparse")
    return sparse | dict.fromkeys(packed_tensors(proto, LARGEST_DENSE), "packed")


def most_in_groups(layer: Layer, weight: np.ndarray, kept: int, of: int) -> bool:
    """Whether at most ``kept`` of every ``of`` weights along the reduction axis are not zero."""
    if layer.reduction % of:
        return False
    order = layer.nm_order()
    used = (weight if order is None else weight[:, order]) != 0
    return bool((used.reshape(-1, of).sum(axis=1) <= kept).all())
