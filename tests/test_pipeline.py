"""Laws of the whole way, on every spelling of a network and by every method."""

from __future__ import annotations

import copy
import functools
import json
import re
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import onnx_ecp
from onnx_ecp.api import preparation
from onnx_ecp.api.optimize import Result
from onnx_ecp.api.options import Options
from onnx_ecp.api.preparation import choose_layers, gather, load, observe_network
from onnx_ecp.errors import (
    CalibrationError,
    ModelError,
    OnnxEcpError,
    ProviderError,
    TargetError,
    UsageError,
)
from onnx_ecp.graph import constants, decode_sparse, read_tensor, signature
from onnx_ecp.graph import load as load_model
from onnx_ecp.layers import edit, find_layers
from onnx_ecp.methods import METHODS
from onnx_ecp.pruning.selection import zeros_wanted
from onnx_ecp.report import SYNTHETIC_WARNING, Report
from onnx_ecp.runtime.session import OutOfMemory, Session
from onnx_ecp.statistics.collection import measure

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
SAMPLES = 40

# Networks: each with random stored tensors. W.. are weights, b.. biases.


@dataclass(frozen=True)
class Net:
    """A network of a few lines.

    Args:
        text: inputs, outputs and body in ONNX text.
        shapes: of the stored tensors.
        edit: what is done to the model in the end.
    """

    text: str
    shapes: dict[str, tuple[int, ...]]
    edit: Callable[[onnx.ModelProto], object] = lambda model: None

    def model(self) -> onnx.ModelProto:
        rng = np.random.default_rng(1)
        header = '<ir_version: 8, opset_import: ["": 17]> net '
        proto = onnx.parser.parse_model(header + self.text)
        dtype = next(s.dtype for s in signature(proto) if s.dtype.kind == "f")
        for name, shape in self.shapes.items():
            scale = 1 if len(shape) == 1 else np.sqrt(np.prod(shape[1:]))
            values = (rng.standard_normal(shape) / scale).astype(dtype)
            proto.graph.initializer.append(numpy_helper.from_array(values, name))
        self.edit(proto)
        proto.doc_string, proto.producer_name = "a net", "hand"
        helper.set_model_props(proto, {"key": "value"})
        onnx.checker.check_model(proto)
        return proto


def into_nodes(model: onnx.ModelProto) -> None:
    """Constant nodes instead of initializers."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes += list(model.graph.node)
    for field in ("initializer", "node"):
        model.graph.ClearField(field)
    model.graph.node.extend(nodes)


def into_short_nodes(model: onnx.ModelProto) -> None:
    """Constant nodes whose values are lists of floats, reshaped where that is no vector."""
    nodes = []
    for tensor in model.graph.initializer:
        name, array = tensor.name, numpy_helper.to_array(tensor)
        flat = name if array.ndim == 1 else f"{name}/flat"
        nodes.append(helper.make_node("Constant", [], [flat], value_floats=array.reshape(-1)))
        if array.ndim > 1:
            shape = f"{name}/shape"
            nodes.append(helper.make_node("Constant", [], [shape], value_ints=array.shape))
            nodes.append(helper.make_node("Reshape", [flat, shape], [name]))
    nodes += list(model.graph.node)
    for field in ("initializer", "node"):
        model.graph.ClearField(field)
    model.graph.node.extend(nodes)


def listed(model: onnx.ModelProto) -> None:
    """Initializers as inputs too, as files of IR version 3 had them."""
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )


GEMMS = "{ h = Gemm<transB=1>(x, W, b) r = Relu(h) y = Gemm<transB=1>(r, W2, b2) }"
GEMM = {"W": (16, 8), "b": (16,), "W2": (3, 16), "b2": (3,)}
NETS = {
    "gemm": Net("(float[n,8] x) => (float[n,3] y) " + GEMMS, GEMM),
    "one layer": Net("(float[n,8] x) => (float[n,5] y) { y = MatMul(x, W) }", {"W": (8, 5)}),
    "no bias": Net(
        "(float[n,8] x) => (float[n,3] y) { h = MatMul(x, W) r = Tanh(h) y = MatMul(r, W2) }",
        {"W": (8, 16), "W2": (16, 3)},
    ),
    "gemm without c": Net(
        "(float[n,8] x) => (float[n,3] y) "
        "{ h = Gemm(x, W) r = Sigmoid(h) y = Gemm<alpha=0.5>(r, W2) }",
        {"W": (8, 16), "W2": (16, 3)},
    ),
    "matmul, add": Net(
        "(float[n,8] x) => (float[n,3] y) "
        "{ p = MatMul(x, W) h = Add(b, p) r = Relu(h) q = MatMul(r, W2) y = Add(q, b2) }",
        {"W": (8, 16), "b": (16,), "W2": (16, 3), "b2": (3,)},
    ),
    "weight on the left": Net(
        "(float[n,8,2] x) => (float[n,3,2] y) { h = MatMul(W, x) r = Tanh(h) y = MatMul(W2, r) }",
        {"W": (16, 8), "W2": (3, 16)},
    ),
    "attention": Net(
        """(float[n,4,8] x) => (float[n,3] y) {
            q = MatMul(x, W)  k = MatMul(x, W2)  v = MatMul(x, W3)
            kt = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, kt)  p = Softmax(s)
            c = MatMul(p, v)  m = ReduceMean<axes=[1], keepdims=0>(c)  o = MatMul(m, W4)
            y = Add(o, b)
        }""",
        {"W": (8, 8), "W2": (8, 8), "W3": (8, 8), "W4": (8, 3), "b": (3,)},
    ),
    "convolution": Net(
        """(float[n,2,6,6] x) => (float[n,3] y) {
            h = Conv<pads=[1,1,1,1]>(x, W, b)  r = Relu(h)  d = Conv<group=2>(r, W2)
            m = GlobalAveragePool(d)  f = Flatten(m)  y = Gemm(f, W3, b3)
        }""",
        {"W": (4, 2, 3, 3), "b": (4,), "W2": (4, 2, 3, 3), "W3": (4, 3), "b3": (3,)},
    ),
    "half precision": Net("(float16[n,8] x) => (float16[n,3] y) " + GEMMS, GEMM),
    "double precision": Net(
        "(double[n,8] x) => (double[n,3] y) "
        "{ h = Gemm<transB=1>(x, W, b) r = Tanh(h) y = Gemm<transB=1>(r, W2, b2) }",
        GEMM,
    ),
    "fixed batch": Net("(float[1,8] x) => (float[1,3] y) " + GEMMS, GEMM),
    "constant nodes": Net("(float[n,8] x) => (float[n,3] y) " + GEMMS, GEMM, into_nodes),
    "constant lists": Net("(float[n,8] x) => (float[n,3] y) " + GEMMS, GEMM, into_short_nodes),
    "listed as inputs": Net("(float[n,8] x) => (float[n,3] y) " + GEMMS, GEMM, listed),
    "tied": Net(
        "(float[n,8] x) => (float[n,3] y) "
        "{ h = MatMul(x, W) r = Tanh(h) g = MatMul(r, W) t = Tanh(g) y = Gemm(t, W2, b) }",
        {"W": (8, 8), "W2": (8, 3), "b": (3,)},
    ),
    "shared bias": Net(
        "(float[n,8] x) => (float[n,8] y) { h = Gemm(x, W, b) r = Relu(h) y = Gemm(r, W2, b) }",
        {"W": (8, 8), "W2": (8, 8), "b": (8,)},
    ),
    "two outputs": Net(
        "(float[n,8] x) => (float[n,3] y, float[n,16] r) " + GEMMS,
        GEMM,
    ),
    "ids and numbers": Net(
        """(int64[n,5] ids, float[n,8] x) => (float[n,3] y) {
            e = Gather(E, ids)  m = ReduceMean<axes=[1], keepdims=0>(e)  s = Add(m, x)
            h = Gemm(s, W, b)  r = Relu(h)  y = Gemm(r, W2, b2)
        }""",
        {"E": (10, 8), "W": (8, 16), "b": (16,), "W2": (16, 3), "b2": (3,)},
    ),
}
TRAINED = ("digits", "heat")
SMOOTH = (
    "one layer",
    "no bias",
    "gemm without c",
    "weight on the left",
    "attention",
    "double precision",
)

each_net = pytest.mark.parametrize("net", [*NETS, *TRAINED])
each_small_net = pytest.mark.parametrize("net", NETS)
each_method = pytest.mark.parametrize("method", METHODS)


@functools.cache
def original(net: str) -> onnx.ModelProto:
    return NETS[net].model() if net in NETS else onnx.load(MODELS / f"{net}.onnx")


@functools.cache
def inputs(net: str, samples: int = SAMPLES) -> dict[str, np.ndarray]:
    """Calibration inputs."""
    if net in TRAINED:
        with np.load(MODELS / f"{net}.npz") as arrays:
            return {name: array[:samples] for name, array in arrays.items()}
    rng, found = np.random.default_rng(2), {}
    for spec in signature(original(net)):
        shape = (samples, *spec.shape[1:])
        ids = spec.dtype.kind == "i"
        drawn = rng.integers(0, 10, shape) if ids else rng.standard_normal(shape)
        found[spec.name] = drawn.astype(spec.dtype)
    return found


@functools.cache
def pruned(net: str, method: str, sparsity: float | str = 0.6, scope: str = "global") -> Result:
    """The result with all its zeros in place: what masks and counts are about."""
    return onnx_ecp.optimize(
        original(net), inputs(net), method=method, sparsity=sparsity, scope=scope, cleanup=False
    )


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Stored tensors by name."""
    return {name: numpy_helper.to_array(t) for name, t in constants(model).items()}


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()


