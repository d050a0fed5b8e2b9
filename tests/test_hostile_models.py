"""Whatever a model file holds: it loads, or ends in one error line that says what is wrong."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import hostile
import numpy as np
import onnx
import pytest
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnx_ecp.errors import ModelError, OnnxEcpError
from onnx_ecp.graph import decode_sparse, digest, load, runtime_support, signature


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_model_is_refused_with_what_is_wrong(case, tmp_path):
    path = case.make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError) as caught:
        load(path)
    assert case.says in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000
    assert sorted(tmp_path.iterdir()) == before


def infinite_mask(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].float_data[1] = float("-inf")


def opset_99(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def repeated_node_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = "same"


def own_domain(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.mine", version=1)
    model.graph.node[0].domain = "com.mine"


def runtime_domain(model: onnx.ModelProto) -> None:
    """ONNX Runtime needs no opset_import for its own domain."""
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.microsoft", "FusedMatMul"


def runtime_operator(model: onnx.ModelProto) -> None:
    """ONNX Runtime's optimizers write this into the standard domain of old opsets."""
    node = model.graph.node[1]
    node.op_type = "SimplifiedLayerNormalization"


def output_without_shape(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.ClearField("shape")


def zero_size(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("none", TensorProto.FLOAT, [0, 3], []))


def hostile_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = "<script>\x1b[31m\n" + "x" * 2**20


def listed_initializer(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 3]))


LEGAL = [
    infinite_mask,
    opset_99,
    repeated_node_names,
    own_domain,
    runtime_domain,
    runtime_operator,
    output_without_shape,
    zero_size,
    hostile_names,
    listed_initializer,
]


@pytest.mark.parametrize("edit", LEGAL, ids=lambda edit: edit.__name__)
def test_a_strange_but_legal_model_loads(edit, tmp_path):
    proto = hostile.small_model()
    edit(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert load(path).proto == proto
    assert [spec.name for spec in signature(proto)] == ["x"]


def test_a_model_newer_than_the_runtime_is_told_with_both_numbers():
    proto = hostile.small_model()
    assert runtime_support(proto) is None
    proto.opset_import[0].version = 99
    assert "opset 99" in (told := runtime_support(proto) or "")
    assert int(told.rstrip(".").split()[-1]) >= 13
    proto.ir_version = 99
    assert "IR version 99" in (told := runtime_support(proto) or "")
    assert int(told.rstrip(".").split()[-1]) >= 8


def test_a_proto_cannot_refer_to_files(tmp_path):
    with pytest.raises(ModelError, match="without its directory"):
        load(hostile.external_model(tmp_path, "weights.bin"))


def test_a_giant_tensor_in_a_file_is_never_in_memory(tmp_path):
    """Eight sparse terabytes on the disk: refused for their size before a byte is read."""
    proto = hostile.external_model(tmp_path, "weights.bin", length=str(2**43))
    proto.graph.initializer[0].dims[:] = [2**41]
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="ends at 48"):
        load(path)


SPARSE = hostile.small_model(
    """<ir_version: 8, opset_import: ["" : 13]>
    net (float[batch,4] x, bool[1] flag) => (float[batch,3] y)
    <float[4,3] W = {1,2,3,4,5,6,7,8,9,10,11,12}>
    {
        b = Constant <value = float[3] {1,2,3}> ()
        h = MatMul(x, W)
        y = If (flag) <
            then_branch = yes () => (float[batch,3] p) { p = Add(h, b) },
            else_branch = no () => (float[batch,3] q) { q = Sub(h, b) }
        >
    }"""
)
hostile.sparse_weight(np.array([1, 5]), np.ones(2, np.float32), [4, 3])(SPARSE)
CORPUS = [
    hostile.VALID,
    SPARSE.SerializeToString(),
    hostile.with_functions({"f": "y = Relu(x)"}, "f").SerializeToString(),
]


def test_the_models_to_mutate_are_valid(tmp_path):
    for data in CORPUS:
        (tmp_path / "model.onnx").write_bytes(data)
        load(tmp_path / "model.onnx")


@st.composite
def mutated(draw) -> bytes:
    """Bytes of a small model with some replaced, inserted or taken out."""
    data = bytearray(draw(st.sampled_from(CORPUS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.integers(0, 3))
        data[at:end] = draw(st.binary(max_size=3))
    return bytes(data)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=mutated())
def test_only_own_errors_escape_whatever_the_bytes(tmp_path_factory, data):
    path: Path = tmp_path_factory.getbasetemp() / "fuzz.onnx"
    path.write_bytes(data)
    with suppress(OnnxEcpError):
        model = load(path)
        signature(model.proto)
        decode_sparse(model.proto)
        digest(model)
