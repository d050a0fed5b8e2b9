"""Every column of every output counts in units of its own spread, whatever its unit and offset."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.cli.commands import main
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.errors import UsageError
from onnx_ecp.evaluation.compare import measure_gap
from onnx_ecp.graph import load
from onnx_ecp.graph.columns import column_axes, counting_outputs
from onnx_ecp.runtime.session import Session
from onnx_ecp.statistics.columns import Measure, Spread

WIDTHS = (6, 16, 12, 4)
# What the columns of the last layer are multiplied with: units of physics.
UNITS = np.array([1e4, 1.0, 1e-3, 1e-6])
OFFSETS = np.array([-3e4, 288.0, 0.0, 2e-6])


def network(
    rng: np.random.Generator, scale: np.ndarray | None = None, offset: np.ndarray | None = None
) -> onnx.ModelProto:
    """Three layers; the last one's rows and biases in other units, the outputs shifted."""
    scale = np.ones(WIDTHS[-1]) if scale is None else scale
    offset = np.zeros(WIDTHS[-1]) if offset is None else offset
    weights = [rng.normal(0, 0.5, (o, i)) for i, o in itertools.pairwise(WIDTHS)]
    biases = [rng.normal(0, 0.3, len(w)) for w in weights]
    weights[-1] = weights[-1] * scale[:, None]
    biases[-1] = biases[-1] * scale + offset
    body = "".join(
        f"z{k} = Gemm<transB = 1>({'x' if k == 0 else f'a{k}'}, W{k}, b{k}) "
        + (f"a{k + 1} = Tanh(z{k}) " if k < 2 else "y = Identity(z2)")
        for k in range(3)
    )
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> '
        f"net (double[n, 6] x) => (double[n, 4] y) {{ {body} }}"
    )
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        model.graph.initializer.extend(
            numpy_helper.from_array(v, f"{n}{k}") for n, v in (("W", w), ("b", b))
        )
    return model


def inputs(rng: np.random.Generator, samples: int = 200) -> np.ndarray:
    return rng.normal(size=(samples, 3)) @ rng.normal(size=(3, 6))


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return Session(model).run({"x": x})["y"]


def column_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(b - a).mean(axis=0) / a.var(axis=0))


@pytest.fixture
def seed(rng) -> int:
    return int(rng.integers(2**31))


METHODS = {
    "ecp-refit": {"method": "ecp-refit", "stages": 3},
    "fine-tuned": {"method": "ecp-refit", "stages": 2, "finetune_steps": 20},
    "ecp": {"method": "ecp"},
    "obd": {"method": "obd"},
    "units": {"method": "ecp-refit", "stages": 2, "granularity": "unit"},
}


