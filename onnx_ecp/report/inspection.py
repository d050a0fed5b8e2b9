"""What can be pruned in a model: the values that are shown."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_ecp.graph import (
    InputSpec,
)
from onnx_ecp.layers import Skip
from onnx_ecp.report import ForTarget
from onnx_ecp.units.rows import UnitGroup


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
        tensorrt: why TensorRT's 2:4 kernels would not take it, pruned so; empty where they may.
        storage: "dense", "sparse" or "packed"; see ``optimize --format``.
        sensitivity: by which way its sensitivity can be had: "reverse graph", "numeric" (the same,
            with differences through an operator that has no rule), "differences" (``--gradients
            numeric`` only), "none", or "unknown".
        blocked: why not by the reverse graph alone, with the operator; empty where it is.
    """

    name: str
    op: str
    tensor: str
    shape: tuple[int, int]
    weights: int
    zeros: int
    two_four: str
    tensorrt: str = ""
    storage: str = "dense"
    sensitivity: str = "unknown"
    blocked: str = ""


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
        target: what a runtime would gain from, where one was named.
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
    target: ForTarget | None = None
