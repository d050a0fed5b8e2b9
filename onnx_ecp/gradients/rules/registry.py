"""The table of gradient rules, and what rules need to read from a node.

A rule answers: given the adjoints ``g`` of a node's outputs, what is the adjoint of input ``i``?
Adjoints have the shape (P, *shape of the tensor), P the probe axis. At a kink any subgradient will
do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.graph.builder import Builder

Rule = Callable[[Builder, gs.Node, list[gs.Tensor | None], int], gs.Tensor | None]

RULES: dict[str, Rule] = {}


class Unsupported(Exception):
    """A rule cannot treat this case; the message says why."""


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operators of the standard domain.

    The rule gets the builder, the node, the adjoints of the node's outputs (None where an output
    has none) and the index of an input. It returns the adjoint (P, *shape of the input), None if
    the derivative is zero everywhere, or raises ``Unsupported``.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def optional_input(node: gs.Node, index: int) -> gs.Tensor | None:
    """An input of the node, or None where it is omitted."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def constant(tensor: gs.Tensor | None) -> np.ndarray | None:
    """The value of a tensor that is stored in the model; None where it is computed or omitted."""
    while tensor is not None and tensor.inputs and tensor.inputs[0].op == "Identity":
        tensor = tensor.inputs[0].inputs[0]
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    if tensor is None or not tensor.inputs:
        return None
    source = tensor.inputs[0]
    if source.op != "Constant":
        return None
    value: Any = next(iter(source.attrs.values()))
    return np.asarray(value.values if isinstance(value, gs.Constant) else value)


def known(tensor: gs.Tensor | None, what: str) -> np.ndarray:
    """The value of a tensor that a rule must know when the graph is built.

    Raises:
        Unsupported: it is computed in the graph.
    """
    value = constant(tensor)
    if value is None:
        raise Unsupported(f"{what} computed in the graph")
    return value


def nonnegative(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis + rank if axis < 0 else axis


def only(node: gs.Node, g: list[gs.Tensor | None], i: int, *inputs: int) -> gs.Tensor:
    """The adjoint of the first output, for rules that know some inputs and no further output.

    Raises:
        Unsupported: ``i`` is not among ``inputs``, or only another output carries an adjoint.
    """
    if i not in inputs:
        raise Unsupported(f"no derivative with respect to input {i}")
    if g[0] is None or any(x is not None for x in g[1:]):
        raise Unsupported("no derivative of a further output")
    return g[0]
