"""Layers inside local functions and constant Ifs: found where they run, stored where they may be.

The node itself is in a body, which is left as it is: a function may have other calls. But its
weight may be a tensor of the main graph, as may its bias, and an Add may stand behind the call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.graph.external import is_external
from onnx_ecp.graph.inlining import Place, has_bodies, inline
from onnx_ecp.graph.proto import constants
from onnx_ecp.graph.tensors import byte_size
from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.bias import AddBehind, Bias, BiasInput
from onnx_ecp.layers.layer import Layer, Skip
from onnx_ecp.layers.trace import Scope

# Values of larger tensors are not needed to find layers.
_SMALL = 2**10


@dataclass(frozen=True)
class Inlined:
    """A model without local functions and constant Ifs, and what it came from.

    Args:
        proto: the model; large values may be missing.
        places: by first output of the nodes that were in bodies, where.
        stored: names of the tensors stored in the main graph.
    """

    proto: onnx.ModelProto
    places: Mapping[str, Place] = field(default_factory=dict)
    stored: Collection[str] = ()

    def settled(self, scope: Scope, node: gs.Node, layer: Affine) -> Layer | Skip:
        """A layer of ``proto`` as one that the model it came from can store, or why it cannot."""
        place, bias = self.places.get(node.outputs[0].name), layer.bias
        if place is not None and layer.weight.tensor not in self.stored:
            return scope.skip(
                node,
                f"its weight is inside {place.words}; only tensors of the main graph are pruned",
            )
        if self._can_store(bias):
            return layer
        behind = layer.output == node.outputs[0].name
        if place is None or (behind and self._leaves(scope, node, place)):
            return replace(layer, bias=AddBehind(layer.output, layer.shift_shape, layer.dtype))
        return scope.skip(
            node,
            f"it is inside {place.words}, where no bias can be added, and has none of its own in "
            "the main graph",
        )

    def _can_store(self, bias: Bias) -> bool:
        """Whether its node is in the main graph, or it is written without changing the node."""
        if bias.node not in self.places:
            return True
        if not isinstance(bias, BiasInput) or bias.constant is None:
            return False
        shape = bias.constant.shape
        fits = _broadcast(shape, bias.units) == shape
        return bias.own and fits and bias.constant.tensor in self.stored

    def _leaves(self, scope: Scope, node: gs.Node, place: Place) -> bool:
        """Whether z is the first result of the body, and nothing in the body reads it."""
        z = node.outputs[0]
        inside = [reader for reader in z.outputs if self._origin(reader) == place.origin]
        return z.name == place.origin and not inside

    def _origin(self, node: gs.Node) -> str:
        place = self.places.get(node.outputs[0].name) if node.outputs else None
        return "" if place is None else place.origin


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that they have together; None where they do not go together."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None


def inlined(proto: onnx.ModelProto) -> Inlined:
    """A model in whose main graph stands whatever runs for certain.

    Args:
        proto: the model; it is not changed. It is given back where there is nothing to inline.
    """
    if not has_bodies(proto):
        return Inlined(proto)
    whole = _without_large_values(proto)
    places = inline(whole)
    return Inlined(whole, places, frozenset(constants(proto))) if places else Inlined(proto)


def _without_large_values(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import,
                           functions=proto.functions)  # fmt: skip
    graph, own = proto.graph, copy.graph
    own.name = graph.name or "graph"
    for kind in ("node", "input", "output", "value_info"):
        getattr(own, kind).extend(getattr(graph, kind))
    for tensor in graph.initializer:
        if is_external(tensor) or byte_size(tensor) > _SMALL:
            own.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        else:
            own.initializer.append(tensor)
    return copy
