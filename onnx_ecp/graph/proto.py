"""What the rest of the package asks of a model: its tensors, inputs, outputs and graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from onnx_ecp.errors import ModelError

MAX_DEPTH = 64

# Behind the name of an output that an Add with a bias has taken over. A node without a name of its
# own is called after its output, and keeps that name.
UNSHIFTED = "/ecp_unshifted"

Body = onnx.GraphProto | onnx.FunctionProto
"""Something that has nodes."""


# Device, number, size and time of the last change of a file; None where there is none.
FileState = tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Model:
    """A validated model.

    Args:
        proto: the model; tensors in external files stay there. It is nobody's to change: copy it.
        path: the file it came from, None for one that was given as a proto.
        base: directory in which its external data lie, None where there can be none.
        late: by name, new values of external initializers of the main graph, which the proto does
            not have yet: ``save`` writes them, ``filled`` puts them into the proto.
        notes: what was done to the model to load it, for the user to know.
        seen: by external data file, which one it was and when it was written, before anything of it
            was read.
    """

    proto: onnx.ModelProto
    path: Path | None
    base: Path | None
    late: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seen: Mapping[Path, FileState] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSpec:
    """An input that the caller must feed.

    Args:
        name: its name.
        dtype: element type (object for strings); None when it is not a dense tensor.
        shape: one size per axis, a string for a named one, None for an unknown one; None when
            not even the rank is known.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...] | None


def signature(proto: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The real inputs in order: those that are listed initializers are not inputs."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    stored |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    return tuple(_input_spec(value) for value in proto.graph.input if value.name not in stored)


def _input_spec(value: onnx.ValueInfoProto) -> InputSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not known_type(kind.elem_type):
        return InputSpec(value.name, None, None)
    shape = tuple(_size(dim) for dim in kind.shape.dim) if kind.HasField("shape") else None
    return InputSpec(value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type), shape)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) or None


def output_names(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the graph's outputs in order."""
    return tuple(value.name for value in proto.graph.output)


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the standard operators; 0 where the model imports none."""
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)


def known_type(data_type: int) -> bool:
    """Whether the installed onnx knows this element type."""
    return bool(data_type != TensorProto.UNDEFINED) and data_type in TensorProto.DataType.values()


def constants(proto: onnx.ModelProto) -> dict[str, TensorProto]:
    """The tensors stored in the main graph, by the name under which its nodes see them.

    These are its initializers and the values of its Constant nodes. They are for reading:
    ``value_floats`` and the like are no tensors in ``proto``, but made into some here;
    ``layers.edit.stored`` gives a tensor to write to.
    """
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            tensor = constant_value(attribute)
            if tensor is not None:
                found[node.output[0]] = tensor
    return found


# The short spellings of a Constant's value, with the element type that each stands for.
_SHORT = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def constant_value(attribute: AttributeProto) -> TensorProto | None:
    """The tensor that an attribute of a Constant node stands for; None for text and sparse ones."""
    if attribute.name == "value" and attribute.HasField("t"):
        return attribute.t
    if attribute.name not in _SHORT:
        return None
    numbers = np.array(onnx.helper.get_attribute_value(attribute), _SHORT[attribute.name])
    return numpy_helper.from_array(numbers)


def bodies(proto: onnx.ModelProto) -> Iterator[Body]:
    """The graph, the functions and every graph inside their nodes; the outer before the inner.

    Raises:
        ModelError: graphs are nested more than 64 deep.
    """
    roots: list[Body] = [proto.graph, *proto.functions]
    for training in proto.training_info:
        roots += [training.initialization, training.algorithm]
    return (body for root in roots for body in nested(root))


def nested(root: Body) -> Iterator[Body]:
    """A body and all graphs inside its nodes, the outer before the inner."""
    open_bodies: list[tuple[Body, int]] = [(root, 0)]
    while open_bodies:
        body, depth = open_bodies.pop()
        if depth > MAX_DEPTH:
            raise ModelError(
                f"If and Loop bodies are nested more than {MAX_DEPTH} deep.",
                hint="Export the model without control flow, or simplify it first.",
            )
        yield body
        inner = [(graph, depth + 1) for node in body.node for graph in subgraphs(node)]
        open_bodies += reversed(inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every dense tensor, wherever it is stored, with a name to show."""
    for body in bodies(proto):
        if isinstance(body, onnx.GraphProto):
            yield from ((tensor.name, tensor) for tensor in body.initializer)
        for label, attribute in _attributes(body):
            if attribute.HasField("t"):
                yield label, attribute.t
            yield from ((label, tensor) for tensor in attribute.tensors)


def sparse_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.SparseTensorProto]]:
    """Every sparse tensor, wherever it is stored, with a name to show."""
    for body in bodies(proto):
        if isinstance(body, onnx.GraphProto):
            yield from ((sparse.values.name, sparse) for sparse in body.sparse_initializer)
        for label, attribute in _attributes(body):
            if attribute.HasField("sparse_tensor"):
                yield label, attribute.sparse_tensor
            yield from ((label, sparse) for sparse in attribute.sparse_tensors)


def _attributes(body: Body) -> Iterator[tuple[str, AttributeProto]]:
    """All attributes in a body, with the name of the node's first output."""
    for node in body.node:
        label = node.output[0] if node.output else node.name
        yield from ((label, attribute) for attribute in node.attribute)
    if isinstance(body, onnx.FunctionProto):
        yield from ((body.name, attribute) for attribute in body.attribute_proto)
