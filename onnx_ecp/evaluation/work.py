"""What the layers of a model take: weights and multiplications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from onnx_ecp.graph import Model, decode_sparse
from onnx_ecp.graph.inlining import has_bodies, inline
from onnx_ecp.graph.shapes import shapes_of_a_run
from onnx_ecp.layers import Layer, find_layers
from onnx_ecp.layers.fused import preactivation


@dataclass(frozen=True)
class Work:
    """What the layers take.

    Args:
        weights: elements of their weights; shared ones count once.
        flops: multiplications per sample of the shapes that were seen.
    """

    weights: int
    flops: int


def work(model: Model, feeds: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Work:
    """What the layers of a model take, for inputs of these shapes."""
    dense = replace(model, proto=decode_sparse(model.proto))
    shapes = shapes_of_a_run(replace(dense, proto=_inlined(dense.proto)), feeds, **settings)
    layers = find_layers(dense.proto).layers
    weights = {layer.weight.tensor: int(np.prod(layer.shape)) for layer in layers}
    products = sum(multiplications(layers, shapes).values())
    return Work(sum(weights.values()), products // samples_of(feeds))


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in whose main graph the tensors of functions stand, which layers read there."""
    if not has_bodies(proto):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    inline(copy)
    return copy


def multiplications(
    layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """By name, the multiplications of the layers in a run with tensors of these shapes.

    Layers that read or give a tensor without a shape, such as one inside a function, are left out:
    they are the same before and after.
    """
    # A fused operator has one name for z and what follows; both have the same shape.
    known = dict(shapes) | {preactivation(name): shape for name, shape in shapes.items()}
    seen = [layer for layer in layers if {layer.input, layer.output} <= known.keys()]
    return {x.name: x.uses(known[x.input], known[x.output]) * int(np.prod(x.shape)) for x in seen}


def samples_of(feeds: Mapping[str, np.ndarray]) -> int:
    """How many samples a run of these inputs is for."""
    return max((len(x) for x in feeds.values() if x.ndim), default=1)