def feeds_of(net: str) -> dict[str, np.ndarray]:
    """What one run takes."""
    one = signature(original(net))[0].shape[0] == 1
    return {name: array[:1] if one else array for name, array in inputs(net).items()}


def computed(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


# What is written.


@pytest.fixture(autouse=True)
def within_reach(request):
    """A run for each of 50,000 weights is none that a test waits for."""
    wanted = getattr(getattr(request.node, "callspec", None), "params", {})
    if wanted.get("method") == "nonlinear" and wanted.get("net") in ("digits", "heat"):
        pytest.skip("nonlinear refuses networks of this size")


@pytest.mark.slow
@each_method
@each_net
def test_without_sparsity_nothing_changes_bit_for_bit(net, method):
    assert pruned(net, method, 0.0).model == original(net)


@pytest.mark.slow
@each_method
@each_net
def test_zeros_are_as_many_as_wanted_and_as_reported(net, method):
    result = pruned(net, method)
    stored = tensors(result.model)
    rows = {row.tensor: row for row in result.report.layers}
    assert sorted(rows) == sorted(result.masks)
    for name, row in rows.items():
        keep, weight = result.masks[name], stored[name]
        assert keep.dtype == np.bool_
        assert keep.shape == weight.shape
        assert not weight[~keep].any()
        assert np.count_nonzero(weight == 0) == np.count_nonzero(~keep) == row.zeros_after
        assert row.weights == weight.size
    wanted = zeros_wanted(0.6, sum(stored[name].size for name in rows))
    assert sum(row.zeros_after for row in rows.values()) == wanted == result.report.zeros_after


@each_net
@pytest.mark.parametrize(
    "method", [m for m in METHODS if METHODS[m].compensation in ("none", "bias")]
)
def test_weights_that_stay_are_the_same_bits(net, method):
    result = pruned(net, method)
    before, after = tensors(original(net)), tensors(result.model)
    for name, keep in result.masks.items():
        assert bits(after[name][keep]) == bits(before[name][keep])
    if METHODS[method].compensation == "none":
        assert all(bits(after[n]) == bits(before[n]) for n in before if n not in result.masks)


@each_method
@each_net
def test_nothing_but_weights_and_biases_differs(net, method):
    before, after = onnx.ModelProto(), onnx.ModelProto()
    before.CopyFrom(original(net))
    result = pruned(net, method)
    after.CopyFrom(result.model)
    if net == "constant lists":  # of what changes, value_floats becomes value
        for name in ("W/flat", "b", "W2/flat", "b2"):
            edit.stored(before, name)
            edit.stored(after, name)
    without_created_biases(after)
    stored = constants(before)
    for name, tensor in constants(after).items():
        if name in result.masks or len(stored[name].dims) == 1:
            assert (tensor.dims, tensor.data_type) == (stored[name].dims, stored[name].data_type)
            tensor.CopyFrom(stored[name])
    if net != "shared bias":  # unsharing removes the one that nobody reads
        assert after == before


def without_created_biases(model: onnx.ModelProto) -> None:
    """Take away what a layer without a bias got."""
    created = [t for t in model.graph.initializer if t.name.endswith("/ecp_bias")]
    for tensor in created:
        reader = next(node for node in model.graph.node if tensor.name in node.input)
        if reader.name.endswith("/ecp_add"):
            node = next(n for n in model.graph.node if reader.input[0] in n.output)
            node.output[0] = reader.output[0]
            model.graph.node.remove(reader)
        else:
            assert reader.input.pop() == tensor.name
        model.graph.initializer.remove(tensor)


@each_net
def test_a_bias_is_created_only_where_it_repairs_something(net):
    for method in ("ecp", "magnitude"):
        result = pruned(net, method)
        created = [row.name for row in result.report.layers if row.bias_created]
        names = [name for name in tensors(result.model) if name.endswith("/ecp_bias")]
        assert len(created) == len(names) or net == "shared bias"
        assert not (method == "magnitude" and names)


def test_a_shared_bias_is_unshared():
    result = pruned("shared bias", "ecp")
    biases = {node.input[2] for node in result.model.graph.node if node.op_type == "Gemm"}
    assert len(biases) == 2
    assert all(not row.bias_created for row in result.report.layers)


REDUCTION = {"gemm": 1, "no bias": 0, "attention": 0, "weight on the left": 1}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ecp", "ecp-refit", "magnitude", "random"])
@pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:8"])
@pytest.mark.parametrize("net", REDUCTION)
def test_n_of_m_holds_in_every_group(net, pattern, method):
    n, m = map(int, pattern.split(":"))
    result = pruned(net, method, pattern)
    stored = tensors(result.model)
    for name in result.masks:
        along = np.moveaxis(stored[name], REDUCTION[net], -1)
        kept = np.count_nonzero(along.reshape(-1, m), axis=1)
        assert (kept == n).all()


def test_n_of_m_of_a_convolution_runs_over_its_channels():
    result = onnx_ecp.optimize(
        original("convolution"), inputs("convolution"), sparsity="1:2", exclude=["^y"]
    )
    for name in ("W", "W2"):
        kept = np.count_nonzero(tensors(result.model)[name], axis=1)
        assert (kept == 1).all()


# Which layers.


@pytest.mark.slow
@each_method
@each_small_net
def test_each_layer_has_the_share_if_asked_for(net, method):
    for row in pruned(net, method, 0.6, "layer").report.layers:
        assert row.zeros_after == zeros_wanted(0.6, row.weights)


def test_layers_are_chosen_by_name():
    model = original("gemm")
    for choice, reason in (
        ({"include": ["h"]}, "not matched by --include"),
        ({"exclude": ["^y$"]}, "matched by --exclude ^y$"),
    ):
        result = onnx_ecp.optimize(model, inputs("gemm"), **choice)
        assert [row.name for row in result.report.layers] == ["h"]
        assert [(skip.name, skip.reason) for skip in result.report.skips] == [("y", reason)]
        assert bits(tensors(result.model)["W2"]) == bits(tensors(model)["W2"])
        assert result.report.zeros_after == 64


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_a_pattern_that_matches_no_layer_is_a_slip(flag):
    with pytest.raises(
        UsageError, match=f"`{flag.replace('-', '_')}` 'zz' matches no layer"
    ) as caught:
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), **{flag: ["^h", "zz"]})
    assert caught.value.hint == "Known: h, y."


