"""Give a model with a fixed batch of one a free batch axis, in a private copy, with proof.

Exporters write the batch of one into the signature and into constants: the shapes of Reshape, the
sizes of Resize, a class token or a first hidden state that is joined with what depends on the
inputs. Axes are followed from the inputs through the shapes of one run. Whether the copy computes
sample by sample what the model computes is no matter of rules: both are run and compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_ecp.errors import OnnxEcpError
from onnx_ecp.graph.inlining import has_bodies, inline
from onnx_ecp.graph.proto import Model, constants, subgraphs
from onnx_ecp.graph.shapes import values_of_a_run
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.session import Session

# What sums in another order may change, relative to the norm of an output of one sample.
ROUNDING = 1e-4
# How many samples are put together for the proof: enough for any one to feel two others.
PROBED = 3
Shape = tuple[int, ...]
Feeds = Mapping[str, np.ndarray]

# Operators whose result has the batch axis of their first input where it was, whatever the rank.
_RECURRENT = ("GRU", "LSTM", "RNN")
# Names of what is added to the private copy.
_BATCH = "ecp/batch"


class _Mixed(Exception):
    """A node that puts samples together, as far as axes tell."""


def free_batch(
    model: Model,
    samples: Sequence[Feeds],
    names: Iterable[str],
    others: Sequence[Feeds] = (),
    **settings: Any,
) -> onnx.ModelProto | None:
    """A copy of a model that takes several samples at once; None where there is no such copy.

    Args:
        model: its sparse initializers must be decoded.
        samples: what the model takes for each of some samples; two or more that differ.
        names: of inputs whose first axis, of size one, is the batch; the others are the same for
            all samples.
        others: samples of other shapes, each looked at alone.
        settings: of the ``Session``.

    Raises:
        ProviderError: the time limit is over.
    """
    batched = frozenset(names)
    try:
        copy = _freed(model, samples[0], batched, settings)
        groups = [samples, *([other] for other in others)]
        same = all(_agrees(model, copy, group, batched, settings) for group in groups)
        return copy if same else None
    except (_Mixed, OnnxEcpError, MemoryError):
        check_deadline()
        return None


def _agrees(
    model: Model,
    copy: onnx.ModelProto,
    samples: Sequence[Feeds],
    batched: frozenset[str],
    settings: Mapping[str, Any],
) -> bool:
    """Whether outputs of the stacked samples are, one after another, those of single samples."""
    single = Session(model.proto, base=model.base, **settings)
    together = Session(copy, base=model.base, **settings).run(stacked(samples, batched))
    for number, sample in enumerate(samples):
        for name, alone in single.run(sample).items():
            whole = together[name]
            if not isinstance(alone, np.ndarray) or whole.shape != (len(samples), *alone.shape[1:]):
                return False
            if not _same(whole[number : number + 1], alone):
                return False
    return True


def stacked(samples: Sequence[Feeds], batched: Iterable[str]) -> dict[str, np.ndarray]:
    """Join the named inputs of several samples; the others are those of the first."""
    joined = {name: np.concatenate([sample[name] for sample in samples]) for name in batched}
    return {**samples[0], **joined}


def _same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal; floating-point numbers to rounding."""
    if found.shape != wanted.shape:
        return False
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(found, wanted))
    x, y = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(finite, np.isfinite(x)):
        return False
    gap, size = np.linalg.norm(x[finite] - y[finite]), np.linalg.norm(y[finite])
    # Half precision rounds at 5e-4; its products are sums of such numbers.
    allowed = ROUNDING if wanted.dtype.itemsize >= 4 else 10 * float(np.finfo(wanted.dtype).eps)
    return bool(gap <= allowed * size + np.finfo(np.float32).tiny)


