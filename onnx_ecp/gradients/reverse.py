"""Reverse mode as an ONNX graph: adjoints of chosen tensors from seeds on the outputs.

For seeds v (P, *shape of y) on every output y, the adjoint of a tensor z is
``g = sum_y v_y dy/dz``, of shape (P, *shape of z). Only tensors downstream of a target and upstream
of a seeded output get adjoints. An operator without a rule is differentiated by differences where
it works element by element; else it poisons everything above it: a partial sum would be silently
wrong, so those targets get the operator's name instead of an adjoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules import RULES, Rule, Unsupported
from onnx_ecp.gradients.rules.differences import by_differences
from onnx_ecp.graph.builder import Builder

NO_OUTPUT = "no float output of the model depends on it"


@dataclass(frozen=True)
class Adjoints:
    """What the reverse graph offers.

    Args:
        tensors: by target name, the tensor that carries its adjoint.
        blocked: by target name, why there is none.
        numeric: by target name, an operator on its way that is differentiated by differences.
    """

    tensors: dict[str, gs.Tensor]
    blocked: dict[str, str]
    numeric: dict[str, str]


def adjoints(
    graph: gs.Graph, op: Builder, targets: Iterable[str], seeds: Mapping[str, gs.Tensor]
) -> Adjoints:
    """Extend ``graph`` by the adjoints of ``targets``.

    Args:
        graph: topologically sorted; its nodes stay as they are.
        op: writes into the same graph and knows the facts of its tensors.
        targets: names of tensors of the graph.
        seeds: by output name, a tensor (P, *shape of the output).

    Returns:
        Adjoints; every target is in exactly one of its two tables.
    """
    targets = list(targets)
    forward = list(graph.nodes)
    active = _active(forward, op, set(targets), set(seeds))
    parts: dict[str, list[gs.Tensor]] = {name: [seed] for name, seed in seeds.items()}
    blocked: dict[str, str] = {}
    numeric: dict[str, str] = {}

    def total(name: str) -> gs.Tensor | None:
        """The adjoint of a tensor whose consumers have all been visited."""
        terms = parts.get(name, [])
        if len(terms) > 1:
            terms = parts[name] = [op.Sum(*terms)]
        return terms[0] if terms else None

    for node in reversed(forward):
        wanted = [i for i, x in enumerate(node.inputs) if x.name in active]
        captured = _captured(node) & active
        reached = [y.name for y in node.outputs if y.name in active]
        if not (wanted or captured) or not reached:
            continue
        reason = next((blocked[y] for y in reached if y in blocked), None)
        if reason is None:
            g = [total(y.name) if y.name in active else None for y in node.outputs]
            if all(x is None for x in g):
                continue
            reason = _pull(op, node, g, wanted, parts) if not captured else f"{node.op} body"
            above = {y: numeric[y] for y in reached if y in numeric}
            rough = _operator(node) if _rule(node) is None else next(iter(above.values()), None)
            if rough is not None:
                numeric |= dict.fromkeys([node.inputs[i].name for i in wanted], rough)
        if reason is not None:
            for name in {node.inputs[i].name for i in wanted} | captured:
                blocked[name] = reason

    found = {t: total(t) for t in targets if t not in blocked}
    return Adjoints(
        {t: g for t, g in found.items() if g is not None},
        {t: blocked.get(t, NO_OUTPUT) for t in targets
         if found.get(t) is None},
        {t: numeric[t] for t in targets if t in numeric and t not in blocked},
    )  # fmt: skip


def _pull(
    op: Builder,
    node: gs.Node,
    g: list[gs.Tensor | None],
    wanted: list[int],
    parts: dict[str, list[gs.Tensor]],
) -> str | None:
    """Add the adjoints of a node's inputs to ``parts``; the reason if a rule is missing."""
    apply = _rule(node)
    through = [node.inputs[i].name for i in wanted]
    through += [y.name for y, given in zip(node.outputs, g, strict=True) if given is not None]
    if any(name not in op.facts for name in through):
        return f"{_operator(node)} reads or makes a sequence, a map or an optional"
    for i in wanted:
        try:
            gradient = (apply or by_differences)(op, node, g, i)
        except Unsupported as refusal:
            return f"{node.op}: {refusal}" if apply else f"no gradient rule for {_operator(node)}"
        if gradient is not None:
            parts.setdefault(node.inputs[i].name, []).append(gradient)
    return None


def _rule(node: gs.Node) -> Rule | None:
    return RULES.get(node.op) if node.domain in (None, "", "ai.onnx") else None


def _operator(node: gs.Node) -> str:
    return f"{node.domain + '.' if node.domain else ''}{node.op}"


def _active(nodes: list[gs.Node], op: Builder, targets: set[str], outputs: set[str]) -> set[str]:
    """Names of float tensors downstream of a target and upstream of a seeded output."""
    down = set(targets)
    for node in nodes:
        if names_read(node) & down:
            down.update(y.name for y in node.outputs if _is_float(op, y.name))
    up = set(outputs)
    for node in reversed(nodes):
        if any(y.name in up for y in node.outputs):
            up |= names_read(node)
    return down & up


def _is_float(op: Builder, name: str) -> bool:
    fact = op.facts.get(name)
    # Without a fact (a sequence, say) the tensor counts as float: what reads it is refused.
    return fact is None or np.issubdtype(fact.dtype, np.floating)


def names_read(node: gs.Node) -> set[str]:
    """Names of the tensors that a node reads, those that its bodies capture included."""
    return {x.name for x in node.inputs if x.name} | _captured(node)


def _captured(node: gs.Node) -> set[str]:
    """Names that the bodies of a control-flow node read from the graph around it."""
    bodies = [a for a in node.attrs.values() if isinstance(a, gs.Graph)]
    names: set[str] = set()
    for body in bodies:
        inside = {y.name for n in body.nodes for y in n.outputs} | {x.name for x in body.inputs}
        read = set().union(*(names_read(n) for n in body.nodes), {y.name for y in body.outputs})
        names |= read - inside
    return names
