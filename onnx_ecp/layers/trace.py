"""From an operator's input back to the stored tensor behind it, and from there to all readers.

A stored tensor is an initializer or a Constant node. Between it and the operator may stand views:
nodes that only move, reshape or convert values. Values are never loaded, but for the few integers
that say how a view reshapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.inference import inferred
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import UNSHIFTED
from onnx_ecp.graph.surgery import import_graph
from onnx_ecp.layers import views
from onnx_ecp.layers.layer import Skip, Step, Weight
from onnx_ecp.layers.versions import once

FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)
# The integers of a view (a target shape, axes) are few; anything longer is something else.
_MOST_INTEGERS = 64


@dataclass(frozen=True)
class Traced:
    """A stored tensor as one operator input sees it.

    Args:
        tensor: name under which it is stored.
        shape: shape of the stored tensor.
        dtype: ONNX element type of the stored tensor.
        steps: from the stored tensor to what the operator sees.
        seen_shape: the shape that the operator sees.
        seen_dtype: the element type that the operator sees.
        direct: whether nothing stands between the stored tensor and the operator.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: int
    steps: tuple[Step, ...]
    seen_shape: tuple[int, ...]
    seen_dtype: int
    direct: bool

    def weight(self, *steps: Step, scale: float = 1.0) -> Weight:
        """The matrix that ``steps`` make of what the operator sees."""
        steps = views.simplify(self.shape, (*self.steps, *steps))
        return Weight(self.tensor, self.shape, self.dtype, steps, scale)

    def view(self, stored: np.ndarray) -> np.ndarray:
        """The values that the operator sees."""
        for step in self.steps:
            stored = step.forward(stored)
        return stored


