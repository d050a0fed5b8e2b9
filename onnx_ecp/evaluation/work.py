"""What the layers of a model take: weights and multiplications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_ecp.graph import Model, decode_sparse
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
    shapes = shapes_of_a_run(dense, feeds, **settings)
    layers = find_layers(dense.proto).layers
    weights = {layer.weight.tensor: int(np.prod(layer.shape)) for layer in layers}
    products = sum(multiplications(layers, shapes).values())
    return Work(sum(weights.values()), products // samples_of(feeds))


def multiplications(
    layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """By name, the multiplications of the layers in a run with tensors of these shapes.

    Layers inside functions have no output in the graph and are left out: they are the same before
    and after.
    """
    # A fused operator has one name for z and what follows; both have the same shape.
    known = dict(shapes) | {preactivation(name): shape for name, shape in shapes.items()}
    seen = [layer for layer in layers if layer.output in known]
    return {x.name: x.uses(known[x.input], known[x.output]) * int(np.prod(x.shape)) for x in seen}


def samples_of(feeds: Mapping[str, np.ndarray]) -> int:
    """How many samples a run of these inputs is for."""
    return max((len(x) for x in feeds.values() if x.ndim), default=1)
