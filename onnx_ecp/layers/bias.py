"""Where a shift of z goes: an input that already is, or may be, the bias, or an Add of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.graph.operators import MICROSOFT
from onnx_ecp.graph.proto import UNSHIFTED
from onnx_ecp.layers import edit
from onnx_ecp.layers.trace import Scope, Traced
from onnx_ecp.layers.views import operator


@dataclass(frozen=True)
class BiasInput:
    """An input of the operator, or of the one node behind it, that is added to z.

    Args:
        node: first output of the node that reads it.
        index: which of its inputs.
        units: shape in which the shift (out,) meets the bias, such as (out,) or (out, 1).
        dtype: ONNX element type that the node works in.
        constant: what is there now; None where the input is omitted.
        scale: what the operator multiplies the bias with (Gemm's beta).
        own: whether the stored tensor is read here, directly, and nowhere else.
    """

    node: str
    index: int
    units: tuple[int, ...]
    dtype: int
    constant: Traced | None = None
    scale: float = 1.0
    own: bool = False

    @property
    def exists(self) -> bool:
        """Whether the model has this bias already."""
        return self.constant is not None

    @property
    def is_flat(self) -> bool:
        """Whether it is the same at all positions."""
        size = 1 if self.constant is None else math.prod(self.constant.seen_shape)
        return size in (1, math.prod(self.units))

    def values(self, model: onnx.ModelProto, base: Path | None) -> np.ndarray:
        """What is added to z, flat: (out,) or one number, or more where positions differ."""
        if self.constant is None:
            return np.zeros(1)
        stored = self.constant.view(edit.read(model, self.constant.tensor, base))
        return np.asarray(stored.astype(np.float64).reshape(-1) * self.scale)

    def add(self, model: onnx.ModelProto, shift: np.ndarray, stem: str, base: Path | None) -> None:
        """Add ``shift`` (out,) to the bias; a stored tensor that others read stays as it is."""
        values = shift.reshape(self.units) / self.scale
        if self.constant is not None:
            old = self.constant.view(edit.read(model, self.constant.tensor, base))
            values = old.astype(np.float64) + values
            if self.own and values.shape == self.constant.shape:
                edit.write(model, self.constant.tensor, values, base)
                return
        name = edit.add_constant(model, f"{stem}/ecp_bias", values, self.dtype, before=self.node)
        edit.set_input(model, self.node, self.index, name)


@dataclass(frozen=True)
class AddBehind:
    """A new Add right behind the operator, which takes over the name of its output.

    Args:
        node: first output of the operator.
        units: shape in which the shift (out,) meets that output.
        dtype: ONNX element type of that output.
    """

    node: str
    units: tuple[int, ...]
    dtype: int
    exists: bool = False
    is_flat: bool = True

    def values(self, model: onnx.ModelProto, base: Path | None) -> np.ndarray:
        """(1,): nothing yet."""
        return np.zeros(1)

    def add(self, model: onnx.ModelProto, shift: np.ndarray, stem: str, base: Path | None) -> None:
        """Insert the Add; whoever read the operator's output reads the shifted one."""
        values = shift.reshape(self.units)
        bias = edit.add_constant(model, f"{stem}/ecp_bias", values, self.dtype, before=self.node)
        index = edit.node_index(model, self.node)
        unshifted = edit.fresh_name(model, f"{stem}{UNSHIFTED}")
        model.graph.node[index].output[0] = unshifted
        name = edit.fresh_name(model, f"{stem}/ecp_add")
        node = onnx.helper.make_node("Add", [unshifted, bias], [self.node], name=name)
        model.graph.node.insert(index + 1, node)


Bias = BiasInput | AddBehind


def operator_bias(
    scope: Scope,
    node: gs.Node,
    index: int,
    *,
    out: int,
    units_behind: tuple[int, ...],
    dtype: int,
    scale: float = 1.0,
) -> Bias:
    """The bias that is input ``index`` of the operator itself (Gemm's C, Conv's B).

    An Add behind the operator is what is left where that input is not constant or counts nothing.

    Args:
        scope: the graph.
        node: the operator.
        index: the input that is the bias.
        out: number of units; the bias of a layer without one gets shape (out,).
        units_behind: shape in which a vector (out,) meets the output.
        dtype: ONNX element type of the output.
        scale: what the operator multiplies the bias with.
    """
    name = node.outputs[0].name
    if scale != 0 and not _has_input(node, index):
        return BiasInput(name, index, (out,), dtype, scale=scale)
    constant = scope.trace(node.inputs[index]) if scale != 0 else None
    if not isinstance(constant, Traced):
        return AddBehind(name, units_behind, dtype)
    own = _own(scope, node, index, constant)
    return BiasInput(name, index, (out,), dtype, constant, scale, own)


# Fused operators that add a vector bias: which inputs may be z, and which one is the bias.
BIAS_READERS = {
    (MICROSOFT, "BiasGelu"): ((0,), 1),
    (MICROSOFT, "FastGelu"): ((0,), 1),
    (MICROSOFT, "SkipLayerNormalization"): ((0, 1), 4),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): ((0, 1), 3),
}


def bias_behind(scope: Scope, node: gs.Node, units: tuple[int, ...], dtype: int) -> Bias:
    """The bias that the one node behind a MatMul adds, or an Add to be inserted.

    Args:
        scope: the graph.
        node: the MatMul.
        units: shape in which a vector (out,) meets its output.
        dtype: ONNX element type of its output.
    """
    z = node.outputs[0]
    new = AddBehind(z.name, units, dtype)
    reader = scope.only_reader(z)
    index = None if reader is None else _bias_index(reader, z, units)
    if reader is None or index is None:
        return new
    name = reader.outputs[0].name
    if not _has_input(reader, index):
        return BiasInput(name, index, units, dtype)
    constant = scope.trace(reader.inputs[index])
    if not isinstance(constant, Traced):
        return new
    return BiasInput(name, index, units, dtype, constant, own=_own(scope, reader, index, constant))


def _bias_index(reader: gs.Node, z: gs.Tensor, units: tuple[int, ...]) -> int | None:
    """Which input of the reader is added to z; None where it does not add one."""
    position = next(i for i, tensor in enumerate(reader.inputs) if tensor is z)
    if operator(reader) == ("", "Add"):
        return 1 - position
    places, index = BIAS_READERS.get(operator(reader), ((), 0))
    return index if position in places and len(units) == 1 else None


def _has_input(node: gs.Node, index: int) -> bool:
    return index < len(node.inputs) and bool(node.inputs[index].name)


def _own(scope: Scope, node: gs.Node, index: int, constant: Traced) -> bool:
    return constant.direct and len(scope.readers(node.inputs[index])) == 1
