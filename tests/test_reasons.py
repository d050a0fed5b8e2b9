"""What is said of layers that are left alone is true, and names what works."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

import onnx_ecp
from onnx_ecp.errors import ModelError, TargetError

HEAD = '<ir_version: 8, opset_import: ["": 17]> g '


def model(body, stored):
    proto = onnx.parser.parse_model(HEAD + body)
    for name, value in stored.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


Q = np.arange(-9, 9, dtype=np.int8).reshape(6, 3)
W = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
SCALE = np.float32([0.01, 0.02, 0.03])
REASONS = {
    "scaled": ("c = Cast<to = 1>(Q) w = Mul(c, s)", {"Q": Q, "s": SCALE}, "quantised (int8"),
    "scaled and shifted": (
        "c = Cast<to = 1>(Q) d = Sub(c, z) w = Mul(d, s)",
        {"Q": Q.astype(np.uint8), "s": SCALE, "z": SCALE},
        "quantised (uint8",
    ),
    "transposed": (
        "c = Cast<to = 1>(Q) t = Transpose<perm = [1, 0]>(c) w = Div(t, s)",
        {"Q": Q.T.copy(), "s": np.float32(3)},
        "quantised (int8",
    ),
    "a mask of floats": (
        "c = Cast<to = 1>(M) w = Mul(V, c)",
        {"M": (Q > 0).astype(np.int8), "V": W},
        "computed in the graph by Mul",
    ),
    "floats": ("w = Mul(V, s)", {"V": W, "s": SCALE}, "computed in the graph by Mul"),
}


@pytest.mark.parametrize(("body", "stored", "words"), REASONS.values(), ids=REASONS)
def test_a_weight_that_is_computed_is_called_what_it_is(body, stored, words, rng):
    text = f"(float[n, 6] x) => (float[n, 4] y) {{ {body} h = MatMul(x, w) y = MatMul(h, B) }}"
    proto = model(text, stored | {"B": rng.standard_normal((3, 4)).astype(np.float32)})
    x = rng.standard_normal((20, 6)).astype(np.float32)
    (skip,) = onnx_ecp.optimize(proto, x, sparsity=0.3).report.skips
    assert words in skip.reason


def lstm_in_if(rng):
    """Both layers are in front of an If that no rule follows."""
    f = {
        "A": (6, 5), "Z": (5, 4), "W": (1, 16, 5), "R": (1, 16, 4), "b": (1, 32),
    }  # fmt: skip
    stored = {n: rng.standard_normal(s).astype(np.float32) for n, s in f.items()}
    stored |= {"zero": np.float32(0), "first": np.int64([0])}
    value = helper.make_tensor_value_info
    lstm = helper.make_node("LSTM", ["u", "W", "R", "b"], ["all", "last"], hidden_size=4)
    squeeze = helper.make_node("Squeeze", ["last", "first"], ["t"])
    one = helper.make_graph([lstm, squeeze], "then", [], [value("t", 1, ["n", 4])])
    same = helper.make_node("Identity", ["z"], ["e"])
    other = helper.make_graph([same], "else", [], [value("e", 1, ["n", 4])])
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["h"]),
        helper.make_node("MatMul", ["h", "Z"], ["z"]),
        helper.make_node("Unsqueeze", ["h", "first"], ["u"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["p"]),
        helper.make_node("If", ["p"], ["y"], then_branch=one, else_branch=other),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", 1, ["n", 6])],
        [value("y", 1, ["n", 4])],
        [numpy_helper.from_array(v, n) for n, v in stored.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    return proto


def test_where_no_sensitivity_is_to_be_had_the_hint_names_what_works(rng):
    proto, x = lstm_in_if(rng), rng.standard_normal((20, 6)).astype(np.float32)
    with pytest.raises(TargetError, match="sensitivity") as error:
        onnx_ecp.optimize(proto, x)
    named = error.value.hint.split("`method` ")[1].split(".")[0].split(", ")
    assert set(named) == {"magnitude", "wanda", "sparsegpt", "obc"}
    ways = [{"method": name} for name in named]
    for choices in (*ways, {"method": "ecp", "gradients": "numeric"}):
        report = onnx_ecp.optimize(proto, x, sparsity=0.3, **choices).report
        assert len(report.layers) == 2
        assert report.zeros_after == round(0.3 * 50)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_outputs_that_are_not_finite_name_the_layer(granularity, rng):
    """A square root of what may be negative: no ranking can bear its derivatives."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (float[n, 2] y) {
            h = MatMul(x, W) r = Relu(h) z = MatMul(r, V) y = Sqrt(z) }"""
    )
    for name, shape in (("W", (3, 8)), ("V", (8, 2))):
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    x = rng.standard_normal((60, 3)).astype(np.float32)
    with pytest.raises(ModelError, match=r"the importance of layer '.' is NaN or infinite"):
        onnx_ecp.optimize(model, x, granularity=granularity, sparsity=0.3)