@pytest.mark.parametrize(
    "choices", [{"sparsity": "2:4"}, {"sparsity": 0.5, "layer_sparsity": {".": "2:4"}}], ids=str
)
def test_layers_that_n_of_m_does_not_fit_stay_dense_and_are_named(choices):
    model = Net(
        "(float[n,6] x) => (float[n,3] y) { h = MatMul(x, W) r = Relu(h) y = MatMul(r, W2) }",
        {"W": (6, 8), "W2": (8, 3)},
    ).model()
    x = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    result = onnx_ecp.optimize(model, {"x": x}, **choices)
    assert [row.name for row in result.report.layers] == ["y"]
    (skip,) = result.report.skips
    assert (skip.name, "4 does not divide the 6" in skip.reason) == ("h", True)
    assert any("1 layer, such as h, stayed dense" in text for text in result.report.warnings)
    assert bits(tensors(result.model)["W"]) == bits(tensors(model)["W"])
    with pytest.raises(TargetError, match="2:4 does not fit it"):
        onnx_ecp.optimize(model, {"x": x}, **choices, exclude="y")


def test_an_error_lists_a_few_of_the_layers_that_cannot_be_pruned():
    with pytest.raises(TargetError, match=r"q .*; k .*; v .*; and 1 more$") as caught:
        onnx_ecp.optimize(original("attention"), inputs("attention"), exclude=".")
    assert "lists every candidate" in caught.value.hint


@pytest.mark.parametrize("thing", [123, b"abc", None], ids=repr)
@pytest.mark.parametrize(
    "call",
    [onnx_ecp.optimize, onnx_ecp.inspect, lambda m: onnx_ecp.compare(m, m, {})],
    ids=["optimize", "inspect", "compare"],
)
def test_what_stands_for_no_model_is_told(call, thing):
    with pytest.raises(UsageError, match="a model cannot be") as caught:
        call(thing)
    assert "ModelProto" in caught.value.hint


def test_ids_beyond_the_vocabulary_are_a_fault_of_the_data():
    given = inputs("ids and numbers")
    with pytest.raises(CalibrationError, match="index") as caught:
        onnx_ecp.optimize(original("ids and numbers"), given | {"ids": given["ids"] + 10})
    assert (caught.value.exit_code, "vocabulary" in caught.value.hint) == (4, True)


def test_reports_are_written_in_the_formats_asked_for(tmp_path):
    paths = [tmp_path / "r.json", tmp_path / "r.html"]
    result = onnx_ecp.optimize(original("gemm"), inputs("gemm"), report=paths)
    assert Report.from_dict(json.loads(paths[0].read_text())) == result.report
    assert paths[1].read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(UsageError, match=r"r\.pdf"):
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), report=tmp_path / "r.pdf")


# Masks.


@pytest.mark.parametrize(
    "choice", [{"sparsity": 0.5}, {"layer_sparsity": {"h": 0.5}}, {"importance": "wanda"}], ids=str
)
def test_masks_leave_nothing_to_choose(choice, tmp_path):
    np.savez(tmp_path / "m.npz", W=np.ones((16, 8), bool))
    with pytest.raises(UsageError, match="`apply_masks` leaves nothing"):
        onnx_ecp.optimize(
            original("gemm"), inputs("gemm"), apply_masks=tmp_path / "m.npz", **choice
        )


@pytest.mark.parametrize(("masked", "missing"), [((), 2), (("W",), 1), (("W", "W2"), 0)])
def test_layers_without_a_mask_are_counted(masked, missing, tmp_path):
    stored = tensors(original("gemm"))
    np.savez(tmp_path / "m.npz", **{name: stored[name] > 0 for name in masked})
    report = onnx_ecp.optimize(
        original("gemm"), inputs("gemm"), apply_masks=tmp_path / "m.npz"
    ).report
    told = [text for text in report.warnings if "has no mask for" in text]
    assert [f"for {missing} of 2 layers" in text for text in told] == [True] * bool(missing)


HEADS = """(float[n,4,8] x) => (float[n,4,3] y) {
    c = Constant<value = int64[4] {0, 0, 2, 4}>()  m = Constant<value = int64[3] {0, 0, 8}>()
    q = MatMul(x, W)  qs = Reshape(q, c)  qh = Transpose<perm=[0,2,1,3]>(qs)
    k = MatMul(x, W2)  ks = Reshape(k, c)  kh = Transpose<perm=[0,2,3,1]>(ks)
    v = MatMul(x, W3)  vs = Reshape(v, c)  vh = Transpose<perm=[0,2,1,3]>(vs)
    l = MatMul(qh, kh)  p = Softmax(l)  o = MatMul(p, vh)  ot = Transpose<perm=[0,2,1,3]>(o)
    z = Reshape(ot, m)  y = MatMul(z, W4)
}"""


