"""Bounds hold: by simulation for the probabilistic ones, by search for the deterministic ones."""

import json
import math

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx.parser import parse_model

from onnx_ecp import optimize
from onnx_ecp.cli.commands import main
from onnx_ecp.data import calibration
from onnx_ecp.errors import ModelError, UsageError
from onnx_ecp.evaluation import bounds
from onnx_ecp.evaluation.bounds import planning, sampling, units
from onnx_ecp.evaluation.bounds.norms import matrix_norm
from onnx_ecp.evaluation.bounds.pair import LayerStep
from onnx_ecp.evaluation.bounds.sampling import binomial_tail, conformal, upper_limit
from onnx_ecp.evaluation.bounds.telescoping import WEIGHTED
from onnx_ecp.evaluation.compare import compare
from onnx_ecp.evaluation.facts import model_of
from onnx_ecp.graph import signature

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
SAMPLES = 12

# name: (input shape of one sample, body of the original, body of the pruned model where it differs)
NETWORKS = {
    "one Gemm": ((6,), "y = Gemm(x, A, a)", None),
    "Gemm, scaled": ((6,), "h = Gemm<alpha = -0.5, beta = 2.0>(x, A, a) y = Relu(h)", None),
    "three layers": (
        (6,),
        "h = Gemm(x, A, a) r = Relu(h) i = Gemm<transB = 1>(r, T, a) s = Tanh(i) y = MatMul(s, B)",
        None,
    ),
    "MatMul and Add": (
        (6,),
        "h = MatMul(x, A) i = Add(h, a) r = Sigmoid(i) y = MatMul(r, B)",
        None,
    ),
    "a bias that compensation made": (
        (6,),
        "h = MatMul(x, A) r = LeakyRelu<alpha = 0.2>(h) y = MatMul(r, B)",
        "g = MatMul(x, A) h = Add(g, a) r = LeakyRelu<alpha = 0.2>(h) y = MatMul(r, B)",
    ),
    "a Gemm that got its C": (
        (6,),
        "h = Gemm(x, A) r = Relu(h) y = MatMul(r, B)",
        "h = Gemm(x, A, a) r = Relu(h) y = MatMul(r, B)",
    ),
    "residual": (
        (5,),
        "h = MatMul(x, T) r = Relu(h) i = MatMul(r, T) s = Add(i, x) y = MatMul(s, B)",
        None,
    ),
    "tokens and Softmax": ((3, 6), "h = MatMul(x, A) i = Add(h, a) y = Softmax(i)", None),
    "LogSoftmax": ((6,), "h = MatMul(x, A) y = LogSoftmax(h)", None),
    "scaling and joining": (
        (6,),
        """h = MatMul(x, A) i = Mul(h, a) j = Sub(a, i) r = Clip(j, zero, six) k = Div(r, a)
           m = Concat<axis = 1>(k, h) f = Flatten(m) y = Softplus(f)""",
        None,
    ),
    "transposed convolutions": (
        (3, 4, 4),
        """h = ConvTranspose<strides = [2, 2], pads = [1, 0, 0, 1]>(x, E, d) r = Relu(h)
           n = BatchNormalization(r, c, d, d, v)
           i = ConvTranspose<group = 3, dilations = [2, 1]>(n, F)
           p = GlobalAveragePool(i) y = Flatten(p)""",
        None,
    ),
    "convolutions": (
        (2, 6, 6),
        """h = Conv<pads = [1, 1, 1, 1]>(x, C, c) r = Relu(h)
           p = MaxPool<kernel_shape = [2, 2], strides = [1, 1]>(r)
           i = Conv<strides = [2, 2]>(p, D) n = BatchNormalization(i, c, d, d, v)
           q = AveragePool<kernel_shape = [2, 2]>(n) y = Flatten(q)""",
        None,
    ),
    "grouped convolution and global mean": (
        (2, 6, 6),
        "h = Conv<group = 2, dilations = [2, 2]>(x, G) t = Tanh(h) g = GlobalAveragePool(t) "
        "y = Flatten(g)",
        None,
    ),
}
SHAPES = {
    "A": (6, 5), "a": (5,), "T": (5, 5), "B": (5, 3), "C": (3, 2, 3, 3), "c": (3,),
    "D": (3, 3, 2, 2), "d": (3,), "v": (3,), "G": (4, 1, 3, 3),
    "E": (3, 3, 3, 3), "F": (3, 2, 2, 3),
}  # fmt: skip


