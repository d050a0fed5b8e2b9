"""Laws of finding layers and of writing into them, over a table of spellings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.builder import Builder, Fact
from onnx_ecp.layers import find_layers
from onnx_ecp.layers.layer import Found, Layer
from onnx_ecp.layers.trace import main_scope

SHARED_MODELS = Path(__file__).parents[2] / "shared" / "models"


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph body that computes y, and the shapes of what it reads.

    ``shifted`` computes from the same tensors, and from s, the y that a shift s of z must give.
    Where the operator hides z, ``shifted`` calls it p.
    """

    body: str
    shapes: dict[str, tuple[int, ...]]
    shifted: str = ""
    inputs: tuple[str, ...] = ("x",)
    kept_in: str = "initializer"  # or "Constant", or "graph input"
    dtype: type = np.float32
    ir_version: int = 8
    opset: int = 17
    has_bias: bool = False
    tensor: str = "W"

    def with_shift(self) -> Case:
        body = self.shifted or self.body.replace("y =", "unshifted =") + "\n y = Add(unshifted, s)"
        return dataclasses.replace(self, body=body, kept_in="initializer")

    def arrays(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            name: rng.standard_normal(shape).astype(self.dtype)
            for name, shape in self.shapes.items()
        }


X = {"x": (5, 3)}
TOKENS = {"x": (2, 5, 3)}
W = {"W": (3, 4)}
NORM = {"skip": (2, 5, 4), "g": (4,), "h": (4,)}