@dataclass(frozen=True)
class Scope:
    """One graph, and what is needed to follow its tensors.

    Args:
        proto: the whole model.
        graph: the main graph, the body of a control-flow node, or the body of a local function.
        names: unique names for the user, by ``id`` of the node, for all graphs of the model.
        constants: tensors of this graph and the outer ones that depend on stored tensors only.
        bound: what a call passes for the inputs of a local function, where that is stored.
        refusal: why no layer of this graph is pruned; empty for the main graph.
    """

    proto: onnx.ModelProto
    graph: gs.Graph
    names: Mapping[int, str]
    constants: frozenset[str]
    bound: Mapping[str, gs.Constant] = field(default_factory=dict)
    refusal: str = ""

    def skip(self, node: gs.Node, reason: str) -> Skip:
        """The refusal of one node."""
        return Skip(self.names[id(node)], node.op, reason)

    def operands(self, node: gs.Node) -> tuple[gs.Tensor, gs.Tensor]:
        """The first two inputs of a node, which it must have.

        Raises:
            ModelError: it has not; nobody checks operators outside the standard domain.
        """
        if len(node.inputs) < 2 or not node.outputs:
            raise ModelError(
                f"node {printable(self.names[id(node)])!r} lacks an operand of {node.op}.",
                hint="The model is damaged: export or download it again.",
            )
        return node.inputs[0], node.inputs[1]

    def stored(self, tensor: gs.Tensor) -> gs.Constant | None:
        """The stored tensor of this very name, unread."""
        if isinstance(tensor, gs.Constant):
            return tensor
        if tensor.name in self.bound:
            return self.bound[tensor.name]
        if tensor.inputs and tensor.inputs[0].op == "Constant":
            return _constant_of(tensor.inputs[0])
        return None

    def is_constant(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor depends on stored tensors only."""
        return tensor.name in self.constants or self.stored(tensor) is not None

    def is_of_shapes(self, tensor: gs.Tensor) -> bool:
        """Whether of the model's inputs only the shapes matter to the tensor: places, for one."""
        return tensor.name in self._of_shapes

    def trace(self, tensor: gs.Tensor) -> Traced | str | None:
        """What is stored behind an operator's input.

        Returns:
            None where the tensor depends on the model's inputs; where it is constant but cannot
            be edited, the reason.
        """
        passed: list[gs.Node] = []
        while (stored := self.stored(tensor)) is None:
            if tensor.name not in self.constants:
                return None
            node = tensor.inputs[0]
            if not views.is_view(node):
                return _why_not(node, self._integers_behind(node))
            passed.append(node)
            tensor = node.inputs[0]
        shape, dtype = tuple(stored.shape), _onnx_type(stored.dtype)
        traced = Traced(tensor.name, shape, dtype, (), shape, dtype, direct=True)
        for node in reversed(passed):
            seen = self._through(node, traced)
            if seen is None:
                return f"its weight {traced.tensor!r} passes a {node.op} that cannot be undone"
            traced = seen
        return traced

    def weight(self, tensor: gs.Tensor) -> Traced | str | None:
        """As ``trace``, for a tensor that is to be pruned: floating point and not empty."""
        traced = self.trace(tensor)
        if not isinstance(traced, Traced):
            return traced
        if traced.dtype not in FLOATS:
            kind = onnx.TensorProto.DataType.Name(traced.dtype)
            return f"its weight {traced.tensor!r} is stored as {kind}; only floats are pruned"
        if 0 in traced.shape:
            return f"its weight {traced.tensor!r} is empty: shape {traced.shape}"
        return traced

    def rank(self, tensor: gs.Tensor) -> int | None:
        """Rank of a tensor as the model, or else ONNX shape inference, tells it."""
        if tensor.shape is not None:
            return len(tensor.shape)
        return self._inferred_ranks.get(tensor.name)

    def readers(self, tensor: gs.Tensor) -> list[gs.Node | str]:
        """Who reads a tensor, through views: nodes, once per use, and "graph output 'y'"."""
        found: list[gs.Node | str] = []
        pending: list[tuple[gs.Tensor, gs.Node | None]] = [(tensor, None)]
        while pending:
            tensor, node = pending.pop()
            if node is not None and not (views.is_view(node) and tensor is node.inputs[0]):
                found.append(node)
                continue
            if node is not None:
                tensor = node.outputs[0]
            if tensor.name in self._outputs:
                found.append(f"graph output {tensor.name!r}")
            pending += [(tensor, reader) for reader in reversed(tensor.outputs)]
        return found

    def only_reader(self, tensor: gs.Tensor) -> gs.Node | None:
        """The one node of this graph that reads a tensor, if nothing else does."""
        if tensor.name in self._outputs or len(tensor.outputs) != 1:
            return None
        reader = tensor.outputs[0]
        return reader if id(reader) in self._ids else None

    @cached_property
    def tensors(self) -> dict[str, gs.Tensor]:
        """All tensors of this graph by name."""
        return dict(self.graph.tensors())

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(id(node) for node in self.graph.nodes)

    @cached_property
    def _of_shapes(self) -> frozenset[str]:
        return _constants(self.graph, self.constants, ("Constant", "Shape", "Size"))

    @cached_property
    def _outputs(self) -> frozenset[str]:
        graphs = [self.graph, *self.graph.subgraphs(recursive=True)]
        return frozenset(tensor.name for graph in graphs for tensor in graph.outputs)

    @cached_property
    def _inferred_ranks(self) -> dict[str, int]:
        graph = inferred(self.proto)
        return {
            info.name: len(info.type.tensor_type.shape.dim)
            for info in (graph.value_info if graph is not None else ())
            if info.type.tensor_type.HasField("shape")
        }

    def _integers_behind(self, node: gs.Node) -> str:
        """The type of the integers that arithmetic makes a weight of; empty where there are none.

        Integers beside as many floats are a mask of these.
        """
        found: tuple[int, str] = (1, "")
        floats, waiting, seen = 0, [node], {id(node)}
        while waiting:
            at = waiting.pop()
            for tensor in at.inputs:
                stored = self.stored(tensor)
                if stored is not None:
                    number, size = _onnx_type(stored.dtype), views.size(stored.shape)
                    kind = onnx.TensorProto.DataType.Name(number).lower()
                    if number in FLOATS:
                        floats = max(floats, size)
                    elif at.op == "Cast" and "int" in kind:
                        found = max(found, (size, kind))
                elif tensor.inputs and id(tensor.inputs[0]) not in seen:
                    waiting.append(tensor.inputs[0])
                    seen.add(id(tensor.inputs[0]))
        return found[1] if found[0] > floats else ""

    def _through(self, node: gs.Node, traced: Traced) -> Traced | None:
        """What is seen behind one view; None where that cannot be told."""
        dtype = int(node.attrs["to"]) if node.op == "Cast" else traced.seen_dtype
        step = views.step(node, traced.seen_shape, self._integers(node))
        if step is None or (node.op == "Cast" and dtype not in FLOATS):
            return None
        return replace(
            traced,
            steps=views.simplify(traced.shape, (*traced.steps, step)),
            seen_shape=views.shape_behind(step, traced.seen_shape),
            seen_dtype=dtype,
            direct=False,
        )

    def _integers(self, node: gs.Node) -> list[int] | None:
        """The target shape or axes of a view, where they are stored in the model itself."""
        attribute = views.attribute_of_integers(node)
        if attribute in node.attrs:
            return list(node.attrs[attribute])
        stored = self.stored(node.inputs[1]) if attribute and len(node.inputs) > 1 else None
        if stored is None or stored.data_location == onnx.TensorProto.EXTERNAL:
            return None
        if views.size(stored.shape) > _MOST_INTEGERS:
            return None
        return [int(value) for value in np.atleast_1d(stored.values)]


def main_scope(proto: onnx.ModelProto) -> Scope:
    """The main graph of a model.

    Raises:
        ModelError: an attribute is not text.
    """

    def look() -> Scope:
        graph = import_graph(proto)
        return Scope(proto, graph, _unique_names(graph), _constants(graph, frozenset()))

    return once("scope", proto, look, heavy=True)


def body_scope(outer: Scope, node: gs.Node, attribute: str) -> Scope:
    """The body that a control-flow node of ``outer`` has in one of its attributes."""
    graph = node.attrs[attribute]
    refusal = (
        f"it is inside {attribute} of {node.op} {outer.names[id(node)]!r}; "
        "only layers of the main graph are pruned"
    )
    constants = _constants(graph, outer.constants)
    return replace(outer, graph=graph, constants=constants, refusal=refusal)


def function_scope(outer: Scope, function: gs.Graph, call: gs.Node) -> Scope:
    """The body of a local function as one call of it in ``outer`` sees it."""
    for node in function.nodes:
        # What the call passes for an attribute makes no difference to where a layer is.
        refs = [key for key, value in node.attrs.items() if isinstance(value, gs.Node.AttributeRef)]
        for key in refs:
            del node.attrs[key]
    actual = [outer.stored(_origin(tensor)) for tensor in call.inputs]
    pairs = zip(function.inputs, actual, strict=False)
    bound = {formal.name: stored for formal, stored in pairs if stored is not None}
    return Scope(
        proto=outer.proto,
        graph=function,
        names={**outer.names, **_unique_names(function, f"{outer.names[id(call)]}/")},
        constants=_constants(function, frozenset(bound)),
        bound=bound,
        refusal=f"it is inside the local function {function.name!r}; inline functions first",
    )


def _origin(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor in front of all views."""
    while tensor.inputs and views.is_view(tensor.inputs[0]):
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def _constant_of(node: gs.Node) -> gs.Constant | None:
    """The tensor of a Constant node; the short spellings ``value_float`` and so on count too."""
    name = node.outputs[0].name
    match node.attrs:
        case {"value": gs.Constant() as value}:
            return value
        case {"value_float": value} | {"value_floats": value}:
            return gs.Constant(name, np.array(value, np.float32))
        case {"value_int": value} | {"value_ints": value}:
            return gs.Constant(name, np.array(value, np.int64))
    return None


def _onnx_type(dtype: np.dtype | int) -> int:
    """The ONNX number of a type; graphsurgeon gives numpy types where there are any."""
    return dtype if isinstance(dtype, int) else int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _why_not(node: gs.Node, integers: str) -> str:
    if node.op in ("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"):
        return f"its weight is quantised ({node.op}); prune before quantising"
    if integers:
        return f"its weight is quantised ({integers} behind {node.op}); prune before quantising"
    if node.op == "Constant":
        return "its weight is a Constant node of a kind that cannot be edited"
    return (
        f"its weight is computed in the graph by {node.op}; "
        "fold constants first, for example with onnxslim or onnxsim"
    )


def _constants(
    graph: gs.Graph, outer: frozenset[str], sources: tuple[str, ...] = ("Constant",)
) -> frozenset[str]:
    """Names of the tensors that depend on stored tensors, or on such ``sources``, only."""
    known = set(outer)
    for node in graph.nodes:
        inputs = [tensor for tensor in node.inputs if tensor.name]
        folds = inputs and all(isinstance(t, gs.Constant) or t.name in known for t in inputs)
        if node.op in sources or (folds and not any(True for _ in node.subgraphs())):
            known.update(tensor.name for tensor in node.outputs)
    return frozenset(known)


def _unique_names(graph: gs.Graph, place: str = "") -> dict[int, str]:
    """A name for every node, those in bodies behind the name of the node that holds them."""
    times = Counter(node.name for node in graph.nodes)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for node in graph.nodes:
        name = node.name if node.name and times[node.name] == 1 else _output_name(node)
        while name in taken or (name != node.name and name in times):
            name += "'"
        taken.add(name)
        names[id(node)] = place + name
        for attribute, body in node.attrs.items():
            if isinstance(body, gs.Graph):
                names |= _unique_names(body, f"{place}{name}/{attribute}/")
    return names


def _output_name(node: gs.Node) -> str:
    names: list[str] = [tensor.name for tensor in node.outputs if tensor.name]
    return names[0].removesuffix(UNSHIFTED) if names else str(node.op)