def network(body, shape, values, more_axes=0):
    read = [name for name in SHAPES if f" {name}" in body.replace("(", "( ").replace(")", " )")]
    dims = ", ".join(map(str, shape))
    proto = parse_model(f"{HEAD} g (float[N, {dims}] x) => (float[N, K] y) {{ {body} }}")
    if " zero" in body:
        values = {**values, "zero": np.float32(0), "six": np.float32(6)}
        read += ["zero", "six"]
    for axis in range(more_axes):
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_param = f"S{axis}"
    if "Softmax(i)" in body:
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_param = "L"
    for name in read:
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(np.asarray(values[name], np.float32), name)
        )
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.fixture(params=NETWORKS)
def models(request, rng):
    """Original, pruned, and a batch of inputs in [-1, 2]."""
    shape, body, other = NETWORKS[request.param]
    values = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    values["v"] = np.abs(values["v"]) + 0.5
    pruned = {n: np.where(np.abs(v) > 0.4, v, 0) for n, v in values.items()}
    pruned |= {"v": values["v"], "d": values["d"]}
    if "Mul(h, a)" in body:
        pruned["a"] = values["a"]  # a divisor
    x = rng.uniform(-1, 2, size=(SAMPLES, *shape)).astype(np.float32)
    return network(body, shape, values), network(other or body, shape, pruned), x


def outputs(proto, x):
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {"x": x})[0].astype(np.float64)


def gaps(a, b, x):
    return np.linalg.norm((outputs(b, x) - outputs(a, x)).reshape(len(x), -1), axis=1)


@pytest.mark.slow
def test_the_deterministic_bound_holds_for_every_sample(models):
    a, b, x = models
    for i in range(len(x)):
        found = bounds.bound(a, b, x[i : i + 1], metric="l2-raw")
        assert found.per_sample.refused == ""
        assert found.per_sample.gap >= gaps(a, b, x[i : i + 1])[0] * (1 - 1e-5) - 1e-6


def test_the_deterministic_bound_holds_in_the_whole_box(models, rng):
    a, b, x = models
    found = bounds.bound(a, b, input_range={"": (-1.0, 2.0)})
    if "LogSoftmax" in {node.op_type for node in a.graph.node}:
        assert "LogSoftmax" in found.box.refused
        return
    corners = rng.choice([-1.0, 2.0], size=(2000, *x.shape[1:])).astype(np.float32)
    assert found.box.gap >= gaps(a, b, corners).max()
    assert found.box.gap >= bounds.bound(a, b, x, metric="l2-raw").per_sample.gap


def test_a_model_is_no_distance_from_itself(models):
    a, _, x = models
    found = bounds.bound(a, a, x)
    assert found.per_sample.gap == found.measured == 0


def test_one_linear_layer_is_bounded_exactly(rng):
    a, b = (
        network("y = Gemm(x, A, a)", (6,), {n: rng.normal(size=s) for n, s in SHAPES.items()})
        for _ in range(2)
    )
    x = rng.normal(size=(20, 6)).astype(np.float32)
    found = bounds.bound(a, b, x, metric="l2-raw")
    np.testing.assert_allclose(found.per_sample.gap, gaps(a, b, x).max(), rtol=1e-5)
    corner = np.array(np.meshgrid(*[[-1, 1]] * 6), np.float32).reshape(6, -1).T
    one = bounds.bound(a, b, input_range={"x": (-1, 1)})
    assert gaps(a, b, corner).max() <= one.box.gap <= 3 * gaps(a, b, corner).max()