def _freed(
    model: Model, sample: Feeds, batched: frozenset[str], settings: Mapping[str, Any]
) -> onnx.ModelProto:
    """The copy, not yet proven."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model.proto)
    if has_bodies(copy):
        inline(copy)
    # Before IR 4 initializers are listed as inputs, which new ones are not.
    copy.ir_version = max(copy.ir_version, 4)
    fed = [value for value in copy.graph.input if value.name in sample]
    del copy.graph.input[:]
    copy.graph.input.extend(fed)
    values = values_of_a_run(Model(copy, None, model.base), sample, **settings)
    _Freeing(copy, {name: np.shape(v) for name, v in values.items()}, batched).apply()
    graph = copy.graph
    del graph.value_info[:]
    for value in graph.input:
        if value.name in batched and value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.dim[0].dim_param = _BATCH
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    return copy


class _Freeing:
    """Follows the batch axis through the nodes of a graph and edits constants on the way.

    Args:
        proto: our own copy, whose nodes are sorted.
        shapes: of all tensors that are fed or computed, in a run of one sample.
        batched: inputs whose first axis is the batch.
    """

    def __init__(
        self, proto: onnx.ModelProto, shapes: Mapping[str, Shape], batched: frozenset[str]
    ) -> None:
        self._graph = proto.graph
        self._stored = constants(proto)
        self._shapes = {n: tuple(t.dims) for n, t in self._stored.items()} | dict(shapes)
        self._axes: dict[str, int] = dict.fromkeys(batched, 0)  # by tensor that depends on a batch
        self._source = next(iter(sorted(batched)))
        self._nodes: list[onnx.NodeProto] = []  # what the graph will have
        self._made = 0

    def apply(self) -> None:
        """Replace the nodes of the graph by those that bear any batch.

        Raises:
            _Mixed: a node puts samples together.
        """
        for node in list(self._graph.node):
            carried = [x for x in node.input if x in self._axes]
            inside = {x for body in subgraphs(node) for n in body.node for x in n.input}
            if inside & self._axes.keys():
                raise _Mixed(node.op_type)
            new = onnx.NodeProto()
            new.CopyFrom(node)
            if carried:
                self._follow(new)
            self._nodes.append(new)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)

    def _follow(self, node: onnx.NodeProto) -> None:
        """Note the axes of what a node makes of batches, and edit its constants."""
        if node.op_type in ("Shape", "Size"):
            return  # sizes of the run: they need no edit
        place = getattr(self, f"_{node.op_type.lower()}", None)
        if node.op_type in _RECURRENT:
            place = self._recurrent
        axes = place(node) if place is not None else [self._kept(node, y) for y in node.output]
        for name, axis in zip(node.output, axes, strict=False):
            shape = self._shapes.get(name)
            if name and (shape is None or axis is None or not 0 <= axis < len(shape)):
                raise _Mixed(node.op_type)
            if name:
                self._axes[name] = axis

    def _kept(self, node: onnx.NodeProto, output: str) -> int | None:
        """The axis as broadcasting places it: counted from behind where ranks differ."""
        rank = len(self._shapes.get(output, ()))
        name = next(x for x in node.input if x in self._axes)
        own = len(self._shapes[name])
        axis = self._axes[name]
        return axis + rank - own if rank >= own else axis

    def _flatten(self, node: onnx.NodeProto) -> list[int | None]:
        return [self._regrouped(node.input[0], node.output[0])]

    def _reshape(self, node: onnx.NodeProto) -> list[int | None]:
        data, wanted = node.input[0], node.input[1] if len(node.input) > 1 else ""
        if data not in self._axes:
            return [None]  # its shape is computed from a batch: no rule for that
        axis = self._regrouped(data, node.output[0])
        if axis is not None and wanted in self._stored:
            target = numpy_helper.to_array(self._stored[wanted]).astype(np.int64)
            node.input[1] = self._constant(self._target(node, data, axis, target))
        return [axis]

    def _target(self, node: onnx.NodeProto, data: str, axis: int, old: np.ndarray) -> np.ndarray:
        """The shape of a Reshape with the batch left open."""
        new = old.copy()
        if new[axis] == -1:
            return new
        zero_is_zero = any(a.name == "allowzero" and a.i for a in node.attribute)
        copies = self._axes[data] == axis and not zero_is_zero
        if copies and self._shapes[data][axis] == self._shapes[node.output[0]][axis]:
            new[axis] = 0
            return new
        # Only one size may be open: whatever was is that of the run.
        sizes = np.array(self._shapes[node.output[0]], np.int64)
        new = np.where(new == -1, sizes, new)
        new[axis] = -1
        return np.asarray(new)

    def _regrouped(self, data: str, output: str) -> int | None:
        """Where the batch is after elements were regrouped in their order."""
        before, after = self._shapes[data], self._shapes.get(output, ())
        outer = math.prod(before[: self._axes[data]])
        found = (k for k in range(len(after)) if math.prod(after[:k]) == outer)
        return next(found, None)

    def _transpose(self, node: onnx.NodeProto) -> list[int | None]:
        rank = len(self._shapes[node.input[0]])
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        perm = perm or list(reversed(range(rank)))
        return [perm.index(self._axes[node.input[0]])]

    def _unsqueeze(self, node: onnx.NodeProto) -> list[int | None]:
        return [self._regrouped(node.input[0], node.output[0])]

    def _squeeze(self, node: onnx.NodeProto) -> list[int | None]:
        if self._axes[node.input[0]] in self._removed(node):
            raise _Mixed(node.op_type)
        return [self._shifted(node)]

    def _reduce(self, node: onnx.NodeProto) -> list[int | None]:
        before, after = self._shapes[node.input[0]], self._shapes[node.output[0]]
        return [self._axes[node.input[0]] if len(before) == len(after) else self._shifted(node)]

    _reducemean = _reducesum = _reducemax = _reducemin = _reducel2 = _reducel1 = _reduce
    _reduceprod = _reducelogsumexp = _reducesumsquare = _argmax = _argmin = _reduce

    def _shifted(self, node: onnx.NodeProto) -> int:
        axis = self._axes[node.input[0]]
        return axis - sum(gone < axis for gone in self._removed(node))

    def _removed(self, node: onnx.NodeProto) -> list[int]:
        """The axes that a node takes away, not negative."""
        shape = self._shapes[node.input[0]]
        given: Sequence[int] | None = None
        for attribute in node.attribute:
            if attribute.name in ("axes", "axis"):
                given = list(attribute.ints) or [attribute.i]
        if given is None and len(node.input) > 1 and node.input[1] in self._stored:
            given = numpy_helper.to_array(self._stored[node.input[1]]).reshape(-1).tolist()
        if given is None:  # all; of a Squeeze those of size one, the batch among them
            raise _Mixed(node.op_type)
        return [int(axis) % len(shape) for axis in given]

    def _gather(self, node: onnx.NodeProto) -> list[int | None]:
        data, indices = node.input[:2]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        rank = len(self._shapes[data])
        axis %= rank
        if data not in self._axes:  # rows of a table, such as an embedding
            return [axis + self._axes[indices]]
        if indices in self._axes or axis == self._axes[data]:
            raise _Mixed(node.op_type)
        own, more = self._axes[data], len(self._shapes[indices]) - 1
        return [own if own < axis else own + more]

    def _recurrent(self, node: onnx.NodeProto) -> list[int | None]:
        if self._axes.get(node.input[0]) != 1:  # and layout 0: sequence, batch, size
            raise _Mixed(node.op_type)
        for number in (5, 6):  # the first hidden state and, of an LSTM, the first cell state
            if len(node.input) > number and node.input[number]:
                node.input[number] = self._expanded(node.input[number], 1)
        return [2, 1, 1]

    def _concat(self, node: onnx.NodeProto) -> list[int | None]:
        along = next((a.i for a in node.attribute if a.name == "axis"), 0)
        rank = len(self._shapes[node.output[0]])
        axis = next(self._axes[x] for x in node.input if x in self._axes)
        if along % rank == axis:
            raise _Mixed(node.op_type)
        for number, name in enumerate(node.input):
            node.input[number] = self._expanded(name, axis)
        return [axis]

    def _resize(self, node: onnx.NodeProto) -> list[int | None]:
        sizes = node.input[3] if len(node.input) > 3 else ""
        if sizes in self._stored:
            given = numpy_helper.to_array(self._stored[sizes])
            if len(given) == len(self._shapes[node.input[0]]):  # with `axes` it may be fewer
                node.input[3] = self._sizes(given, self._axes[node.input[0]])
        return [self._axes[node.input[0]]]

    def _expanded(self, name: str, axis: int) -> str:
        """A tensor that is the same for all samples, once for each of them."""
        if name in self._axes:
            return name
        shape = self._shapes.get(name)
        if shape is None or len(shape) <= axis or shape[axis] != 1:
            raise _Mixed(name)
        sizes = self._sizes(np.ones(len(shape), np.int64), axis)
        return self._node("Expand", [name, sizes])

    def _sizes(self, given: np.ndarray, axis: int) -> str:
        """Sizes (rank,) with the number of samples on one axis."""
        ends = [self._constant(given[:axis]), self._batch(), self._constant(given[axis + 1 :])]
        return self._node("Concat", ends, axis=0)

    def _batch(self) -> str:
        """The number of samples (1,) int64, read off an input."""
        shape = self._node("Shape", [self._source])
        return self._node("Gather", [shape, self._constant(np.zeros(1, np.int64))], axis=0)

    def _node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        output = self._fresh()
        self._nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def _constant(self, values: np.ndarray) -> str:
        name = self._fresh()
        tensor = numpy_helper.from_array(values.astype(np.int64), name)
        self._graph.initializer.append(tensor)
        return name

    def _fresh(self) -> str:
        self._made += 1
        return f"{_BATCH}/{self._made}"
