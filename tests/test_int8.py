"""Laws of int8 behind pruning: zeros stay, the grid is exact, what is stated is computed."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from test_pipeline import MODELS, NETS, Net, computed, feeds_of, inputs, original

import onnx_ecp
import onnx_ecp.report.text
from onnx_ecp.api.options import Options
from onnx_ecp.api.preparation import choose_layers, gather, load, observe_network
from onnx_ecp.cli.commands import main
from onnx_ecp.errors import ModelError, QualityError, TargetError, UsageError
from onnx_ecp.evaluation.facts import model_facts
from onnx_ecp.graph import Model
from onnx_ecp.layers import find_layers
from onnx_ecp.quantising.candidates import OPSET, candidates, opset_of, prepared
from onnx_ecp.quantising.grid import (
    LARGEST,
    best_scales,
    cost,
    fitting_scales,
    nearest,
    on_grid,
)
from onnx_ecp.quantising.stage import COSTLY
from onnx_ecp.quantising.writing import integers_of, unit_axis, written
from onnx_ecp.report import Report

FLOATS = ("weight on the left", "half precision", "double precision")
INT8 = [net for net in NETS if net not in FLOATS]
DIGITS, HEAT = MODELS / "digits.onnx", MODELS / "heat.onnx"
FAST = {"method": "magnitude", "sparsity": 0.5, "measure": False, "cleanup": False}


def drawn(net: str, samples: int = 60) -> dict[str, np.ndarray]:
    return inputs(net, samples)


def in_int8(net: str, **choices: object) -> onnx_ecp.Result:
    return onnx_ecp.optimize(original(net), drawn(net), **{**FAST, "quantize": "int8", **choices})


def ready(net: str) -> tuple[Model, list, list]:
    """The model as the writer takes it, its candidates, and batches of samples."""
    data = gather(load(original(net)), drawn(net), Options.of())
    model = prepared(load(original(net)), next(data.train.batches(1)), {})
    layers, _ = candidates(model.proto)
    return model, layers, list(data.train.batches(16))


# The grid.


@pytest.fixture
def system(rng) -> np.ndarray:
    rows = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6))
    return rows.T @ rows / 40 + 0.01 * np.eye(6)


def test_the_grid_keeps_zeros_and_its_range(rng, system):
    weight = rng.standard_normal((20, 6))
    keep = rng.random((20, 6)) < 0.6
    scale = 0.5 * fitting_scales(weight)  # the largest weights do not fit
    q = on_grid(weight * keep, system, keep, scale)
    assert not q[~keep].any()
    assert np.array_equal(q, np.rint(q))
    assert np.abs(q).max() == LARGEST


def test_no_row_is_further_away_than_its_nearest_integers(rng, system):
    weight = rng.standard_normal((50, 6))
    keep = np.ones(weight.shape, np.bool_)
    scale = fitting_scales(weight) * np.float32(20)  # so coarse that rounding matters
    found, plain = (
        cost(q * scale[:, None] - weight, system)
        for q in (on_grid(weight, system, keep, scale), nearest(weight, scale))
    )
    assert (found <= plain).all()
    assert found.sum() < 0.8 * plain.sum()


def test_rows_of_three_weights_come_near_the_best_of_all_points(rng):
    rows = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 3))
    system, weight = rows.T @ rows / 40, rng.standard_normal((30, 3))
    scale = fitting_scales(weight) * np.float32(30)
    points = np.array(list(itertools.product(range(-6, 7), repeat=3)), np.float64)
    best = np.array(
        [cost(points * s - w, system).min() for w, s in zip(weight, scale, strict=True)]
    )
    found = on_grid(weight, system, np.ones(weight.shape, np.bool_), scale)
    costs = cost(found * scale[:, None] - weight, system)
    assert (costs >= best * (1 - 1e-9)).all()
    assert np.mean(costs <= best * (1 + 1e-9)) > 0.6


def test_a_scale_is_never_worse_than_the_one_that_fits(rng, system):
    weight = rng.standard_t(2, (30, 6))  # outliers
    scales = [fitting_scales(weight), best_scales(weight, system)]
    fitting, best = (cost(nearest(weight, s) * s[:, None] - weight, system) for s in scales)
    assert (best <= fitting).all()
    assert np.array_equal(fitting_scales(np.zeros((2, 3))), np.ones(2, np.float32))


# What is written.


@pytest.mark.parametrize("net", INT8)
def test_what_lies_on_a_grid_is_written_as_it_is(net, rng):
    model, layers, batches = ready(net)
    proto, scales, wanted = onnx.ModelProto(), {}, {}
    proto.CopyFrom(model.proto)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for layer in layers:
        scale = rng.uniform(0.01, 0.1, layer.shape[0]).astype(np.float32)
        q = rng.integers(-60, 61, layer.shape).astype(np.float32)  # no row reaches the end
        q[0] = 0
        name = layer.weight.tensor
        values = layer.weight.unmatrix(q * scale[:, None]).astype(np.float32)
        stored[name].CopyFrom(numpy_helper.from_array(values, name))
        scales[name], wanted[name] = scale, layer.weight.unmatrix(q)
    made = written(proto, layers, batches, scales)
    for layer in layers:
        name = layer.weight.tensor
        integers, scale = integers_of(made, name)
        assert integers.dtype == np.int8
        assert np.array_equal(integers, wanted[name])
        assert np.array_equal(scale, scales[name])
        assert integers.shape[unit_axis(proto, layer)] == len(scale)


@pytest.mark.parametrize("net", INT8)
def test_zeros_stay_zeros_and_weights_lie_on_the_grid(net):
    result = in_int8(net)
    onnx.checker.check_model(result.model, full_check=True)
    floats = onnx_ecp.optimize(original(net), drawn(net), **FAST)
    for name, keep in result.masks.items():
        assert np.array_equal(keep, floats.masks[name])
        own = integers_of(result.model, name)
        integers, _ = own or integers_of(result.model, f"{name}/int8")  # as it is multiplied
        if own is not None:
            assert not integers[~keep].any()
        assert np.count_nonzero(integers) <= np.count_nonzero(keep)
        assert integers.min() >= -LARGEST
    rows = result.report.int8.layers
    assert [row.int8 for row in rows] == [True] * len(rows)
    assert not any(row.note for row in rows)
    assert result.report.zeros_after == floats.report.zeros_after


@pytest.mark.parametrize("net", ["convolution", "gemm", "no bias"])
def test_the_file_is_smaller_and_counts_as_many_weights(net, tmp_path):
    result = in_int8(net, output=tmp_path / "r.onnx")
    written_model = onnx.load(tmp_path / "r.onnx")
    assert written_model == result.model
    floats = onnx_ecp.optimize(original(net), drawn(net), **FAST)
    counted, facts = result.report.result, floats.report.result
    assert counted.parameters >= facts.parameters
    assert counted.zeros >= facts.zeros > 0
    large = in_digits()
    assert large.report.result.bytes < 0.3 * large.report.int8.bytes
    assert large.report.result.compressed_bytes < 0.6 * large.report.int8.compressed_bytes


@functools.cache
def in_digits(**choices: object) -> onnx_ecp.Result:
    return onnx_ecp.optimize(DIGITS, **{**FAST, "quantize": "int8", **choices})


def test_a_pattern_is_kept():
    result = in_digits(sparsity="2:4", exclude="layers.4")
    rows = {row.name: row for row in result.report.int8.layers}
    assert [row.int8 for row in rows.values()] == [True, True, False]
    assert "exclude" in list(rows.values())[2].note
    checked = 0
    for name, keep in result.masks.items():
        integers, _ = integers_of(result.model, name)
        assert not integers[~keep].any()
        groups = (integers != 0).reshape(len(integers), -1, 4).sum(axis=2)
        assert groups.max() <= 2
        checked += 1
    assert checked == 2
    assert any("TensorRT" in warning for warning in result.report.warnings)


def test_the_same_seed_gives_the_same_bytes():
    first, second = (in_int8("convolution").model.SerializeToString() for _ in range(2))
    assert first == second


def test_whole_units_go_first():
    result = onnx_ecp.optimize(
        DIGITS, method="magnitude", speedup=2, quantize="int8", measure=False
    )
    assert result.report.units
    told = result.report.int8
    assert [row.int8 for row in told.layers] == [True] * 3
    assert sum(row.weights for row in told.layers) < 0.6 * result.report.weights
    assert result.report.result.bytes < told.bytes < result.report.original.bytes


def test_external_data_end_in_one_file(tmp_path):
    source, folder = tmp_path / "in.onnx", tmp_path / "out"
    folder.mkdir()
    onnx.save(  # which changes what it is given
        copy.deepcopy(original("gemm")),
        source,
        save_as_external_data=True,
        location="in.bin",
        size_threshold=0,
    )
    choices = {**FAST, "quantize": "int8"}
    result = onnx_ecp.optimize(source, drawn("gemm"), output=folder / "r.onnx", **choices)
    assert [file.name for file in folder.iterdir()] == ["r.onnx"]
    feeds, inside = feeds_of("gemm"), in_int8("gemm").model
    for a, b in zip(computed(result.model, feeds), computed(inside, feeds), strict=True):
        assert np.allclose(a, b, atol=1e-6)


def test_what_the_model_says_of_itself_stays():
    made = in_int8("gemm").model
    assert (made.doc_string, made.producer_name) == ("a net", "hand")
    assert [(p.key, p.value) for p in made.metadata_props] == [("key", "value")]


# What is stated.


@pytest.mark.parametrize("net", ["gemm", "convolution", "attention", "two outputs", "fixed batch"])
def test_the_stated_errors_are_those_of_the_models_run(net):
    options = Options.of(**{**FAST, "quantize": "int8"})
    given = load(original(net))
    data = gather(given, drawn(net), options)
    layers, _ = choose_layers(given, options)
    measure = observe_network(given, layers, data, options)[0].observer.measure
    pruned = onnx_ecp.optimize(original(net), drawn(net), **FAST)
    result = in_int8(net)
    samples = list(data.test.batches(1))

    def outputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
        names = [y.name for y in model.graph.output]
        runs = [computed(model, batch.feeds) for batch in samples]
        return {n: np.concatenate([run[k] for run in runs]) for k, n in enumerate(names)}

    def error(a: onnx.ModelProto, b: onnx.ModelProto) -> float:
        of_a, of_b = outputs(a), outputs(b)
        squares = {n: np.mean((of_b[n] - of_a[n]) ** 2.0, axis=0) for n in of_a}
        return np.sqrt(np.mean([np.mean(squares[n] / measure.unit(n)) for n in of_a]))

    told = result.report.int8
    assert told.zeros == pytest.approx(error(given.proto, pruned.model), rel=1e-3)
    assert told.rounding == pytest.approx(error(pruned.model, result.model), rel=1e-2)
    assert told.both == pytest.approx(error(given.proto, result.model), rel=1e-3)
    assert told.both == result.report.gap.relative_error


class Reader(CalibrationDataReader):
    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


def static(model: onnx.ModelProto, batches, folder) -> onnx.ModelProto:
    """What quantize_static makes of a model with one scale per channel."""
    onnx.save(model, folder / "a.onnx")
    reader = Reader(batch.feeds for batch in batches)
    quantize_static(
        folder / "a.onnx", folder / "b.onnx", reader, quant_format=QuantFormat.QDQ, per_channel=True
    )
    return onnx.load(folder / "b.onnx")


@pytest.mark.parametrize("net", ["gemm", "matmul, add", "convolution", "digits", "heat"])
def test_it_is_at_least_as_exact_as_quantize_static_on_the_pruned_model(net, tmp_path):
    samples = drawn(net, 300)
    model = original(net)
    pruned = onnx_ecp.optimize(model, samples, **FAST)
    result = onnx_ecp.optimize(model, samples, **{**FAST, "quantize": "int8"})
    data = gather(load(model), samples, Options.of())
    others = static(pruned.model, list(data.train.batches(32)), tmp_path)
    test = {name: data.test.arrays[name] for name in data.test.arrays}
    rounding = [
        onnx_ecp.compare(pruned.model, m, test).gap.relative_error for m in (result.model, others)
    ]
    assert rounding[0] <= rounding[1]


def test_compensation_is_kept_where_it_is_better(rng):
    told = in_digits().report.int8
    assert told.compensated
    assert told.rounding < told.uncompensated


# Models that exporters and ONNX Runtime's optimizer have written.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "floats"),
    [
        ("mobilenet-torchscript", ()),
        ("vit-torchscript", ()),
        ("bert-torchscript-transformers", ("Attention",)),
        ("resnet-torchscript-ort-extended", ("FusedConv",)),
        ("llama-torchscript-transformers", ()),
        ("lstm-dynamo", ()),
    ],
)
def test_every_layer_of_an_exported_model_is_int8_or_says_why_not(file, floats):
    path = Path(__file__).parent / "fixtures" / f"{file}.onnx"
    result = onnx_ecp.optimize(path, samples=24, **{**FAST, "quantize": "int8"})
    rows = result.report.int8.layers
    assert {row.op for row in rows if not row.int8} == set(floats)
    assert all(bool(row.note) != row.int8 for row in rows)
    assert all(row.op in row.note for row in rows if not row.int8)
    dequantised = {n.output[0] for n in result.model.graph.node if n.op_type == "DequantizeLinear"}
    named = {node.name: node for node in result.model.graph.node}
    for row in rows:
        if row.int8:
            assert set(named[row.name].input[:2]) <= dequantised
    assert 0 < result.report.int8.rounding < max(0.25, result.report.int8.zeros)


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime computes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return onnx.load(folder / "optimised.onnx")


@pytest.mark.parametrize(
    "file", ["resnet-torchscript", "bert-torchscript", "mobilenet-dynamo", "vit-dynamo", "heat"]
)
def test_onnxruntime_computes_in_int8_what_is_said_to_be(file, tmp_path):
    path = MODELS / "heat.onnx"
    if file != "heat":
        path = Path(__file__).parent / "fixtures" / f"{file}.onnx"
    result = onnx_ecp.optimize(path, samples=24, **{**FAST, "quantize": "int8"})
    assert all(row.int8 for row in result.report.int8.layers)
    graph = optimised(result.model, tmp_path).graph
    floats = {y for n in graph.node if n.op_type == "DequantizeLinear" for y in n.output}
    products = [
        n for n in graph.node if n.op_type.removeprefix("Fused") in ("Conv", "Gemm", "MatMul")
    ]
    assert not [n.name for n in products if floats & set(n.input)]
    inside = ("QLinearConv", "QGemm", "MatMulIntegerToFloat")
    assert sum(n.op_type in inside for n in graph.node) == len(result.report.int8.layers)


def test_what_is_not_in_int8_reads_what_was_not_rounded():
    net = Net(
        """(float[n,2,6,6] x) => (float[n,4,6,6] y) {
            h = Conv<pads=[1,1,1,1]>(x, W, b) s = Sigmoid(h) d = Conv(s, W2)
            e = Mul(s, d) y = Exp(e)
        }""",
        {"W": (4, 2, 3, 3), "b": (4,), "W2": (4, 4, 1, 1)},
    )
    rng = np.random.default_rng(3)
    data = {"x": rng.standard_normal((40, 2, 6, 6)).astype(np.float32)}
    made = onnx_ecp.optimize(net.model(), data, **{**FAST, "quantize": "int8"}).model
    producers = {y: node for node in made.graph.node for y in node.output}
    mul = next(node for node in made.graph.node if node.op_type == "Mul")
    by_input = {producers[name].op_type for name in mul.input}
    assert by_input == {"Sigmoid", "DequantizeLinear"}  # a Conv in int8 gives rounded outputs alone


# Layers that cost too much.


def outlier() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A network whose second layer reads one input of a range that leaves none to the others."""
    net = Net(
        """(float[n,8] x) => (float[n,3] y) {
            h = Gemm<transB=1>(x, W, b) r = Relu(h) s = Mul(r, k) c = Gemm<transB=1>(s, W2, b2)
            t = Tanh(c) y = Gemm<transB=1>(t, W3, b3)
        }""",
        {
            "W": (16, 8),
            "b": (16,),
            "W2": (16, 16),
            "b2": (16,),
            "W3": (3, 16),
            "b3": (3,),
            "k": (16,),
        },
    )
    proto = net.model()
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    scale = np.ones(16, np.float32)
    scale[0] = 3e4
    values = (numpy_helper.to_array(stored["W2"]) / scale).astype(np.float32)
    for name, array in (("k", scale), ("W2", values)):
        stored[name].CopyFrom(numpy_helper.from_array(array, name))
    rng = np.random.default_rng(4)
    return proto, {"x": rng.standard_normal((200, 8)).astype(np.float32)}