REFUSED = {
    "Sinh": "h = MatMul(x, A) y = Sinh(h)",
    "Mul": "h = MatMul(x, A) y = Mul(h, h)",
    "Transpose": "h = MatMul(x, A) y = Transpose<perm = [1, 0]>(h)",
    "Gemm": "y = Gemm<transA = 1>(x, A)",
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_named_and_the_rest_still_bounded(body, rng):
    values = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    model = network(body, (6,), values)
    found = bounds.bound(model, model, rng.normal(size=(6, 6)).astype(np.float32))
    op = model.graph.node[-1].op_type
    assert op in found.per_sample.refused
    assert found.per_sample.gap is None
    assert found.conformal.samples == 6


def test_models_that_are_not_the_same_graph_have_no_deterministic_bound(rng):
    values = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    a = network("h = MatMul(x, A) y = Relu(h)", (6,), values)
    b = network("h = MatMul(x, A) y = Tanh(h)", (6,), values)
    found = bounds.bound(a, b, np.zeros((3, 6), np.float32))
    assert "'y'" in found.per_sample.refused
    b.graph.node[-1].output[0] = b.graph.output[0].name = "other"
    with pytest.raises(ModelError, match="outputs"):
        bounds.bound(a, b, np.zeros((3, 6), np.float32))


CONVOLUTIONS = {
    "valid": ({}, (3, 2, 3, 3), (6, 5)),
    "strided": ({"strides": [2, 2], "pads": [1, 1, 1, 1]}, (3, 2, 3, 3), (6, 7)),
    "stride larger than the kernel": ({"strides": [3, 3]}, (3, 2, 2, 2), (7, 7)),
    "dilated": ({"dilations": [2, 1], "pads": [2, 1, 2, 1]}, (2, 2, 3, 3), (6, 6)),
    "grouped": ({"group": 2}, (4, 1, 3, 3), (6, 6)),
    "one dimension": ({"strides": [2], "dilations": [2]}, (3, 2, 3), (9,)),
}
TRANSPOSED = {
    "whole": ({}, (2, 3, 3, 3), (4, 3)),
    "strided": ({"strides": [2, 2], "pads": [1, 1, 1, 1]}, (2, 3, 3, 3), (4, 3)),
    "stride larger than the kernel": ({"strides": [3, 3]}, (2, 3, 2, 2), (3, 3)),
    "dilated": ({"dilations": [2, 1]}, (2, 2, 3, 3), (4, 4)),
    "grouped": ({"group": 2, "strides": [2, 1]}, (4, 3, 3, 2), (4, 3)),
    "of a shape": ({"output_shape": [8, 6], "strides": [2, 2]}, (2, 3, 3, 3), (4, 3)),
}


@pytest.mark.parametrize(
    ("op", "attributes", "shape", "spatial"),
    [
        *(("Conv", *case) for case in CONVOLUTIONS.values()),
        *(("ConvTranspose", *case) for case in TRANSPOSED.values()),
    ],
    ids=[*CONVOLUTIONS, *(f"transposed, {name}" for name in TRANSPOSED)],
)
def test_the_norm_of_a_convolution_is_not_underestimated(op, attributes, shape, spatial, rng):
    w = rng.normal(size=shape).astype(np.float32)
    channels = shape[1] * attributes.get("group", 1) if op == "Conv" else shape[0]
    node = onnx.helper.make_node(op, ["x", "w"], ["y"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [None, channels, *spatial])],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    size = channels * math.prod(spatial)
    images = np.eye(size, dtype=np.float32).reshape(size, channels, *spatial)
    matrix = outputs(model, images).reshape(size, -1)
    exact = matrix_norm(matrix)
    step = LayerStep(node, {}, {}, [])
    weighted = WEIGHTED[op]
    columns, _ = weighted.columns(step, 0, w)
    bound = weighted.norm(step, columns, (1, channels, *spatial))
    assert exact * (1 - 1e-5) <= bound <= 2 * exact


# From tables of exact binomial limits: (count, n, one-sided confidence) -> upper limit.
LIMITS = {
    (0, 100, 0.95): 1 - 0.05 ** (1 / 100),
    (0, 10, 0.975): 0.3084971,
    (1, 10, 0.975): 0.4450161,
    (5, 50, 0.975): 0.2181354,
    (10, 100, 0.975): 0.1762226,
    (9, 10, 0.95): 1 - (1 - 0.95 ** (1 / 10)),
    (10, 10, 0.95): 1.0,
}


@pytest.mark.parametrize(("case", "limit"), LIMITS.items(), ids=map(str, LIMITS))
def test_clopper_pearson_limits_are_those_of_the_tables(case, limit):
    assert upper_limit(*case) == pytest.approx(limit, abs=5e-7)


@pytest.mark.parametrize(("count", "n"), [(0, 5), (3, 5), (7, 40), (40, 60)])
def test_the_binomial_tail_is_the_sum_of_its_terms(count, n):
    for p in (0.01, 0.3, 0.9):
        terms = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count + 1)]
        assert binomial_tail(count, n, p) == pytest.approx(sum(terms), rel=1e-10)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_clopper_pearson_covers(share, rng):
    n, confidence, trials = 80, 0.9, 4000
    limits = np.array([upper_limit(k, n, confidence) for k in range(n + 1)])
    covered = limits[rng.binomial(n, share, trials)] >= share
    assert covered.mean() >= confidence - 3 * math.sqrt(0.09 / trials)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_conformal_gap_covers_one_new_gap_and_is_tight(alpha, rng):
    n, trials = 59, 4000
    draws = rng.exponential(size=(trials, n + 1)) ** 3
    found = np.array([conformal(row[:n], alpha).gap for row in draws])
    exceeded = (draws[:, n] > found).mean()
    noise = 3 * math.sqrt(alpha / trials)
    assert alpha - 1 / (n + 1) - noise <= exceeded <= alpha + noise