LAYERS = {
    "gemm": Case("y = Gemm(x, W, b)", X | W | {"b": (4,)}, has_bias=True),
    "gemm, no C": Case("y = Gemm(x, W)", X | W),
    "gemm, C omitted by name": Case('y = Gemm(x, W, "")', X | W),
    "gemm, transB": Case(
        "y = Gemm<transB = 1>(x, W, b)", X | {"W": (4, 3), "b": (4,)}, has_bias=True
    ),
    "gemm, scaled": Case(
        "y = Gemm<alpha = 0.5, beta = 2.0>(x, W, b)", X | W | {"b": (1, 4)}, has_bias=True
    ),
    "gemm, scaled, no C": Case("y = Gemm<alpha = 0.3, beta = 3.0>(x, W)", X | W),
    "gemm, beta 0": Case("y = Gemm<beta = 0.0>(x, W, b)", X | W | {"b": (4,)}),
    "gemm, C ()": Case("y = Gemm(x, W, b)", X | W | {"b": ()}, has_bias=True),
    "gemm, C (1,)": Case("y = Gemm(x, W, b)", X | W | {"b": (1,)}, has_bias=True),
    "gemm, C (M, 1)": Case("y = Gemm(x, W, b)", X | W | {"b": (5, 1)}, has_bias=True),
    "gemm, C (M, N)": Case("y = Gemm(x, W, b)", X | W | {"b": (5, 4)}, has_bias=True),
    "gemm, C an input": Case("y = Gemm(x, W, b)", X | W | {"b": (5, 4)}, inputs=("x", "b")),
    "gemm, C computed": Case("c = Tanh(b) y = Gemm(x, W, c)", X | W | {"b": (4,)}),
    "gemm, C behind a view": Case(
        "c = Transpose(b) y = Gemm(x, W, c)", X | W | {"b": (4, 1)}, has_bias=True
    ),
    "gemm, C read twice": Case(
        "n = Gemm(x, W, b) y = Add(n, b)",
        X | W | {"b": (4,)},
        shifted="n = Gemm(x, W, b) m = Add(n, b) y = Add(m, s)",
        has_bias=True,
    ),
    "gemm, in Constant nodes": Case(
        "y = Gemm(x, W, b)", X | W | {"b": (4,)}, kept_in="Constant", has_bias=True
    ),
    "gemm, old, listed as inputs": Case(
        "y = Gemm(x, W, b)",
        X | W | {"b": (1,)},
        kept_in="graph input",
        ir_version=3,
        opset=9,
        has_bias=True,
    ),
    "gemm, double": Case("y = Gemm(x, W, b)", X | W | {"b": (4,)}, dtype=np.float64, has_bias=True),
    "gemm, half": Case("y = Gemm(x, W, b)", X | W | {"b": (4,)}, dtype=np.float16, has_bias=True),
    "gemm behind a flatten": Case("f = Flatten(x) y = Gemm(f, W)", W | {"x": (5, 3, 1)}),
    "matmul": Case("y = MatMul(x, W)", X | W),
    "matmul of a vector": Case("y = MatMul(x, W)", W | {"x": (3,)}),
    "matmul of tokens": Case("y = MatMul(x, W)", TOKENS | W),
    "matmul of rank 4": Case("y = MatMul(x, W)", W | {"x": (2, 5, 2, 3)}),
    "matmul behind a reshape": Case(
        "i = Constant<value_ints = [-1, 3]>() r = Reshape(x, i) y = MatMul(r, W)",
        W | {"x": (5, 3, 2)},
    ),
    "matmul, weight of rank 4": Case("y = MatMul(x, W)", X | {"W": (1, 1, 3, 4)}),
    "matmul in an old file": Case(
        "y = MatMul(x, W)", X | W, ir_version=3, opset=9, kept_in="graph input"
    ),
    "matmul, add": Case("z = MatMul(x, W) y = Add(z, b)", TOKENS | W | {"b": (4,)}, has_bias=True),
    "matmul, add in the other order": Case(
        "z = MatMul(x, W) y = Add(b, z)", TOKENS | W | {"b": (1, 1, 4)}, has_bias=True
    ),
    "matmul, add a scalar": Case(
        "z = MatMul(x, W) y = Add(z, b)", TOKENS | W | {"b": ()}, has_bias=True
    ),
    "matmul, add a short Constant": Case(
        "b = Constant<value_float = 0.5>() z = MatMul(x, W) y = Add(z, b)",
        TOKENS | W,
        has_bias=True,
    ),
    "matmul, add a table per position": Case(
        "z = MatMul(x, W) y = Add(z, b)", TOKENS | W | {"b": (5, 4)}, has_bias=True
    ),
    "matmul, add a variable": Case(
        "z = MatMul(x, W) y = Add(z, b)",
        TOKENS | W | {"b": (4,)},
        inputs=("x", "b"),
    ),
    "matmul, add to what others read": Case(
        "z = MatMul(x, W) t = Add(z, b) y = Mul(t, z)",
        TOKENS | W | {"b": (4,)},
        shifted="z = MatMul(x, W) u = Add(z, s) t = Add(u, b) y = Mul(t, u)",
    ),
    "matmul, added to itself": Case(
        "z = MatMul(x, W) y = Add(z, z)",
        X | W,
        shifted="z = MatMul(x, W) u = Add(z, s) y = Add(u, u)",
    ),
    "matmul on the left": Case("y = MatMul(W, x)", W | {"x": (4, 5)}),
    "matmul on the left, tokens": Case("y = MatMul(W, x)", W | {"x": (2, 4, 5)}),
    "matmul on the left, vector": Case("y = MatMul(W, x)", W | {"x": (4,)}),
    "matmul on the left, rank inferred": Case("r = Relu(x) y = MatMul(W, r)", W | {"x": (4, 5)}),
    "matmul on the left, add": Case(
        "z = MatMul(W, x) y = Add(z, b)", W | {"x": (2, 4, 5), "b": (3, 1)}, has_bias=True
    ),
    "matmul on the left, add a scalar": Case(
        "z = MatMul(W, x) y = Add(z, b)", W | {"x": (4, 5), "b": ()}, has_bias=True
    ),
    "matmul on the left of a vector, add": Case(
        "z = MatMul(W, x) y = Add(z, b)", W | {"x": (4,), "b": (3,)}, has_bias=True
    ),
    "matmul with a vector": Case("y = MatMul(x, W)", X | {"W": (3,)}),
    "matmul with a vector, tokens": Case("y = MatMul(x, W)", TOKENS | {"W": (3,)}),
    "matmul with a vector, add": Case(
        "z = MatMul(x, W) y = Add(z, b)", X | {"W": (3,), "b": (1,)}, has_bias=True
    ),
    "matmul with a vector on the left": Case("y = MatMul(W, x)", {"W": (4,), "x": (2, 4, 5)}),
    "matmul, batch of matrices": Case("y = MatMul(x, W)", {"x": (5, 2, 6, 3), "W": (2, 3, 4)}),
    "matmul, batch of matrices on one input": Case(
        "y = MatMul(x, W)", {"x": (5, 1, 6, 3), "W": (1, 2, 3, 4)}
    ),
    "matmul, batch of matrices on the left, add": Case(
        "z = MatMul(W, x) y = Add(z, b)",
        {"x": (5, 2, 3, 6), "W": (2, 4, 3), "b": (2, 4, 1)},
        has_bias=True,
    ),
    "weight behind Identity": Case("w = Identity(W) y = MatMul(x, w)", X | W),
    "weight behind Transpose": Case("w = Transpose(W) y = MatMul(x, w)", X | {"W": (4, 3)}),
    "weight behind a chain": Case(
        """i = Constant<value_ints = [3, 0, -1]>()
        j = Constant<value_ints = [0]>()
        t = Transpose<perm = [2, 0, 1]>(W)
        r = Reshape(t, i)
        u = Unsqueeze(r, j)
        q = Squeeze(u)
        f = Flatten(q)
        c = Identity(f)
        y = Gemm(x, c)""",
        X | {"W": (2, 2, 3)},
    ),
    "weight behind Cast": Case("w = Cast<to = 1>(W) v = Cast<to = 1>(w) y = MatMul(x, v)", X | W),
    "fused gemm": Case(
        'y = com.microsoft.FusedGemm<activation = "Relu", transB = 1, alpha = 2.0>(x, W, b)',
        X | {"W": (4, 3), "b": (4,)},
        shifted="n = Gemm<transB = 1, alpha = 2.0>(x, W, b) p = Add(n, s) y = Relu(p)",
        has_bias=True,
    ),
    "fused gemm, no C": Case(
        'y = com.microsoft.FusedGemm<activation = "Tanh">(x, W)',
        X | W,
        shifted="n = Gemm(x, W) p = Add(n, s) y = Tanh(p)",
    ),
    "fused matmul": Case("y = com.microsoft.FusedMatMul<alpha = 0.5>(x, W)", TOKENS | W),
    "fused matmul, transB": Case(
        "z = com.microsoft.FusedMatMul<transB = 1>(x, W) y = Add(z, b)",
        TOKENS | {"W": (4, 3), "b": (4,)},
        has_bias=True,
    ),
    "fused matmul on the left": Case(
        "y = com.microsoft.FusedMatMul<transA = 1>(W, x)", {"W": (3, 4), "x": (2, 3, 5)}
    ),
    "bias in BiasGelu": Case(
        "z = MatMul(x, W) y = com.microsoft.BiasGelu(z, b)",
        TOKENS | W | {"b": (4,)},
        shifted="z = MatMul(x, W) t = Add(z, s) y = com.microsoft.BiasGelu(t, b)",
        has_bias=True,
    ),
    "bias in FastGelu": Case(
        "z = MatMul(x, W) y = com.microsoft.FastGelu(z, b)",
        TOKENS | W | {"b": (4,)},
        shifted="z = MatMul(x, W) t = Add(z, s) y = com.microsoft.FastGelu(t, b)",
        has_bias=True,
    ),
    "FastGelu without bias": Case(
        "z = MatMul(x, W) y = com.microsoft.FastGelu(z)",
        TOKENS | W,
        shifted="z = MatMul(x, W) t = Add(z, s) y = com.microsoft.FastGelu(t)",
    ),
    "bias in SkipLayerNormalization": Case(
        "z = MatMul(x, W) y = com.microsoft.SkipLayerNormalization(z, skip, g, h, b)",
        TOKENS | W | NORM | {"b": (4,)},
        shifted="""z = MatMul(x, W) t = Add(z, s)
        y = com.microsoft.SkipLayerNormalization(t, skip, g, h, b)""",
        inputs=("x", "skip"),
        has_bias=True,
    ),
    "SkipLayerNormalization without bias": Case(
        "z = MatMul(x, W) y = com.microsoft.SkipLayerNormalization(skip, z, g)",
        TOKENS | W | NORM,
        shifted="""z = MatMul(x, W) t = Add(z, s)
        y = com.microsoft.SkipLayerNormalization(skip, t, g)""",
        inputs=("x", "skip"),
    ),
    "conv": Case(
        "y = Conv(x, W, b)", {"x": (2, 3, 6, 5), "W": (4, 3, 3, 2), "b": (4,)}, has_bias=True
    ),
    "conv, no B": Case("y = Conv(x, W)", {"x": (2, 3, 6, 5), "W": (4, 3, 3, 2)}),
    "conv, B an input": Case(
        "y = Conv(x, W, b)", {"x": (2, 3, 6, 5), "W": (4, 3, 3, 2), "b": (4,)}, inputs=("x", "b")
    ),
    "conv, 1-D, strided, dilated, padded": Case(
        "y = Conv<strides = [2], dilations = [3], pads = [1, 4]>(x, W)",
        {"x": (2, 3, 11), "W": (4, 3, 3)},
    ),
    "conv, 3-D": Case(
        "y = Conv<pads = [0, 1, 0, 1, 0, 1]>(x, W)", {"x": (2, 2, 4, 3, 5), "W": (3, 2, 2, 3, 2)}
    ),
    "conv, groups": Case(
        "y = Conv<group = 2, strides = [1, 2]>(x, W)", {"x": (2, 4, 6, 5), "W": (6, 2, 3, 3)}
    ),
    "conv, depthwise": Case("y = Conv<group = 4>(x, W)", {"x": (2, 4, 6, 5), "W": (4, 1, 3, 3)}),
    "conv, VALID": Case(
        'y = Conv<auto_pad = "VALID">(x, W)', {"x": (2, 3, 6, 5), "W": (4, 3, 3, 2)}
    ),
    "conv, SAME_UPPER": Case(
        'y = Conv<auto_pad = "SAME_UPPER", strides = [2, 3]>(x, W)',
        {"x": (2, 3, 7, 6), "W": (4, 3, 4, 2)},
    ),
    "conv, SAME_LOWER": Case(
        'y = Conv<auto_pad = "SAME_LOWER", strides = [2, 1]>(x, W)',
        {"x": (2, 3, 6, 6), "W": (4, 3, 3, 4)},
    ),
    "conv transpose": Case(
        "y = ConvTranspose(x, W, b)",
        {"x": (2, 3, 4, 5), "W": (3, 4, 3, 2), "b": (4,)},
        has_bias=True,
    ),
    "conv transpose, no B, strided": Case(
        "y = ConvTranspose<strides = [2, 2]>(x, W)", {"x": (2, 3, 4, 5), "W": (3, 4, 2, 2)}
    ),
    "conv transpose, B an input": Case(
        "y = ConvTranspose(x, W, b)",
        {"x": (2, 3, 4, 5), "W": (3, 4, 3, 2), "b": (4,)},
        inputs=("x", "b"),
    ),
    "conv transpose, 1-D, strided, dilated, padded": Case(
        "y = ConvTranspose<strides = [3], dilations = [2], pads = [1, 2], output_padding = [1]>"
        "(x, W)",
        {"x": (2, 3, 5), "W": (3, 4, 4)},
    ),
    "conv transpose, padded more than the kernel": Case(
        "y = ConvTranspose<strides = [2, 1], pads = [3, 2, 1, 0]>(x, W)",
        {"x": (2, 3, 6, 5), "W": (3, 4, 2, 2)},
    ),
    "conv transpose, a stride beyond the kernel": Case(
        "y = ConvTranspose<strides = [3, 2]>(x, W)", {"x": (2, 3, 3, 4), "W": (3, 4, 2, 1)}
    ),
    "conv transpose, 3-D": Case(
        "y = ConvTranspose<strides = [1, 2, 1], pads = [0, 1, 0, 1, 0, 1]>(x, W)",
        {"x": (2, 2, 3, 2, 4), "W": (2, 3, 2, 3, 2)},
    ),
    "conv transpose, groups": Case(
        "y = ConvTranspose<group = 2, strides = [1, 2]>(x, W)",
        {"x": (2, 4, 3, 4), "W": (4, 3, 3, 2)},
    ),
    "conv transpose, depthwise": Case(
        "y = ConvTranspose<group = 4, strides = [2, 2]>(x, W)",
        {"x": (2, 4, 3, 4), "W": (4, 1, 3, 3)},
    ),
    "conv transpose, VALID": Case(
        'y = ConvTranspose<auto_pad = "VALID", strides = [2, 2]>(x, W)',
        {"x": (2, 3, 4, 5), "W": (3, 4, 3, 2)},
    ),
    "conv transpose, SAME_UPPER": Case(
        'y = ConvTranspose<auto_pad = "SAME_UPPER", strides = [2, 3]>(x, W)',
        {"x": (2, 3, 4, 5), "W": (3, 4, 5, 2)},
    ),
    "conv transpose, SAME_LOWER": Case(
        'y = ConvTranspose<auto_pad = "SAME_LOWER", strides = [2, 1]>(x, W)',
        {"x": (2, 3, 4, 5), "W": (3, 4, 5, 4)},
    ),
    "conv transpose, of a shape": Case(
        "y = ConvTranspose<output_shape = [8, 11], strides = [2, 2]>(x, W)",
        {"x": (2, 3, 4, 5), "W": (3, 4, 3, 3)},
    ),
    "conv transpose, of a shape, the odd one behind": Case(
        'y = ConvTranspose<auto_pad = "SAME_UPPER", output_shape = [8, 10], strides = [2, 2]>'
        "(x, W)",
        {"x": (2, 3, 4, 5), "W": (3, 4, 3, 3)},
    ),
    "merged attention": Case(
        "y = com.microsoft.Attention<num_heads = 2>(x, W, b)",
        {"x": (2, 5, 4), "W": (4, 12), "b": (12,)},
        shifted="n = MatMul(x, W) m = Add(n, b) p = Add(m, s) q, k, v = Split<axis = -1>(p)"
        " y = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)",
        has_bias=True,
    ),
    "merged attention, other values, a mask, no bias": Case(
        """m = Constant<value = int32[2, 5] {1, 1, 1, 0, 0, 1, 1, 1, 1, 0}>()
        y = com.microsoft.Attention<num_heads = 2, qkv_hidden_sizes = [4, 4, 6]>(x, W, "", m)""",
        {"x": (2, 5, 4), "W": (4, 14)},
        shifted="""n = MatMul(x, W) p = Add(n, s) i = Constant<value_ints = [4, 4, 6]>()
        m = Constant<value = int32[2, 5] {1, 1, 1, 0, 0, 1, 1, 1, 1, 0}>()
        q, k, v = Split<axis = -1>(p, i)
        y = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v, "", m)""",
    ),
    "conv, kernel behind a reshape": Case(
        "i = Constant<value_ints = [4, 3, 1, 1]>() w = Reshape(W, i) y = Conv(x, w)",
        {"x": (2, 3, 6, 5), "W": (4, 3)},
    ),
    "fused conv": Case(
        'y = com.microsoft.FusedConv<activation = "Relu">(x, W, b)',
        {"x": (2, 3, 6, 5), "W": (4, 3, 3, 2), "b": (4,)},
        shifted="n = Conv(x, W, b) p = Add(n, s) y = Relu(p)",
        has_bias=True,
    ),
    "fused conv, sum": Case(
        'y = com.microsoft.FusedConv<activation = "Relu">(x, W, b, c)',
        {"x": (2, 3, 6, 5), "W": (4, 3, 3, 2), "b": (4,), "c": (2, 4, 4, 4)},
        shifted="n = Conv(x, W, b) m = Add(n, c) p = Add(m, s) y = Relu(p)",
        inputs=("x", "c"),
        has_bias=True,
    ),
}

