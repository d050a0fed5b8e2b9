"""Pooling: averages are convolutions with ones; maxima know where they came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.convolution import merge_probes
from onnx_ecp.gradients.rules.movement import scatter_add
from onnx_ecp.gradients.rules.reduction import extreme, mean
from onnx_ecp.gradients.rules.registry import Unsupported, only, rule
from onnx_ecp.graph.builder import Builder
from onnx_ecp.graph.windows import Window, margins, pad_spatial


@rule("MaxPool")
def _maxpool(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """The second output counts over the whole input: just what the scatter rule wants."""
    if node.attrs.get("storage_order", 0):
        raise Unsupported("column-major indices")
    origin = op.further_output(node, 1, np.int64)
    adjoint = only(node, g, i, 0)
    if _tiles(op, node, adjoint):
        return _chosen_cells(op, node, adjoint, origin)
    return scatter_add(op, adjoint, origin, node.inputs[0])


# Above this, float32 does not tell neighbouring cell numbers apart.
EXACT = 2**24


def _tiles(op: Builder, node: gs.Node, g: gs.Tensor) -> bool:
    """Whether every cell lies in one window at most, and ONNX Runtime can repeat the adjoint."""
    window = Window.of(node, node.attrs["kernel_shape"])
    return (
        window.kernel == window.strides
        and set(window.dilations) == {1}
        and not any(node.attrs.get("pads", ()))
        and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and op.dtype(g) == np.float32
        and math.prod(op.shape(node.inputs[0])[2:]) < EXACT
    )


def _chosen_cells(op: Builder, node: gs.Node, g: gs.Tensor, origin: gs.Tensor) -> Any:
    """Every window's adjoint repeated over its cells, times one where the maximum was, else zero.

    Which cell was chosen is found once for all probes, where a scatter asks for every probe.
    """
    (x,), y = node.inputs, node.outputs[0]
    kernel, sizes = node.attrs["kernel_shape"], op.Shape(x, start=2)
    cell = op.cast(op.Mod(origin, op.ReduceProd(sizes, keepdims=0)), np.float32)
    number: Any = 0.0  # of every cell: its place in the flat image
    for axis, width in enumerate(kernel):
        places = op.Range(0, op.Mul(op.Gather(op.Shape(y, start=2), axis), width), 1)
        row = op.Mul(number, op.cast(op.Gather(sizes, axis), np.float32))
        number = op.Add(op.Unsqueeze(row, [-1]) if axis else row, op.cast(places, np.float32))
    chosen = op.cast(op.Equal(_repeated(op, cell, kernel), number), np.float32)
    cells = _repeated(op, merge_probes(op, g, y), kernel)
    spread = op.Reshape(cells, op.Concat(op.probes(g), op.Shape(chosen), axis=0))
    product = op.Mul(spread, chosen)
    tiled = np.multiply(op.shape(y)[2:], kernel)
    if np.array_equal(tiled, op.shape(x)[2:]):
        return product
    rank = len(kernel)
    behind = op.Sub(sizes, op.Shape(chosen, start=2))
    amounts = op.Concat(np.zeros(rank, np.int64), behind, axis=0)
    return op.pad(product, 3 + rank, range(3, 3 + rank), amounts)


def _repeated(op: Builder, x: gs.Tensor, times: Sequence[int]) -> Any:
    """Every cell of x (N, C, ...) repeated along the spatial axes."""
    return op.Resize(
        x,
        None,
        np.array([1, 1, *times], np.float32),
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )


@rule("MaxUnpool")
def _maxunpool(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """Every cell came from one place, which the indices count over the whole output."""
    if len(node.inputs) > 2 and node.inputs[2].name:
        raise Unsupported("an output size of its own")
    adjoint = only(node, g, i, 0)
    probes = op.probes(adjoint)
    flat = op.Reshape(adjoint, op.Concat(probes, np.array([-1]), axis=0))
    places = op.Reshape(node.inputs[1], np.array([1, -1]))
    rows = op.Expand(places, op.Concat(probes, np.array([1]), axis=0))
    return op.reshape_like(op.GatherElements(flat, rows, axis=1), adjoint, node.inputs[0])


@rule("AveragePool")
def _averagepool(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    window = Window.of(node, node.attrs["kernel_shape"])
    share = op.Div(only(node, g, i, 0), _cells_averaged(op, node, window))
    return op.reshape_like(_spread(op, node, window, share), share, node.inputs[0])


def _spread(op: Builder, node: gs.Node, window: Window, g: gs.Tensor) -> Any:
    """Every window's adjoint g (P, *shape of y) added to all cells of x it covers, (P*N*C, 1, ...).

    The transposed operator of the sum over windows.
    """
    images = op.Reshape(g, op.Concat([-1, 1], op.Shape(node.outputs[0], start=2), axis=0))
    cells = op.ConvTranspose(images, _ones(op, window, g), **window.attrs)
    begin, end = _margins(op, node, window)
    return pad_spatial(op, cells, op.Neg(begin), op.Neg(end), window.rank)


def _margins(op: Builder, node: gs.Node, window: Window) -> tuple[Any, Any]:
    (x,), (y,) = node.inputs, node.outputs
    total = op.Sub(window.covered(op, op.Shape(y, start=2)), op.Shape(x, start=2))
    return margins(op, node.attrs, total, window.rank)


def _ones(op: Builder, window: Window, like: gs.Tensor) -> Any:
    return op.const(np.ones((1, 1, *window.kernel)), op.dtype(like))


def _cells_averaged(op: Builder, node: gs.Node, window: Window) -> Any:
    """By how many cells each window's sum was divided, (1, 1, *spatial shape of y)."""
    (x,) = node.inputs
    begin, end = _margins(op, node, window)
    cells = op.Shape(x, start=2)
    if node.attrs.get("count_include_pad", 0):
        declared = node.attrs.get("pads", [0] * 2 * window.rank)[window.rank :]
        # Cells that only ceil_mode adds are behind the padding and never count.
        behind = op.const(np.array(declared, np.int64)) if _is_explicit(node) else end
        cells = op.Add(cells, op.Add(begin, behind))
        begin, end = op.const(np.zeros(window.rank, np.int64)), op.Sub(end, behind)
    counted = op.Expand(op.const(1.0, op.dtype(x)), op.Concat([1, 1], cells, axis=0))
    return op.Conv(
        pad_spatial(op, counted, begin, end, window.rank), _ones(op, window, x), **window.attrs
    )


def _is_explicit(node: gs.Node) -> bool:
    return bool(node.attrs.get("auto_pad", "NOTSET") == "NOTSET")


@rule("LpPool")
def _lppool(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """With y = (sum |x|^p)^(1/p): |x|^(p-1) sign(x) times the spread of g y^(1-p)."""
    (x,), (y,), p = node.inputs, node.outputs, float(node.attrs.get("p", 2))
    window = Window.of(node, node.attrs["kernel_shape"])
    share = op.Mul(g[0], op.Pow(op.Where(op.Equal(y, 0.0), 1.0, y), 1.0 - p))
    spread = op.reshape_like(_spread(op, node, window, share), share, x)
    return op.Mul(spread, op.Mul(op.Pow(op.Abs(x), p - 1.0), op.Sign(x)))


@rule("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    (x,), (y,) = node.inputs, node.outputs
    derivative = mean if node.op == "GlobalAveragePool" else extreme
    return derivative(op, only(node, g, i, 0), x, y, np.arange(2, op.rank(x)))