def test_too_few_samples_bound_nothing():
    few = conformal(np.ones(18), 0.05)
    assert few.gap == math.inf
    assert few.samples_needed == 19
    assert conformal(np.ones(19), 0.05).gap == 1


def layers_of(rng, draw):
    return {f"l{i}": draw(s) for i, s in enumerate([(40, 60), (30, 40), (5, 30)])}


DRAWS = {
    "uniform": lambda rng, s: rng.uniform(-1, 1, s) / math.sqrt(s[1]),
    "normal": lambda rng, s: rng.normal(size=s) / math.sqrt(s[1]),
    "heavy tails": lambda rng, s: rng.laplace(size=s) ** 3 / math.sqrt(s[1]),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_random_masks_stay_within_the_plan(draw, share, rng):
    w = layers_of(rng, lambda s: draw(rng, s))
    plan = planning.plan(w, "random", share, confidence=0.8)
    ratios = []
    for _ in range(200):
        norms = [
            matrix_norm(v * (rng.random(v.shape) < share)) / matrix_norm(v) for v in w.values()
        ]
        ratios.append(math.prod(1 + x for x in norms) - 1)
    assert np.mean(np.array(ratios) <= plan.gap) >= 0.8
    assert np.mean(ratios) <= plan.expected


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_magnitude_pruning_of_random_weights_stays_within_the_plan(draw, share, rng):
    fitted = layers_of(rng, lambda s: draw(rng, s))
    plan = planning.plan(fitted, "magnitude", share, confidence=0.8)
    flat = np.concatenate([np.abs(v).ravel() for v in fitted.values()])
    threshold = np.quantile(flat, share)
    within = 0
    for _ in range(100):
        fresh = layers_of(rng, lambda s: draw(rng, s))
        gone = [v * (np.abs(v) <= threshold) for v in fresh.values()]
        ratios = [
            matrix_norm(d) / matrix_norm(v) for d, v in zip(gone, fitted.values(), strict=True)
        ]
        within += math.prod(1 + x for x in ratios) - 1 <= plan.gap
    assert within >= 80


@pytest.mark.parametrize(("method", "power"), [("random", 0.5), ("magnitude", 1.5)])
def test_uniform_weights_have_the_norms_of_qian_and_klabjan(method, power, rng):
    width, share = 400, 0.3
    w = rng.uniform(-1, 1, (width, width)) / math.sqrt(width)
    (row,) = planning.plan({"l": w}, method, share, 0.95).layers
    expected = 2 / math.sqrt(3) * share**power
    gone = rng.random(w.shape) < share if method == "random" else np.abs(w) < share / 20
    assert row.typical * matrix_norm(w) == pytest.approx(expected, rel=0.03)
    assert matrix_norm(w * gone) == pytest.approx(expected, rel=0.1)
    assert row.limit >= row.expected


def test_the_largest_sparsity_keeps_to_eps_and_no_larger_one_does(rng):
    w = layers_of(rng, lambda s: rng.uniform(-1, 1, s))
    plan = planning.plan(w, "magnitude", 0.1, 0.95, eps=0.3)
    assert 0 < plan.largest_sparsity < 1
    total = sum(v.size for v in w.values())
    assert plan.largest_weights == math.floor(plan.largest_sparsity * total)
    assert planning.plan(w, "magnitude", plan.largest_sparsity, 0.95).gap <= 0.3
    assert planning.plan(w, "magnitude", plan.largest_sparsity + 2 / total, 0.95).gap > 0.3


def test_the_plan_holds_for_the_outputs_of_a_network(rng):
    values = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    body = "h = MatMul(x, A) r = Relu(h) y = MatMul(r, B)"
    model = network(body, (6,), values)
    plan = bounds.plan(model, "random", 0.2, confidence=0.5)
    x = rng.normal(size=(50, 6)).astype(np.float32)
    largest = matrix_norm(values["A"]) * matrix_norm(values["B"]) * np.linalg.norm(x, axis=1)
    held = 0
    for _ in range(40):
        pruned = {n: np.where(rng.random(v.shape) < 0.2, 0, v) for n, v in values.items()}
        held += np.all(gaps(model, network(body, (6,), pruned), x) <= plan.gap * largest)
    assert held >= 20


def test_the_command_prints_json(tmp_path, rng):
    values = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    body = "h = MatMul(x, A) r = Relu(h) y = MatMul(r, B)"
    pruned = {n: np.where(np.abs(v) > 0.3, v, 0) for n, v in values.items()}
    onnx.save(network(body, (6,), values), tmp_path / "a.onnx")
    onnx.save(network(body, (6,), pruned), tmp_path / "b.onnx")
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(40, 6)).astype(np.float32))
    a, b, d = (str(tmp_path / name) for name in ("a.onnx", "b.onnx", "d.npz"))
    words = ["bound", a, b, "-d", d, "--confidence", "0.9", "--eps", "1", "--json"]
    done = CliRunner().invoke(main, words)
    found = json.loads(done.output)
    assert found["conformal"]["alpha"] == 0.1
    assert found["conformal"]["gap"] <= found["measured"]
    assert 0 < found["above"]["limit"] <= 1
    assert all(found[k]["assumptions"] for k in ("conformal", "above", "flips", "per_sample"))
    done = CliRunner().invoke(main, ["bound", a, b, "-d", d, "--input-range", "x:-1,1"])
    assert "conformal" in done.output
    assert "assumed" in done.output
    words = ["bound", a, "--method", "magnitude", "--sparsity", "0.1", "--eps", "0.5", "--json"]
    planned = json.loads(CliRunner().invoke(main, words).output)
    assert planned["largest_weights"] >= 0
    assert planned["assumptions"]