each_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


def build(case: Case, arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model of a case; its output has a type but no shape."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    graph = onnx.parser.parse_graph(f"g () => () {{ {case.body} }}")
    graph.output.append(onnx.helper.make_tensor_value_info("y", kind, None))
    for name in case.inputs:
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, arrays[name].shape))
    for name in reversed([name for name in arrays if name not in case.inputs]):
        tensor = onnx.numpy_helper.from_array(arrays[name], name)
        if case.kept_in == "Constant":
            graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=tensor))
            continue
        graph.initializer.append(tensor)
        if case.kept_in == "graph input":
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, tensor.dims))
    opsets = [
        onnx.helper.make_opsetid("", case.opset),
        onnx.helper.make_opsetid("com.microsoft", 1),
    ]
    return onnx.helper.make_model(graph, ir_version=case.ir_version, opset_imports=opsets)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], output: str = "y") -> np.ndarray:
    """One tensor of the model, as ONNX Runtime computes it."""
    if output in feeds:
        return feeds[output]
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    if output not in {info.name for info in seen.graph.output}:
        seen.graph.output.append(onnx.ValueInfoProto(name=output))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(seen.SerializeToString(), options, ["CPUExecutionProvider"])
    [value] = session.run([output], feeds)
    return value


def tell_output_shape(model: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    """The checker wants one where it knows no operator that tells it."""
    kind = model.graph.output[0].type.tensor_type.elem_type
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", kind, shape))


def only_layer(found: Found) -> Layer:
    assert not found.skips
    [layer] = found.layers
    return layer


def observed(case: Case, arrays: dict[str, np.ndarray]) -> tuple[Layer, onnx.ModelProto, str]:
    """The layer of a case, and a model of which one tensor is its z, with that tensor's name."""
    model = build(case, arrays)
    layer = only_layer(find_layers(model))
    if any(layer.output in node.output for node in model.graph.node):
        return layer, model, layer.output
    return layer, build(case.with_shift(), arrays | {"s": np.zeros((), case.dtype)}), "p"


def tolerance(dtype: type) -> dict[str, float]:
    step = 20 * float(np.finfo(dtype).eps)
    return {"rtol": step, "atol": step}


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def tensors_of(model: onnx.ModelProto) -> dict[str, bytes]:
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    return {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer} | {
        node.output[0]: node.SerializeToString() for node in constants
    }


def nodes_of(model: onnx.ModelProto) -> list[bytes]:
    nodes = [node for node in model.graph.node if node.op_type != "Constant"]
    return [node.SerializeToString() for node in nodes]


@each_layer
def test_rows_times_the_matrix_is_what_onnx_runtime_computes(case, rng):
    arrays = case.arrays(rng)
    layer, shown, z = observed(case, arrays)
    feeds = {name: arrays[name] for name in case.inputs}
    other = feeds | {"x": rng.standard_normal(arrays["x"].shape).astype(case.dtype)}

    # The difference of two inputs: the bias cancels.
    a = layer.rows_in(run(shown, feeds, layer.input)) - layer.rows_in(
        run(shown, other, layer.input)
    )
    z = layer.rows_out(run(shown, feeds, z)[None] - run(shown, other, z)[None])

    matrix = layer.weight.matrix(arrays[case.tensor])
    assert matrix.shape == layer.shape
    per_group = matrix.reshape(layer.groups, -1, layer.shape[1])
    expected = np.einsum("gri,goi->gro", a, per_group)
    np.testing.assert_allclose(z[0], expected, **tolerance(case.dtype))


@each_layer
def test_rows_in_a_graph_are_those_of_numpy(case, rng):
    arrays = case.arrays(rng)
    layer, model, name = observed(case, arrays)
    feeds = {name: arrays[name] for name in case.inputs}
    a, z = run(model, feeds, layer.input), run(model, feeds, name)
    z = np.stack([z, -2 * z])  # two probes
    graph = gs.Graph(opset=18)
    read, made, probed = (
        gs.Variable(name, x.dtype, x.shape)
        for name, x in ((layer.input, a), (layer.output, z[0]), ("probed", z))
    )
    graph.inputs = [read, made, probed]
    facts = {x.name: Fact(x.shape, x.dtype) for x in (read, made)}
    op = Builder(graph, facts)
    graph.outputs = [layer.rows_in_graph(op, read, made), layer.rows_out_graph(op, probed)]
    for output in graph.outputs:
        output.dtype = read.dtype
    proto = gs.export_onnx(graph)
    proto.ir_version = 8
    rows = [
        run(proto, {layer.input: a, layer.output: z[0], "probed": z}, y.name) for y in graph.outputs
    ]

    order = layer.graph_order()
    expected = layer.rows_in(a)
    np.testing.assert_array_equal(rows[0], expected if order is None else expected[..., order])
    np.testing.assert_array_equal(rows[1], layer.rows_out(z).swapaxes(2, 3))


@each_layer
def test_units_lie_where_the_layer_says(case, rng):
    """On an axis of z, and, with the weights that read them, on the axes of the weight."""
    arrays = case.arrays(rng)
    layer, model, name = observed(case, arrays)
    if layer.units_refusal:
        return
    (out, width), scale = layer.shape, layer.weight.scale
    along = out if layer.groups_side_by_side else out // layer.groups
    z = run(model, {name: arrays[name] for name in case.inputs}, name)
    assert layer.makes_number or z.shape[layer.units_axis] == along

    scope = main_scope(build(case, arrays))
    node = next(node for node in scope.graph.nodes if node.op == layer.op)
    index, (row_axis, column_axis) = layer.weight_axes(node)
    kernel = scope.trace(node.inputs[index]).view(arrays[case.tensor]) * scale
    matrix = layer.weight.matrix(arrays[case.tensor])
    if not layer.makes_number:
        rows = np.moveaxis(kernel, row_axis, 0).reshape(along, -1)
        by_row = matrix.reshape(-1, along, width).swapaxes(0, 1).reshape(along, -1)
        np.testing.assert_allclose(np.sort(rows), np.sort(by_row), rtol=1e-3)
    if layer.groups > 1:
        return
    # Every channel has as many columns as the kernel has positions.
    channels = width if layer.reads_vectors else layer.reduction
    columns = np.moveaxis(kernel, column_axis, 0).reshape(channels, -1)
    by_channel = matrix.reshape(out, channels, -1).swapaxes(0, 1).reshape(channels, -1)
    np.testing.assert_allclose(np.sort(columns), np.sort(by_channel), rtol=1e-3)


@each_layer
def test_the_matrix_leads_back_to_the_stored_tensor(case, rng):
    arrays = case.arrays(rng)
    weight = only_layer(find_layers(build(case, arrays))).weight
    stored = arrays[case.tensor].astype(np.float64)
    assert (weight.tensor, weight.shape) == (case.tensor, stored.shape)
    np.testing.assert_array_equal(weight.layout(weight.matrix(stored)), stored * weight.scale)
    np.testing.assert_allclose(weight.unmatrix(weight.matrix(stored)), stored, rtol=1e-15)


@each_layer
def test_storing_back_what_was_read_changes_nothing(case, rng):
    arrays = case.arrays(rng)
    arrays[case.tensor].flat[0] = -0.0
    model = build(case, arrays)
    layer = only_layer(find_layers(model))
    copy = copy_of(model)
    assert not layer.store(copy, None, None)
    assert not layer.store(copy, np.abs(arrays[case.tensor]) * np.sign(arrays[case.tensor]), None)
    assert not layer.store(copy, arrays[case.tensor].astype(np.float64), np.zeros(layer.shape[0]))
    assert copy.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@each_layer
def test_a_stored_weight_and_shift_are_what_the_model_then_computes(case, rng):
    arrays = case.arrays(rng)
    model = build(case, arrays)
    layer = only_layer(find_layers(model))
    assert layer.has_bias == case.has_bias
    new = rng.standard_normal(arrays[case.tensor].shape).astype(case.dtype)
    shift = rng.standard_normal(layer.shape[0]).astype(case.dtype)

    copy = copy_of(model)
    assert layer.store(copy, new, shift.astype(np.float64)) == (not case.has_bias)

    feeds = {name: arrays[name] for name in case.inputs}
    result = run(copy, feeds)
    s = shift.reshape(layer.shift_shape)
    expected = run(build(case.with_shift(), arrays | {case.tensor: new, "s": s}), feeds)
    np.testing.assert_allclose(result, expected, **tolerance(case.dtype))
    assert result.shape == expected.shape


@each_layer
def test_storing_touches_the_weight_the_bias_and_one_node(case, rng):
    arrays = case.arrays(rng)
    model = onnx.shape_inference.infer_shapes(build(case, arrays))
    tell_output_shape(model, run(model, {name: arrays[name] for name in case.inputs}).shape)
    layer = only_layer(find_layers(model))
    copy = copy_of(model)
    layer.store(copy, arrays[case.tensor] + 1, np.ones(layer.shape[0]))

    onnx.checker.check_model(copy, full_check=True)
    before, after = tensors_of(model), tensors_of(copy)
    changed = {name for name in before if after.get(name, b"gone") != before[name]}
    assert case.tensor in changed
    assert changed <= {case.tensor, "b"}
    assert all("ecp_bias" in name for name in set(after) - set(before))
    node_changes = [node for node in nodes_of(model) if node not in nodes_of(copy)]
    views_gone = sum(b"Transpose" in node for node in node_changes)
    assert len(node_changes) - views_gone <= 1
    for field in ("node", "initializer", "value_info"):
        model.graph.ClearField(field)
        copy.graph.ClearField(field)
    assert copy == model


@each_layer
def test_a_layer_keeps_its_name_when_it_gets_a_bias(case, rng):
    model = build(case, case.arrays(rng))
    layer = only_layer(find_layers(model))
    layer.store(model, None, np.ones(layer.shape[0]))
    assert only_layer(find_layers(model)).name == layer.name


def test_a_bias_that_others_read_is_unshared(rng):
    arrays = {"x": (5, 3), "V": (3, 4), "W": (4, 4), "b": (4,)}
    case = Case("h = Gemm(x, V, b) y = Gemm(h, W, b)", arrays)
    values = case.arrays(rng)
    model = build(case, values)
    first, second = find_layers(model).layers
    copy = copy_of(model)
    assert not first.store(copy, None, np.ones(4))
    assert tensors_of(copy)["b"] == tensors_of(model)["b"]
    assert not second.store(copy, None, np.full(4, 2.0))
    assert set(tensors_of(copy)) == {"V", "W", "h/ecp_bias", "y/ecp_bias"}  # b serves nobody now
    hidden = values["x"] @ values["V"] + values["b"] + 1
    expected = hidden @ values["W"] + values["b"] + 2
    np.testing.assert_allclose(run(copy, {"x": values["x"]}), expected, **tolerance(np.float32))


def test_a_shift_reaches_a_pre_activation_that_is_an_output_itself():
    model = parse("z = MatMul(x, W) y = Add(z, B)", x="float[3,3]", W="float[3,3]", B="float[3]")
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, [3, 3]))
    feeds = {"x": np.ones((3, 3), np.float32)}
    before = [run(model, feeds, name) for name in "yz"]
    assert only_layer(find_layers(model)).store(model, None, np.ones(3))
    for name, old in zip("yz", before, strict=True):
        np.testing.assert_array_equal(run(model, feeds, name), old + 1)


