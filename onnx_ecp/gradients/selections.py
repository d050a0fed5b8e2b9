"""Where outputs depend on a layer, but no gradient says how: selections, and what is no tensor.

The indices of an ArgMax, the boxes that NonMaxSuppression keeps, the sign of a score: a small
change of the scores changes nothing, a larger one everything. A derivative of zero does not tell
what a layer is worth then. What decides is the float tensor that the selecting operator reads: it
is observed as if it were an output, and a layer is ranked by what it does to it.

An output that is no tensor (a sequence, a map) is observed at the float tensors it is made of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_ecp.graph.builder import Fact
from onnx_ecp.graph.proto import subgraphs

# Only shape or type of their first input matter to these.
_SHAPES = frozenset({"EyeLike", "RandomNormalLike", "RandomUniformLike", "Shape", "Size"})
# Float results that are constant between jumps.
_STEPS = frozenset({"Ceil", "Floor", "Hardmax", "Sign"})


@dataclass(frozen=True)
class Selection:
    """A tensor that decides.

    Args:
        tensor: what the operator reads.
        op: the operator that no gradient passes.
        node: the name of its node, or of its first output where it has none.
        layers: pre-activations that act through such operators alone, and act on this tensor.
    """

    tensor: str
    op: str
    node: str
    layers: frozenset[str]


def parts_of_outputs(
    graph: onnx.GraphProto, facts: Mapping[str, Fact], targets: Iterable[str]
) -> tuple[str, ...]:
    """The float tensors that outputs are made of which are no tensors themselves.

    Args:
        graph: topologically sorted.
        facts: of all its tensors; what is no tensor has none.
        targets: names of tensors; only what depends on one of them is asked for.
    """
    down = _downstream(graph, set(targets))
    wanted = {y.name for y in graph.output if y.name not in facts} & down
    found: dict[str, None] = {}
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            read = [x for x in reads(node) if x in down]
            wanted.update(x for x in read if x not in facts)
            found |= dict.fromkeys(x for x in read if _is_float(facts, x) and x in facts)
    return tuple(found)


def selections(
    graph: onnx.GraphProto,
    facts: Mapping[str, Fact],
    targets: Iterable[str],
    seeded: Iterable[str],
) -> tuple[Selection, ...]:
    """The tensors that decide where a target acts on the outputs through selections alone.

    Args:
        graph: topologically sorted.
        facts: of all its tensors.
        targets: names of pre-activations.
        seeded: names of the tensors whose gradients are taken.
    """
    stuck = set(targets) & _reaching(graph) - _differentiable(graph, facts, set(seeded))
    if not stuck:
        return ()
    live = _reaching(graph)
    sources = {name: frozenset([name]) for name in stuck}
    found: dict[str, Selection] = {}
    for node in graph.node:
        hit = [x for x in dict.fromkeys(reads(node)) if x in sources]
        if not hit or node.op_type in _SHAPES or not live.intersection(node.output):
            continue
        passed = [y for y in node.output if y in live and _passes(node, facts, y)]
        if passed:
            union = frozenset().union(*(sources[x] for x in hit))
            sources |= {y: sources.get(y, frozenset()) | union for y in passed}
            continue
        for x in hit:
            known = found[x].layers if x in found else frozenset[str]()
            name = node.name or node.output[0]
            found[x] = Selection(x, node.op_type, name, known | sources[x])
    return tuple(found.values())


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the tensors that a node reads, those that its bodies capture included."""
    yield from filter(None, node.input)
    for body in subgraphs(node):
        inside = {y for inner in body.node for y in inner.output} | {x.name for x in body.input}
        inside |= {tensor.name for tensor in body.initializer}
        named = [x for inner in body.node for x in reads(inner)] + [y.name for y in body.output]
        yield from (name for name in named if name not in inside)


def _passes(node: onnx.NodeProto, facts: Mapping[str, Fact], output: str) -> bool:
    """Whether a gradient goes through a node from this output."""
    return node.op_type not in (_STEPS | _SHAPES) and _is_float(facts, output)


def _is_float(facts: Mapping[str, Fact], name: str) -> bool:
    """Whether a tensor is floating-point; what is none counts as such, its parts may be."""
    return name not in facts or bool(np.issubdtype(facts[name].dtype, np.floating))


def _reaching(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors whose values any output depends on, in whatever way."""
    found = {y.name for y in graph.output}
    for node in reversed(graph.node):
        if node.op_type not in _SHAPES and found.intersection(node.output):
            found.update(reads(node))
    return found


def _differentiable(
    graph: onnx.GraphProto, facts: Mapping[str, Fact], seeded: Collection[str]
) -> set[str]:
    """Names of the float tensors from which a gradient path leads to a seeded one."""
    found = set(seeded)
    for node in reversed(graph.node):
        if any(y in found and _passes(node, facts, y) for y in node.output):
            found.update(x for x in reads(node) if _is_float(facts, x))
    return found


def _downstream(graph: onnx.GraphProto, names: Collection[str]) -> set[str]:
    found = set(names)
    for node in graph.node:
        if not found.isdisjoint(reads(node)):
            found.update(node.output)
    return found
