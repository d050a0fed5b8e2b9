"""What of a model is prunable, what is not and why: without running it.

Works for models that are newer than the installed ONNX Runtime, or where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnx_ecp.errors import ProviderError
from onnx_ecp.layers import Layer, Skip, find_layers
from onnx_ecp.model import (
    InputSpec,
    Model,
    constants,
    decode_sparse,
    load,
    read_tensor,
    runtime_support,
    signature,
)
from onnx_ecp.structure import find_structure, inferred_shapes
from onnx_ecp.structure.outcome import UnitGroup, unit_groups


@dataclass(frozen=True)
class Prunable:
    """A layer that can be pruned.

    Args:
        name: its name.
        op: operator type.
        tensor: the stored tensor behind W.
        shape: (out, in) of W.
        weights: elements of W.
        zeros: how many of them are zero now.
        two_four: why 2:4 does not fit it; empty where it does.
    """

    name: str
    op: str
    tensor: str
    shape: tuple[int, int]
    weights: int
    zeros: int
    two_four: str


@dataclass(frozen=True)
class Inspection:
    """What there is to prune.

    Args:
        path: the model's file, None for a model in memory.
        ir_version: of the model.
        opsets: version by domain.
        inputs: what the caller feeds.
        outputs: what comes out.
        layers: the prunable layers, in graph order.
        skips: the other candidates, with the reason.
        unit_groups: the neurons, channels and heads that ``--granularity unit`` may remove.
        unit_refusals: the prunable layers whose units must stay, with the reason.
        weights: of all prunable layers; tensors that several share count once.
        zeros: among them.
        warnings: what the user must know.
    """

    path: str | None
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    layers: tuple[Prunable, ...]
    skips: tuple[Skip, ...]
    unit_groups: tuple[UnitGroup, ...]
    unit_refusals: tuple[Skip, ...]
    weights: int
    zeros: int
    warnings: tuple[str, ...] = ()


def inspect(model: str | Path | onnx.ModelProto) -> Inspection:
    """Find the layers of a model that can be pruned.

    Args:
        model: path or proto; it is not changed and not run.

    Raises:
        ModelError: the model is unreadable or invalid.
    """
    given = load(model)
    dense = Model(decode_sparse(given.proto), given.path, given.base)
    found = find_layers(dense.proto)
    stored = constants(dense.proto)
    layers = tuple(
        _prunable(layer, read_tensor(dense, stored[layer.weight.tensor])) for layer in found.layers
    )
    structure = find_structure(dense.proto, found.layers, inferred_shapes(dense.proto))
    by_tensor = {layer.tensor: layer for layer in layers}.values()
    return Inspection(
        path=None if given.path is None else str(given.path),
        ir_version=given.proto.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in given.proto.opset_import},
        inputs=signature(given.proto),
        outputs=_outputs(given.proto),
        layers=layers,
        skips=found.skips,
        unit_groups=unit_groups(structure),
        unit_refusals=structure.refusals,
        weights=sum(layer.weights for layer in by_tensor),
        zeros=sum(layer.zeros for layer in by_tensor),
        warnings=_warnings(given.proto),
    )


def _prunable(layer: Layer, stored: np.ndarray) -> Prunable:
    return Prunable(
        name=layer.name,
        op=layer.op,
        tensor=layer.weight.tensor,
        shape=layer.shape,
        weights=stored.size,
        zeros=stored.size - int(np.count_nonzero(stored)),
        two_four="" if layer.reduction % 4 == 0 else f"4 does not divide {layer.reduction}",
    )


def _outputs(proto: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The outputs, described as inputs are: by a graph that has them as inputs."""
    return signature(onnx.ModelProto(graph=onnx.GraphProto(input=proto.graph.output)))


def _warnings(proto: onnx.ModelProto) -> tuple[str, ...]:
    try:
        problem = runtime_support(proto)
    except ProviderError as error:
        problem = error.message
    return () if problem is None else (f"only `inspect` works on this model here: {problem}",)
