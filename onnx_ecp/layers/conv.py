"""Conv in one to three dimensions: z = W a over patches a of the input, groups side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.lib.stride_tricks import sliding_window_view

from onnx_ecp.graph import windows
from onnx_ecp.graph.builder import Builder
from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.bias import operator_bias
from onnx_ecp.layers.channels import Channels, stored_kernel
from onnx_ecp.layers.layer import Reshape, Skip
from onnx_ecp.layers.trace import Scope


@dataclass(frozen=True)
class Window(windows.Window):
    """How a kernel moves over the spatial axes: the attributes of Conv.

    Args:
        pads: zeros before and after, per spatial axis; not used with ``auto_pad`` SAME.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
    """

    pads: tuple[tuple[int, int], ...]
    auto_pad: str

    def padding(self, spatial: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Zeros (before, after) per spatial axis, for an input of this size."""
        if not self.auto_pad.startswith("SAME"):
            return self.pads
        totals = [
            max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
            for size, stride, extent in zip(spatial, self.strides, self.reach.tolist(), strict=True)
        ]
        # The odd zero goes behind in SAME_UPPER, in front in SAME_LOWER.
        halves = [(total // 2, total - total // 2) for total in totals]
        return tuple(h if self.auto_pad == "SAME_UPPER" else h[::-1] for h in halves)

    def patches(self, a: np.ndarray) -> np.ndarray:
        """(samples, channels, *spatial) as a view (samples, channels, *positions, *kernel)."""
        axes = tuple(range(2, a.ndim))
        a = np.pad(a, ((0, 0), (0, 0), *self.padding(a.shape[2:])))
        windows = sliding_window_view(a, tuple(self.reach.tolist()), axes)
        steps = [slice(None, None, step) for step in (*self.strides, *self.dilations)]
        return windows[(slice(None), slice(None), *steps)]


@dataclass(frozen=True)
class Conv(Channels):
    """A convolution: what a position sees is a patch of the input."""

    window: Window

    def rows_in(self, a: np.ndarray) -> np.ndarray:
        """(samples, channels, *spatial) as patches (groups, samples * positions, in).

        In memory every column lies in one piece: so whole lines of an image are copied at a time.
        """
        patches = self.window.patches(a)
        dims = len(self.window.kernel)
        samples, channels, *rest = patches.shape
        patches = patches.reshape(samples, self.groups, channels // self.groups, *rest)
        kernel, positions = range(3 + dims, 3 + 2 * dims), range(3, 3 + dims)
        patches = patches.transpose(1, 2, *kernel, 0, *positions)
        return patches.reshape(self.groups, self.shape[1], -1).swapaxes(1, 2)

    def count_rows(self, a: np.ndarray) -> int:
        """One for every position of every sample."""
        return len(a) * math.prod(self.window.patches(a[:1]).shape[2 : a.ndim])

    def some_rows_in(self, a: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Nothing but the patches that are wanted is copied."""
        patches = np.moveaxis(self.window.patches(a), 1, a.ndim - 1)  # (samples, *positions, ...)
        shape = patches.shape[: a.ndim - 1]
        found = patches[np.unravel_index(at, shape)]  # (k, channels, *kernel)
        return found.reshape(len(at), self.groups, self.shape[1]).swapaxes(0, 1)

    def rows_in_graph(self, op: Builder, a: gs.Tensor, z: gs.Tensor) -> gs.Tensor:
        """Cells of the padded image are numbered; those a position sees at every tap are taken."""
        own, rank = self.window, self.window.rank
        attrs = {"auto_pad": own.auto_pad, "pads": [begin for begin, _ in own.pads]}
        total = op.Sub(own.covered(op, op.Shape(z, start=2)), op.Shape(a, start=2))
        padded = windows.pad_spatial(op, a, *windows.margins(op, attrs, total, rank), rank)
        sizes = [op.Shape(padded, start=2 + d, end=3 + d) for d in range(rank)]
        counts = [op.Squeeze(op.Shape(z, start=2 + d, end=3 + d)) for d in range(rank)]
        starts = _numbers(op, sizes, [
            op.Mul(op.Range(op.const(0), n, op.const(1)), stride)
            for n, stride in zip(counts, own.strides, strict=True)
        ])  # fmt: skip
        taps = _numbers(op, sizes, [
            op.const(np.arange(size) * step)
            for size, step in zip(own.kernel, own.dilations, strict=True)
        ])  # fmt: skip
        seen = op.Add(op.Unsqueeze(starts, [1]), taps)
        return self.gathered(op, padded, seen)

    @property
    def adds_zeros(self) -> bool:
        """Where windows reach beyond the border."""
        window = self.window
        return window.auto_pad.startswith("SAME") or any(map(any, window.pads))

    def weight_axes(self, node: gs.Node) -> tuple[int, tuple[int, int]]:
        """(out, in per group, *kernel)."""
        return 1, (0, 1)


def _numbers(op: Builder, sizes: Sequence[gs.Tensor], coordinates: Sequence[Any]) -> gs.Tensor:
    """Numbers (cells,) of the cells on a grid with these coordinates, in an image of a size."""
    cells = coordinates[0]
    for along, size in zip(coordinates[1:], sizes[1:], strict=True):
        cells = op.Add(op.Mul(op.Unsqueeze(cells, [-1]), size), along)
    return op.Reshape(cells, [-1])


def match(node: gs.Node, scope: Scope) -> Affine | Skip | None:
    """A Conv as a layer, or why it is none; FusedConv has the same attributes."""
    seen = stored_kernel(node, scope)
    if isinstance(seen, Skip):
        return seen
    out, kernel = seen.seen_shape[0], seen.seen_shape[2:]
    shape = (out, math.prod(seen.seen_shape[1:]))
    behind = (out,) + (1,) * len(kernel)
    bias = operator_bias(scope, node, 2, out=out, units_behind=behind, dtype=seen.seen_dtype)
    a, name, z = node.inputs[0], scope.names[id(node)], node.outputs[0].name
    groups = int(node.attrs.get("group", 1))
    window = _window(node, kernel)
    weight = seen.weight(Reshape(shape))
    return Conv(name, node.op, a.name, z, weight, shape, bias, window, groups=groups)


def _window(node: gs.Node, kernel: tuple[int, ...]) -> Window:
    dims = len(kernel)
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    pads = [0] * 2 * dims
    if auto_pad == "NOTSET":
        pads = node.attrs.get("pads", pads)
    return Window(
        kernel,
        tuple(node.attrs.get("strides", [1] * dims)),
        tuple(node.attrs.get("dilations", [1] * dims)),
        tuple(zip(pads[:dims], pads[dims:], strict=True)),
        auto_pad,
    )
