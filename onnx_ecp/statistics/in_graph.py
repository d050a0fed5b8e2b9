"""The sums of ``statistics.Moments`` as nodes behind the adjoints: nothing large leaves the graph.

Accumulators are graph inputs, their new values graph outputs, so sums of batches add up wherever
the graph is run. Rows are those of ``Layer.rows_in`` and ``Layer.rows_out``, sums those of
``statistics.expand``, in float64. The constant c that activations are centred about is the mean of
the first batch; as long as there is none it is NaN. What goes in at first are scalars, which
broadcast.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.builder import Builder, Fact
from onnx_ecp.gradients.rules.convolution import Window, margins, pad_spatial
from onnx_ecp.graph.surgery import export_graph, import_graph
from onnx_ecp.layers import Layer
from onnx_ecp.layers.batched import Batched
from onnx_ecp.layers.conv import Conv
from onnx_ecp.layers.dense import Dense, Dot
from onnx_ecp.statistics.moments import Moments


@dataclass(frozen=True)
class Accumulation:
    """Inputs and outputs of an observation graph that adds up.

    Args:
        weights: by layer name, the output with the sensitivity of every row, (1, groups, rows).
        start: by input of an accumulator, its value before the first batch, a scalar.
        new: by the same names, the output with its value after one more batch.
    """

    weights: Mapping[str, str]
    start: Mapping[str, np.ndarray]
    new: Mapping[str, str]


def accumulation(
    proto: onnx.ModelProto,
    layers: Sequence[Layer],
    adjoints: Mapping[str, str],
    summed: Collection[str],
    facts: Mapping[str, Fact],
    *,
    with_squares: bool = True,
    with_gradient: bool = False,
) -> tuple[onnx.ModelProto, Accumulation]:
    """The observation graph with sums and sensitivities of rows for its outputs.

    Args:
        proto: forward, or with adjoints.
        layers: those whose rows are looked at.
        adjoints: by layer name, the tensor with its adjoint; where there is none, only activations
            are summed.
        summed: names of the layers whose moments are wanted.
        facts: by tensor name.
        with_squares: whether to sum (dy/dW)^2.
        with_gradient: also sum dy/dW per probe.
    """
    graph = import_graph(proto)
    graph.outputs.clear()
    op = Builder(graph, facts, "ecp/sum")
    tensors, sums, weights = graph.tensors(), _Sums(op), {}
    for layer in layers:
        g = tensors[adjoints[layer.name]] if layer.name in adjoints else None
        s = None
        if g is not None:
            g = op.cast(g, np.float64)
            s = _rows_out(op, layer, op.ReduceSumSquare(g, [0], keepdims=1))
            mean = op.rename(op.ReduceMean(s, [2], keepdims=0), f"ecp/weights/{layer.name}")
            graph.outputs.append(_typed(mean))
            weights[layer.name] = mean.name
        if layer.name in summed:
            a = _rows_in(op, layer, op.cast(tensors[layer.input], np.float64), tensors)
            sums.of(layer, a, s, g if with_gradient else None, with_squares=with_squares)
    model = export_graph(graph)
    model.ir_version = proto.ir_version
    return model, Accumulation(weights, sums.start, sums.new)


def moments(layer: Layer, sums: Mapping[str, np.ndarray], samples: int) -> Moments:
    """The moments of one layer from the values of its accumulators, by the names of the inputs."""
    out, width = layer.shape
    order = layer.nm_order()  # of a Conv: taps vary slowest, as they do in the graph

    def columns(part: str, shape: tuple[int, ...]) -> np.ndarray:
        """The sums in the order and shape of W's columns."""
        values = np.asarray(sums.get(_name(part, layer), np.zeros((0, width))))
        if order is not None:
            ordered = np.empty_like(values)
            ordered[..., order] = values
            values = ordered
        return values.reshape(shape)

    known = {part for part in ("ww", "gradient") if _name(part, layer) in sums}
    bb = sums.get(_name("bb", layer), np.zeros(0)).reshape(-1)
    return Moments(
        count=samples,
        centre=columns("centre", (layer.groups, width)),
        bb=bb,
        wb=columns("wb", (len(bb), width)),
        ww=columns("ww", (len(bb), width)) if "ww" in known else None,
        gradient=columns("gradient", (-1, out, width)) if "gradient" in known else None,
        rows=int(sums[_name("rows", layer)].item()),
        a=columns("a", (layer.groups, width)),
        aa=columns("aa", (layer.groups, width)),
    )


