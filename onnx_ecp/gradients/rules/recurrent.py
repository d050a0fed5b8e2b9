"""LSTM, GRU and RNN: back through time, as a Scan that runs against the operator's direction.

The gates of all steps follow at once from X and from Y, the hidden states that the operator gives
out. Only the cell state of an LSTM must be run through again. With ``dh`` the adjoint of a step's
hidden state, a step back gives the adjoint of the gates' pre-activations, ``da``, and adds to that
of the state before; the adjoint of X is ``da W`` for all steps at once. A step behind the end of
its sequence passes states on, and their adjoints.

Shapes: X (T, N, in), Y (T, directions, N, H), W (directions, gates * H, in); adjoints have P in
front. Within one direction the tensors have no axis of directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.registry import Unsupported, optional_input, rule
from onnx_ecp.graph.builder import Builder

# (builder of the body, adjoints of the states, values of the step) to (adjoints of the states
# before, adjoint of the pre-activations).
Step = Callable[[Builder, Sequence[Any], Mapping[str, Any]], tuple[Sequence[Any], Any]]


@dataclass(frozen=True)
class Pass:
    """One direction of the operator, as seen by the formulas of its cell.

    Args:
        x: (T, N, in).
        before: hidden states before every step, (T, N, H).
        weights: W and R of this direction, (gates * H, in) and (gates * H, H).
        bias: W's and R's biases, (gates * H,) each, or None.
        first_cell: cell state before the first step (N, H); only an LSTM has it.
        hidden: hidden states, (T, N, H).
        backward: whether the operator runs from the last step to the first.
        seen: which steps are before the end of their sequence (T, N, 1), None if all are.
    """

    x: Any
    before: Any
    weights: tuple[Any, Any]
    bias: tuple[Any, Any] | None
    first_cell: Any
    hidden: Any
    backward: bool
    seen: Any = None


def _scan(
    op: Builder, states: Sequence[Any], steps: Mapping[str, Any], step: Step, *, backward: bool
) -> list[Any]:
    """Run ``step`` over time: the last states, and the results of all steps in time order.

    Adjoints (P, T, N, H) are named "dy" among the steps; then states and results have P in front
    too, and time is their second axis.
    """
    lead = 1 if "dy" in steps else 0
    body = gs.Graph(opset=op.graph.opset)
    inner = Builder(body, {}, prefix=op.fresh("scan"))
    # ONNX Runtime wants to know the ranks.
    carried = [gs.Variable(inner.fresh("state"), op.dtype(s), [None] * (2 + lead)) for s in states]
    values = {
        n: gs.Variable(inner.fresh(n), op.dtype(t), [None] * (2 + lead * (n == "dy")))
        for n, t in steps.items()
    }
    results, emitted = step(inner, carried, values)
    body.inputs = [*carried, *values.values()]
    # An output must be a tensor of its own, even where a state is passed on unchanged.
    body.outputs = [inner.Identity(t) for t in (*results, emitted)]
    for output in body.outputs:
        output.dtype, output.shape = inner.dtype(output), [None] * (2 + lead)
    found: list[Any] = op.Scan(
        *states,
        *steps.values(),
        outputs=len(states) + 1,
        body=body,
        num_scan_inputs=len(steps),
        scan_input_axes=[int(name == "dy") for name in steps],
        scan_input_directions=[int(backward)] * len(steps),
        scan_output_axes=[lead],
        scan_output_directions=[int(backward)],
    )
    return found


def _gates(op: Builder, run: Pass, count: int) -> list[Any]:
    """Pre-activations of the gates, (T, N, H) each: X W^T + H R^T + biases."""
    total = op.Add(_times(op, run.x, run.weights[0]), _times(op, run.before, run.weights[1]))
    for bias in run.bias or ():
        total = op.Add(total, bias)
    return list(op.Split(total, axis=2, num_outputs=count, outputs=count))


def _times(op: Builder, rows: Any, weight: Any) -> Any:
    return op.MatMul(rows, op.Transpose(weight, perm=[1, 0]))


def _one_minus_square(op: Builder, y: Any) -> Any:
    return op.Sub(1.0, op.Mul(y, y))


def _logistic_slope(op: Builder, y: Any) -> Any:
    return op.Mul(y, op.Sub(1.0, y))


# One function per cell: the values of every step, and the step back.


def _lstm(op: Builder, run: Pass, node: gs.Node) -> tuple[dict[str, Any], Step]:
    """The cell c' = f c + i u and h = o tanh(c'), with gates in the order i, o, f, u."""
    if node.attrs.get("input_forget", 0) or optional_input(node, 7) is not None:
        raise Unsupported("coupled gates or peepholes")
    _require_activations(node, ["Sigmoid", "Tanh", "Tanh"])
    pre = _gates(op, run, 4)
    i, o, f = (op.Sigmoid(a) for a in pre[:3])
    u = op.Tanh(pre[3])

    def forward(op: Builder, states: Sequence[Any], v: Mapping[str, Any]) -> tuple[Any, Any]:
        return [op.Add(op.Mul(v["f"], states[0]), v["iu"])], states[0]

    steps = {"f": f, "iu": op.Mul(i, u)}
    if run.seen is not None:
        steps = {"f": op.Where(run.seen, f, 1.0), "iu": op.Where(run.seen, steps["iu"], 0.0)}
    _, cell = _scan(op, [run.first_cell], steps, forward, backward=run.backward)
    squashed = op.Tanh(op.Add(op.Mul(f, cell), steps["iu"]))
    values = {
        # By what the adjoint of h, and that of c, reach the pre-activations.
        "ho": op.Mul(squashed, _logistic_slope(op, o)),
        "hc": op.Mul(o, _one_minus_square(op, squashed)),
        "ci": op.Mul(u, _logistic_slope(op, i)),
        "cf": op.Mul(cell, _logistic_slope(op, f)),
        "cu": op.Mul(i, _one_minus_square(op, u)),
        "f": steps["f"],
    }
    r = run.weights[1]

    def back(op: Builder, states: Sequence[Any], v: Mapping[str, Any]) -> tuple[Any, Any]:
        dh = op.Add(states[0], v["dy"])
        dc = op.Add(states[1], op.Mul(dh, v["hc"]))
        parts = [op.Mul(dh, v["ho"]), *(op.Mul(dc, v[name]) for name in ("ci", "cf", "cu"))]
        da = op.Concat(parts[1], parts[0], parts[2], parts[3], axis=2)
        return [op.MatMul(da, r), op.Mul(dc, v["f"])], da

    return values, back


def _rnn(op: Builder, run: Pass, node: gs.Node) -> tuple[dict[str, Any], Step]:
    activations = _activations(node, ["Tanh"])
    if len(set(activations)) != 1 or activations[0] not in ("Tanh", "Relu"):
        raise Unsupported(f"activations {activations}")
    h = run.hidden
    slope = op.Sign(h) if activations[0] == "Relu" else _one_minus_square(op, h)
    r = run.weights[1]

    def back(op: Builder, states: Sequence[Any], v: Mapping[str, Any]) -> tuple[Any, Any]:
        da = op.Mul(op.Add(states[0], v["dy"]), v["slope"])
        return [op.MatMul(da, r)], da

    return {"slope": slope}, back


def _gru(op: Builder, run: Pass, node: gs.Node) -> tuple[dict[str, Any], Step]:
    """State h' = (1 - z) n + z h, gates in the order z, r, n; n sees h through the reset r."""
    _require_activations(node, ["Sigmoid", "Tanh"])
    rest, candidate = _split_candidate(op, run)
    z, r = (op.Sigmoid(a) for a in _gates(op, rest, 2))
    late = bool(node.attrs.get("linear_before_reset", 0))
    seen = op.Mul(r, run.before)
    heard = _times(op, run.before if late else seen, candidate.weights[1])
    if candidate.bias is not None:
        heard = op.Add(heard, candidate.bias[1])
    own = _times(op, run.x, candidate.weights[0])
    if candidate.bias is not None:
        own = op.Add(own, candidate.bias[0])
    n = op.Tanh(op.Add(own, op.Mul(r, heard) if late else heard))
    values = {
        "hz": op.Mul(op.Sub(run.before, n), _logistic_slope(op, z)),
        "hn": op.Mul(op.Sub(1.0, z), _one_minus_square(op, n)),
        "nr": op.Mul(heard if late else run.before, _logistic_slope(op, r)),
        "r": r,
        "z": z,
    }
    r_rest, r_candidate = rest.weights[1], candidate.weights[1]

    def back(op: Builder, states: Sequence[Any], v: Mapping[str, Any]) -> tuple[Any, Any]:
        dh = op.Add(states[0], v["dy"])
        dz, dn = op.Mul(dh, v["hz"]), op.Mul(dh, v["hn"])
        if late:
            dr = op.Mul(dn, v["nr"])
            through = op.MatMul(op.Mul(dn, v["r"]), r_candidate)
        else:
            dm = op.MatMul(dn, r_candidate)
            dr, through = op.Mul(dm, v["nr"]), op.Mul(dm, v["r"])
        direct = op.Mul(dh, v["z"])
        gated = op.MatMul(op.Concat(dz, dr, axis=2), r_rest)
        return [op.Add(op.Add(direct, gated), through)], op.Concat(dz, dr, dn, axis=2)

    return values, back