def test_the_report_of_optimize_has_the_bounds_of_its_held_out_samples(tmp_path, rng):
    values = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    model = network("h = MatMul(x, A) r = Relu(h) y = MatMul(r, B)", (6,), values)
    x = rng.normal(size=(400, 6)).astype(np.float32)
    choices = {"method": "magnitude", "sparsity": 0.4}
    cleaned = optimize(model, {"x": x}, bound=True, **choices).report.bounds
    assert cleaned.per_sample.gap is None
    assert "--no-cleanup" in cleaned.per_sample.refused
    made = optimize(model, {"x": x}, bound=True, cleanup=False, **choices)
    found = made.report.bounds
    assert np.isclose(cleaned.measured, found.measured, rtol=1e-4)
    assert found.samples == made.report.calibration.held_out == 80
    assert 0 < found.conformal.gap <= found.measured <= found.per_sample.gap
    gap = made.report.gap
    assert gap.relative_error < found.measured
    plain = optimize(model, {"x": x}, bound=True, metric="l2-raw", **choices).report.bounds
    assert np.isclose(gaps(model, made.model, x), plain.measured, rtol=1e-5).any()
    assert optimize(model, {"x": x}, **choices).report.bounds is None
    with pytest.raises(UsageError, match="target"):
        optimize(model, {"x": x}, method="magnitude", max_error=0.1, bound=True)


