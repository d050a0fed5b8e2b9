"""Odd models that ONNX Runtime runs: unsorted, random, with outputs that are no tensors."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_ecp
from onnx_ecp.errors import ModelError
from onnx_ecp.graph.sorting import NOTE, sorted_copy
from onnx_ecp.runtime.session import Session

HEADER = '<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>'


def mlp(body, outputs, rng, **more):
    model = onnx.parser.parse_model(
        f"""{HEADER} net (float[n, 6] x) => ({outputs}) {{
            a = Gemm<transB = 1>(x, W0, b0)
            h = Relu(a)
            {body}
        }}"""
    )
    arrays = {"W0": (12, 6), "b0": (12,), "W1": (12, 3)}
    for name, shape in arrays.items():
        tensor = numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        model.graph.initializer.append(tensor)
    for name, array in more.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def inputs(rng, samples=60):
    return rng.normal(size=(samples, 6)).astype(np.float32)


# Order.


def test_an_unsorted_graph_is_sorted_in_the_result_and_the_report_says_so(rng, tmp_path):
    model = mlp("z = MatMul(h, W1)  y = Tanh(z)", "float[n, 3] y", rng)
    nodes = list(model.graph.node)
    mixed = onnx.ModelProto()
    mixed.CopyFrom(model)
    del mixed.graph.node[:]
    mixed.graph.node.extend(nodes[i] for i in (3, 1, 0, 2))
    before = mixed.SerializeToString()
    x = inputs(rng)
    found, plain = (
        onnx_ecp.optimize(m, x, sparsity=0.5, output=tmp_path / name)
        for m, name in ((mixed, "mixed.onnx"), (model, "plain.onnx"))
    )
    assert NOTE in found.report.warnings
    assert NOTE not in plain.report.warnings
    assert mixed.SerializeToString() == before
    assert (tmp_path / "mixed.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    onnx.checker.check_model(found.model, full_check=True)


def test_a_sorted_graph_is_not_copied_and_order_is_kept_where_it_can_be(rng):
    model = mlp("z = MatMul(h, W1)  u = Relu(a)  y = Tanh(z)", "float[n, 3] y", rng)
    assert sorted_copy(model) is model
    nodes = list(model.graph.node)
    mixed = onnx.ModelProto()
    mixed.CopyFrom(model)
    del mixed.graph.node[:]
    mixed.graph.node.extend(nodes[i] for i in (2, 0, 1, 3, 4))
    made = [node.output[0] for node in sorted_copy(mixed).graph.node]
    assert made == ["a", "h", "u", "z", "y"]


# Random outputs.

YES, HALF = np.array(True), np.array(0.5, np.float32)
RANDOM = {
    "RandomNormalLike": ("r = RandomNormalLike(h)  k = Add(h, r)  y = MatMul(k, W1)", {}),
    "RandomUniformLike": ("r = RandomUniformLike(h)  k = Mul(h, r)  y = MatMul(k, W1)", {}),
    "Bernoulli": ("s = Sigmoid(h)  k = Bernoulli(s)  y = MatMul(k, W1)", {}),
    "Dropout": ("k = Dropout(h, half, yes)  y = MatMul(k, W1)", {"half": HALF, "yes": YES}),
    "BatchNormalization": (
        "z = MatMul(h, W1)  y, m, v = BatchNormalization<training_mode = 1>(z, s, t, s, s)",
        {"s": np.ones(3, np.float32), "t": np.zeros(3, np.float32)},
    ),
}


@pytest.mark.parametrize("op", RANDOM)
def test_random_outputs_are_refused_with_the_name_of_the_node(op, rng):
    body, more = RANDOM[op]
    model = mlp(body, "float[n, 3] y", rng, **more)
    node = next(node for node in model.graph.node if node.op_type == op)
    node.name = "the culprit"
    with pytest.raises(ModelError, match=f"{op} 'the culprit' (draws|is in training mode)"):
        onnx_ecp.optimize(model, inputs(rng), sparsity=0.5)
    with pytest.raises(ModelError, match="the culprit"):
        onnx_ecp.compare(model, model, inputs(rng))


CALM = {
    "no training": ("k = Dropout(h, half, no)  y = MatMul(k, W1)", {"no": np.array(False)}),
    "a ratio of zero": ("k = Dropout(h, zero, yes)  y = MatMul(k, W1)", {"zero": np.float32(0)}),
    "read by no output": ("r = RandomNormalLike(h)  y = MatMul(h, W1)", {}),
}


@pytest.mark.parametrize("name", CALM)
def test_operators_that_draw_nothing_are_no_reason(name, rng):
    body, more = CALM[name]
    stored = {"half": HALF, "yes": YES} | {n: np.asarray(v) for n, v in more.items()}
    used = {n: v for n, v in stored.items() if f" {n}" in body}
    model = mlp(body, "float[n, 3] y", rng, **used)
    assert onnx_ecp.optimize(model, inputs(rng), sparsity=0.5).report.sparsity == 0.5


# Outputs that are no tensors.


def classifier(rng):
    """What scikit-learn's converter makes: labels, and a dictionary of scores for every sample."""
    model = mlp(
        "z = MatMul(h, W1)  p = Softmax(z)  label = ArgMax<axis = 1, keepdims = 0>(p)",
        "int64[n] label",
        rng,
    )
    model.graph.node.append(
        helper.make_node(
            "ZipMap", ["p"], ["scores"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
        )
    )
    value = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    model.graph.output.append(
        helper.make_value_info("scores", helper.make_sequence_type_proto(value))
    )
    return model


def test_scores_in_dictionaries_are_pruned_and_measured(rng, tmp_path):
    model, x = classifier(rng), inputs(rng)
    found = onnx_ecp.optimize(model, x, sparsity=0.5, method="ecp", output=tmp_path / "o.onnx")
    names = [d.output for d in found.report.gap.outputs]
    assert names == ["label", "scores"]
    a, b = (Session(m).run({"x": x}) for m in (model, found.model))
    assert [list(row) for row in b["scores"]] == [[0, 1, 2]] * 60
    apart = np.array([list(r.values()) for r in b["scores"]]) - [
        list(r.values()) for r in a["scores"]
    ]
    assert 0 < np.square(apart).mean() < 0.1


def test_tensors_in_a_sequence_are_outputs_of_their_own(rng):
    model = mlp("z = MatMul(h, W1)  u = Tanh(z)  y = SequenceConstruct(z, u)", "float[n] q", rng)
    del model.graph.output[:]
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    model.graph.output.append(helper.make_value_info("y", helper.make_sequence_type_proto(tensor)))
    found = onnx_ecp.optimize(model, inputs(rng), sparsity=0.5)
    assert [d.output for d in found.report.gap.outputs] == ["y[0]", "y[1]"]
    # Of y[1], some columns are at one end of Tanh for all but one sample.
    assert 0 < found.report.gap.outputs[0].relative_error < 1