def test_new_names_are_fresh():
    model = parse("q = Relu(x) y = MatMul(q, W)", x="float[3,3]", W="float[3,3]")
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "y/ecp_bias"
    tell_output_shape(model, (3, 3))
    only_layer(find_layers(model)).store(model, None, np.ones(3))
    onnx.checker.check_model(model, full_check=True)
    assert set(tensors_of(model)) == {"W", "y/ecp_bias_2"}


# One stored tensor, several readers.

ALIKE = {
    "twice the same": "h = MatMul(x, W) y = MatMul(h, W)",
    "behind different views of the same effect": """
        t = Transpose(W) u = Identity(W)
        h = Gemm<transB = 1>(x, t) y = MatMul(h, u)""",
}
UNLIKE = {
    "an embedding": ("h = MatMul(x, W) y = Gather(W, i)", {"h": "Gather 'y'"}),
    "two orientations": (
        "h = MatMul(x, W) y = Gemm<transB = 1>(h, W)",
        {"h": "Gemm 'y'", "y": "MatMul 'h'"},
    ),
    "two scales": (
        "h = MatMul(x, W) y = Gemm<alpha = 2.0>(h, W)",
        {"h": "Gemm 'y'", "y": "MatMul 'h'"},
    ),
    "a graph output": ("h = MatMul(x, W) y = Identity(W)", {"h": "graph output 'y'"}),
    "a layer that is refused": (
        "h = MatMul(x, W) y = Gemm<transA = 1>(h, W)",
        {"h": "Gemm 'y'", "y": "transA"},
    ),
    "its own second operand": ("y = Gemm(x, W, W)", {"y": "in a second place"}),
    "a body": (
        """h = MatMul(x, W)
        y = If (c) <then_branch = g1 () => (float[3,3] p) { p = Add(W, W) },
                    else_branch = g2 () => (float[3,3] q) { q = Identity(h) }>""",
        {"h": "Add 'y/then_branch/p'"},
    ),
    "many": (
        "h = MatMul(x, W)" + "".join(f" y{i} = Abs(W)" for i in range(7)) + " y = Relu(h)",
        {"h": "and 2 more"},
    ),
}


