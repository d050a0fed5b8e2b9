"""The table of operators says what operators do: every row is run, and all that read it agree."""

import inspect

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_ecp
from onnx_ecp.errors import ProviderError
from onnx_ecp.gradients.rules import RULES as GRADIENTS
from onnx_ecp.graph.operators import OPERATORS, UNKNOWN, Moves, find
from onnx_ecp.runtime.session import Session
from onnx_ecp.units.rules import RULES as UNITS

OPSET = 24 if onnx.defs.onnx_opset_version() >= 24 else onnx.defs.onnx_opset_version()
FUNCTIONS = sorted(
    op
    for (domain, op), row in OPERATORS.items()
    if not domain and row.elementwise == 1 and row.moves is None
)
# Where a function is defined.
DOMAINS = {
    "Acos": (-0.95, 0.95), "Asin": (-0.95, 0.95), "Atanh": (-0.95, 0.95), "Acosh": (1.05, 3.0),
    "Log": (0.1, 3.0), "Sqrt": (0.0, 3.0), "Reciprocal": (0.2, 3.0), "Tan": (-1.2, 1.2),
}  # fmt: skip
# Attributes beside the defaults.
VARIANTS = {
    "Elu": [{"alpha": 2.0}, {"alpha": -0.5}],
    "LeakyRelu": [{"alpha": 3.0}, {"alpha": -0.5}],
    "Celu": [{"alpha": 0.5}],
    "Selu": [{"alpha": 0.5, "gamma": 2.0}],
    "HardSigmoid": [{"alpha": 0.5, "beta": 0.1}, {"alpha": -0.5}],
    "Shrink": [{"lambd": 0.5, "bias": 0.5}, {"lambd": 0.5, "bias": 0.7}],
    "ThresholdedRelu": [{"alpha": 0.0}],
}
CASES = [(op, attributes) for op in FUNCTIONS for attributes in ({}, *VARIANTS.get(op, ()))]


def computed(op, x, attributes):
    """An operator of one input by ONNX Runtime, float64 where it has a kernel, else float32."""
    for kind in (np.float64, np.float32):
        boolean = op in ("Not",)
        before = TensorProto.BOOL if boolean else helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        after = TensorProto.BOOL if op in ("IsInf", "IsNaN", "Not") else before
        node = helper.make_node(op, ["x"], ["y"], **attributes)
        inputs = ["x"]
        stored = []
        if op == "Clip":
            node.input.extend(["low", "high"])
            stored = [
                numpy_helper.from_array(np.array(v, kind), n)
                for n, v in (("low", -1), ("high", 1.5))
            ]
        graph = helper.make_graph(
            [node], "g",
            [helper.make_tensor_value_info(n, before, ["n"]) for n in inputs],
            [helper.make_tensor_value_info("y", after, ["n"])],
            stored,
        )  # fmt: skip
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", min(OPSET, 20))], ir_version=9
        )
        try:
            return Session(model).run({"x": x > 0 if boolean else x.astype(kind)})["y"]
        except ProviderError:
            continue
    pytest.skip(f"ONNX Runtime has no kernel for {op}")


def grid(op):
    low, high = DOMAINS.get(op, (-4.0, 4.0))
    return np.linspace(low, high, 4001)


@pytest.mark.parametrize(("op", "attributes"), CASES, ids=[f"{op}{a or ''}" for op, a in CASES])
def test_a_function_does_what_its_row_says(op, attributes):
    row, x = find("", op), grid(op)
    y = computed(op, x, attributes).astype(np.float64)
    slopes = np.diff(y) / np.diff(x)
    rounding = 1e-5
    sign = row.monotone(attributes)
    if sign:
        assert (sign * np.diff(y) >= -rounding).all()
    limit = row.lipschitz(attributes)
    if limit is not None:
        assert np.abs(slopes).max() <= limit * (1 + 1e-3) + 0.02 * (y.dtype == np.float32)
    if row.image is not None:
        assert row.image[0] - rounding <= y.min()
        assert y.max() <= row.image[1] + rounding
    if row.flat and op not in ("IsInf", "IsNaN", "Not"):
        assert len(np.unique(y)) < 20
    if row.zeros and x[0] <= 0 <= x[-1]:
        assert computed(op, np.zeros(3), attributes).astype(np.float64) == pytest.approx(0)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_what_has_a_slope_has_a_gradient_and_lets_units_through(op):
    assert op in GRADIENTS
    assert ("", op) in UNITS