def test_a_layer_that_costs_too_much_stays_in_floats_and_is_named():
    proto, data = outlier()
    result = onnx_ecp.optimize(proto, data, **{**FAST, "sparsity": 0.1, "quantize": "int8"})
    rows = result.report.int8.layers
    assert [row.int8 for row in rows] == [True, False, True]
    assert rows[1].note == COSTLY
    assert rows[1].error > 10 * rows[0].error
    assert result.report.int8.rounding < 0.1
    assert integers_of(result.model, "W2") is None
    assert "int8=2/3" in onnx_ecp.report.text.ok_line(result.report)


# Opsets.


def lowered(version: int) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(original("gemm"))
    model.opset_import[0].version, model.ir_version = version, 4  # nothing in it has changed since
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("version", [9, 11, 12])
def test_an_old_opset_is_raised(version):
    model = lowered(version)
    assert opset_of(model) == version
    result = onnx_ecp.optimize(model, drawn("gemm"), **{**FAST, "quantize": "int8"})
    assert opset_of(result.model) == OPSET
    newer = in_int8("gemm")
    feeds = feeds_of("gemm")
    for a, b in zip(computed(result.model, feeds), computed(newer.model, feeds), strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_an_opset_that_cannot_be_raised_is_refused(monkeypatch):
    def other(model, version):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        changed.opset_import[0].version = version
        bias = next(t for t in changed.graph.initializer if t.name == "b2")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, "b2"))
        return changed

    def fails(model, version):
        raise RuntimeError("no adapter")

    model, data = lowered(11), drawn("gemm")
    batch = next(gather(load(model), data, Options.of()).train.batches(1))
    for convert, text in ((other, "something else"), (fails, "no adapter")):
        with monkeypatch.context() as patched:
            patched.setattr(
                "onnx_ecp.quantising.candidates.convert_version",
                lambda m, v, f=convert: f(m, v),
            )
            with pytest.raises(ModelError, match=text) as raised:
                prepared(load(model), batch, {})
            assert f"opset {OPSET}" in raised.value.hint


