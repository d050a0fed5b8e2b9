"""Window operators: Conv and ConvTranspose; see ``graph.windows`` for begin, end and covered cells.

ConvTranspose fills the covered cells; x is cut out of them. Probes and batch are one batch axis for
all of this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.registry import only, rule
from onnx_ecp.graph.builder import Builder
from onnx_ecp.graph.windows import Window, margins, pad_spatial


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
