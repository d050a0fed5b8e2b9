"""What layers between channels share: units on the second axis, kernels in the columns of W."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.graph import windows
from onnx_ecp.graph.builder import Builder
from onnx_ecp.layers.affine import Affine
from onnx_ecp.layers.layer import Skip
from onnx_ecp.layers.trace import Scope, Traced


@dataclass(frozen=True)
class Channels(Affine):
    """A layer between channels; every position of the output of every sample is one row.

    W is (out, in): the input channels of one group times the kernel, its positions varying fastest.
    Spellings say which cells of the input a position sees at every tap of the kernel.

    Args:
        window: how the kernel moves.
    """

    window: windows.Window

    @property
    def reduction(self) -> int:
        """N:M groups divide the input channels of one kernel position."""
        return self.shape[1] // math.prod(self.window.kernel)

    def nm_order(self) -> np.ndarray | None:
        """All channels of the first kernel position, then of the next one."""
        if self.reduction == self.shape[1]:
            return None
        return np.arange(self.shape[1]).reshape(self.reduction, -1).T.ravel()

    def rows_out(self, z: np.ndarray) -> np.ndarray:
        """(P, samples, out, *positions) as (P, groups, samples * positions, out // groups)."""
        units = self.shape[0] // self.groups
        probes, samples, _, *positions = z.shape
        z = z.reshape(probes, samples, self.groups, units, *positions)
        z = z.transpose(0, 2, 3, 1, *range(4, z.ndim))
        return z.reshape(probes, self.groups, units, -1).swapaxes(2, 3)

    def rows_out_graph(self, op: Builder, z: gs.Tensor) -> gs.Tensor:
        """Positions of all samples one after the other."""
        units = self.shape[0] // self.groups
        maps = op.Reshape(z, [0, 0, self.groups, units, -1])
        by_unit = op.Transpose(maps, perm=[0, 2, 3, 1, 4])
        return op.Reshape(by_unit, [0, self.groups, units, -1])

    def gathered(self, op: Builder, images: gs.Tensor, seen: gs.Tensor) -> gs.Tensor:
        """Rows of images (samples, channels, cells), given the cell of every (position, tap)."""
        grouped = op.Reshape(images, [0, self.groups, self.reduction, -1])
        cells = op.Transpose(grouped, perm=[1, 0, 3, 2])
        return op.Reshape(op.Gather(cells, seen, axis=2), [self.groups, -1, self.shape[1]])

    def graph_order(self) -> np.ndarray | None:
        """Taps vary slowest: so all channels of a cell are taken in one piece."""
        return self.nm_order()

    @property
    def shift_shape(self) -> tuple[int, ...]:
        """(out, 1, 1, ...): the units lie on the second axis."""
        return (self.shape[0],) + (1,) * self.window.rank

    @property
    def units_axis(self) -> int:
        """Channels lie on the second axis."""
        return 1


def stored_kernel(node: gs.Node, scope: Scope) -> Traced | Skip:
    """The stored kernel of a node, its second input, or why there is none that can be pruned."""
    a, w = scope.operands(node)
    seen = scope.weight(w)
    if seen is None:
        return scope.skip(node, "its kernel is computed from the inputs of the model")
    if isinstance(seen, str):
        return scope.skip(node, seen)
    if scope.is_constant(a):
        return scope.skip(node, "both operands are constant: it does not depend on the inputs")
    rank = len(seen.seen_shape) - 2
    if not 1 <= rank <= 3:
        return scope.skip(node, f"a convolution in {rank} dimensions; 1 to 3 are supported")
    return seen
