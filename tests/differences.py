"""Adjoints against directional differences: the one check behind all tests of gradient rules.

For seeds v and a direction d of the inputs, ``<v, change of y along d>`` equals ``<adjoint, d>``.
"""

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnx_ecp.gradients.reverse import adjoints
from onnx_ecp.graph.builder import Builder, Fact

PROBES = 3


class Erf(OpRun):
    """The reference rounds to single precision."""

    def _run(self, x):
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Pad(OpRun):
    """The reference refuses negative padding."""

    def _run(self, x, pads, value=None, axes=None, mode=None):
        axes = range(x.ndim) if axes is None else axes
        begin, end = np.zeros((2, x.ndim), np.int64)
        for place, axis in enumerate(axes):
            begin[axis], end[axis] = pads[place], pads[place + len(axes)]
        cut = tuple(
            slice(max(-b, 0), n - max(-e, 0)) for b, e, n in zip(begin, end, x.shape, strict=True)
        )
        width = [(max(b, 0), max(e, 0)) for b, e in zip(begin, end, strict=True)]
        if mode in (None, "constant"):
            filling = {"constant_values": 0 if value is None else np.asarray(value).item()}
        else:
            filling = {}
        return (np.pad(x[cut], width, mode=mode or "constant", **filling).astype(x.dtype),)


Erf.op_domain = Pad.op_domain = ""


def in_reference(model):
    """A function from feeds to outputs by name, by onnx's reference implementation."""
    evaluator = ReferenceEvaluator(model, new_ops=[Erf, Pad])
    names = [y.name for y in model.graph.output]
    return lambda feeds: dict(zip(names, evaluator.run(None, feeds), strict=True))


def in_onnxruntime(model):
    """A function from feeds to outputs by name, by ONNX Runtime with all its optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [y.name for y in model.graph.output]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def facts_of(model, feeds, engine):
    """Shape and dtype of every tensor that an engine gives out."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    known = {y.name for y in probed.graph.output}
    names = {y for node in probed.graph.node for y in node.output if y} - known
    probed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    values = {**engine(probed)(feeds), **feeds}
    return {n: Fact(np.shape(v), np.asarray(v).dtype) for n, v in values.items() if v is not None}


def float_outputs(model, facts):
    """Names of the outputs that can carry a seed."""
    return [y.name for y in model.graph.output if np.issubdtype(facts[y.name].dtype, np.floating)]


def with_adjoints(model, facts, wrt, seeded):
    """The model with a seed input for each of ``seeded`` and the adjoints of ``wrt`` as outputs.

    Returns:
        The model, the adjoints' names by input, and the reasons why an input has none.
    """
    graph = gs.import_onnx(model)
    seeds = {
        y: gs.Variable(f"seed/{y}", facts[y].dtype, [None] * (len(facts[y].shape) + 1))
        for y in seeded
    }
    graph.inputs += seeds.values()
    found = adjoints(graph, Builder(graph, facts), wrt, seeds)
    graph.outputs = []
    for name, tensor in found.tensors.items():
        tensor.dtype = facts[name].dtype
        graph.outputs.append(tensor)
    exported = gs.export_onnx(graph, do_type_check=False)
    exported.ir_version = model.ir_version
    return exported, {n: t.name for n, t in found.tensors.items()}, found.blocked


def disagreement(model, extended, names, feeds, seeded, rng, *, engine, differences, step):
    """Largest error of <adjoint, direction>, relative to the largest true value.

    Args:
        model: the operator alone.
        extended: the same with adjoints, from ``with_adjoints``.
        names: names of the adjoints by input.
        feeds: inputs by name, in the dtype that ``engine`` computes the adjoints in.
        seeded: outputs that carry seeds.
        rng: source of direction and seeds.
        engine: runs the adjoints.
        differences: runs the operator; the reference does so in double precision.
        step: of the central difference; any step is exact for what is linear.
    """
    dtype = np.float64 if differences is in_reference else np.float32
    direction = {n: rng.standard_normal(feeds[n].shape) for n in names}
    run = differences(model)

    def along(sign):
        moved = {n: (feeds[n] + sign * step * d).astype(dtype) for n, d in direction.items()}
        rest = {n: v.astype(dtype) if v.dtype.kind == "f" else v for n, v in feeds.items()}
        return run({**rest, **moved})

    ahead, behind = along(1), along(-1)
    slopes = {y: (ahead[y].astype(float) - behind[y]) / (2 * step) for y in seeded}
    seeds = {y: rng.standard_normal((PROBES, *s.shape)) for y, s in slopes.items()}
    expected = sum((seeds[y] * slopes[y]).reshape(PROBES, -1).sum(1) for y in seeded)
    own = feeds[next(iter(names))].dtype
    typed = {f"seed/{y}": v.astype(own) for y, v in seeds.items()}
    got = engine(extended)({**feeds, **typed})
    for n, adjoint in names.items():
        assert got[adjoint].shape == (PROBES, *feeds[n].shape), n
    found = sum((got[names[n]] * d).reshape(PROBES, -1).sum(1) for n, d in direction.items())
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-3)