@pytest.mark.parametrize("metric", ["l2", "l2-raw"])
def test_a_bound_that_constant_outputs_would_meet_is_called_vacuous(metric, rng):
    values = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    body = "h = MatMul(x, A) r = Relu(h) y = MatMul(r, B)"
    a = network(body, (6,), values)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    near = network(body, (6,), {n: v * (1 + 1e-3) for n, v in values.items()})
    far = network(body, (6,), {n: -v for n, v in values.items()})
    y = outputs(a, x)
    spread = 1 if metric == "l2-raw" else y.std(axis=0) * np.sqrt(y.shape[1])
    centred = (y if metric == "l2-raw" else y - y.mean(axis=0)) / spread
    norms = np.linalg.norm(centred, axis=1)
    found = bounds.bound(a, near, x, eps=float(np.median(norms)), metric=metric)
    assert found.vacuous == ()
    assert found.output_norm == pytest.approx(norms.max(), rel=1e-5)
    found = bounds.bound(a, far, x, eps=0.0, input_range={"": (-9, 9)}, metric=metric)
    assert set(found.vacuous) >= {"above", "per_sample", "box"}
    nothing = network(body, (6,), {n: 0 * v for n, v in values.items()})
    found = bounds.bound(a, nothing, x, eps=0.0, metric=metric)
    assert set(found.vacuous) >= {"conformal", "per_sample"}
    assert metric == "l2" or "above" in found.vacuous
    few = bounds.bound(a, near, x[:5], metric=metric)
    assert few.vacuous == ("conformal",)
    assert not bounds.plan(a, "magnitude", 0.0).vacuous
    assert bounds.plan(a, "random", 0.9).vacuous