@pytest.mark.slow
@pytest.mark.parametrize("choices", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("offset", [None, OFFSETS], ids=["scaled", "scaled and shifted"])
def test_units_and_offsets_of_columns_change_no_mask(choices, offset, seed, rng):
    plain = network(np.random.default_rng(seed))
    scaled = network(np.random.default_rng(seed), UNITS, offset)
    x = inputs(rng)
    found = [onnx_ecp.optimize(m, x, sparsity=0.6, **choices) for m in (plain, scaled)]
    a, b = (f.masks or {} for f in found)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    errors = [f.report.gap.relative_error for f in found]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    fresh = inputs(np.random.default_rng(seed + 1))
    made = [
        column_errors(run(m, fresh), run(f.model, fresh))
        for m, f in zip((plain, scaled), found, strict=True)
    ]
    np.testing.assert_allclose(*made, rtol=1e-3)


# Methods whose objective is the error of the outputs, or which look at nothing.
OUTPUT_ERROR = ("ecp-refit", "ecp", "obs", "obd", "gradient-magnitude", "nonlinear", "random")
# Those that compare weights of a row with each other alone, under N:M, whatever their objective.
WITHIN_ROWS = (*OUTPUT_ERROR, "magnitude", "wanda", "flap", "sparsegpt", "obc")
GRANULARITIES = {
    "weights": (OUTPUT_ERROR, {"sparsity": 0.6}),
    "layer by layer": (OUTPUT_ERROR, {"sparsity": 0.6, "scope": "layer"}),
    "2:4": (WITHIN_ROWS, {"sparsity": "2:4"}),
    "units": (OUTPUT_ERROR, {"sparsity": 0.4, "granularity": "unit"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "choices"),
    [
        pytest.param(method, choices, id=f"{method}, {name}")
        for name, (methods, choices) in GRANULARITIES.items()
        for method in methods
    ],
)
def test_a_last_layer_in_other_units_loses_the_same_weights(method, choices, seed, rng):
    x, widths = inputs(rng), {"cleanup": False, "method": method} | choices
    found = [
        onnx_ecp.optimize(network(np.random.default_rng(seed), scale), x, **widths)
        for scale in (None, UNITS)
    ]
    a, b = (f.masks for f in found)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    errors = [f.report.gap.relative_error for f in found]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("method", onnx_ecp.METHODS)
def test_the_page_of_every_method_says_what_units_do_to_it(method):
    page = (Path(__file__).parents[1] / "docs" / "methods" / f"{method}.md").read_text()
    (said,) = [line for line in page.splitlines() if line.startswith("**Units of outputs.**")]
    assert ("no unit changes the masks" in said.lower()) == (method in OUTPUT_ERROR)
    assert ("paper's" in said) == (method != "random")


def test_the_plain_sum_is_another_measure_and_loses_small_columns(seed, rng):
    model, x = network(np.random.default_rng(seed), UNITS), inputs(rng)
    errors = {
        metric: column_errors(
            run(model, x), run(onnx_ecp.optimize(model, x, sparsity=0.7, metric=metric).model, x)
        )
        for metric in ("l2", "l2-raw")
    }
    assert errors["l2"].max() < 0.5 < errors["l2-raw"].max()


def test_the_stated_error_is_what_a_user_would_compute(seed, rng):
    """On held-out samples, relative to the spread over the others."""
    model, x = network(np.random.default_rng(seed), UNITS, OFFSETS), inputs(rng)
    result = onnx_ecp.optimize(model, x, sparsity=0.6, method="ecp")
    rest, held_out = Calibration({"x": x}, True, "test", False, 0).split(0.2, 0)
    y, z = (run(m, held_out.arrays["x"]) for m in (model, result.model))
    mean_squares = np.square(z - y).mean(axis=0) / run(model, rest.arrays["x"]).var(axis=0)
    gap = result.report.gap
    assert gap.relative_error == pytest.approx(np.sqrt(mean_squares.mean()), rel=1e-6)
    (found,) = gap.outputs
    worst = found.worst[0]
    assert (worst.column, found.axis, found.columns) == (mean_squares.argmax(), 1, 4)
    assert worst.relative_error == pytest.approx(np.sqrt(mean_squares.max()), rel=1e-6)


def test_importances_add_up_to_the_error(seed, rng):
    """Of one small removal, which the linearisation describes."""
    model, x = network(np.random.default_rng(seed), UNITS, OFFSETS), inputs(rng, 2000)
    report = onnx_ecp.optimize(model, x, sparsity=0.02, method="ecp", cleanup=False).report
    assert report.predicted_error == pytest.approx(report.gap.relative_error, rel=0.5)


def test_a_column_that_never_varies_is_named_and_left_out(seed, rng):
    x = inputs(rng)
    still = UNITS * [1, 1, 0, 1]
    model = network(np.random.default_rng(seed), still, np.array([0, 0, 7.0, 0]))
    result = onnx_ecp.optimize(model, x, sparsity=0.6)
    (output,) = result.report.gap.outputs
    assert output.left_out == (2,)
    assert any("columns 2 of output 'y' never vary" in w for w in result.report.warnings)
    assert {c.column for c in output.worst} == {0, 1, 3}
    assert column_errors(run(model, x)[:, [0, 1, 3]], run(result.model, x)[:, [0, 1, 3]]).max() < 1


def test_a_lost_column_is_warned_of(seed, rng):
    model, x = network(np.random.default_rng(seed), UNITS), inputs(rng)
    lost = network(np.random.default_rng(seed), UNITS * [1, 1, 1, 0])
    gap = onnx_ecp.compare(model, lost, x).gap
    (warning,) = gap.warnings
    assert "little is left of columns 3 (1" in warning


def test_weights_of_outputs_and_columns_are_followed(seed, rng):
    model, x = network(np.random.default_rng(seed)), inputs(rng)

    def errors(weights: dict[str, float]) -> np.ndarray:
        made = onnx_ecp.optimize(model, x, sparsity=0.7, output_weights=weights)
        return column_errors(run(model, x), run(made.model, x))

    plain = errors({})
    for column in range(4):
        assert errors({f"y:{column}": 100.0})[column] < plain[column]
    gap = onnx_ecp.compare(model, onnx_ecp.optimize(model, x, sparsity=0.7).model, x).gap
    only = onnx_ecp.compare(
        model, onnx_ecp.optimize(model, x, sparsity=0.7).model, x,
        output_weights={"y:0": 0, "y:1": 0, "y:2": 0},
    ).gap  # fmt: skip
    last = next(c for c in gap.outputs[0].worst if c.column == 3)
    assert only.relative_error == pytest.approx(last.relative_error)


WRONG = {
    "no output": ({"z": 1.0}, "'z' is no output"),
    "no column": ({"y:4": 1.0}, "has no column 4; it has 4"),
    "negative": ({"y": -1.0}, "0 or more"),
    "nothing left": ({"y": 0.0}, "no output is left"),
    "not finite": ({"y": float("nan")}, "finite"),
}


@pytest.mark.parametrize(("weights", "message"), WRONG.values(), ids=WRONG)
def test_weights_that_say_nothing_are_refused(weights, message, seed, rng):
    model = network(np.random.default_rng(seed))
    with pytest.raises(UsageError, match=message):
        onnx_ecp.optimize(model, inputs(rng), output_weights=weights)


def test_the_command_line_takes_weights(seed, rng, tmp_path, capsys):
    model, x = network(np.random.default_rng(seed)), inputs(rng)
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "in.npz", x=x)
    text = [str(tmp_path / name) for name in ("in.onnx", "out.onnx")]
    for command in (["optimize"], ["compare", "--json", "-d", str(tmp_path / "in.npz")]):
        with pytest.raises(SystemExit) as end:
            main([command[0], *text, *command[1:], "--output-weights", "y:0=2"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
    assert len(json.loads(shown)["gap"]["outputs"][0]["worst"]) == 4


def test_one_sample_has_no_spread_and_says_so(seed, rng):
    model = network(np.random.default_rng(seed))
    lost = network(np.random.default_rng(seed + 1))
    x = inputs(rng, 1)
    gap = onnx_ecp.compare(model, lost, x).gap
    y, z = run(model, x), run(lost, x)
    assert gap.relative_error == pytest.approx(np.sqrt(np.square((z - y) / y).mean()))
    assert any("no column of any output varies" in text for text in gap.warnings)


# Sums.


@pytest.mark.parametrize("axis", [None, 1, 2])
@pytest.mark.parametrize("sizes", [(1, 39), (7, 13, 20), (40,)])
def test_spreads_of_batches_add_up(axis, sizes, rng):
    y = rng.normal(300, 1, (40, 3, 5))
    parts = np.split(y, np.cumsum(sizes)[:-1])
    spread = Spread.of(parts[0], axis, len(parts[0]))
    for part in parts[1:]:
        spread += Spread.of(part, axis, len(part))
    flat = y.reshape(-1, 1) if axis is None else np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis])
    np.testing.assert_allclose(spread.variance, flat.var(axis=0), rtol=1e-9)
    np.testing.assert_allclose(spread.mean_square, np.square(flat).mean(axis=0), rtol=1e-12)


def test_batches_with_other_numbers_of_columns_are_one_column(rng):
    a, b = rng.normal(2, 1, (4, 3)), rng.normal(5, 3, (6, 7))
    spread = Spread.of(a, 1, 4) + Spread.of(b, 1, 6)
    whole = np.concatenate([a.ravel(), b.ravel()])
    assert spread.axis is None
    np.testing.assert_allclose(spread.variance, [whole.var()], rtol=1e-12)


def test_values_that_are_not_finite_are_left_out_of_the_spread(rng):
    y = rng.normal(size=(20, 2))
    y[3, 0], y[5, 1] = np.nan, np.inf
    variance = Spread.of(y, 1, 20).variance
    np.testing.assert_allclose(variance, [np.nanvar(y[:, 0]), np.delete(y[:, 1], 5).var()])


def test_factors_make_squares_add_up_to_the_error(rng):
    y = {"a": rng.normal(3, 2, (30, 4, 5)), "b": rng.normal(0, 1e-3, (30, 2))}
    axes = {"a": 1, "b": 1}
    z = {name: v + rng.normal(size=v.shape) * v.std() for name, v in y.items()}
    measure = Measure.of({n: Spread.of(v, axes[n], 30) for n, v in y.items()}, {"b": 3.0})
    squares = {n: np.square(z[n] - y[n]) for n in y}
    mean = {"a": squares["a"].mean(axis=(0, 2)), "b": squares["b"].mean(axis=0)}
    total = sum(float((squares[n] * f**2).sum()) for n, f in measure.factors().items()) / 30
    assert np.sqrt(total) == pytest.approx(measure.overall(mean), rel=1e-12)
    by_output = [measure.output(n, mean[n]) ** 2 for n in y]
    assert total == pytest.approx((by_output[0] + 3 * by_output[1]) / 4, rel=1e-12)


# Which axis holds the columns.

AXES = {
    "rows": ("float[n, 6] x", "y = MatMul(x, W)", "float[6, 3]", "float[n, 3] y", 1),
    "tokens": ("float[n, 4, 6] x", "y = MatMul(x, W)", "float[6, 9]", "float[n, 4, 9] y", 2),
    "tokens, biased": (
        "float[n, 4, 6] x",
        "z = MatMul(x, W) y = Add(W2, z)",
        "float[6, 9]",
        "float[n, 4, 9] y",
        2,
    ),
    "image": (
        "float[n, 2, 5, 5] x", "y = Conv(x, W)", "float[3, 2, 1, 1]", "float[n, 3, 5, 5] y", 1
    ),
    "channels last": (
        "float[n, 2, 5, 5] x",
        "z = Conv(x, W) t = Transpose<perm = [0, 2, 3, 1]>(z) y = Sigmoid(t)",
        "float[3, 2, 1, 1]", "float[n, 5, 5, 3] y", 3,
    ),
    "signal": ("float[n, 2, 9] x", "y = Conv(x, W)", "float[12, 2, 1]", "float[n, 12, 9] y", 1),
    "classes of a softmax": (
        "float[n, 6, 2] x", "z = CumSum(x, W) y = Softmax<axis = 1>(z)", "int32[1]",
        "float[n, 6, 2] y", 1,
    ),
    "boxes first": (
        "float[n, 3, 9] x", "y = Concat<axis = 1>(x, x)", "float[1]", "float[n, 6, 9] y", 1,
    ),
    "boxes last": (
        "float[n, 9, 3] x", "y = Concat<axis = 2>(x, x)", "float[1]", "float[n, 9, 6] y", 2,
    ),
    "a free axis is of positions": (
        "float[n, t, 6] x", "y = Concat<axis = 2>(x, x)", "float[1]", "float[n, t, 12] y", 2,
    ),
    "one number a sample": (
        "float[n, 6] x", "y = ReduceSum<keepdims = 0>(x, W)", "int64[1]", "float[n] y", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "body", "weight", "out", "axis"), AXES.values(), ids=AXES)
def test_the_axis_of_the_columns_is_found(given, body, weight, out, axis):
    kind, _, sizes = weight.rstrip("]").partition("[")
    shape = tuple(map(int, sizes.split(",")))
    dtype = {"float": np.float32, "int32": np.int32, "int64": np.int64}[kind]
    stored = np.ones(shape, dtype)
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({given}) => ({out}) {{ {body} }}'
    )
    proto.graph.initializer.append(numpy_helper.from_array(stored, "W"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "W2"))
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    x = np.zeros([d.dim_value or {"n": 2, "t": 3}[d.dim_param] for d in dims], np.float32)
    y = Session(proto).run({"x": x})["y"]
    assert column_axes(proto, {"y": y.shape}, {2}) == {"y": axis}


