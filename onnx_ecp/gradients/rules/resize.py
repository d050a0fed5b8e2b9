"""Resize: linear, and along every axis a matrix of its own.

Resizing the unit matrix along one axis shows that axis's matrix, whatever the interpolation and
the way of counting coordinates; the adjoint is multiplied by its transpose.
"""

from __future__ import annotations

from string import ascii_letters
from typing import Any

import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.registry import (
    Unsupported,
    constant,
    nonnegative,
    only,
    optional_input,
    rule,
)
from onnx_ecp.graph.builder import Builder

_INTERPOLATION = (
    "antialias",
    "coordinate_transformation_mode",
    "cubic_coeff_a",
    "exclude_outside",
    "mode",
    "nearest_mode",
)


@rule("Resize")
def _resize(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("keep_aspect_ratio_policy")
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Unsupported("tf_crop_and_resize")
    x, adjoint = node.inputs[0], only(node, g, i, 0)
    rank = op.rank(x)
    axes = [nonnegative(a, rank) for a in node.attrs.get("axes", range(rank))]
    for place, axis in enumerate(axes):
        if _changes(op, node, place, axis):
            adjoint = _contract(op, adjoint, _axis_matrix(op, node, place, axis), rank, axis)
    return adjoint


def _changes(op: Builder, node: gs.Node, place: int, axis: int) -> bool:
    """Whether the operator does anything along an axis."""
    scales = constant(optional_input(node, 2))
    scaled = scales is not None and scales.size > 0 and bool(scales[place] != 1.0)
    return scaled or op.shape(node.inputs[0])[axis] != op.shape(node.outputs[0])[axis]


def _axis_matrix(op: Builder, node: gs.Node, place: int, axis: int) -> Any:
    """What the operator does along an axis: (size of input, size of output)."""
    x = node.inputs[0]
    size = op.Shape(x, start=axis, end=axis + 1)
    zeros = op.Expand(op.const(0.0, op.dtype(x)), op.Concat(size, size, axis=0))
    attrs = {name: node.attrs[name] for name in _INTERPOLATION if name in node.attrs}
    scales, sizes = optional_input(node, 2), optional_input(node, 3)
    if sizes is not None:
        target = op.Concat(size, op.Slice(sizes, [place], [place + 1]), axis=0)
        return op.Resize(op.EyeLike(zeros), None, None, target, **attrs)
    factor = op.Slice(scales, [place], [place + 1])
    return op.Resize(op.EyeLike(zeros), None, op.Concat([1.0], factor, axis=0), **attrs)


def _contract(op: Builder, g: Any, matrix: Any, rank: int, axis: int) -> Any:
    """The adjoint (P, ...) times the matrix along one axis of the tensor behind the probes."""
    letters, new = ascii_letters[: rank + 1], ascii_letters[rank + 1]
    old = letters[axis + 1]
    equation = f"{letters},{new}{old}->{letters.replace(old, new)}"
    return op.Einsum(g, matrix, equation=equation)