# Refusals.


@pytest.mark.parametrize("net", FLOATS)
def test_a_model_without_a_layer_for_int8_is_refused(net):
    with pytest.raises(TargetError, match="no layer can be int8") as raised:
        in_int8(net)
    assert raised.value.hint


@pytest.mark.parametrize(
    "choices",
    [
        {"quantize": "int4"},
        {"format": "sparse"},
        {"bound": True},
        {"sparsity": None, "max_error": 0.1},
        {"sparsity": None, "speedup": 2, "cost": "latency"},
        {"sparsity": "2:4", "target": "tensorrt"},
    ],
)
def test_what_does_not_go_with_int8_is_refused_before_any_work(choices):
    with pytest.raises(UsageError, match="quantize"):
        Options.of(**{"quantize": "int8", "sparsity": 0.5, **choices})


def test_a_gate_holds_for_zeros_and_int8_together(tmp_path):
    free = in_digits()
    zeros, both = free.report.int8.zeros, free.report.gap.relative_error
    result = in_digits(max_error=2 * max(zeros, both))
    assert [point.within for point in result.report.curve] == [True]
    assert result.report.curve[0].error >= both
    tight = in_digits(sparsity=0.0, max_error=1.0).report.int8.rounding / 4
    with pytest.raises(QualityError, match="int8 misses the target"):
        in_digits(sparsity=0.0, max_error=tight, output=tmp_path / "r.onnx")
    assert not (tmp_path / "r.onnx").exists()


