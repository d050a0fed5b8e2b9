"""Windows that move over spatial axes: their geometry, which layers and gradients share.

Along a spatial axis the windows of a Conv cover ``(outputs - 1) stride + reach`` cells, where
``reach = dilation (kernel - 1) + 1``. They begin ``begin`` cells before x and end ``end`` cells
behind it (negative: some cells of x are not covered). ConvTranspose fills the covered cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.graph.builder import Builder


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
