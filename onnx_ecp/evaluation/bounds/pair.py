"""Two models that are one graph with different constants, node by node beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnx_ecp.errors import ModelError
from onnx_ecp.graph import Model, constants, decode_sparse, printable, read_tensor, signature
from onnx_ecp.runtime.session import Session


@dataclass(frozen=True)
class LayerStep:
    """The same node of both models.

    Args:
        node: of model a.
        a: its constant inputs, by position; omitted ones are not in it.
        b: those of model b.
        opsets: of model a.
    """

    node: onnx.NodeProto
    a: Mapping[int, np.ndarray]
    b: Mapping[int, np.ndarray]
    opsets: Sequence[onnx.OperatorSetIdProto]

    @property
    def name(self) -> str:
        """What the user sees: operator type and name."""
        return f"{self.node.op_type} {printable(self.node.name or self.node.output[0])!r}"

    @property
    def attributes(self) -> dict[str, Any]:
        """Values of the node's attributes by name."""
        return {a.name: onnx.helper.get_attribute_value(a) for a in self.node.attribute}

    @property
    def data(self) -> dict[int, str]:
        """By position, the inputs that are computed."""
        known = {i for i, x in enumerate(self.node.input) if not x} | self.a.keys() | self.b.keys()
        return {i: x for i, x in enumerate(self.node.input) if i not in known}

    @property
    def same(self) -> bool:
        """Whether the constants are equal in both models."""
        return self.a.keys() == self.b.keys() and all(
            np.array_equal(self.a[i], self.b[i]) for i in self.a
        )

    def run(self, inputs: Mapping[int, np.ndarray]) -> np.ndarray:
        """The node's first output for these inputs by position."""
        return evaluate(self.node, inputs, self.opsets)


@dataclass(frozen=True)
class Pair:
    """Both models.

    Args:
        steps: in an order in which they can be computed.
        inputs: names of the inputs.
        outputs: names of the outputs.
    """

    steps: tuple[LayerStep, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    """One model: its nodes by first output, in order, and all its constants."""

    nodes: dict[str, onnx.NodeProto]
    constants: dict[str, np.ndarray]


def pair(a: Model, b: Model) -> Pair:
    """Put the nodes of two models beside each other.

    An Add of a constant that only one model has (a bias that compensation made) gets a counterpart
    that adds zero.

    Raises:
        ModelError: the models differ in more than their constants; the node is named.
    """
    of_a, of_b = _side(a), _side(b)
    left, right = _mirrored(of_a, of_b), _mirrored(of_b, of_a)
    opsets = list(a.proto.opset_import)
    steps = []
    for output, node in left.nodes.items():
        other = right.nodes.get(output)
        if other is None or not _alike(node, other, left.constants, right.constants):
            raise ModelError(
                f"node {printable(output)!r} of the first model has no counterpart of the same "
                "shape in the second: only models that differ in the values of their constants "
                "have a deterministic bound (`optimize --no-cleanup` makes them).",
                hint="Prune again without clean-up, or take the statistical bounds.",
            )
        steps.append(LayerStep(node, _known(node, left), _known(other, right), opsets))
    inputs = tuple(spec.name for spec in signature(a.proto))
    return Pair(tuple(steps), inputs, tuple(y.name for y in a.proto.graph.output))


def evaluate(
    node: onnx.NodeProto,
    inputs: Mapping[int, np.ndarray],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> np.ndarray:
    """Run one node through ONNX Runtime.

    Args:
        node: its input names do not matter.
        inputs: by position; positions that are missing are omitted.
        opsets: of its model.
    """
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    last = max(inputs, default=-1)
    alone.ClearField("input")
    alone.input.extend(f"x{i}" if i in inputs else "" for i in range(last + 1))
    del alone.output[1:]
    alone.output[0] = "y"
    kinds = {i: onnx.helper.np_dtype_to_tensor_dtype(x.dtype) for i, x in inputs.items()}
    infos = [onnx.helper.make_tensor_value_info(f"x{i}", kinds[i], inputs[i].shape) for i in inputs]
    graph = onnx.helper.make_graph([alone], "node", infos, [onnx.ValueInfoProto(name="y")])
    session = Session(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))
    return session.run({f"x{i}": x for i, x in inputs.items()})["y"]


def _side(model: Model) -> _Side:
    """Constants in memory, those that nodes compute from constants too."""
    proto = decode_sparse(model.proto)
    found = {name: read_tensor(model, t) for name, t in constants(proto).items()}
    nodes = {}
    for node in proto.graph.node:
        read = [x for x in node.input if x]
        if node.output[0] in found:
            continue
        if all(x in found for x in read) and len(node.output) == 1:
            inputs = {i: found[x] for i, x in enumerate(node.input) if x}
            found[node.output[0]] = evaluate(node, inputs, proto.opset_import)
        else:
            nodes[node.output[0]] = node
    return _Side(nodes, found)


def _mirrored(side: _Side, other: _Side) -> _Side:
    """The side with an Add of zeros wherever the other one alone adds a constant."""
    nodes, known = {}, dict(side.constants)
    for output, node in side.nodes.items():
        twin = other.nodes.get(output)
        if twin is None or twin.op_type != "Add" or node.op_type == "Add":
            nodes[output] = node
            continue
        before = next((x for x in twin.input if x not in other.constants), output)
        added = next((x for x in twin.input if x in other.constants), "")
        if before in side.nodes or not added:
            nodes[output] = node
            continue
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node)
        renamed.output[0] = before
        zeros = f"{before}/zeros"
        known[zeros] = np.zeros_like(other.constants[added])
        names = [zeros if x == added else x for x in twin.input]
        nodes |= {before: renamed, output: onnx.helper.make_node("Add", names, [output])}
    return _Side(nodes, known)


def _known(node: onnx.NodeProto, side: _Side) -> dict[int, np.ndarray]:
    return {i: side.constants[x] for i, x in enumerate(node.input) if x in side.constants}


def _alike(
    a: onnx.NodeProto,
    b: onnx.NodeProto,
    known_a: Mapping[str, np.ndarray],
    known_b: Mapping[str, np.ndarray],
) -> bool:
    """Whether two nodes do the same to the same computed tensors."""
    return (
        (a.op_type, a.domain) == (b.op_type, b.domain)
        and list(_attributes(a)) == list(_attributes(b))
        and _computed(a, known_a) == _computed(b, known_b)
        and all(known_a[i].size == known_b[i].size for i in known_a.keys() & known_b.keys())
    )


def _attributes(node: onnx.NodeProto) -> Iterator[bytes]:
    for attribute in sorted(node.attribute, key=lambda x: x.name):
        bare = onnx.AttributeProto()
        bare.CopyFrom(attribute)
        bare.ClearField("doc_string")
        yield bare.SerializeToString(deterministic=True)


def _computed(node: onnx.NodeProto, known: Mapping[str, np.ndarray]) -> dict[int, str]:
    return {i: x for i, x in enumerate(node.input) if x and x not in known}