# Reports.


def test_the_command_line_says_how_many_layers_are_int8(tmp_path):
    arguments = ["optimize", HEAT, tmp_path / "r.onnx", "-m", "magnitude", "-s", "0.3"]
    arguments += ["--quantize", "int8", "--no-measure"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert "error of rounding alone" in done.stdout
    assert " int8=3/3 " in done.stdout.splitlines()[-1]
    again = ["optimize", tmp_path / "r.onnx", tmp_path / "s.onnx"]
    refused = CliRunner().invoke(main, [str(argument) for argument in again])
    assert refused.exit_code == TargetError.exit_code
    assert "prune before quantising" in refused.stderr


def test_the_report_tells_every_layer_and_comes_back_from_json(tmp_path):
    report = in_int8("convolution", report=[tmp_path / "r.json", tmp_path / "r.html"]).report
    values = json.loads((tmp_path / "r.json").read_text())
    assert Report.from_dict(values) == replace(report, result=report.result)
    assert values["int8"]["layers"][0]["int8"] is True
    text = onnx_ecp.report.text.plain(onnx_ecp.report.text.report_tables(report))
    page = (tmp_path / "r.html").read_text()
    for words in ("error of zeros alone", "error of rounding alone", "error of both"):
        assert words in text
        assert words in page
    for row in report.int8.layers:
        assert row.name in text


def test_the_facts_of_a_quantised_model_count_integers_that_stand_for_zero():
    model = in_digits().model
    facts = model_facts(Model(model, None, None))
    names = [t.name.removesuffix("_quantized") for t in model.graph.initializer]
    layers = [integers_of(model, name)[0] for name in names if name.endswith("weight")]
    assert len(layers) == 3
    assert facts.parameters >= sum(q.size for q in layers)
    assert facts.zeros >= sum(np.count_nonzero(q == 0) for q in layers)


def test_layers_of_the_result_are_named_as_in_the_model():
    result = in_int8("convolution")
    assert [row.name for row in result.report.int8.layers] == [
        layer.name for layer in find_layers(original("convolution")).layers
    ]
    assert onnxruntime.InferenceSession(result.model.SerializeToString())


def test_nothing_is_said_beside_the_report_of_biases_that_were_rewritten(rng, capfd):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> net (float[n, 8] x) => (float[n, 4] y) {
        h = MatMul(x, W) s = Add(h, b) a = Relu(s) t = MatMul(a, V) y = Add(t, c) }"""
    )
    for name, shape in {"W": (8, 16), "b": (1, 16), "V": (16, 4), "c": (1, 4)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    x = rng.standard_normal((60, 8)).astype(np.float32)
    result = onnx_ecp.optimize(proto, {"x": x}, sparsity=0.3, quantize="int8", stages=1)
    assert any(node.op_type == "QuantizeLinear" for node in result.model.graph.node)
    assert capfd.readouterr() == ("", "")
