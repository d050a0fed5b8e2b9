"""Nodes in the order in which they can be computed: files of some exporters and editors lack it.

ONNX asks for the order, ONNX Runtime makes one of its own. So a copy is sorted, and the result is
written sorted.
"""

from __future__ import annotations

from collections import deque

import onnx

from onnx_ecp.graph.proto import Body, bodies, subgraphs

NOTE = "the nodes were not in the order in which they are computed; the result has them sorted."


def sorted_copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself where its nodes are sorted, else a copy in which they are.

    Nodes that can be computed keep their order. Those of a cycle, or behind one, stay last, for
    validation to refuse them.
    """
    if all(_is_sorted(body) for body in bodies(proto)):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for body in bodies(copy):
        if not _is_sorted(body):
            nodes = _sorted(list(body.node))
            kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del body.node[:]
            body.node.extend(kept)
    return copy


def _is_sorted(body: Body) -> bool:
    made = {name for node in body.node for name in node.output if name}
    for node in body.node:
        if not made.isdisjoint(_reads(node)):
            return False
        made.difference_update(node.output)
    return True


def _sorted(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Kahn's algorithm, the first node that is ready first."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    readers: dict[int, list[int]] = {}
    missing = [0] * len(nodes)
    for i, node in enumerate(nodes):
        for before in {maker[x] for x in _reads(node) if x in maker}:
            readers.setdefault(before, []).append(i)
            missing[i] += 1
    ready = deque(i for i, count in enumerate(missing) if not count)
    order: list[int] = []
    while ready:
        i = ready.popleft()
        order.append(i)
        for reader in readers.get(i, ()):
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)
    placed = set(order)
    return [nodes[i] for i in order] + [n for i, n in enumerate(nodes) if i not in placed]


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, or that a graph inside it may."""
    found, inside = {name for name in node.input if name}, [node]
    while inside:
        for graph in subgraphs(inside.pop()):
            found |= {name for inner in graph.node for name in inner.input if name}
            found |= {output.name for output in graph.output}
            inside += graph.node
    return found - set(node.output)
