"""ConvTranspose in one to three dimensions: z = W a over the cells that reach a position.

Along an axis, tap t of the kernel carries cell c of the input to position ``c stride + t dilation -
begin`` of the output, where ``begin`` cells are cut off. So position q reads, at tap t, the cell

    c = (q + begin - t dilation) / stride

if that is an integer and lies in the image, and zero otherwise. Rows are cut out so: the input is
not dilated by zeros first, the cells are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.graph import windows
from onnx_ecp.graph.builder import Builder
from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.bias import operator_bias
from onnx_ecp.layers.channels import Channels, stored_kernel
from onnx_ecp.layers.layer import Reshape, Skip, Transpose
from onnx_ecp.layers.trace import Scope


@dataclass(frozen=True)
class Window(windows.Window):
    """How a kernel spreads cells over the spatial axes: the attributes of ConvTranspose.

    Args:
        pads: positions cut off in front and behind, per spatial axis; not used with ``auto_pad``
            or ``output_shape``.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
        output_padding: positions added behind, per spatial axis.
        output_shape: size of the output's spatial axes; None where it follows from the rest.
    """

    pads: tuple[tuple[int, int], ...]
    auto_pad: str
    output_padding: tuple[int, ...]
    output_shape: tuple[int, ...] | None

    def cut(self, spatial: Sequence[int]) -> list[tuple[int, int]]:
        """(begin, size of the output) per spatial axis, for an input of this size."""
        return [self._cut(axis, size) for axis, size in enumerate(spatial)]

    def _cut(self, axis: int, size: int) -> tuple[int, int]:
        stride, reach = self.strides[axis], int(self.reach[axis])
        covered = (size - 1) * stride + reach + self.output_padding[axis]
        if self.output_shape is not None:
            out = self.output_shape[axis]
        elif self.auto_pad.startswith("SAME"):
            out = min(covered, size * stride)
        else:
            begin, end = (0, 0) if self.auto_pad == "VALID" else self.pads[axis]
            return begin, covered - begin - end
        total = max(covered - out, 0)
        # The odd position is cut off behind in SAME_UPPER, in front in all else.
        return (total // 2 if self.auto_pad == "SAME_UPPER" else total - total // 2), out

    def cells(self, spatial: Sequence[int]) -> np.ndarray:
        """(taps, positions): number of the cell that a tap of a position reads, or of none.

        None is the number behind the last cell of an image of this size.
        """
        numbers, known = np.zeros((1, 1), np.int64), np.ones((1, 1), np.bool_)
        for axis, (size, (begin, out)) in enumerate(zip(spatial, self.cut(spatial), strict=True)):
            taps = np.arange(self.kernel[axis])[:, None] * self.dilations[axis]
            place = np.arange(out) + begin - taps
            cell = place // self.strides[axis]
            there = (place % self.strides[axis] == 0) & (cell >= 0) & (cell < size)
            numbers = _outer(numbers * size, cell, np.add)
            known = _outer(known, there, np.logical_and)
        return np.where(known, numbers, math.prod(spatial))


def _outer(outer: np.ndarray, inner: np.ndarray, join: Any) -> np.ndarray:
    """(taps, positions) of several axes from those of the first ones and of one more."""
    joined = join(outer[:, None, :, None], inner[None, :, None, :])
    return np.asarray(joined.reshape(len(outer) * len(inner), -1))


@dataclass(frozen=True)
class ConvTranspose(Channels):
    """A transposed convolution: at every tap of its kernel, a position sees one cell or none."""

    window: Window

    def rows_in(self, a: np.ndarray) -> np.ndarray:
        """(samples, channels, *spatial) as (groups, samples * positions, in)."""
        images = a.reshape(len(a), self.groups, self.reduction, -1)
        images = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1)))  # the cell that is none
        rows = images.transpose(1, 2, 0, 3)[..., self.window.cells(a.shape[2:])]
        rows = np.moveaxis(rows, 3, 2)  # (groups, channels, taps, samples, positions)
        return rows.reshape(self.groups, self.shape[1], -1).swapaxes(1, 2)

    def rows_in_graph(self, op: Builder, a: gs.Tensor, z: gs.Tensor) -> gs.Tensor:
        """As ``rows_in``, with numbers of cells computed from the sizes of the run."""
        own, rank = self.window, self.window.rank
        attrs: dict[str, Any] = {"auto_pad": own.auto_pad, "pads": [b for b, _ in own.pads]}
        if own.output_shape is not None:
            attrs["output_shape"] = own.output_shape
        covered = op.Add(own.covered(op, op.Shape(a, start=2)), list(own.output_padding))
        begins, _ = windows.margins(op, attrs, op.Sub(covered, op.Shape(z, start=2)), rank)
        numbers, known = op.const(np.zeros((1, 1), np.int64)), op.const(np.ones((1, 1), np.bool_))
        for axis in range(rank):
            size = op.Shape(a, start=2 + axis, end=3 + axis)
            out = op.Squeeze(op.Shape(z, start=2 + axis, end=3 + axis))
            positions = op.Range(op.const(0), out, op.const(1))
            begin = op.Slice(begins, [axis], [axis + 1])
            taps = np.arange(own.kernel[axis]) * own.dilations[axis]
            place = op.Sub(op.Unsqueeze(op.Add(positions, begin), [1]), taps)
            stride = op.const(np.array(own.strides[axis], np.int64))
            # Division of integers rounds to zero, so places in front of the image are told apart.
            cell = op.Div(place, stride)
            there = op.And(
                op.Equal(op.Mod(place, stride), 0),
                op.And(op.GreaterOrEqual(place, 0), op.Less(cell, size)),
            )
            numbers = _outer_in_graph(op, op.Mul(numbers, size), cell, "Add")
            known = _outer_in_graph(op, known, there, "And")
        none = op.ReduceProd(op.Shape(a, start=2), keepdims=1)
        seen = op.Where(known, numbers, none)
        images = op.Reshape(a, [0, 0, -1])
        return self.gathered(op, op.pad(images, 3, [2], np.array([0, 1], np.int64)), seen)

    def uses(self, a: tuple[int, ...], z: tuple[int, ...]) -> int:
        """Once per cell of the input: what is not there is not multiplied."""
        return math.prod(a) // (self.groups * self.reduction)

    @property
    def adds_zeros(self) -> bool:
        """At the border, and between cells where they are further apart than one position."""
        return True

    def weight_axes(self, node: gs.Node) -> tuple[int, tuple[int, int]]:
        """(in, out per group, *kernel); depthwise, a row lies with its channel."""
        return 1, ((1, 0) if self.groups == 1 else (0, 1))

    @property
    def units_refusal(self) -> str:
        """Rows of a group have no axis of their own, but for one row for every channel."""
        one_each = self.reduction == 1 and self.shape[0] == self.groups
        return "" if self.groups == 1 or one_each else "channels of a group are not followed"


def _outer_in_graph(op: Builder, outer: gs.Tensor, inner: gs.Tensor, join: str) -> gs.Tensor:
    """(positions, taps) of several axes from those of the first ones and of one more."""
    joined = op.op(join, op.Unsqueeze(outer, [1, 3]), op.Unsqueeze(inner, [0, 2]))
    shape = op.Mul(op.Shape(outer), op.Shape(inner))
    return op.Reshape(joined, shape)


def match(node: gs.Node, scope: Scope) -> Affine | Skip | None:
    """A ConvTranspose as a layer, or why it is none."""
    seen = stored_kernel(node, scope)
    if isinstance(seen, Skip):
        return seen
    channels, per_group, *kernel = seen.seen_shape
    groups, taps = int(node.attrs.get("group", 1)), math.prod(kernel)
    shape = (groups * per_group, channels // groups * taps)
    weight = seen.weight(
        Reshape((groups, channels // groups, per_group, taps)),
        Transpose((0, 2, 1, 3)),
        Reshape(shape),
    )
    units = (shape[0],) + (1,) * len(kernel)
    bias = operator_bias(scope, node, 2, out=shape[0], units_behind=units, dtype=seen.seen_dtype)
    a, name, z = node.inputs[0], scope.names[id(node)], node.outputs[0].name
    window = _window(node, tuple(kernel))
    return ConvTranspose(name, node.op, a.name, z, weight, shape, bias, window, groups=groups)


def _window(node: gs.Node, kernel: tuple[int, ...]) -> Window:
    rank = len(kernel)
    pads, size = node.attrs.get("pads", [0] * 2 * rank), node.attrs.get("output_shape")
    return Window(
        kernel,
        tuple(node.attrs.get("strides", [1] * rank)),
        tuple(node.attrs.get("dilations", [1] * rank)),
        tuple(zip(pads[:rank], pads[rank:], strict=True)),
        node.attrs.get("auto_pad", "NOTSET"),
        tuple(node.attrs.get("output_padding", [0] * rank)),
        None if size is None else tuple(size[-rank:]),
    )
