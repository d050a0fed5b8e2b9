"""What is written passes the checker of its own opset, from the oldest to the newest one."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_ecp
from onnx_ecp.api import output as writing
from onnx_ecp.errors import ModelError
from onnx_ecp.layers import edit
from onnx_ecp.runtime.session import Session

IR = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 13: 7, 17: 8, 21: 10}
NODES = {
    "products": [("MatMul", "x W", "h"), ("Relu", "h", "r"), ("MatMul", "r V", "y")],
    "Gemm": [("Gemm", "x W b", "h"), ("Tanh", "h", "r"), ("Gemm", "r V", "y")],
    "two shapes": [
        ("MatMul", "x W", "h"),
        ("Reshape", "h s", "i"),
        ("Relu", "i", "r"),
        ("Reshape", "r t", "f"),
        ("MatMul", "f V", "y"),
    ],
}
STORED = {
    "W": (8, 16),
    "V": (16, 4),
    "b": (16,),
    "s": np.array([-1, 16, 1], np.int64),
    "t": np.array([-1, 16], np.int64),
}


def network(opset, kind, rng):
    nodes = [helper.make_node(op, ins.split(), outs.split(), outs) for op, ins, outs in NODES[kind]]
    if kind == "Gemm" and opset < 11:
        nodes[2].input.append("c")
    read = {name for node in nodes for name in node.input}
    stored = []
    for name, shape in {**STORED, "c": (4,)}.items():
        if name in read:
            values = shape if isinstance(shape, np.ndarray) else rng.standard_normal(shape)
            values = values if values.dtype == np.int64 else values.astype(np.float32)
            stored.append(numpy_helper.from_array(values, name))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])]
    if IR[opset] < 4:  # of that time are models whose initializers are inputs
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in stored]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR[opset]
    )
    onnx.checker.check_model(model, full_check=True)
    return model


WAYS = {
    "zeros": {"sparsity": 0.6},
    "units": {"granularity": "unit", "sparsity": 0.5},
    "2:4, permuted": {"sparsity": "2:4", "permute": True},
    "int8": {"sparsity": 0.5, "quantize": "int8"},
    "clean-up": {"sparsity": 0.9, "method": "magnitude"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("opset", IR)
def test_the_result_passes_the_checker(opset, kind, way, rng, tmp_path):
    model = network(opset, kind, rng)
    x = rng.standard_normal((60, 8)).astype(np.float32)
    effort = {} if "method" in WAYS[way] else {"effort": "fast"}
    written = tmp_path / "o.onnx"
    onnx_ecp.optimize(model, x, output=written, measure=False, **effort, **WAYS[way])
    found = onnx.load(written)
    onnx.checker.check_model(found, full_check=True)
    assert Session(found).run({"x": x})["y"].shape == (60, 4)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("opset", IR)
def test_a_new_stored_tensor_passes_the_checker(opset, dtype, rng):
    model = network(opset, "products", rng)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    name = edit.add_constant(model, "new", np.ones(4, kind), dtype, before="y")
    if dtype != TensorProto.FLOAT:
        model.graph.node.append(helper.make_node("Cast", [name], ["f"], to=TensorProto.FLOAT))
        name = "f"
    model.graph.node.append(helper.make_node("Add", ["y", name], ["z"]))
    model.graph.output[0].name = "z"
    onnx.checker.check_model(model, full_check=True)
    before = [value.name for value in network(opset, "products", rng).graph.input]
    x = rng.standard_normal((3, 8)).astype(np.float32)
    assert Session(model).run({"x": x})["z"].shape == (3, 4)
    assert [value.name for value in model.graph.input][: len(before)] == before


def test_a_result_that_the_checker_refuses_is_not_written(rng, tmp_path, monkeypatch):
    model, x = network(8, "products", rng), rng.standard_normal((60, 8)).astype(np.float32)
    stage = writing.modelling.stage

    def broken(proto, *rest, **more):
        number = numpy_helper.from_array(np.ones(4, np.int64))
        proto.graph.node.append(helper.make_node("Constant", [], ["number"], value=number))
        return stage(proto, *rest, **more)

    monkeypatch.setattr(writing.modelling, "stage", broken)
    with pytest.raises(ModelError, match="does not pass the checker of its own opset"):
        onnx_ecp.optimize(model, x, output=tmp_path / "o.onnx", method="magnitude", measure=False)
    assert not list(tmp_path.iterdir())
