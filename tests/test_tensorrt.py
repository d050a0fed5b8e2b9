"""What TensorRT's 2:4 kernels may take is said layer by layer, with the reason."""

import numpy as np
import onnx
import pytest

import onnx_ecp
from onnx_ecp.evaluation.targets import TARGETS, eligible
from onnx_ecp.evaluation.targets.tensorrt import advice, refusal
from onnx_ecp.graph import load
from onnx_ecp.layers import find_layers

HEADER = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>\n'


def build(signature, body, rng, **shapes):
    model = onnx.parser.parse_model(f"{HEADER} g ({signature}) => (float[] y) {{ {body} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    double = model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    if double:
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float64 if double else np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return load(model)


# Name: (signature, body, shapes, refusal).
REASONS = {
    "fits": ("float[N, 8] x", "y = MatMul(x, W)", {"W": (8, 5)}, ""),
    "fits, transposed": ("float[N, 8] x", "y = Gemm<transB = 1>(x, W)", {"W": (5, 8)}, ""),
    "fits, channels": ("float[N, 4, 6, 6] x", "y = Conv(x, W)", {"W": (3, 4, 3, 3)}, ""),
    "axis": ("float[N, 6] x", "y = MatMul(x, W)", {"W": (6, 8)}, "axis: 4 does not divide 6"),
    "axis of channels": (
        "float[N, 2, 6, 6] x", "y = Conv(x, W)", {"W": (3, 2, 2, 2)}, "axis: 4 does not divide 2",
    ),
    "groups": (
        "float[N, 8, 6, 6] x", "y = Conv<group = 2>(x, W)", {"W": (6, 4, 3, 3)},
        "op: a convolution of 2 groups",
    ),
    "op": (
        "float[N, 8] x", 'y = com.microsoft.FusedGemm<activation = "Relu">(x, W)', {"W": (8, 4)},
        "op: FusedGemm is ONNX Runtime's own",
    ),
    "precision": ("double[N, 8] x", "y = MatMul(x, W)", {"W": (8, 4)}, "precision: DOUBLE"),
}  # fmt: skip


@pytest.mark.parametrize(("signature", "body", "shapes", "reason"), REASONS.values(), ids=REASONS)
def test_every_reason(signature, body, shapes, reason, rng):
    model = build(signature, body, rng, **shapes)
    (layer,) = find_layers(model.proto).layers
    assert refusal(layer) == reason
    (row,) = onnx_ecp.inspect(model.proto).layers
    assert row.tensorrt == reason
    (kernel,) = eligible(model, TARGETS["tensorrt"])
    assert kernel.refused.startswith(reason or "pattern: more than two of four neighbours")


@pytest.mark.parametrize(("axis", "kept"), [(0, ""), (1, "pattern")])
def test_the_pattern_counts_along_the_input_axis(axis, kept, rng):
    model = build("float[N, 8] x", "y = MatMul(x, W)", rng, W=(8, 8))
    tensor = model.proto.graph.initializer[0]
    values = onnx.numpy_helper.to_array(tensor).copy()
    np.moveaxis(values, axis, 0)[[0, 1, 4, 5]] = 0
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, "W"))
    (kernel,) = eligible(model, TARGETS["tensorrt"])
    assert kernel.refused[: len("pattern")] == kept


def test_advice_is_about_precision_and_size(rng):
    large = build("float[N, 256] x", "y = MatMul(x, W)", rng, W=(256, 256))
    (layer,) = find_layers(large.proto).layers
    assert advice(layer) == "weights are float32: build the engine with FP16 or INT8"
    small = build("float[N, 8] x", "y = MatMul(x, W)", rng, W=(8, 300))
    (layer,) = find_layers(small.proto).layers
    assert "a dense kernel may be faster: 8 channels, 256 wanted" in advice(layer)


@pytest.mark.parametrize(
    ("encoding", "refused"), [("dense", ""), ("sparse", "format: the weight is stored sparse")]
)
def test_a_report_of_a_pattern_lists_the_layers_of_the_file(encoding, refused, rng, tmp_path):
    body = "h = MatMul(x, W)  a = Relu(h)  y = MatMul(a, V)"
    model = build("float[N, 64] x", body, rng, W=(64, 22), V=(22, 4))
    x = {"x": rng.standard_normal((40, 64)).astype(np.float32)}
    choices = {"method": "magnitude", "format": encoding, "exclude": "y"}
    path = tmp_path / "out.onnx"
    report = onnx_ecp.optimize(model.proto, x, sparsity="2:4", output=path, **choices).report
    assert report.target.name == "tensorrt"
    reasons = {kernel.name: kernel.refused for kernel in report.target.layers}
    assert reasons == {"h": refused, "y": "axis: 4 does not divide 22"}
    assert onnx_ecp.optimize(model.proto, x, sparsity=0.5, method="magnitude").report.target is None