def test_a_plan_takes_no_samples_and_a_pair_no_sparsity(tmp_path, rng):
    a = network("y = MatMul(x, A)", (6,), {n: rng.normal(size=s) for n, s in SHAPES.items()})
    onnx.save(a, tmp_path / "a.onnx")
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(40, 6)).astype(np.float32))
    model, data = str(tmp_path / "a.onnx"), str(tmp_path / "d.npz")
    for words in (
        ["bound", model, "--method", "magnitude", "-d", data],
        ["bound", model, "--method", "magnitude", "--input-range", "0,1"],
        ["bound", model, model, "-d", data, "--sparsity", "0.3"],
        ["bound", model, model, "--input-range", "0,1", "--eps", "1"],
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2
        assert "error:" in done.output
        assert "hint:" in done.output


# In units of the columns.


def rescaled(proto, scale, body):
    """The same network with another unit for every column of its last layer."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for tensor in found.graph.initializer:
        if tensor.name in LAST[body]:
            w = onnx.numpy_helper.to_array(tensor)
            wide = scale.reshape(-1, *(1,) * (w.ndim - 1)) if tensor.name == "C" else scale
            scaled = (w * wide).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, tensor.name))
    return found


LAST = {
    "h = MatMul(x, A) r = Relu(h) y = MatMul(r, B)": ("B",),
    "h = MatMul(x, A) r = Relu(h) m = MatMul(r, B) y = Add(m, d)": ("B", "d"),
    "h = Gemm(x, A, a) r = Tanh(h) y = Gemm(r, B, d)": ("B", "d"),
    "g = Relu(x) y = Conv<pads = [1, 1, 1, 1]>(g, C, c)": ("C", "c"),
}


@pytest.fixture(params=LAST)
def pruned_pair(request, rng):
    body = request.param
    conv = "Conv" in body
    values = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    pruned = {n: np.where(np.abs(v) > 0.4, v, 0) for n, v in values.items()}
    shape = (2, 6, 6) if conv else (6,)
    a, b = (network(body, shape, v, 2 * conv) for v in (values, pruned))
    return body, a, b, rng.normal(size=(50, *shape)).astype(np.float32)


@pytest.mark.parametrize("scale", [(1e-3, 1.0, 1e3), (7.0, 7.0, 7.0)], ids=str)
def test_the_unit_of_a_column_changes_no_bound(pruned_pair, scale):
    body, a, b, x = pruned_pair
    eps = 0.5
    one = bounds.bound(a, b, x, eps=eps, input_range={"": (-1, 1)})
    c, d = (rescaled(proto, np.float32(scale), body) for proto in (a, b))
    other = bounds.bound(c, d, x, eps=eps, input_range={"": (-1, 1)})
    assert (other.above, other.vacuous) == (one.above, one.vacuous)
    for found in ("measured", "output_norm"):
        assert getattr(other, found) == pytest.approx(getattr(one, found), rel=1e-3)
    for found in ("conformal", "per_sample", "box"):
        assert getattr(other, found).gap == pytest.approx(getattr(one, found).gap, rel=1e-3)
    assert other.per_sample.ratio == pytest.approx(one.per_sample.ratio, rel=1e-3)


def test_the_root_mean_square_of_gaps_is_the_error_of_compare(pruned_pair):
    _, a, b, x = pruned_pair
    data = calibration.load(x, signature(a))
    first, second = model_of(a), model_of(b)
    settings = {"provider": "cpu", "threads": None, "batch_size": 7}
    found = units.units_over(first, data, None, **settings)
    gaps_of = sampling.measure_gaps(first, second, data, units=found, **settings)
    gap = compare(first, second, data).gap
    assert np.sqrt(np.square(gaps_of.gaps).mean()) == pytest.approx(gap.relative_error)
    assert np.sqrt(np.square(gaps_of.norms).mean()) == pytest.approx(1.0)


def test_the_bound_in_units_holds_for_every_sample(pruned_pair):
    _, a, b, x = pruned_pair
    found = bounds.bound(a, b, x, input_range={"": (-9, 9)})
    assert found.measured * (1 - 1e-5) <= found.per_sample.gap <= found.box.gap
    assert not found.plain


def test_a_column_without_weight_counts_in_no_bound(rng):
    values = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    body = "h = MatMul(x, A) r = Relu(h) y = MatMul(r, B)"
    other = values | {"B": values["B"] * np.float32([1, 1, 0.5])}
    a, b = network(body, (6,), values), network(body, (6,), other)
    x = rng.normal(size=(30, 6)).astype(np.float32)
    assert bounds.bound(a, b, x).measured > 0.1
    found = bounds.bound(a, b, x, output_weights={"y:2": 0.0})
    assert found.measured == found.per_sample.gap == 0
    with pytest.raises(UsageError, match="output_weights"):
        bounds.bound(a, b, x, output_weights={"y:2": 0.0}, metric="l2-raw")
    with pytest.raises(UsageError, match="no output"):
        bounds.bound(a, b, x, output_weights={"z": 0.0})
    with pytest.raises(UsageError, match="metric"):
        bounds.bound(a, b, x, metric="kl")


@pytest.mark.parametrize(
    "choices",
    [
        {"data": None},
        {"data": np.zeros((2, 6), np.float32), "confidence": 1.0},
        {"input_range": {"z": (0, 1)}},
        {"input_range": {"x": (1, 0)}},
    ],
)
def test_what_makes_no_sense_is_refused(choices, rng):
    values = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    model = network("y = MatMul(x, A)", (6,), values)
    with pytest.raises(UsageError):
        bounds.bound(model, model, **choices)


def test_only_random_and_magnitude_can_be_planned(rng):
    model = network("y = MatMul(x, A)", (6,), {n: rng.normal(size=s) for n, s in SHAPES.items()})
    with pytest.raises(UsageError, match="ecp"):
        bounds.plan(model, "ecp", 0.1)
    silu = network(
        "h = MatMul(x, A) g = Sinh(h) y = MatMul(g, B)",
        (6,),
        {n: rng.normal(size=s) for n, s in SHAPES.items()},
    )
    with pytest.raises(bounds.CannotFollow, match="Sinh"):
        bounds.plan(silu, "random", 0.1)
