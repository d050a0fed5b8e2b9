"""The sums of ``statistics.Moments`` as nodes behind the adjoints: nothing large leaves the graph.

Accumulators are graph inputs, their new values graph outputs, so sums of batches add up wherever
the graph is run. Rows are those of ``rows_in_graph`` and ``rows_out_graph``, sums those of
``statistics.expand``, in float64. The constant c that activations are centred about is the mean of
the first batch; as long as there is none it is NaN. What goes in at first are scalars, which
broadcast.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.graph.builder import Builder, Fact
from onnx_ecp.graph.surgery import export_graph, import_graph
from onnx_ecp.layers import Layer
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
            s = layer.rows_out_graph(op, op.ReduceSumSquare(g, [0], keepdims=1))
            mean = op.rename(op.ReduceMean(s, [2], keepdims=0), f"ecp/weights/{layer.name}")
            graph.outputs.append(_typed(mean))
            weights[layer.name] = mean.name
        if layer.name in summed:
            wide = op.cast(tensors[layer.input], np.float64)
            a = layer.rows_in_graph(op, wide, tensors[layer.output])
            sums.of(layer, a, s, g if with_gradient else None, with_squares=with_squares)
    model = export_graph(graph)
    model.ir_version = proto.ir_version
    return model, Accumulation(weights, sums.start, sums.new)


def moments(layer: Layer, sums: Mapping[str, np.ndarray], samples: int) -> Moments:
    """The moments of one layer from the values of its accumulators, by the names of the inputs."""
    out, width = layer.shape
    order = layer.graph_order()

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
            parts["gradient"] = op.MatMul(layer.rows_out_graph(op, g), a)
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