class _Sums:
    """Accumulators of a graph; see ``Accumulation`` for ``start`` and ``new``."""

    def __init__(self, op: Builder) -> None:
        self._op = op
        self.start: dict[str, np.ndarray] = {}
        self.new: dict[str, str] = {}

    def of(
        self,
        layer: Layer,
        a: gs.Tensor,
        s: gs.Tensor | None,
        g: gs.Tensor | None,
        *,
        with_squares: bool,
    ) -> None:
        """Add up one layer.

        Args:
            layer: whose rows they are.
            a: (groups, rows, in).
            s: sensitivities (1, groups, out per group, rows), where they are known.
            g: the adjoint, where gradients are wanted.
            with_squares: whether to sum (dy/dW)^2, where sensitivities are known.
        """
        op = self._op
        before = self._before("centre", layer, np.nan)
        centre = op.Where(op.IsNaN(before), op.ReduceMean(a, [1], keepdims=0), before)
        self._after("centre", layer, centre)
        shifted = op.Sub(a, op.Unsqueeze(centre, [1]))
        squared = op.Mul(shifted, shifted)
        parts = {
            "rows": op.cast(op.Shape(a, start=1, end=2), np.float64),
            "a": op.ReduceSum(shifted, [1], keepdims=0),
            "aa": op.ReduceSum(squared, [1], keepdims=0),
        }
        if s is not None:
            parts["bb"] = op.ReduceSum(s, [3], keepdims=0)
            parts["wb"] = op.MatMul(s, shifted)
            if with_squares:
                parts["ww"] = op.MatMul(s, squared)
        if g is not None:
            parts["gradient"] = op.MatMul(_rows_out(op, layer, g), a)
        for part, values in parts.items():
            self._after(part, layer, op.Add(self._before(part, layer, 0.0), values))

    def _before(self, part: str, layer: Layer, start: float) -> gs.Tensor:
        name = _name(part, layer)
        tensor = gs.Variable(name, np.float64, None)
        self._op.graph.inputs.append(tensor)
        self.start[name] = np.array(start)
        return tensor

    def _after(self, part: str, layer: Layer, values: gs.Tensor) -> None:
        name = _name(part, layer)
        self._op.graph.outputs.append(_typed(self._op.rename(values, f"{name}/new")))
        self.new[name] = values.name


def _name(part: str, layer: Layer) -> str:
    return f"ecp/{part}/{layer.name}"


def _typed(tensor: gs.Tensor) -> gs.Tensor:
    tensor.dtype = np.float64
    return tensor


# Rows as the layers cut them out, but with the taps of a Conv varying slowest within a row.


def _rows_in(op: Builder, layer: Layer, a: gs.Tensor, tensors: Mapping[str, gs.Tensor]) -> Any:
    """The layer's input, in float64, as (groups, rows, in)."""
    if isinstance(layer, Conv):
        return _patches(op, layer, a, tensors[layer.output])
    if isinstance(layer, Batched):
        return _of_batch(op, layer, a)
    assert isinstance(layer, Dense), "there are no other kinds"
    if layer.axis == -2:
        a = _swapped(op, a, len(op.facts[layer.input].shape))
    return op.Reshape(a, [1, -1, layer.shape[1]])