def parse(body: str, **shapes: str) -> onnx.ModelProto:
    """A model whose upper-case tensors are initializers, full of ones."""
    inputs = [f"{kind} {name}" for name, kind in shapes.items() if name.islower()]
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g ({", ".join(inputs)}) => (float[2] y) {{ {body} }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(
        stored(name, kind) for name, kind in shapes.items() if name.isupper()
    )
    return model


def stored(name: str, kind: str) -> onnx.TensorProto:
    element, _, dims = kind.rstrip("]").partition("[")
    shape = [int(size) for size in dims.split(",")]
    number = onnx.TensorProto.DataType.Value(element.upper())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
    return onnx.numpy_helper.from_array(np.ones(shape).astype(dtype), name)


@pytest.mark.parametrize("body", ALIKE.values(), ids=ALIKE.keys())
def test_layers_that_see_a_tensor_alike_share_it(body):
    found = find_layers(parse(body, x="float[3,3]", W="float[3,3]"))
    first, second = found.layers
    assert not found.skips
    assert first.weight == second.weight


@pytest.mark.parametrize(("body", "reasons"), UNLIKE.values(), ids=UNLIKE.keys())
def test_any_other_sharing_is_a_skip_that_names_the_sharers(body, reasons):
    found = find_layers(parse(body, x="float[3,3]", i="int64[2]", c="bool", W="float[3,3]"))
    assert not found.layers
    assert [skip.name for skip in found.skips] == list(reasons)
    for skip in found.skips:
        assert reasons[skip.name] in skip.reason


SKIPS = {
    "transA": ("y = Gemm<transA = 1>(x, W)", "Gemm", "transA"),
    "alpha 0": ("y = Gemm<alpha = 0.0>(x, W)", "Gemm", "alpha is 0"),
    "weight as A": ("y = Gemm(W, x)", "Gemm", "first operand"),
    "Gemm of activations": ("y = Gemm(x, x)", "Gemm", "computed from the inputs"),
    "Gemm of constants": ("y = Gemm(W, W)", "Gemm", "both operands are constant"),
    "MatMul of constants": ("y = MatMul(W, W)", "MatMul", "both operands are constant"),
    "batch of matrices": ("y = MatMul(x, B)", "MatMul", "batch of matrices"),
    "vector times a vector": ("y = MatMul(alone, V)", "MatMul", "its weight is a vector"),
    "rank not known": ("r = Reshape(x, s) y = MatMul(W, r)", "MatMul", "rank"),
    "empty": ("y = MatMul(x, E)", "MatMul", "empty"),
    "integers": ("y = MatMul(n, I)", "MatMul", "INT32"),
    "converted integers": ("w = Cast<to = 1>(I) y = MatMul(x, w)", "MatMul", "INT32"),
    "rounded": (
        "v = Cast<to = 6>(W) w = Cast<to = 1>(v) y = MatMul(x, w)",
        "MatMul",
        "Cast that cannot be undone",
    ),
    "fp8": ("w = Cast<to = 1>(F) y = MatMul(x, w)", "MatMul", "FLOAT8E4M3FN"),
    "int4": ("w = Cast<to = 1>(Q) y = MatMul(x, w)", "MatMul", "INT4"),
    "computed": ("w = Tanh(W) y = MatMul(x, w)", "MatMul", "computed in the graph by Tanh"),
    "reshaped by an input": (
        "w = Reshape(W, s) y = Gemm(x, w)",
        "Gemm",
        "computed from the inputs",
    ),
    "reshaped by what is computed": (
        "t = Abs(T) w = Reshape(W, t) y = Gemm(x, w)",
        "Gemm",
        "Reshape that cannot be undone",
    ),
    "QDQ": (
        "w = DequantizeLinear(I, Z) y = MatMul(x, w)",
        "MatMul",
        "quantised (DequantizeLinear)",
    ),
    "MatMulInteger": ("y = MatMulInteger(n, I)", "MatMulInteger", "quantised"),
    "kernel from an input": ("y = Conv(x, x)", "Conv", "computed from the inputs"),
    "transposed kernel from an input": (
        "y = ConvTranspose(x, x)",
        "ConvTranspose",
        "computed from the inputs",
    ),
    "Einsum": ('y = Einsum<equation = "ij,jk->ik">(x, W)', "Einsum", "not supported yet"),
    "LSTM": ("y = LSTM<hidden_size = 1>(x, B, B)", "LSTM", "inside LSTM"),
    "attention with a past": (
        'y = com.microsoft.Attention<num_heads = 1>(t, W, V, "", t)',
        "Attention",
        "inside Attention with keys and values of the past",
    ),
    "attention that gives its keys": (
        "y, k = com.microsoft.Attention<num_heads = 1>(t, W, V)",
        "Attention",
        "keys and values are outputs",
    ),
    "attention with rotary positions": (
        "y = com.microsoft.Attention<num_heads = 1, do_rotary = 1>(t, W, V)",
        "Attention",
        "rotary",
    ),
    "attention with a mask for every head": (
        """j = Constant<value_ints = [0, 0, 1, 3]>() h = Reshape(t, j) u = Cast<to = 6>(h)
        y = com.microsoft.Attention<num_heads = 1>(t, W, "", u)""",
        "Attention",
        "a mask whose rank is not known to be 1, 2 or 3",
    ),
    "attention with a bias from an input": (
        "y = com.microsoft.Attention<num_heads = 1>(t, W, x)",
        "Attention",
        "its bias is computed",
    ),
    "MatMulNBits": (
        "y = com.microsoft.MatMulNBits<K = 3, N = 3, bits = 4, block_size = 16>(x, W, V)",
        "MatMulNBits",
        "quantised",
    ),
    "places of tokens": (
        """e = Shape(t) i, n, w = Split<axis = 0>(e) f = Squeeze(n) o = Constant<value_int = 0>()
        d = Constant<value_int = 1>() r = Range(o, f, d) j = Constant<value_ints = [1, 3]>()
        g = Cast<to = 1>(r) h = Reshape(g, j) y = MatMul(h, W)""",
        "MatMul",
        "only their shape matters",
    ),
    "batch axes": ("y = com.microsoft.FusedMatMul<transBatchA = 1>(x, W)", "FusedMatMul", "batch"),
    "transposed input": (
        "y = com.microsoft.FusedMatMul<transA = 1>(x, W)",
        "FusedMatMul",
        "transA",
    ),
    "no place for a bias": (
        'y = com.microsoft.FusedGemm<activation = "Relu">(x, W, x)',
        "FusedGemm",
        "activation is fused",
    ),
    "branch": (
        """y = If (c) <then_branch = g1 () => (float[3,3] p) { p = MatMul(x, W) },
                      else_branch = g2 () => (float[3,3] q) { q = Identity(x) }>""",
        "MatMul",
        "then_branch of If 'y'",
    ),
    "nested branch": (
        """y = If (c) <then_branch = g1 () => (float[3,3] p) {
                p = If (c) <then_branch = g3 () => (float[3,3] r) { r = Identity(x) },
                            else_branch = g4 () => (float[3,3] s) { s = Gemm(x, W) }> },
            else_branch = g2 () => (float[3,3] q) { q = Identity(x) }>""",
        "Gemm",
        "else_branch of If 'y/then_branch/p'",
    ),
    "loop": (
        """y = Loop (m, c, x) <body = g1 (int64 i, bool d, float[3,3] v)
            => (bool e, float[3,3] u) { e = Identity(d) u = MatMul(v, W) }>""",
        "MatMul",
        "body of Loop 'y'",
    ),
}


@pytest.mark.parametrize(("body", "op", "words"), SKIPS.values(), ids=SKIPS.keys())
def test_what_is_not_pruned_says_why(body, op, words):
    model = parse(
        body,
        x="float[3,3]",
        t="float[2,3,3]",
        alone="float[3]",
        n="int32[3,3]",
        s="int64[n]",
        c="bool",
        m="int64",
        W="float[3,3]",
        V="float[3]",
        B="float[2,3,3]",
        E="float[3,0]",
        I="int32[3,3]",
        F="float8e4m3fn[3,3]",
        Q="int4[3,3]",
        T="int64[2]",
        Z="float[1]",
    )
    found = find_layers(model)
    assert not found.layers
    [skip] = found.skips
    assert skip.op == op
    assert words in skip.reason


def test_a_layer_in_a_local_function_is_named_with_the_function():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[3,3] x) => (float[3,3] y)
        <float[3,3] W = {1,2,3,4,5,6,7,8,9}>
        { w = Transpose(W) h = local.block(x, w) y = local.block(h, w) }
        <opset_import: ["" : 17], domain: "local">
        block <turn> (a, w) => (z) { q = MatMul(a, a) s = MatMul(q, w) z = Relu(s) }"""
    )
    found = find_layers(model)
    assert not found.layers
    assert [(skip.name, skip.op) for skip in found.skips] == [("h/s", "MatMul"), ("y/s", "MatMul")]
    assert all("local function 'block'" in skip.reason for skip in found.skips)


def test_a_product_of_two_activations_is_no_candidate():
    found = find_layers(parse("t = Transpose(x) y = MatMul(x, t)", x="float[3,3]"))
    assert found == Found(())


def test_names_are_unique_whatever_the_nodes_are_called():
    model = parse(
        "h = MatMul(x, W) i = MatMul(h, W) y = MatMul(i, W)", x="float[3,3]", W="float[3,3]"
    )
    for node, name in zip(model.graph.node, ["y", "fc", "fc"], strict=True):
        node.name = name
    names = [layer.name for layer in find_layers(model).layers]
    assert names == ["y", "i", "y'"]


def test_nm_groups_of_a_conv_run_over_channels():
    model = parse("y = Conv(x, W)", x="float[1,4,5,5]", W="float[2,4,2,1]")
    layer = only_layer(find_layers(model))
    kernel = np.arange(2 * 4 * 2).reshape(2, 4, 2, 1)
    in_order = layer.weight.matrix(kernel)[:, layer.nm_order()].reshape(2, -1, layer.reduction)
    np.testing.assert_array_equal(in_order[0], kernel[0, :, :, 0].T)


def test_external_data_are_read_by_store_only(tmp_path):
    model = parse("h = MatMul(x, W) y = Add(h, V)", x="float[3,3]", W="float[3,3]", V="float[3]")
    onnx.save(model, tmp_path / "m", save_as_external_data=True, size_threshold=0, location="data")
    skeleton = onnx.load(tmp_path / "m", load_external_data=False)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    layer = only_layer(find_layers(skeleton))
    (tmp_path / "elsewhere").rename(tmp_path / "data")

    before = skeleton.SerializeToString(deterministic=True)
    layer.store(skeleton, np.ones((3, 3)), None, tmp_path)
    assert skeleton.SerializeToString(deterministic=True) == before

    layer.store(skeleton, np.full((3, 3), 2.0), np.ones(3), tmp_path)
    weight, bias = skeleton.graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(weight), 2)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(bias), 2)


def test_a_model_fused_by_onnx_runtime_has_the_same_layers(tmp_path):
    model = parse(
        """c = Conv(x, K) r = Relu(c) f = Flatten(r) h = Gemm(f, W, B) t = Tanh(h)
        m = MatMul(t, V) a = Add(m, B) y = Relu(a)""",
        x="float[1,2,3,3]",
        K="float[3,2,3,3]",
        W="float[3,4]",
        B="float[4]",
        V="float[4,4]",
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    fused = find_layers(onnx.load(tmp_path / "fused.onnx"))
    assert not fused.skips
    assert {layer.op for layer in fused.layers} & {"FusedConv", "FusedGemm"}
    assert [layer.shape for layer in fused.layers] == [
        layer.shape for layer in find_layers(model).layers
    ]


VIEWS = {
    "Flatten(w)": (2, 60),
    "Flatten<axis = 0>(w)": (1, 120),
    "Flatten<axis = -1>(w)": (24, 5),
    "Squeeze(w)": (2, 3, 4, 5),
    "Squeeze(w, last_but_one)": (2, 3, 4, 5),
    "Unsqueeze(w, last_but_one)": (2, 3, 4, 1, 1, 5),
    "Reshape(w, keep_and_fill)": (2, 60),
    "Transpose(w)": (5, 1, 4, 3, 2),
    "Identity(w)": (2, 3, 4, 1, 5),
}


@pytest.mark.parametrize(("view", "shape"), VIEWS.items(), ids=VIEWS.keys())
def test_a_view_gives_the_shape_and_values_that_onnx_gives(view, shape, rng):
    model = parse(
        f"""last_but_one = Constant<value_ints = [-2]>()
        keep_and_fill = Constant<value_ints = [0, -1]>() y = {view}""".replace("w", "W"),
        W="float[2,3,4,1,5]",
    )
    values = rng.standard_normal((2, 3, 4, 1, 5)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, "W"))
    scope = main_scope(model)
    seen = scope.trace(scope.tensors["y"])
    assert seen.seen_shape == shape
    [expected] = onnx.reference.ReferenceEvaluator(model).run(None, {})
    np.testing.assert_array_equal(seen.view(values), expected)


def test_damaged_nodes_are_errors_that_name_them():
    model = parse("y = com.microsoft.FusedGemm(x)", x="float[3,3]")
    with pytest.raises(ModelError, match="'y' lacks an operand of FusedGemm"):
        find_layers(model)


def test_bfloat16_weights_are_found_and_stored():
    model = parse("y = MatMul(x, W)", x="bfloat16[3,3]", W="bfloat16[3,2]")
    layer = only_layer(find_layers(model))
    layer.store(model, np.full((3, 2), 1 / 3), np.ones(2))
    weight, bias = model.graph.initializer
    assert weight.data_type == bias.data_type == onnx.TensorProto.BFLOAT16
    np.testing.assert_allclose(
        onnx.numpy_helper.to_array(weight).astype(np.float64), 1 / 3, rtol=2**-8
    )


@pytest.mark.parametrize(
    ("name", "layers", "skips"),
    [
        ("lenet300_mnist", 3, 0),
        ("lenet5_mnist", 4, 0),
        ("mlpnet_mnist", 3, 0),
        ("real_acas_1_1", 7, 0),
        ("real_keras_dense", 2, 0),
        ("real_mnist5x20_leaky_relu", 7, 0),
        ("real_mnist_cnn_tribuo", 4, 0),
        ("real_mnist_softmax_last", 3, 0),
        ("real_policy_go1", 4, 0),
    ],
)
def test_every_affine_layer_of_a_real_model_is_named(name, layers, skips):
    path = SHARED_MODELS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: the shared models are no part of the project")
    found = find_layers(onnx.load(path))
    assert (len(found.layers), len(found.skips)) == (layers, skips)


def test_a_real_model_inside_an_if_is_refused_layer_by_layer():
    path = SHARED_MODELS / "real_silero_vad_ifless.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: the shared models are no part of the project")
    found = find_layers(onnx.load(path))
    assert not found.layers
    assert Counter(skip.op for skip in found.skips) == {"Conv": 12, "Gemm": 4}
    assert all("branch of If" in skip.reason for skip in found.skips)