@pytest.fixture
def heads(rng) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A network with two attention heads, and samples."""
    model = Net(HEADS, {"W": (8, 8), "W2": (8, 8), "W3": (8, 8), "W4": (8, 3)}).model()
    return model, {"x": rng.standard_normal((SAMPLES, 4, 8)).astype(np.float32)}


def test_there_are_no_masks_where_they_would_not_fit_the_model_given(heads):
    assert onnx_ecp.optimize(*heads, granularity="unit", sparsity=0.2).masks is None
    choices = {"method": "magnitude", "sparsity": "2:4"}
    assert (
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), **choices, permute=True).masks is None
    )
    assert onnx_ecp.optimize(original("gemm"), inputs("gemm"), **choices).masks is not None


def test_masks_of_units_say_that_heads_are_pruned_otherwise(heads, tmp_path):
    choices = {"granularity": "unit", "sparsity": 0.2, "masks": tmp_path / "m.npz"}
    result = onnx_ecp.optimize(*heads, **choices)
    with np.load(tmp_path / "m.npz") as written:
        assert all(np.array_equal(result.masks[name], written[name]) for name in written)
    assert any("pruned in their own bases" in text for text in result.report.warnings)


@pytest.mark.parametrize(
    "choice", [{"exclude": "^h$"}, {"exclude": "^g$"}, {"include": ["^h$", "^y$"]}]
)
def test_a_shared_weight_stays_if_one_of_its_layers_must(choice):
    result = onnx_ecp.optimize(original("tied"), inputs("tied"), **choice)
    assert [row.name for row in result.report.layers] == ["y"]
    assert [skip.name for skip in result.report.skips] == ["h", "g"]
    assert sum("shares its weight" in skip.reason for skip in result.report.skips) == 1
    assert bits(tensors(result.model)["W"]) == bits(tensors(original("tied"))["W"])


@pytest.mark.parametrize("layer", ["^h$", "^g$"])
def test_a_shared_weight_has_the_sparsity_of_any_of_its_layers(layer):
    result = onnx_ecp.optimize(original("tied"), inputs("tied"), layer_sparsity={layer: 0.75})
    assert np.count_nonzero(~result.masks["W"]) == 48


def test_a_layer_with_its_own_sparsity_is_not_ranked_with_the_others():
    result = onnx_ecp.optimize(
        original("attention"),
        inputs("attention"),
        method="ecp",
        sparsity=0.5,
        layer_sparsity={"^q$": 0.25, "^k$": "2:4"},
    )
    zeros = {row.name: row.zeros_after for row in result.report.layers}
    assert (zeros["q"], zeros["k"]) == (16, 32)
    assert zeros["v"] + zeros["o"] == (64 + 24) / 2


# What is measured.


@pytest.mark.slow
@each_method
@each_net
def test_importances_are_not_negative_and_have_the_shape_of_w(net, method):
    scores = onnx_ecp.importance(original(net), inputs(net), method=method)
    shapes = {layer.name: layer.shape for layer in find_layers(original(net)).layers}
    assert {name: score.shape for name, score in scores.items()} == shapes
    for score in scores.values():
        assert score.dtype == np.float64
        assert (score >= 0).all()
        assert np.isfinite(score).all()
        assert score.any()


VARIANTS = {
    "exact": {},
    "probes": {"probes": 3},
    "kl": {"metric": "kl"},
    "kl, probes": {"metric": "kl", "probes": 2},
    "reduce": {"positions": "reduce"},
}


def test_statistics_do_not_depend_on_the_batch_size_in_double_precision():
    for options in VARIANTS.values():
        scores = by_batch_size("double precision", (1, 7, 36), method="ecp", **options)
        for other in scores[1:]:
            np.testing.assert_allclose(other, scores[0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("net", ["gemm", "attention", "convolution", "two outputs", "digits"])
def test_statistics_do_not_depend_on_the_batch_size(net, options):
    # ONNX Runtime's float32 products differ in the last bits with the number of rows.
    first, *others = by_batch_size(net, (1, 36), method="ecp", **options)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-6 * first.max())


def by_batch_size(net: str, sizes: tuple[int, ...], **options: object) -> list[np.ndarray]:
    """All importances of a network, one array for each batch size."""
    return [
        np.concatenate([score.ravel() for score in scores.values()])
        for size in sizes
        for scores in [onnx_ecp.importance(original(net), inputs(net), batch_size=size, **options)]
    ]


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("net", ["gemm", "attention", "convolution", "ids and numbers"])
def test_the_same_seed_gives_the_same_bytes(net, method, tmp_path):
    written = []
    for i in range(2):
        path = tmp_path / f"{i}.onnx"
        onnx_ecp.optimize(
            original(net), inputs(net), method=method, sparsity=0.6, probes=2, output=path
        )
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_another_seed_gives_other_random_numbers():
    masks = [
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), method="random", seed=seed).masks["W"]
        for seed in (0, 1)
    ]
    assert (masks[0] != masks[1]).any()


@pytest.mark.slow
@each_method
@each_small_net
def test_optimizing_again_keeps_the_mask(net, method):
    first = pruned(net, method)
    second = onnx_ecp.optimize(
        first.model, inputs(net), method=method, sparsity=0.6, scope="global"
    )
    for name, keep in first.masks.items():
        np.testing.assert_array_equal(second.masks[name], keep)
    assert second.report.zeros_before == second.report.zeros_after == first.report.zeros_after


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_optimizing_an_n_of_m_model_again_changes_nothing(pattern):
    first = pruned("gemm", "ecp", pattern)
    second = onnx_ecp.optimize(first.model, inputs("gemm"), method="ecp", sparsity=pattern)
    assert second.model == first.model


@pytest.mark.parametrize("method", ["ecp", "ecp-refit"])
def test_a_constant_feature_costs_nothing(method):
    model, x = original("gemm without c"), inputs("gemm without c")["x"].copy()
    x[:, 2] = 3.0
    scores = onnx_ecp.importance(model, {"x": x}, method="ecp")["h"]
    assert scores[:, 2].max() < 1e-12 * scores.max()
    result = onnx_ecp.optimize(model, {"x": x}, method=method, include=["h"], sparsity=1 / 8)
    assert not result.masks["W"][2].any()
    assert result.report.gap.relative_error < 1e-6


@pytest.mark.parametrize("net", [n for n in NETS if n != "half precision"])
def test_both_engines_see_the_same(net):
    few = {name: array[:10] for name, array in inputs(net).items()}
    by_graph, by_differences = (
        onnx_ecp.importance(original(net), few, method="obd", gradients=engine)
        for engine in ("vjp", "numeric")
    )
    tolerance = 1e-3 if net in SMOOTH else 2e-2  # a step crosses kinks
    for name, scores in by_graph.items():
        gap = np.linalg.norm(by_differences[name] - scores) / np.linalg.norm(scores)
        assert gap < tolerance


@pytest.mark.parametrize("net", ["gemm", "no bias", "tied", "two outputs", "double precision"])
def test_one_position_is_the_same_reduced_or_expanded(net):
    expanded, reduced = (
        onnx_ecp.importance(original(net), inputs(net), method="ecp", positions=positions)
        for positions in ("expand", "reduce")
    )
    for name, scores in expanded.items():
        np.testing.assert_allclose(reduced[name], scores, rtol=1e-6, atol=1e-12)


def test_reduced_positions_are_the_sensitivity_of_the_whole_layer():
    """By hand, with y = sum over tokens: dy/dW_ij = sum_t a_tj, the same for every sample."""
    net = Net(
        "(float[n,4,8] x) => (float[n,3] y) { h = MatMul(x, W) "
        "axes = Constant<value = int64[1] {1}> () y = ReduceSum<keepdims=0>(h, axes) }",
        {"W": (8, 3)},
    )
    x = np.random.default_rng(3).standard_normal((10, 4, 8)).astype(np.float32)
    data = preparation.gather(load_model(net.model()), {"x": x}, Options())
    seen = data.train.arrays["x"].astype(np.float64)
    weight = tensors(net.model())["W"].T.astype(np.float64)
    reduced = onnx_ecp.importance(
        net.model(), {"x": x}, method="obd", metric="l2-raw", positions="reduce"
    )["h"]
    np.testing.assert_allclose(reduced, weight**2 * (seen.sum(axis=1) ** 2).mean(axis=0), rtol=1e-5)
    expanded = onnx_ecp.importance(net.model(), {"x": x}, method="obd", metric="l2-raw")["h"]
    np.testing.assert_allclose(expanded, weight**2 * (seen**2).sum(axis=1).mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("method", ["ecp", "wanda"])
def test_memory_does_not_grow_with_the_number_of_samples(method):
    net = Net(
        "(float[n,1] x) => (float[n,1] y) "
        "{ h = MatMul(x, W) r = Tanh(h) g = MatMul(r, W2) t = Tanh(g) y = MatMul(t, W3) }",
        {"W": (1, 200), "W2": (200, 200), "W3": (200, 1)},
    ).model()
    peaks = []
    for samples in (200, 200, 4000):  # the first run warms up
        x = np.random.default_rng(0).standard_normal((samples, 1)).astype(np.float32)
        tracemalloc.start()
        onnx_ecp.optimize(net, {"x": x}, method=method, batch_size=32)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # One float64 copy of all activations would be 4000 * 400 * 8 bytes.
    assert peaks[2] - peaks[1] < 2**20


# The result in use.


@each_net
def test_the_result_agrees_in_onnxruntime_and_the_reference(net):
    model, feeds = pruned(net, "ecp-refit").model, feeds_of(net)
    onnx.checker.check_model(model, full_check=True)
    tolerance = 2e-2 if net == "half precision" else 1e-5
    expected = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    for got, wanted in zip(computed(model, feeds), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@each_net
def test_the_report_measures_what_onnxruntime_computes(net):
    """With one sample, held out and calibration are the same."""
    one = {name: array[:1] for name, array in inputs(net).items()}
    result = onnx_ecp.optimize(original(net), one, method="magnitude", sparsity=0.3)
    before, after = (
        np.concatenate([y.ravel().astype(np.float64) for y in computed(model, one)])
        for model in (original(net), result.model)
    )
    if len(original(net).graph.output) == 1:
        error = np.linalg.norm(after - before) / np.linalg.norm(before)
        np.testing.assert_allclose(result.report.gap.outputs[0].raw_error, error, rtol=1e-5)


@pytest.mark.parametrize("encoding", ["dense", "sparse", "packed"])
@pytest.mark.parametrize("net", TRAINED)
def test_every_format_holds_the_same_model(net, encoding, tmp_path):
    path = tmp_path / "out.onnx"
    choices = {"sparsity": 0.9, "method": "ecp", "cleanup": False}
    result = onnx_ecp.optimize(original(net), inputs(net), format=encoding, output=path, **choices)
    dense = pruned(net, "ecp", 0.9)
    for got, wanted in zip(
        computed(onnx.load(path), inputs(net)), computed(dense.model, inputs(net)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert result.model == onnx.load(path)
    assert result.report.zeros_after == dense.report.zeros_after
    again = decode_sparse(result.model)
    found = onnx_ecp.inspect(path)
    assert sum(layer.zeros for layer in found.layers) == dense.report.zeros_after
    assert {layer.storage for layer in found.layers} <= {encoding, "dense"}
    assert encoding in {layer.storage for layer in found.layers}
    for name, keep in dense.masks.items():
        np.testing.assert_array_equal(tensors(again)[name] != 0, keep)
    assert result.report.result.parameters == dense.report.result.parameters
    assert result.report.result.zeros == dense.report.result.zeros
    if encoding != "dense":
        assert path.stat().st_size < 0.4 * len(dense.model.SerializeToString())


@pytest.mark.parametrize("encoding", ["sparse", "packed"])
def test_a_sparse_file_can_be_pruned_further(encoding, tmp_path):
    path = tmp_path / "sparse.onnx"
    whole = {"cleanup": False}  # masks of both are of the same shapes
    first = onnx_ecp.optimize(
        original("digits"), inputs("digits"), sparsity=0.8, format=encoding, output=path, **whole
    )
    second = onnx_ecp.optimize(path, inputs("digits"), sparsity=0.9, **whole)
    assert second.report.zeros_before == first.report.zeros_after
    for name, keep in first.masks.items():
        assert not second.masks[name][~keep].any()


def test_the_predicted_error_is_the_measured_one_where_the_network_is_linear():
    """One layer: the first order is all there is; the samples differ, hence not exact."""
    net = Net("(float[n,8] x) => (float[n,4] y) { y = MatMul(x, W) }", {"W": (8, 4)}).model()
    x = np.random.default_rng(0).standard_normal((4000, 8)).astype(np.float32)
    report = onnx_ecp.optimize(net, {"x": x}, method="ecp", sparsity=0.25).report
    assert report.predicted_error == pytest.approx(report.gap.relative_error, rel=0.1)


# Outputs of all kinds.

BODY = "h = MatMul(x, W)  r = Relu(h)  z = MatMul(r, W2) "
SHAPES = {"W": (8, 16), "W2": (16, 3)}
BESIDE = {
    "a constant": ("float[3] c", "c = Identity(C)"),
    "a stored tensor": ("float[3] C", ""),
    "an input": ("float[n,8] x", ""),
    "a function of an input": ("float[n,8] c", "c = Exp(x)"),
}


@pytest.mark.parametrize("method", ["ecp", "magnitude"])
@pytest.mark.parametrize("beside", BESIDE)
def test_an_output_that_no_layer_reaches_plays_no_part(beside, method):
    outputs, node = BESIDE[beside]
    stored = SHAPES | ({"C": (3,)} if "C" in outputs + node else {})
    alone = Net("(float[n,8] x) => (float[n,3] z) { " + BODY + "}", SHAPES).model()
    both = Net(f"(float[n,8] x) => (float[n,3] z, {outputs}) {{ {BODY} {node} }}", stored).model()
    expected, found = (
        onnx_ecp.optimize(model, inputs("gemm"), method=method, sparsity=0.6).masks
        for model in (alone, both)
    )
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask)


MIXING = {
    "a mean over samples": "(float[3] y) { BODY y = ReduceMean<axes=[0], keepdims=0>(z) }",
    "one number": "(float y) { BODY y = ReduceMean<keepdims=0>(z) }",
    "a covariance": "(float[3,3] y) { BODY t = Transpose<perm=[1,0]>(z) y = MatMul(t, z) }",
}


@pytest.mark.parametrize("text", MIXING.values(), ids=MIXING)
def test_a_network_that_mixes_samples_has_no_sensitivities(text):
    model = Net("(float[n,8] x) => " + text.replace("BODY", BODY), SHAPES).model()
    with pytest.raises(ModelError, match=r"'y' has shape .* mixes samples"):
        onnx_ecp.optimize(model, inputs("gemm"), method="ecp")
    assert onnx_ecp.optimize(model, inputs("gemm"), method="magnitude").report.zeros_after == 88


KL_HEADS = {
    "probabilities": "float[n,3] y",
    "logits and probabilities": "float[n,3] z, float[n,3] y",
    "probabilities twice": "float[n,3] y, float[n,3] l",
}


def test_under_kl_logits_count_once_however_many_outputs_they_have():
    scores = []
    for outputs in KL_HEADS.values():
        text = f"(float[n,8] x) => ({outputs}) {{ {BODY} y = Softmax(z) l = LogSoftmax(z) }}"
        model = Net(text, SHAPES).model()
        scores.append(onnx_ecp.importance(model, inputs("gemm"), method="ecp", metric="kl"))
    for other in scores[1:]:
        for name, score in scores[0].items():
            np.testing.assert_allclose(other[name], score, rtol=1e-6)


BEHIND_A_SOFTMAX = {
    "identity": "y = Identity(p)",
    "reshaped": "s = Constant<value_ints=[-1, 1, 3]>() y = Reshape(p, s)",
    "flattened": "y = Flatten(p)",
    "an axis more": "a = Constant<value_ints=[2]>() y = Unsqueeze(p, a)",
    "an axis more and less": "a = Constant<value_ints=[0]>() u = Unsqueeze(p, a) y = Squeeze(u, a)",
    "converted": "d = Cast<to=11>(p) y = Cast<to=1>(d)",
    "its logarithm": "l = Log(p) y = Identity(l)",
}


@pytest.mark.parametrize("behind", BEHIND_A_SOFTMAX.values(), ids=BEHIND_A_SOFTMAX)
def test_under_kl_logits_are_found_through_what_only_moves_probabilities(behind):
    text = f"{{ {BODY} p = Softmax(z) {behind} }}"
    moved = Net("(float[n,8] x) => (float y) " + text, SHAPES).model()
    bare = Net("(float[n,8] x) => (float[n,3] z) { " + BODY + "}", SHAPES).model()
    found = onnx_ecp.optimize(moved, inputs("gemm"), method="ecp", metric="kl")
    alone = onnx_ecp.optimize(bare, inputs("gemm"), method="ecp", metric="kl")
    for name, mask in alone.masks.items():
        np.testing.assert_array_equal(found.masks[name], mask)
    assert found.report.recipe.metric_reason == "asked for; taken at the logits of y"
    assert alone.report.recipe.metric_reason == "asked for"
    assert not any("probabilities" in text for text in found.report.warnings)


NO_LOGITS = {
    "some probabilities": "p = Softmax(z) s = Constant<value_ints=[0]>() "
    "e = Constant<value_ints=[2]>() a = Constant<value_ints=[1]>() y = Slice(p, s, e, a)",
    "probabilities on another axis": "a = Constant<value_ints=[2]>() u = Unsqueeze(z, a) "
    "p = Softmax<axis=1>(u) y = Flatten(p)",
}


@pytest.mark.parametrize("end", NO_LOGITS.values(), ids=NO_LOGITS)
def test_under_kl_outputs_that_are_no_logits_are_told(end):
    model = Net(f"(float[n,8] x) => (float y) {{ {BODY} {end} }}", SHAPES).model()
    found = onnx_ecp.optimize(model, inputs("gemm"), method="ecp", metric="kl").report
    assert any("'y' look like probabilities" in text for text in found.warnings)


NO_CLASSES = {
    "a number": "(float[n] y) { BODY y = ReduceMean<axes=[1], keepdims=0>(z) }",
    "one score": "(float[n,1] y) { BODY y = ReduceMean<axes=[1], keepdims=1>(z) }",
    "another axis": "(float[n,3,1] y) { BODY a = Constant<value_ints=[2]>() "
    "u = Unsqueeze(z, a) y = Softmax<axis=1>(u) }",
}


@pytest.mark.parametrize("text", NO_CLASSES.values(), ids=NO_CLASSES)
def test_kl_wants_classes_on_the_last_axis(text):
    model = Net("(float[n,8] x) => " + text.replace("BODY", BODY), SHAPES).model()
    with pytest.raises(UsageError, match="kl") as caught:
        onnx_ecp.optimize(model, inputs("gemm"), metric="kl")
    assert "l2" in caught.value.hint


@pytest.mark.parametrize("method", ["ecp", "ecp-refit"])
def test_an_infinite_derivative_is_told_and_prunes_nothing(method):
    text = "{ h = MatMul(x, W) r = Relu(h) s = Sqrt(r) y = MatMul(s, W2) }"
    model = Net("(float[n,8] x) => (float[n,3] y) " + text, SHAPES).model()
    with pytest.raises(ModelError, match="importance of layer 'h' is NaN"):
        onnx_ecp.optimize(model, inputs("gemm"), method=method)


FEW = {
    "one sample": np.ones((1, 8)),
    "two samples": np.stack([np.ones(8), np.arange(8)]),
    "always the same": np.ones((40, 8)),
    "zeros": np.zeros((40, 8)),
}


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("x", FEW.values(), ids=FEW)
def test_inputs_that_do_not_vary_are_no_obstacle(x, method):
    x = x.astype(np.float32)
    scores = onnx_ecp.importance(original("gemm"), {"x": x}, method=method)
    assert all(np.isfinite(score).all() for score in scores.values())
    result = onnx_ecp.optimize(original("gemm"), {"x": x}, method=method, sparsity=0.5)
    assert result.report.zeros_after == 88
    if method == "ecp-refit" and len(np.unique(x, axis=0)) == 1:
        assert result.report.gap.relative_error < 1e-5  # the biases alone make everything good


def test_finite_differences_bear_large_numbers():
    model, x = original("gemm"), {"x": 1e6 * inputs("gemm")["x"]}
    graph, differences = (
        onnx_ecp.importance(model, x, method="obd", gradients=engine)
        for engine in ("vjp", "numeric")
    )
    for name, score in graph.items():
        gap = np.linalg.norm(differences[name] - score) / np.linalg.norm(score)
        assert gap < 2e-2


# Where the samples come from.


DESTROYED = {
    "worse than constants": ({"method": "magnitude", "sparsity": 0.95}, "than constants would be"),
    "nothing left": ({"method": "magnitude", "sparsity": 1.0}, "no weight is left"),
    "far from linear": ({"method": "ecp", "sparsity": 0.9}, "linearisation"),
}


@pytest.mark.parametrize(("choices", "words"), DESTROYED.values(), ids=DESTROYED)
def test_a_destroyed_network_is_told(choices, words):
    report = onnx_ecp.optimize(original("digits"), inputs("digits"), **choices).report
    assert any(words in text for text in report.warnings), (report.predicted_error, report.gap)
    mild = onnx_ecp.optimize(original("digits"), inputs("digits"), **choices | {"sparsity": 0.1})
    assert not any(words in text for text in mild.report.warnings)


def test_the_line_on_speed_is_that_of_the_pattern():
    report = onnx_ecp.optimize(original("gemm"), inputs("gemm"), sparsity="2:4").report
    assert report.speed.startswith("N:M makes the compressed file smaller")


def test_made_up_inputs_are_told_loudly():
    report = onnx_ecp.optimize(original("ids and numbers")).report
    assert report.calibration.synthetic
    assert report.warnings[0] == SYNTHETIC_WARNING


def test_the_file_beside_the_model_is_used_without_a_warning(tmp_path):
    onnx.save(original("gemm"), tmp_path / "net.onnx")
    np.savez(tmp_path / "net.npz", **inputs("gemm"))
    choices = {"method": "ecp", "sparsity": 0.6, "cleanup": False}
    beside = onnx_ecp.optimize(tmp_path / "net.onnx", **choices)
    assert beside.report.calibration.source == str(tmp_path / "net.npz")
    assert not beside.report.calibration.synthetic
    assert SYNTHETIC_WARNING not in beside.report.warnings
    assert beside.model == pruned("gemm", "ecp").model


def test_a_named_source_is_never_replaced(tmp_path):
    onnx.save(original("gemm"), tmp_path / "net.onnx")
    np.savez(tmp_path / "net.npz", **inputs("gemm"))
    with pytest.raises(OnnxEcpError) as caught:
        onnx_ecp.optimize(tmp_path / "net.onnx", tmp_path / "gone.npz")
    assert caught.value.exit_code == 4


def test_the_callers_model_and_arrays_are_not_changed():
    model, arrays = NETS["gemm"].model(), inputs("gemm")
    before = {name: array.copy() for name, array in arrays.items()}
    onnx_ecp.optimize(model, arrays, sparsity=0.6)
    assert model == original("gemm")
    for name, array in before.items():
        np.testing.assert_array_equal(arrays[name], array)


# What may happen on the way.

ENDLESS = """
<ir_version: 8, opset_import: ["": 17]>
net (float[n,8] x) => (float[n,4] y) {
    trips = Constant<value = int64 {1000000000000}> ()
    h = MatMul(x, W)
    y = Loop (trips, , h) <
        body = step (int64 i, bool going, float[n,4] before) => (bool on, float[n,4] after) {
            on = Identity(going)  after = Sin(before)
        }
    >
}"""


@pytest.fixture
def endless(tmp_path) -> Path:
    """A model that runs for ever."""
    model = onnx.parser.parse_model(ENDLESS)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 4), np.float32), "W"))
    onnx.save(model, tmp_path / "endless.onnx")
    np.savez(tmp_path / "endless.npz", x=inputs("gemm")["x"])
    return tmp_path / "endless.onnx"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_running_session(number, endless):
    code = textwrap.dedent(f"""
        import sys, threading
        sys.path.insert(0, {str(ROOT)!r})
        import onnx_ecp.cli.commands, onnx_ecp.runtime.session
        run = onnx_ecp.runtime.session.Session.run
        def told(*arguments):
            threading.Timer(0.2, print, ["running"], {{"flush": True}}).start()
            return run(*arguments)
        onnx_ecp.runtime.session.Session.run = told
        onnx_ecp.cli.commands.main()
    """)
    before = sorted(endless.parent.iterdir())
    with subprocess.Popen(
        [sys.executable, "-B", "-c", code, "optimize", endless, endless.parent / "o.onnx"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)  # for ever, did it not end
    assert process.returncode == 128 + number
    assert errors.splitlines()[-2:] == ["error: interrupted.", "hint: Nothing was written."]
    assert sorted(endless.parent.iterdir()) == before


def test_the_time_limit_ends_a_running_session(endless):
    with pytest.raises(ProviderError, match=r"time limit of 0\.5 s"):
        onnx_ecp.optimize(endless, timeout=0.5)


def test_an_unknown_provider_is_a_usage_error():
    with pytest.raises(UsageError, match="'cdua'") as caught:
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), provider="cdua")
    assert "cpu" in caught.value.hint


@pytest.mark.parametrize(
    ("asked", "hint"), [("cuda", r"onnx-ecp\[gpu\]"), ("migraphx", "this one has CPU")]
)
def test_a_provider_that_this_build_lacks_is_told(asked, hint, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="built without") as caught:
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), provider=asked)
    assert re.search(hint, caught.value.hint)


def test_a_provider_that_is_not_used_is_told(monkeypatch):
    class Fallen(onnxruntime.InferenceSession):
        """Falls back to the CPU, as ONNX Runtime does with no more than a line in the log."""

        def __init__(self, model, options, providers):
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(ProviderError, match=r"CUDA.* was asked for, .* uses CPU"):
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), provider="cuda")


def test_a_missing_runtime_is_told_with_both_commands(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match="not installed") as caught:
        onnx_ecp.optimize(original("gemm"), inputs("gemm"))
    assert "onnx-ecp[cpu]" in caught.value.hint
    assert "onnx-ecp[gpu]" in caught.value.hint


@pytest.fixture
def small_memory(monkeypatch) -> Callable[[int], None]:
    """Sessions that fail for batches of more than some number of samples."""

    def limit(samples: int) -> None:
        run = Session.run

        def starved(session, feeds, outputs=None):
            if any(len(feeds[name]) > samples for name in ("x",) if name in feeds):
                raise OutOfMemory("Failed to allocate memory for requested buffer of size 9")
            return run(session, feeds, outputs)

        monkeypatch.setattr(Session, "run", starved)

    return limit


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("net", ["gemm", "attention", "two outputs"])
def test_a_batch_that_does_not_fit_is_halved(net, method, small_memory):
    expected = pruned(net, method)
    small_memory(5)
    result = onnx_ecp.optimize(
        original(net), inputs(net), method=method, sparsity=0.6, scope="global"
    )
    for name, keep in expected.masks.items():
        assert np.mean(result.masks[name] == keep) > 0.95


@each_method
def test_one_sample_that_does_not_fit_is_told(method, small_memory):
    small_memory(0)
    with pytest.raises(ProviderError, match="memory"):
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), method=method)


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("net", ["attention", "convolution", "tied"])
def test_the_result_does_not_depend_on_the_memory(net, method):
    """With one byte every layer is a group of its own, and everything lies in temporary files.

    The joint refit alone needs its vectors in memory; it is left out with a warning.
    """
    options = {"method": method, "sparsity": 0.6, "scope": "global", "cleanup": False}
    if onnx_ecp.METHODS[method].compensation == "joint":
        options["compensation"] = "refit"
    little, much = (
        onnx_ecp.optimize(original(net), inputs(net), max_memory=memory, **options)
        for memory in (1, "1G")
    )
    assert little.model == much.model
    assert [row.importance_removed for row in little.report.layers] == [
        row.importance_removed for row in much.report.layers
    ]


@pytest.mark.parametrize(("samples", "passes"), [(8, 1), (28, 2)])
def test_layers_in_turn_share_one_pass_where_it_takes_less_space_than_their_sums(
    samples, passes, monkeypatch
):
    source, options = load(original("gemm")), Options.of()
    layers, _ = choose_layers(source, options)
    data = gather(source, inputs("gemm"), options)
    network, _ = observe_network(source, layers, data, options)
    few, observe, seen = network.train.limit(samples, 0), network.observer.observe, []

    def counted(state, batch, *, common):
        seen.append(batch.samples)
        return observe(state, batch, common=common)

    monkeypatch.setattr(network.observer, "observe", counted)
    much, little = (
        measure(network.observer, network.original, few, size=4, memory=memory).moments
        for memory in (None, 1)
    )
    assert sum(seen) == samples + passes * samples
    for name, moments in much.items():
        for part in ("bb", "wb", "ww", "a", "aa"):
            assert np.array_equal(getattr(little[name], part), getattr(moments, part))


@pytest.mark.parametrize("net", ["convolution", "attention"])
def test_the_batch_size_counts_what_is_cut_out_of_tensors(net):
    """Patches of a convolution overlap, so its rows take more than its input."""
    source, options = load(original(net)), Options.of()
    layers, _ = choose_layers(source, options)
    data = gather(source, inputs(net), options)
    network, _ = observe_network(source, layers, data, options)
    batch = next(data.train.batches(4))
    seen = network.observer.observe(network.original, batch)
    adjoints = sum(seen.adjoints[x.name].nbytes for x in network.layers)
    largest = max(seen.inputs[x.name].nbytes for x in network.layers)
    assert network.observer.bytes_per_sample >= (adjoints + largest) / batch.samples


def test_memory_is_a_size():
    with pytest.raises(UsageError, match="`max_memory` is 'much'; it must be a size"):
        onnx_ecp.optimize(original("gemm"), inputs("gemm"), max_memory="much")


def test_words_of_the_runtime_for_too_little_memory_are_understood(monkeypatch):
    expected = pruned("gemm", "ecp").report
    run = onnxruntime.InferenceSession.run

    def starved(session, names, feeds, options=None):
        if len(feeds.get("x", ())) > 5:
            raise RuntimeError("Non-zero status code returned while running MatMul: std::bad_alloc")
        return run(session, names, feeds, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", starved)
    report = onnx_ecp.optimize(original("gemm"), inputs("gemm"), method="ecp", sparsity=0.6).report
    assert report.zeros_after == expected.zeros_after


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "ecp", "ecp-refit"])
@pytest.mark.parametrize("net", ["gemm", "half precision", "double precision", "tied", "digits"])
def test_external_weights_end_as_those_inside_do(net, method, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "net.onnx"
    onnx.save(copy.deepcopy(original(net)), path, save_as_external_data=True, size_threshold=0)
    options = {"method": method, "sparsity": 0.6, "scope": "global", "cleanup": False}
    in_memory = onnx_ecp.optimize(path, inputs(net), **options)
    onnx_ecp.optimize(path, inputs(net), output=tmp_path / "out.onnx", **options)
    written = load_model(tmp_path / "out.onnx")
    expected = tensors(pruned(net, method).model)
    found = {n: read_tensor(written, t) for n, t in constants(written.proto).items()}
    for model in (found, tensors(in_memory.model)):
        assert model.keys() == expected.keys()
        for name, array in expected.items():
            assert bits(np.asarray(model[name])) == bits(array)


@pytest.mark.parametrize("cleanup", [False, True])
def test_external_data_go_in_and_out(cleanup, tmp_path):
    """Beyond 2 GB the same code runs; here the tensors are small."""
    folder = tmp_path / "in"
    folder.mkdir()
    proto = onnx.ModelProto()
    proto.CopyFrom(original("digits"))  # saving it changes it
    onnx.save(proto, folder / "net.onnx", save_as_external_data=True, size_threshold=0)
    choices = {"method": "ecp", "sparsity": 0.9, "cleanup": cleanup}
    result = onnx_ecp.optimize(
        folder / "net.onnx", inputs("digits"), output=tmp_path / "out.onnx", **choices
    )
    within = onnx_ecp.optimize(original("digits"), inputs("digits"), **choices)
    assert bool(within.report.units) == cleanup
    expected = tensors(within.model)
    written = load_model(tmp_path / "out.onnx")
    for name, tensor in constants(written.proto).items():
        np.testing.assert_array_equal(read_tensor(written, tensor), expected[name])
    assert result.report.zeros_after == within.report.zeros_after


def test_writing_over_the_model_still_reports_the_original(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes((MODELS / "digits.onnx").read_bytes())
    before = onnx_ecp.inspect(path)
    report = onnx_ecp.optimize(
        path, MODELS / "digits.npz", output=path, force=True, method="magnitude"
    ).report
    assert report.original.sha256 != report.result.sha256
    assert report.original.zeros == sum(layer.zeros for layer in before.layers) == 0