def _rows_out(op: Builder, layer: Layer, g: gs.Tensor) -> Any:
    """Values (P, *shape of z) as (P, groups, out per group, rows)."""
    out, groups = layer.shape[0], layer.groups
    if isinstance(layer, Conv):
        maps = op.Reshape(g, [0, 0, groups, out // groups, -1])
        by_unit = op.Transpose(maps, perm=[0, 2, 3, 1, 4])
        return op.Reshape(by_unit, [0, groups, out // groups, -1])
    rank = 1 + len(op.facts[layer.output].shape)
    if isinstance(layer, Batched):
        last = [rank - 1, rank - 2] if layer.axis == -1 else [rank - 2, rank - 1]
        front = op.Transpose(g, perm=[0, rank - 3, last[0], *range(1, rank - 3), last[1]])
        return op.Reshape(front, [0, groups, out // groups, -1])
    assert isinstance(layer, Dense), "there are no other kinds"
    if layer.axis == -2 and not isinstance(layer, Dot):
        g = _swapped(op, g, rank)
    return op.Transpose(op.Reshape(g, [0, 1, -1, out]), perm=[0, 1, 3, 2])


def _of_batch(op: Builder, layer: Batched, a: gs.Tensor) -> Any:
    """(..., groups or 1, rows, in) as (groups, rows, in)."""
    shape = op.facts[layer.input].shape
    rank = len(shape)
    last = [rank - 2, rank - 1] if layer.axis == -1 else [rank - 1, rank - 2]
    front = op.Transpose(a, perm=[rank - 3, *range(rank - 3), *last])
    rows = op.Reshape(front, [shape[-3], -1, layer.shape[1]])
    return op.Expand(rows, [layer.groups, 1, 1]) if shape[-3] == 1 else rows


def _swapped(op: Builder, x: gs.Tensor, rank: int) -> Any:
    """The last two axes exchanged."""
    return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])


def _patches(op: Builder, layer: Conv, a: gs.Tensor, z: gs.Tensor) -> Any:
    """Patches (groups, samples * positions, taps * channels) of images (samples, channels, ...).

    Sizes are those of the run: cells of the padded image are numbered, and those that a position
    sees at every tap are gathered.
    """
    own, rank = layer.window, len(layer.window.kernel)
    window = Window(own.kernel, own.strides, own.dilations)
    attrs = {"auto_pad": own.auto_pad, "pads": [begin for begin, _ in own.pads]}
    covered = window.covered(op, op.Shape(z, start=2))
    begin, end = margins(op, attrs, op.Sub(covered, op.Shape(a, start=2)), rank)
    padded = pad_spatial(op, a, begin, end, rank)
    sizes = [op.Shape(padded, start=2 + d, end=3 + d) for d in range(rank)]

    def numbers(coordinates: Sequence[Any]) -> Any:
        """Of the cells on a grid with these coordinates along its axes, (cells,)."""
        cells = coordinates[0]
        for along, size in zip(coordinates[1:], sizes[1:], strict=True):
            cells = op.Add(op.Mul(op.Unsqueeze(cells, [-1]), size), along)
        return op.Reshape(cells, [-1])

    counts = [op.Squeeze(op.Shape(z, start=2 + d, end=3 + d)) for d in range(rank)]
    starts = numbers([
        op.Mul(op.Range(op.const(0), n, op.const(1)), stride)
        for n, stride in zip(counts, own.strides, strict=True)
    ])  # fmt: skip
    taps = numbers([
        op.const(np.arange(size) * step)
        for size, step in zip(own.kernel, own.dilations, strict=True)
    ])  # fmt: skip
    seen = op.Add(op.Unsqueeze(starts, [1]), taps)
    images = op.Reshape(padded, [0, layer.groups, layer.reduction, -1])
    cells = op.Transpose(images, perm=[1, 0, 3, 2])
    return op.Reshape(op.Gather(cells, seen, axis=2), [layer.groups, -1, layer.shape[1]])
