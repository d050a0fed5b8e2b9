"""Visit the layers in graph order, each with the input that a version of the network gives it.

The refit of a layer needs its input in the current, partly pruned network (whatever was refitted
before it included) and in the original one. The observation graph is cut in front of every layer;
the live tensors between two cuts are kept for all samples, so that a walk costs one forward pass,
however many layers there are. Those that do not fit in memory wait in a temporary file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnx_ecp.data.calibration import Batch
from onnx_ecp.layers import Layer
from onnx_ecp.runtime.lazy import Spill
from onnx_ecp.runtime.session import Openings, Session
from onnx_ecp.statistics.observer import Observer, State


@dataclass(frozen=True)
class Segment:
    """The part of the graph between the cut in front of the layer before and this layer's.

    Args:
        layer: the layer whose input the segment ends with.
        part: what it runs; None where an earlier segment has computed that input already.
        openings: opens it.
        drops: live tensors that nothing reads after this segment.
    """

    layer: Layer
    part: onnx.ModelProto | None
    openings: Openings
    drops: frozenset[str]

    @property
    def session(self) -> Session | None:
        """Its session, which may be opened for this."""
        return None if self.part is None else self.openings.session(self.part)


def segments(
    observer: Observer, layers: Sequence[Layer], *, in_order: bool = False
) -> list[Segment]:
    """Cut the observation graph in front of every one of these layers, in graph order.

    With ``in_order`` they are taken as they come, which is to be an order of some graph of theirs.
    """
    proto = observer.proto
    nodes = list(proto.graph.node)
    producer = {y: i for i, node in enumerate(nodes) for y in node.output if y}
    depth = {layer.name: _last(producer, layer.output) for layer in layers}
    ordered = sorted(layers, key=lambda layer: 0 if in_order else depth[layer.name])
    done: set[int] = set()
    parts: list[list[int]] = []
    for layer in ordered:
        parts.append(sorted(_ancestors(nodes, producer, layer.input, done)))
        done.update(parts[-1])
    reads = [
        set().union({layer.input}, *(_reads(nodes[i]) for i in part))
        for layer, part in zip(ordered, parts, strict=True)
    ]
    found, produced = [], set()
    openings = Openings(observer.session)
    for k, (layer, part) in enumerate(zip(ordered, parts, strict=True)):
        later = set().union(*reads[k + 1 :])
        made = {y for i in part for y in nodes[i].output if y}
        produced |= made
        model = None
        if part:
            outputs = made & (later | {layer.input})
            model = _part(observer, [nodes[i] for i in part], outputs)
        found.append(Segment(layer, model, openings, frozenset(produced - later)))
        produced &= later
    return found


class ForwardPass:
    """One version of the network on its way through the segments.

    Args:
        observer: whose graph was cut.
        batches: the samples.
        limit: bytes that live tensors may take in memory, None for any number.
    """

    def __init__(
        self, observer: Observer, batches: Sequence[Batch], limit: int | None = None
    ) -> None:
        self._observer = observer
        self._inputs = [observer.input_feeds(batch.feeds) for batch in batches]
        self._live = Spill(limit)  # by index of the batch and name of the tensor

    def advance(
        self, segment: Segment, state: State, at: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Run one segment and yield the layer's input rows (groups, rows, in) batch by batch.

        Segments must be taken in order, each to its end.

        Args:
            segment: the next one.
            state: weights and shifts of all layers before the segment's end.
            at: numbers of the rows that are wanted, counted over all batches; None for all.
        """
        layer, first = segment.layer, 0
        session, wanted = segment.session, segment.layer.input
        reads = () if session is None else session.inputs
        constants: Mapping[str, Any] = self._observer.state_feeds(state, frozenset(reads))
        if session is not None:
            constants = session.placed(constants)
        for index, inputs in enumerate(self._inputs):

            def live(name: str, at: int = index, fed: Mapping[str, np.ndarray] = inputs) -> Any:
                return fed[name] if name in fed else self._live[at, name]

            made: dict[str, np.ndarray] = {}
            if session is not None:
                made = session.run({n: constants[n] if n in constants else live(n) for n in reads})
            a = made[wanted] if wanted in made else live(wanted)
            if at is None:
                yield layer.rows_in(a)
            else:
                end = first + layer.count_rows(a)
                yield layer.some_rows_in(a, at[slice(*np.searchsorted(at, (first, end)))] - first)
                first = end
            for name in made.keys() - segment.drops:
                self._live[index, name] = made[name]
            for name in segment.drops - made.keys():
                self._live.pop((index, name), None)


def _last(producer: Mapping[str, int], name: str) -> int:
    return producer.get(name, -1)


def _ancestors(
    nodes: Sequence[onnx.NodeProto], producer: Mapping[str, int], name: str, done: set[int]
) -> set[int]:
    """Indices of the nodes that a tensor needs and that are not done yet."""
    found: set[int] = set()
    open_names = [name]
    while open_names:
        index = producer.get(open_names.pop())
        if index is not None and index not in done and index not in found:
            found.add(index)
            open_names.extend(_reads(nodes[index]))
    return found


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those of the graph around its bodies included."""
    names = {x for x in node.input if x}
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            inside = {y for n in body.node for y in n.output} | {x.name for x in body.input}
            inside |= {t.name for t in body.initializer}
            read = set().union(*(_reads(n) for n in body.node), {y.name for y in body.output})
            names |= read - inside
    return names


def _part(
    observer: Observer, nodes: Sequence[onnx.NodeProto], outputs: set[str]
) -> onnx.ModelProto:
    """A model of these nodes; what they read from outside becomes its input."""
    proto = observer.proto
    part = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    graph = part.graph
    graph.name = "segment"
    graph.node.extend(nodes)
    made = {y for node in nodes for y in node.output}
    read = set().union(*(_reads(node) for node in nodes)) - made
    stored = [t for t in proto.graph.initializer if t.name in read]
    graph.initializer.extend(stored)
    for name in sorted(read - {t.name for t in stored}):
        kind = onnx.helper.np_dtype_to_tensor_dtype(observer.facts[name].dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(outputs))
    return part