def _split_candidate(op: Builder, run: Pass) -> tuple[Pass, Pass]:
    """The gates z and r of a GRU, and its candidate n."""

    def halves(t: Any) -> tuple[Any, Any]:
        z, r, n = op.Split(t, axis=0, num_outputs=3, outputs=3)
        return op.Concat(z, r, axis=0), n

    weights = [halves(w) for w in run.weights]
    biases = [halves(b) for b in run.bias] if run.bias is not None else None
    passes = [
        Pass(
            run.x,
            run.before,
            (weights[0][k], weights[1][k]),
            None if biases is None else (biases[0][k], biases[1][k]),
            None,
            run.hidden,
            run.backward,
            run.seen,
        )
        for k in (0, 1)
    ]
    return passes[0], passes[1]


def _activations(node: gs.Node, default: list[str]) -> list[str]:
    return list(node.attrs.get("activations", default))


def _require_activations(node: gs.Node, names: list[str]) -> None:
    given = _activations(node, names)
    if any(a != names[k % len(names)] for k, a in enumerate(given)):
        raise Unsupported(f"activations {given}")


CELLS = {"GRU": _gru, "LSTM": _lstm, "RNN": _rnn}


@rule("GRU", "LSTM", "RNN")
def _recurrent(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    if i not in (0, 5, 6):
        raise Unsupported(f"no derivative with respect to input {i}")
    if node.attrs.get("layout", 0) or "clip" in node.attrs:
        raise Unsupported("batch-first layout or clipping")
    count = op.shape(node.inputs[1])[0]
    found = [_direction(op, node, g, i, k) for k in range(count)]
    if i == 0:
        return found[0] if count == 1 else op.Add(*found)
    return op.Concat(*(op.Unsqueeze(t, [1]) for t in found), axis=1)


def _direction(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int, k: int) -> Any:
    """The adjoint that direction k adds to input i; for the states without the direction axis."""
    y = op.further_output(node, 0, op.dtype(node.inputs[0]))
    run = _pass(op, node, y, k)
    values, back = CELLS[node.op](op, run, node)
    if run.seen is not None:
        values, back = _padded(op, run.seen, values, back)
    some = next(t for t in g if t is not None)
    of_steps, *of_last = [*g, None, None][:3]
    dy = op.zeros(some, run.hidden) if of_steps is None else op.Gather(of_steps, k, axis=2)
    states = [
        op.zeros(some, run.first_cell) if t is None else op.Gather(t, k, axis=1)
        for t in (of_last if node.op == "LSTM" else of_last[:1])
    ]
    *before, da = _scan(op, states, {"dy": dy, **values}, back, backward=not run.backward)
    return op.MatMul(da, run.weights[0]) if i == 0 else before[i - 5]


def _padded(
    op: Builder, seen: Any, values: Mapping[str, Any], back: Step
) -> tuple[dict[str, Any], Step]:
    """The same where steps behind the end of a sequence pass on what comes back to them.

    By what an adjoint is multiplied there is zero; an LSTM's forget gate is one already.
    """
    masked = {n: v if n == "f" else op.Where(seen, v, 0.0) for n, v in values.items()}
    masked["behind"] = op.cast(op.Not(seen), op.dtype(next(iter(values.values()))))

    def step(op: Builder, states: Sequence[Any], v: Mapping[str, Any]) -> tuple[Any, Any]:
        (first, *others), da = back(op, states, v)
        return [op.Add(first, op.Mul(states[0], v["behind"])), *others], da

    return masked, step


def _pass(op: Builder, node: gs.Node, y: gs.Tensor, k: int) -> Pass:
    """Direction k of the operator."""

    def own(index: int) -> Any:
        given = optional_input(node, index)
        return None if given is None else op.Gather(given, k, axis=0)

    hidden = op.Gather(y, k, axis=1)
    backward = k == 1 or node.attrs.get("direction", "forward") == "reverse"
    zero = op.Mul(op.Gather(hidden, 0, axis=0), 0.0)
    first, biases = own(5), own(3)
    edge = op.Unsqueeze(zero if first is None else first, [0])
    lengths, seen, states = optional_input(node, 4), None, hidden
    if lengths is not None:
        places = op.Range(op.const(0), op.Squeeze(op.Shape(hidden, end=1)), op.const(1))
        ends = op.Unsqueeze(op.cast(lengths, np.int64), [0, 2])
        seen = op.Less(op.Unsqueeze(places, [1, 2]), ends)
        states = op.Where(seen, hidden, edge)  # to there one comes from behind, still at the first
    if backward:
        before = op.Concat(op.Slice(states, [1], [np.iinfo(np.int64).max], [0]), edge, axis=0)
    else:
        before = op.Concat(edge, op.Slice(states, [0], [-1], [0]), axis=0)
    first_cell = own(6)
    return Pass(
        node.inputs[0],
        before,
        (own(1), own(2)),
        None if biases is None else tuple(op.Split(biases, axis=0, num_outputs=2, outputs=2)),
        zero if first_cell is None else first_cell,
        hidden,
        backward,
        seen,
    )
