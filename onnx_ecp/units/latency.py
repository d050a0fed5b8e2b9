"""What units cost in time, on this machine: layers timed alone, and whole models against whole.

Every layer that may lose rows or columns is timed alone at a few of its sizes, with made-up values;
between them its time is interpolated. The table ranks units and says about where a target lies: it
knows nothing of what stands between layers. Whether a model is fast enough the clock says, in runs
of both models in turns. How fast a model is depends on its sizes and not on its values, so units
can be chosen by the clock before anything is refitted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.data.calibration import Batch
from onnx_ecp.evaluation.latency import measure_latency
from onnx_ecp.graph import Model
from onnx_ecp.graph.shapes import Shapes, shapes_of_a_run
from onnx_ecp.layers import Layer
from onnx_ecp.layers.trace import Traced, main_scope
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.runtime.session import Session
from onnx_ecp.units.choice import NOTHING
from onnx_ecp.units.cutting import cut
from onnx_ecp.units.groups import Group, Structure, with_layers

Settings = Mapping[str, Any]
# Seconds that one run of a model alone takes.
Clock = Callable[[onnx.ModelProto, Mapping[str, np.ndarray]], float]

# Kernels are laid out for so many channels, or twice as many: a number in between takes as long as
# the next multiple, or longer (docs/benchmarks/latency-of-units.md).
BLOCK = 8
# Sizes of either axis at which a layer is timed.
SIZES = 8
# A layer alone is run so often, and for so many seconds, at least.
RUNS, SECONDS = 7, 0.005
# Whole models are compared for so many turns, and seconds, at least, while units are chosen.
TURNS, PATIENCE = 30, 0.5


def liked(group: Group, block: int = BLOCK) -> np.ndarray:
    """(k,): numbers of units that kernels like: whole blocks of entries, below that 1, 2, 4, ...

    Of dimensions of heads, of which every layer has many, all numbers.
    """
    number, step = len(group.units), block // math.gcd(block, group.entries)
    if group.inside:
        return np.arange(1, number + 1)
    found = [*(n for n in (1, 2, 4, 8) if n < step), *range(step, number, step), number]
    return np.unique([size for size in found if size <= number])


@dataclass(frozen=True)
class Times:
    """Seconds that one layer takes: a ``Price``.

    Args:
        rows: (k,) ascending numbers of rows.
        columns: (m,) ascending numbers of columns.
        seconds: (k, m), what a layer of that size takes.
    """

    rows: np.ndarray
    columns: np.ndarray
    seconds: np.ndarray

    @staticmethod
    def of_table(rows: np.ndarray, columns: np.ndarray, seconds: np.ndarray) -> Times:
        """A table in which nothing smaller takes longer: the larger one could be had instead."""
        for axis in (0, 1):
            seconds = np.flip(np.minimum.accumulate(np.flip(seconds, axis), axis), axis)
        return Times(rows, columns, seconds)

    def of(self, rows: int, columns: int) -> float:
        """Seconds of the layer, interpolated."""
        return float(np.interp(rows, self.rows, self._over_rows(columns)))

    def of_row(self, rows: int, columns: int) -> float:
        """Seconds that a row less saves, on the way to the smallest layer."""
        return _slope(rows, self.rows, self._over_rows(columns))

    def of_column(self, rows: int, columns: int) -> float:
        """Seconds that a column less saves, on the way to the smallest layer."""
        over_columns = np.array([np.interp(rows, self.rows, t) for t in self.seconds.T])
        return _slope(columns, self.columns, over_columns)

    def _over_rows(self, columns: int) -> np.ndarray:
        return np.array([np.interp(columns, self.columns, t) for t in self.seconds])


def _slope(size: int, sizes: np.ndarray, seconds: np.ndarray) -> float:
    saved = np.interp(size, sizes, seconds) - seconds[0]
    return float(max(saved, NOTHING) / max(size - sizes[0], 1))


@dataclass(frozen=True)
class Watch:
    """Times layers of a model, and the model without some of its units.

    Args:
        model: dense; what others are compared with.
        structure: its units.
        layers: those of the structure.
        batch: what whole models are fed.
        few: batches of one and of two samples; they tell shapes.
        settings: of the ``Session``.
        clock: times one layer; None for ONNX Runtime's.
        progress: called as layers are timed.
    """

    model: Model
    structure: Structure
    layers: Sequence[Layer]
    batch: Batch
    few: tuple[Batch, Batch]
    settings: Settings
    clock: Clock | None = None
    progress: Progress = silent
    _ratios: dict[tuple[int, ...], float] = field(default_factory=dict)

    @cached_property
    def times(self) -> dict[str, Times]:
        """By name, the table of every layer that may lose rows or columns."""
        shapes, known = self._shapes(), dict[bytes, float]()
        clock = self.clock or (lambda model, feeds: _seconds(model, feeds, self.settings))

        def seconds(single: Alone, rows: int, columns: int) -> float:
            model, x = single.resized(rows, columns)
            key = model.SerializeToString()  # layers of one shape are timed once
            if key not in known:
                known[key] = clock(model, {"x": x})
            return known[key]

        scope, found = main_scope(self.model.proto), dict[str, Times]()
        counts = self.structure.counts
        for node, layer in with_layers(scope, self.layers):
            if layer is None:
                continue
            self.progress("timing layers", len(found), len(self.layers))
            rows = _sizes(self.structure.rows[layer.name])
            columns = _sizes(self.structure.columns[layer.name])
            if len(rows) > 1 or len(columns) > 1:
                stored = scope.trace(node.inputs[layer.weight_axes(node)[0]])
                assert isinstance(stored, Traced), "the weight of a layer is stored"
                single = Alone(
                    layer,
                    node,
                    self.model.proto,
                    stored.seen_shape,
                    shapes[layer.input],
                    any(c.kind == "group" and c.node == node.outputs[0].name for c in counts),
                )
                table = [[seconds(single, r, c) for c in columns.tolist()] for r in rows.tolist()]
                found[layer.name] = Times.of_table(rows, columns, np.array(table))
        return found

    def ratio(self, keep: np.ndarray) -> float:
        """Measured latency with the units ``keep`` (units,) bool, as a share of that of all."""
        sizes = tuple(int(keep[group.units].sum()) for group in self.structure.groups)
        if sizes not in self._ratios:
            proto = cut(self.model.proto, self.structure, keep, self.model.base)
            smaller = Model(proto, None, self.model.base)
            latency = measure_latency(
                self.model, smaller, self.batch, turns=TURNS, seconds=PATIENCE, **self.settings
            )
            self._ratios[sizes] = latency.ratio
        return self._ratios[sizes]

    def _shapes(self) -> Shapes:
        """Shapes of all tensors in a run of the batch, which is too large to look at them all."""
        one, two = (shapes_of_a_run(self.model, b.feeds, **self.settings) for b in self.few)
        more = self.batch.samples - self.few[0].samples
        return {
            name: tuple(a + more * (b - a) for a, b in zip(one[name], two[name], strict=True))
            for name in one
        }


def _sizes(units: np.ndarray) -> np.ndarray:
    """(k,): numbers of entries of an axis, of these units (length,), at which a layer is timed."""
    movable = units[units >= 0]
    number = len(np.unique(movable))
    if not number:
        return np.array([len(units)])
    sizes = liked(Group((), (), np.arange(number), 1))
    chosen = np.unique(np.linspace(0, len(sizes) - 1, SIZES).round().astype(int))
    return len(units) - len(movable) + sizes[chosen] * len(movable) // number


@dataclass(frozen=True)
class Alone:
    """A layer as a model of its own, of made-up weights, in any size.

    Args:
        layer: it has units as rows or columns.
        node: of the layer.
        proto: the model in which it was found.
        weight: shape of the weight as the operator sees it.
        read: shape of what the layer reads.
        by_group: whether rows go with the group of channels that they read.
    """

    layer: Layer
    node: gs.Node
    proto: onnx.ModelProto
    weight: tuple[int, ...]
    read: tuple[int, ...]
    by_group: bool = False

    def resized(self, rows: int, columns: int) -> tuple[onnx.ModelProto, np.ndarray]:
        """The model with so many rows and columns of W, and its input."""
        layer, weight, read = self.layer, list(self.weight), list(self.read)
        index, (row_axis, column_axis) = layer.weight_axes(self.node)
        per_channel = layer.shape[1] // weight[column_axis]
        beside = layer.groups if layer.groups_side_by_side else 1
        if not layer.makes_number:
            weight[row_axis] = rows * beside // layer.groups
        weight[column_axis] = columns // per_channel
        attributes = dict(self.node.attrs)
        if self.by_group:
            read[1] = read[1] * rows // layer.shape[0]
            attributes["group"] = layer.groups * rows // layer.shape[0]
        else:
            read[layer.units_axis] = weight[column_axis] * beside
        dtype = onnx.helper.tensor_dtype_to_np_dtype(layer.dtype)
        stored = {"w": np.full(weight, 1 / columns, dtype)}
        if len(self.node.inputs) > 2 and self.node.inputs[2].name:
            stored["b"] = np.ones(rows, dtype)
        names = ["x", *stored] if index else ["w", "x"]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(layer.op, names, ["y"], domain=self.node.domain, **attributes)],
            "layer",
            [onnx.helper.make_tensor_value_info("x", layer.dtype, read)],
            [onnx.helper.make_tensor_value_info("y", layer.dtype, None)],
            [onnx.numpy_helper.from_array(values, name) for name, values in stored.items()],
        )
        versions = {
            "opset_imports": self.proto.opset_import,
            "ir_version": self.proto.ir_version,
        }
        return onnx.helper.make_model(graph, **versions), np.ones(read, dtype)


def _seconds(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], settings: Settings) -> float:
    """Of one run: the least of several."""
    session = Session(model, **settings)
    session.seconds(feeds)  # the first one allocates
    taken, began = list[float](), time.monotonic()
    while len(taken) < RUNS or time.monotonic() - began < SECONDS:
        taken.append(session.seconds(feeds))
    return min(taken)
