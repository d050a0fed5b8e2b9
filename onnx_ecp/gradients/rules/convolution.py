"""Window operators: Conv and ConvTranspose, and the geometry that pooling shares with them.

Along a spatial axis the windows of a Conv cover ``(outputs - 1) stride + reach`` cells, where
``reach = dilation (kernel - 1) + 1``. They begin ``begin`` cells before x and end ``end`` cells
behind it (negative: some cells of x are not covered). ConvTranspose fills the covered cells; x is
cut out of them. Probes and batch are one batch axis for all of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.builder import Builder
from onnx_ecp.gradients.rules.registry import only, rule


@dataclass(frozen=True)
class Window:
    """Kernel size, stride and dilation along every spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, node: gs.Node, kernel: Sequence[int]) -> Window:
        """The window of a node whose kernel has the given spatial shape."""
        ones = [1] * len(kernel)
        strides, dilations = (node.attrs.get(k, ones) for k in ("strides", "dilations"))
        return cls(tuple(kernel), tuple(strides), tuple(dilations))

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def reach(self) -> np.ndarray:
        """Cells from the first to the last tap, by axis."""
        return np.array(self.dilations, np.int64) * (np.array(self.kernel, np.int64) - 1) + 1

    @property
    def attrs(self) -> dict[str, list[int]]:
        """As attributes of an operator without padding."""
        return {"strides": list(self.strides), "dilations": list(self.dilations)}

    def covered(self, op: Builder, outputs: gs.Tensor) -> Any:
        """Number of cells that the windows of ``outputs`` (spatial sizes) cover, int64 vector."""
        steps = op.Mul(op.Sub(outputs, 1), np.array(self.strides, np.int64))
        return op.Add(steps, self.reach)


def margins(op: Builder, attrs: Mapping[str, Any], total: gs.Tensor, rank: int) -> tuple[Any, Any]:
    """How the ``total`` (int64 vector) of padding cells is split: before x and behind it.

    Args:
        op: writes the nodes.
        attrs: of an operator: ``auto_pad``, ``pads``, ``output_shape`` where it has them.
        total: int64 vector, one element for every spatial axis.
        rank: number of spatial axes.
    """
    mode = attrs.get("auto_pad", "NOTSET")
    if mode == "NOTSET" and "output_shape" in attrs:
        mode = "SAME_LOWER"
    if mode == "NOTSET":
        begin: Any = op.const(np.array(attrs.get("pads", [0] * 2 * rank)[:rank], np.int64))
    elif mode == "VALID":
        begin = op.const(np.zeros(rank, np.int64))
    else:
        smaller = op.Div(op.Max(total, 0), 2)
        begin = smaller if mode == "SAME_UPPER" else op.Sub(op.Max(total, 0), smaller)
    return begin, op.Sub(total, begin)


def pad_spatial(op: Builder, x: gs.Tensor, begin: gs.Tensor, end: gs.Tensor, rank: int) -> Any:
    """Pad (or with negative amounts cut) the spatial axes of x (N, C, ...)."""
    return op.pad(x, 2 + rank, range(2, 2 + rank), op.Concat(begin, end, axis=0))


def merge_probes(op: Builder, g: gs.Tensor, y: gs.Tensor) -> Any:
    """The adjoint (P, N, ...) of y (N, ...) as a batch (P*N, ...)."""
    return op.Reshape(g, op.Concat([-1], op.Shape(y, start=1), axis=0))


@rule("Conv")
def _conv(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    (x, weight), y = node.inputs[:2], node.outputs[0]
    window = Window.of(node, op.shape(weight)[2:])
    images = merge_probes(op, only(node, g, i, 0), y)
    groups, pads = node.attrs.get("group", 1), _dense_pads(node, window)
    if pads is not None and groups == 1:
        # Faster than a Conv with the mirrored kernel, which is no constant that could be packed.
        cells = op.ConvTranspose(images, weight, pads=[int(p) for p in pads], **window.attrs)
        return op.reshape_like(cells, g[0], x)
    if pads is not None:
        # ConvTranspose takes one group after the other.
        cells = op.Conv(
            images,
            _mirrored_weight(op, weight, groups),
            pads=[int(p) for p in np.tile(window.reach - 1, 2) - pads],
            dilations=list(window.dilations),
            group=groups,
        )
        return op.reshape_like(cells, g[0], x)
    cells = op.ConvTranspose(images, weight, group=groups, **window.attrs)
    total = op.Sub(window.covered(op, op.Shape(y, start=2)), op.Shape(x, start=2))
    begin, end = margins(op, node.attrs, total, window.rank)
    return op.reshape_like(pad_spatial(op, cells, op.Neg(begin), op.Neg(end), window.rank), g[0], x)


def _dense_pads(node: gs.Node, window: Window) -> np.ndarray | None:
    """Padding of a Conv that reaches every cell at every step; None where it skips some."""
    if any(s != 1 for s in window.strides):
        return None
    mode, spare = node.attrs.get("auto_pad", "NOTSET"), window.reach - 1
    if mode == "NOTSET":
        pads = np.array(node.attrs.get("pads", [0] * 2 * window.rank), np.int64)
    elif mode == "VALID":
        pads = np.zeros(2 * window.rank, np.int64)
    else:
        halves = [spare // 2, spare - spare // 2]
        pads = np.concatenate(halves if mode == "SAME_UPPER" else halves[::-1])
    return pads if (pads <= np.tile(spare, 2)).all() else None


def _mirrored_weight(op: Builder, weight: gs.Tensor, groups: int) -> Any:
    """The kernel (out, in/groups, ...) mirrored in space, as (in, out/groups, ...)."""
    out, per_group, *kernel = op.shape(weight)
    rank = len(kernel)
    spatial = list(range(3, 3 + rank))
    grouped = op.Reshape(weight, [groups, out // groups, per_group, *kernel])
    exchanged = op.Transpose(grouped, perm=[0, 2, 1, *spatial])
    swapped = op.Reshape(exchanged, [groups * per_group, out // groups, *kernel])
    far = np.iinfo(np.int64).min
    return op.Slice(swapped, [-1] * rank, [far] * rank, list(range(2, 2 + rank)), [-1] * rank)


@rule("ConvTranspose")
def _conv_transpose(
    op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int
) -> gs.Tensor | None:
    (x, weight), y = node.inputs[:2], node.outputs[0]
    window = Window.of(node, op.shape(weight)[2:])
    images = merge_probes(op, only(node, g, i, 0), y)
    covered = window.covered(op, op.Shape(x, start=2))
    behind = op.Sub(covered, op.Shape(y, start=2))
    extra = node.attrs.get("output_padding", [0] * window.rank)
    begin, _ = margins(op, node.attrs, op.Add(behind, np.array(extra, np.int64)), window.rank)
    cells = pad_spatial(op, images, begin, op.Sub(behind, begin), window.rank)
    found = op.Conv(cells, weight, group=node.attrs.get("group", 1), **window.attrs)
    return op.reshape_like(found, g[0], x)