def test_an_output_without_a_batch_axis_has_its_columns_on_the_only_one():
    proto = onnx.ModelProto()
    assert column_axes(proto, {"y": (8,)}, {1}) == {"y": 0}


def test_dense_outputs_pool_their_positions(rng):
    """A column of boxes is one quantity at all positions."""
    text = "float[n, 4, 7] x) => (float[n, 4, 7] y"
    a, b = (
        load(onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17]> g ({text}) '
            f"{{ c = Constant<value = float[4, 1] {{1, 1, {v}, 1}}>() y = Mul(x, c) }}"
        ))
        for v in (1, 0)
    )  # fmt: skip
    x = rng.normal(size=(20, 4, 7)).astype(np.float32) * [[1e3], [1.0], [1e-3], [1.0]]
    gap = measure_gap(a, b, Calibration({"x": x.astype(np.float32)}, True, "test", False, 0))
    (output,) = gap.outputs
    assert (output.axis, output.columns, output.worst[0].column) == (1, 4, 2)
    assert output.worst[0].relative_error == pytest.approx(1, rel=0.1)
    assert gap.relative_error == pytest.approx(0.5, rel=0.1)


def test_weights_by_a_name_with_a_colon(rng):
    spread = Spread.of(rng.normal(size=(9, 2)), 1, 9)
    measure = Measure.of({"a:0": spread, "b": replace(spread)}, {"a:0": 3.0, "a:0:1": 0.0})
    np.testing.assert_allclose(measure.shares["a:0"], [0.75, 0])
    np.testing.assert_allclose(measure.shares["b"], [0.125, 0.125])


