"""Operators without a rule that work element by element: central differences, in the graph.

    f'(x)  ~  (f(x + h) - f(x - h)) / ((x + h) - (x - h))

In double precision where ONNX Runtime has the kernel. Whether an operator that the table of
operators does not list works element by element is tried out: what happens to an element must not
depend on where it is, nor on the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.errors import ProviderError
from onnx_ecp.gradients.rules.registry import Unsupported, only
from onnx_ecp.graph.builder import Builder
from onnx_ecp.graph.operators import find
from onnx_ecp.graph.surgery import export_graph
from onnx_ecp.runtime.session import Session

# In units of max(|x|, 1): the cube root of the precision, where both errors together are least.
STEPS: dict[np.dtype, float] = {np.dtype(np.float64): 6e-6, np.dtype(np.float32): 2e-3}


def by_differences(
    op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int
) -> gs.Tensor | None:
    """The adjoint of the input of an operator that works element by element; a ``Rule``.

    Raises:
        Unsupported: it does not, or it has several inputs or outputs.
    """
    (x, *others), adjoint = node.inputs, only(node, g, i, 0)
    given = [t for t in others if not t.is_empty()]
    if given or len(node.outputs) != 1 or any(True for _ in node.subgraphs()):
        raise Unsupported("several inputs or outputs")
    own, shape = op.dtype(x), op.shape(x)
    if shape != op.shape(node.outputs[0]) or own not in STEPS or op.dtype(node.outputs[0]) != own:
        raise Unsupported("another shape or type")
    listed = find(node.domain, node.op).elementwise
    if not listed and not _is_elementwise(op, node, shape, own):
        raise Unsupported("elements that depend on each other")
    wide = next(t for t in STEPS if t == own or _session(op, node, shape, t) is not None)
    x = x if wide == own else op.cast(x, wide)
    step = op.Mul(op.Max(op.Abs(x), 1.0), STEPS[wide])
    ends = [op.Add(x, step), op.Sub(x, step)]
    values = [_applied(op, node, end) for end in ends]
    slope = op.Div(op.Sub(*values), op.Sub(*ends))
    return op.Mul(adjoint, slope if wide == own else op.cast(slope, own))  # type: ignore[no-any-return]


def _applied(op: Builder, node: gs.Node, x: gs.Tensor) -> Any:
    """The operator of a node, of whatever domain, on another tensor."""
    y = op.op(node.op, x, **node.attrs)
    op.graph.nodes[-1].domain = node.domain
    return y


def _session(op: Builder, node: gs.Node, shape: tuple[int, ...], dtype: np.dtype) -> Session | None:
    """The operator alone; None where ONNX Runtime has no kernel for this type."""
    x, y = gs.Variable("x", dtype, shape), gs.Variable("y", dtype)
    alone = gs.Node(node.op, attrs=node.attrs, inputs=[x], outputs=[y], domain=node.domain)
    domains = op.graph.import_domains
    graph = gs.Graph([alone], [x], [y], opset=op.graph.opset, import_domains=domains)
    model = export_graph(graph)
    model.ir_version = min(model.ir_version, 10)
    try:
        return Session(model, threads=1)
    except ProviderError:
        return None


def _is_elementwise(op: Builder, node: gs.Node, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    session = _session(op, node, shape, dtype)
    if session is None:
        return False
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(dtype)
    order, some = rng.permutation(x.size), rng.random(shape) < 0.5
    other = np.where(some, x, rng.standard_normal(shape)).astype(dtype)
    y, moved, changed = (
        session.run({"x": v})["y"] for v in (x, x.reshape(-1)[order].reshape(shape), other)
    )
    same_place = np.allclose(moved, y.reshape(-1)[order].reshape(shape), rtol=1e-5, equal_nan=True)
    return same_place and np.allclose(changed[some], y[some], rtol=1e-5, equal_nan=True)
