"""The packed form read back: what was written comes back, what only looks like it is left alone."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import onnx_ecp
from onnx_ecp.graph import LARGEST_DENSE, constants, decode_sparse, packed_tensors

TEXT = """<ir_version: 8, opset_import: ["": 18]> g (float[n,4] x) => (float[n,3] y)
    <int64[1] size = {12}, int64[3] at = {1, 5, 10}, float[3] what = {1.5, -2.5, 3.5},
     int64[2] shape = {4, 3}>
    {
        zeros = ConstantOfShape(size)
        flat = ScatterElements<axis = 0>(zeros, at, what)
        W = Reshape(flat, shape)
        y = MatMul(x, W)
    }"""
# By name, what is changed in the text, and whether it is still a packed tensor.
READ = {
    "as written": ((), True),
    "narrow indices": (("int64[3] at", "int32[3] at"), True),
    "used twice": (("y = MatMul(x, W)", "z = MatMul(x, W) t = Add(W, W) y = Add(z, b)"), True),
    "shared shape": (("y = MatMul(x, W)", "v = Shape(shape) y = MatMul(x, W)"), True),
    "an index out of range": (("5, 10", "5, 12"), False),
    "a negative index": (("{1, 5", "{-1, 5"), False),
    "another size": (("{12}", "{13}"), False),
    "an inferred axis": (("shape = {4, 3}", "shape = {4, -1}"), False),
    "a huge tensor": (("size = {12}", "size = {1099511627776}"), False),
    "fewer values": (("float[3] what = {1.5, -2.5, 3.5}", "float[2] what = {1.5, -2.5}"), False),
    "sums": (("<axis = 0>", '<axis = 0, reduction = "add">'), False),
    "ones": (("ConstantOfShape(size)", "ConstantOfShape<value = float[1] {1}>(size)"), False),
    "integers": (("float[3] what = {1.5, -2.5, 3.5}", "int64[3] what = {1, 2, 3}"), False),
    "a middle that others read": (("y = Mat", "s = Neg(flat) y = Mat"), False),
    "computed values": (("zeros, at, what)", "zeros, at, more) "), False),
}


def read(change: tuple[str, str] | tuple[()]) -> onnx.ModelProto:
    text = TEXT.replace(*change) if change else TEXT
    text = (
        text.replace("{\n        zeros", "{ more = Neg(what)\n zeros") if "more" in text else text
    )
    assert text != TEXT or not change
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "b"))
    return proto


@pytest.mark.parametrize(("change", "packed"), READ.values(), ids=READ)
def test_only_what_is_packed_is_read(change, packed):
    proto = read(change)
    assert (list(packed_tensors(proto, LARGEST_DENSE)) == ["W"]) == packed
    dense = decode_sparse(proto)
    assert ("W" in constants(dense)) == packed
    if not packed:
        assert dense == proto


@pytest.mark.parametrize("change", [c for c, packed in READ.values() if packed])
def test_the_dense_model_computes_the_same_and_keeps_nothing_of_the_form(change, rng):
    proto = read(change)
    dense = decode_sparse(proto)
    x = rng.standard_normal((5, 4)).astype(np.float32)
    before, after = (ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (proto, dense))
    np.testing.assert_array_equal(before, after)
    assert not {"size", "at", "what"} & set(constants(dense))
    assert ("shape" in constants(dense)) == ("Shape(shape)" in str(change))
    assert not {node.op_type for node in dense.graph.node} & {"ScatterElements", "ConstantOfShape"}
    onnx.checker.check_model(dense, full_check=True)


def test_all_that_is_packed_must_fit_into_memory():
    assert not packed_tensors(read(()), 4 * 12 - 1)
    assert packed_tensors(read(()), 4 * 12)


def test_a_packed_tensor_counts_as_the_dense_one():
    found = onnx_ecp.compare(read(()), decode_sparse(read(())), np.ones((2, 4), np.float32))
    assert (found.a.parameters, found.a.zeros) == (found.b.parameters, found.b.zeros) == (15, 9)
    assert [layer.storage for layer in onnx_ecp.inspect(read(())).layers] == ["packed"]