TO_INTEGERS = {
    "cast": ("int32[n, 3] y", "y = Cast<to = 6>(s)"),
    "round": ("uint8[n, 3] y", "r = Round(s) c = Clip(r, lo, hi) y = Cast<to = 2>(c)"),
    "quantised": ("uint8[n, 3] y", "y = QuantizeLinear(s, one, zero)"),
    "moved": ("int64[3, n] y", "i = Cast<to = 7>(s) y = Transpose<perm = [1, 0]>(i)"),
}


@pytest.mark.parametrize("form", TO_INTEGERS)
def test_integers_that_are_numbers_are_measured_as_numbers(form, rng):
    """Of two by a little different networks, in units of the spread of every column."""
    output, tail = TO_INTEGERS[form]
    given = ", uint8 zero = {128}, float one = {1}, float lo = {0}, float hi = {255}"
    a, b = (
        load(onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => ({output}) '
            f"<float[3] k = {{{factors}}} {given}> {{ s = Mul(x, k) {tail} }}"
        ))
        for factors in ("10, 30, 20", "10, 33, 20")
    )  # fmt: skip
    x = rng.uniform(0 if form == "round" else -1, 2, size=(400, 3)).astype(np.float32)
    gap = measure_gap(a, b, Calibration({"x": x}, True, "test", False, 0))
    y, z = (Session(m.proto).run({"x": x})["y"].astype(float) for m in (a, b))
    axis = 1 if form == "moved" else 0
    errors = np.square(z - y).mean(axis=axis) / y.var(axis=axis)
    if form != "moved":  # whose samples lie on its second axis
        assert gap.outputs[0].worst[0].column == 1
        assert gap.relative_error == pytest.approx(np.sqrt(errors.mean()), rel=1e-6)
    assert 0.01 < gap.relative_error < 0.2


@pytest.mark.parametrize(
    "body",
    ["y = ArgMax(x)", "i = ArgMax(x) f = Cast<to = 1>(i) y = Cast<to = 7>(f)",
     "i = ArgMax(x) n = Gather(one, i) y = Cast<to = 7>(n)",
     "g = Greater(x, k) y = Cast<to = 7>(g)", "v, y = TopK(x, one)"],
)  # fmt: skip
def test_integers_that_name_something_are_equal_or_not(body):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (int64[n, m] y) '
        f"<float k = {{0}}, int64[1] one = {{1}}> {{ {body} }}"
    )
    assert counting_outputs(proto) == frozenset()