JOINING = sorted(
    op for (d, op), row in OPERATORS.items() if not d and row.elementwise > 1 and row.moves is None
)


@pytest.mark.parametrize("op", JOINING)
def test_what_joins_entry_by_entry_has_a_gradient_and_joins_units(op):
    assert op in GRADIENTS
    assert ("", op) in UNITS


PASSING = [
    op for op in FUNCTIONS if not find("", op).flat and op not in ("Acos", "Acosh", "Asin", "Atanh")
]


@pytest.mark.slow
@pytest.mark.parametrize("op", PASSING)
def test_units_go_behind_any_function(op, rng):
    """Removing units behind a function leaves what ONNX Runtime computes without them."""
    if op == "Swish" and OPSET < 24:
        pytest.skip("Swish came with opset 24")
    squashed = "t = Tanh(z)  h = Abs(t)  k = Add(h, one)" if op in DOMAINS else "k = Tanh(z)"
    opset = 24 if op == "Swish" else 20
    text = f"""<ir_version: 9, opset_import: ["": {opset}]>
        net (float[n, 6] x) => (float[n, 3] y) {{
            z = Gemm<transB = 1>(x, W0, b0)  {squashed}  a = {op}(k)  y = MatMul(a, W1) }}"""
    model = onnx.parser.parse_model(text)
    arrays = {"W0": (10, 6), "b0": (10,), "W1": (10, 3)}
    for name, shape in arrays.items():
        value = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    if "one" in squashed:
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "one"))
    x = rng.normal(size=(50, 6)).astype(np.float32)
    try:
        Session(model).run({"x": x})
    except ProviderError:
        pytest.skip(f"ONNX Runtime has no kernel for {op} in float32")
    found = onnx_ecp.optimize(model, x, granularity="unit", sparsity=0.4, method="ecp")
    assert found.report.units[0].after < 10
    assert np.isfinite(found.report.gap.relative_error)


def test_moves_take_entries_from_their_input(rng):
    x = rng.normal(size=(2, 4, 4, 4)).astype(np.float32)
    bodies = {
        "Reshape": "s = Constant<value_ints = [2, 64]>()  y = Reshape(x, s)",
        "Transpose": "y = Transpose<perm = [3, 1, 0, 2]>(x)",
        "Flatten": "y = Flatten(x)",
        "Slice": "b = Constant<value_ints = [1]>()  e = Constant<value_ints = [3]>()  "
        "y = Slice(x, b, e)",
        "Gather": "i = Constant<value_ints = [1, 1, 0]>()  y = Gather(x, i)",
        "DepthToSpace": "y = DepthToSpace<blocksize = 2>(x)",
        "SpaceToDepth": "y = SpaceToDepth<blocksize = 2>(x)",
        "Expand": "s = Constant<value_ints = [3, 2, 4, 4, 4]>()  y = Expand(x, s)",
        "Concat": "y = Concat<axis = 0>(x, x)",
    }
    for op, body in bodies.items():
        row = find("", op)
        assert row.moves is not None
        model = onnx.parser.parse_model(
            f"""<ir_version: 9, opset_import: ["": 17]>
            g (float[2, 4, 4, 4] x) => (float y) {{ {body} }}"""
        )
        model.graph.output[0].type.tensor_type.ClearField("shape")
        y = Session(model).run({"x": x})["y"]
        assert np.isin(y, x).all()
        if row.moves in (Moves.IN_ORDER, Moves.REORDERED):
            assert y.size == x.size
        if row.moves is Moves.IN_ORDER:
            np.testing.assert_array_equal(y.ravel(), x.ravel())


def test_what_the_table_does_not_know_is_unknown():
    assert find("", "NoSuchOperator") is UNKNOWN
    assert find("com.example", "Relu") is UNKNOWN
    assert find(None, "Relu") is find("ai.onnx", "Relu") is OPERATORS["", "Relu"]
    assert all(len(inspect.signature(row.monotone).parameters) == 1 for row in OPERATORS.values())
