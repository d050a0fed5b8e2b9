"""Each version of a model is imported and searched once, and no version is taken for another."""

from collections import Counter
from contextlib import nullcontext

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

import onnx_ecp
from onnx_ecp.layers import find_layers
from onnx_ecp.layers.trace import main_scope
from onnx_ecp.layers.versions import one_look_each, version

TEXT = """
<ir_version: 8, opset_import: ["": 17, "loc": 1]>
g (float[n,40] x) => (float[n,4] y) <int64[2] s = {-1, 40}>
{ h = MatMul(x, U) r = loc.act(h) i = Reshape(r, s) y = MatMul(i, V) }
<opset_import: ["": 17], domain: "loc"> act (a) => (b) { b = Relu(a) }
"""


@pytest.fixture
def model(rng):
    return network(TEXT, rng)


@pytest.fixture
def plain(rng):
    """Without a function, which units do not pass."""
    return network(TEXT.replace("loc.act(h)", "Relu(h)"), rng)


def network(text, rng):
    proto = onnx.parser.parse_model(text)
    for name, shape in {"U": (40, 40), "V": (40, 4)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def copied(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


CHANGES = {
    "an operator": lambda m: setattr(m.graph.node[0], "op_type", "Gemm"),
    "an input of a node": lambda m: m.graph.node[3].input.__setitem__(0, "h"),
    "an attribute": lambda m: m.graph.node[0].attribute.append(onnx.helper.make_attribute("k", 1)),
    "a name": lambda m: setattr(m.graph.node[0], "name", "first"),
    "a node less": lambda m: m.graph.node.pop(),
    "a small value": lambda m: m.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.array([40, -1]), "s")
    ),
    "a size of a weight": lambda m: m.graph.initializer[1].dims.__setitem__(0, 39),
    "a type of a weight": lambda m: setattr(m.graph.initializer[1], "data_type", 11),
    "a type of an input": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 11),
    "an output": lambda m: setattr(m.graph.output[0], "name", "r"),
    "a declared shape": lambda m: m.graph.value_info.append(
        onnx.helper.make_tensor_value_info("h", 1, ["n", 40])
    ),
    "a function": lambda m: setattr(m.functions[0].node[0], "op_type", "Tanh"),
    "an opset": lambda m: setattr(m.opset_import[0], "version", 18),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_is_looked_at_makes_another_version(change, model):
    other = copied(model)
    change(other)
    assert version(other) != version(model)
    assert version(copied(model)) == version(model)


def test_weights_make_no_version(model, rng):
    other = copied(model)
    values = rng.standard_normal((40, 40)).astype(np.float32)
    other.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(values, "U"))
    assert version(other) == version(model)


def test_layers_are_searched_once_and_again_after_an_edit(model):
    with one_look_each():
        first = find_layers(model)
        assert find_layers(copied(model)) is first
        model.graph.node[3].name = "last"
        assert [layer.name for layer in find_layers(model).layers] != [x.name for x in first.layers]
    assert find_layers(model) is not find_layers(model)


def test_a_graph_is_that_of_one_object(model):
    with one_look_each():
        scope = main_scope(model)
        assert main_scope(model) is scope
        assert main_scope(copied(model)) is not scope


@pytest.mark.parametrize(
    "choices", [{}, {"granularity": "unit"}, {"method": "magnitude", "cleanup": False}]
)
def test_a_run_imports_each_version_once(choices, plain, rng, monkeypatch):
    imports = Counter()
    imported = gs.import_onnx

    def counted(proto, *rest):
        imports[proto.SerializeToString()] += 1
        return imported(proto, *rest)

    monkeypatch.setattr(gs, "import_onnx", counted)
    x = rng.standard_normal((60, 40)).astype(np.float32)
    onnx_ecp.optimize(plain, x, sparsity=0.5, measure=False, **choices)
    # The given model, what it became, and what they are observed with.
    assert max(imports.values()) == 1
    assert len(imports) <= 6


@pytest.mark.parametrize("choices", [{"sparsity": 0.7}, {"granularity": "unit", "sparsity": 0.4}])
def test_looking_once_changes_nothing(choices, plain, rng, monkeypatch):
    x = rng.standard_normal((60, 40)).astype(np.float32)
    once = onnx_ecp.optimize(plain, x, measure=False, effort="fast", **choices).model
    monkeypatch.setattr("onnx_ecp.api.optimize.one_look_each", nullcontext)
    always = onnx_ecp.optimize(plain, x, measure=False, effort="fast", **choices).model
    assert once == always
