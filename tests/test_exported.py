"""Files of PyTorch's exporters and ONNX Runtime's optimizers, ten architectures, tiny widths.

``benchmarks/exported_models.py --fixtures`` wrote them; it also compares them with torch.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_ecp
from onnx_ecp.data.calibration import Batch
from onnx_ecp.graph import Model, signature
from onnx_ecp.layers import Found, Layer, find_layers
from onnx_ecp.statistics.moments import reduce_positions
from onnx_ecp.statistics.observer import Observer, original_state

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.onnx"))
SAMPLES = 4
# Single precision, and kinks of ReLU and MaxPool between two points.
DIFFERENCE = 5e-3
VOCABULARY = 24

# By architecture: the affine weights of the module, and those of them inside an LSTM.
WEIGHTS = {
    "mlp": (528, 0),
    "lenet": (716, 0),
    "resnet": (5476, 0),
    "mobilenet": (1412, 0),
    "convnext": (1054, 0),
    "vit": (4944, 0),
    "bert": (4432, 0),
    "gpt2": (4480, 0),
    "llama": (4992, 0),
    "lstm": (1836, 1536),
}

each_file = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)


@functools.cache
def model_of(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


def found_in(path: Path) -> Found:
    return find_layers(model_of(path))


def inputs_of(path: Path, samples: int = SAMPLES) -> dict[str, np.ndarray]:
    """Random numbers, token ids, and masks of sequences that end at different places."""
    rng, found = np.random.default_rng(0), {}
    for spec in signature(model_of(path)):
        shape = (samples, *spec.shape[1:])
        if spec.name == "mask":
            drawn = np.arange(shape[1]) < rng.integers(3, shape[1] + 1, (samples, 1))
        elif spec.dtype.kind == "i":
            drawn = rng.integers(0, VOCABULARY, shape)
        else:
            drawn = rng.standard_normal(shape)
        found[spec.name] = drawn.astype(spec.dtype)
    return found


def outputs_of(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    [y] = session.run(None, feeds)
    return np.asarray(y)


def test_every_architecture_is_there():
    assert {path.stem.split("-")[0] for path in FIXTURES} == set(WEIGHTS)
    operators = {node.op_type for path in FIXTURES for node in model_of(path).graph.node}
    assert {"Attention", "BatchNormalization", "FusedConv", "LSTM", "Gelu"} <= operators


@each_file
def test_every_affine_weight_is_named(path):
    found, (total, inside) = found_in(path), WEIGHTS[path.stem.split("-")[0]]
    matrices = {layer.weight.tensor: np.prod(layer.shape) for layer in found.layers}
    assert sum(matrices.values()) == total - inside
    reasons = [skip.reason for skip in found.skips if "only their shape matters" not in skip.reason]
    assert all("inside LSTM" in reason for reason in reasons)
    assert len(reasons) == (2 if inside else 0)


@pytest.mark.slow
@each_file
def test_every_layer_has_a_sensitivity_that_finite_differences_confirm(path, rng):
    """For all weights of a layer at once: <v, dy> = <dy/dW, dW>."""
    model = Model(model_of(path), None, None)
    layers = found_in(path).layers
    batch = Batch(0, inputs_of(path), SAMPLES)
    observer = Observer(model, layers, batch)
    assert not observer.blocked
    state = original_state(model, layers)
    [(head, y)] = observer.heads(state, batch).items()
    seed = rng.standard_normal((1, *y.shape)).astype(np.float32)
    seen = observer.pull(state, batch, {head: seed})
    for layer in layers:
        a, g = seen.inputs[layer.name], seen.adjoints[layer.name]
        centre = np.zeros((layer.groups, layer.shape[1]))
        gradient = reduce_positions(a, g, centre, 1, with_gradient=True).gradient[0]
        # Mostly uphill: along a random direction single precision sees little but rounding.
        direction = gradient * rng.uniform(0, 2, gradient.shape)
        weight = state.weights[layer.weight.tensor]
        direction *= np.linalg.norm(weight) / np.linalg.norm(direction)
        moved = layer.weight.unmatrix(direction).astype(np.float32)
        expected = (gradient * direction).sum()

        def head_at(step: float, layer=layer, weight=weight, moved=moved) -> np.ndarray:
            there = state.with_layer(layer, weight + step * moved, state.shifts[layer.name])
            return observer.heads(there, batch)[head].astype(np.float64)

        slopes = [
            (seed * (head_at(step) - head_at(-step))).sum() / (2 * step)
            for step in (1e-2, 1e-3, 1e-4, 3e-5)  # kinks want a small step, rounding a large one
        ]
        error = min(abs(slope / expected - 1) for slope in slopes)
        assert error < DIFFERENCE, (layer.name, slopes, expected)


@each_file
def test_shifts_that_are_stored_do_what_they_did_under_observation(path, rng):
    model, layers = model_of(path), found_in(path).layers
    batch = Batch(0, inputs_of(path), SAMPLES)
    observer = Observer(Model(model, None, None), layers, batch, reverse=False)
    state = original_state(Model(model, None, None), layers)
    shifts = {layer.name: 0.3 * rng.standard_normal(layer.shape[0]) for layer in layers}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for layer in layers:
        layer.store(copy, None, shifts[layer.name])
    [expected] = observer.heads(replace(state, shifts=shifts), batch).values()
    y = outputs_of(copy, batch.feeds)
    assert np.abs(y - outputs_of(model, batch.feeds)).max() > 0.01
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@each_file
def test_the_default_prunes_it_and_the_result_loads(path):
    result = onnx_ecp.optimize(model_of(path), inputs_of(path, 24), sparsity=0.5)
    before, after = found_in(path), find_layers(result.model)
    assert [x.name for x in after.layers] == [x.name for x in before.layers]
    zeros = sum(int((~mask).sum()) for mask in result.masks.values())
    size = sum(mask.size for mask in result.masks.values())
    assert size == sum(
        np.prod(x.shape) for x in {x.weight.tensor: x for x in before.layers}.values()
    )
    assert zeros == round(size / 2)
    feeds = inputs_of(path, 2)
    y, z = outputs_of(model_of(path), feeds), outputs_of(result.model, feeds)
    assert z.shape == y.shape
    assert np.linalg.norm(z - y) < np.linalg.norm(y)


def fixture(name: str) -> Path:
    return Path(__file__).parent / "fixtures" / f"{name}.onnx"


# Convolutions in front of a BatchNormalization that no exporter has folded.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet-norms", "mobilenet-norms"])
def test_a_convolution_in_front_of_a_normalization_is_compensated_by_its_own_bias(name):
    path = fixture(name)
    model, feeds = model_of(path), inputs_of(path, 24)
    choices = {"sparsity": 0.5, "cleanup": False}
    result = onnx_ecp.optimize(model, feeds, **choices).model
    norms = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    assert [n for n in result.graph.node if n.op_type == "BatchNormalization"] == norms
    stored = {t.name: t for t in model.graph.initializer}
    kept = {t.name: t for t in result.graph.initializer}
    assert all(kept[x] == stored[x] for n in norms for x in n.input[1:])
    before = {n.output[0]: n for n in model.graph.node if n.op_type == "Conv"}
    after = {n.output[0]: n for n in result.graph.node if n.op_type == "Conv"}
    assert before.keys() == after.keys()
    grown = [y for y, n in before.items() if len(after[y].input) > len(n.input)]
    assert len(grown) > len(before) / 2  # convolutions that had no bias, where one has an effect
    # The runtime folds the pair; what the bias does must survive that.
    y = outputs_of(result, feeds)
    np.testing.assert_allclose(y, unfused(result, feeds), rtol=1e-3, atol=1e-4 * np.abs(y).max())
    bare = onnx_ecp.optimize(model, feeds, **choices, compensation="none").model
    wanted = outputs_of(model, feeds)
    assert np.linalg.norm(y - wanted) < 0.7 * np.linalg.norm(outputs_of(bare, feeds) - wanted)


def unfused(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, feeds)[0])


# Projections of attention: one by one and merged. By file: which layer the keys of the first block
# belong to, and which of its rows they are. Width 16.
KEYS = {
    "bert-dynamo": (1, slice(0, 16)),
    "bert-torchscript": (1, slice(0, 16)),
    "bert-torchscript-transformers": (0, slice(16, 32)),
    "gpt2-dynamo": (0, slice(16, 32)),
    "gpt2-torchscript-ort-extended": (0, slice(16, 32)),
    "vit-dynamo": (1, slice(16, 32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_the_bias_of_attention_keys_compensates_nothing(name):
    """A softmax does not feel a shift of all keys, which is what a sample as a whole sees."""
    path = fixture(name)
    place, keys = KEYS[name]
    model = model_of(path)
    choices = {"method": "ecp", "positions": "reduce", "cleanup": False}
    pruned = onnx_ecp.optimize(model, inputs_of(path, 24), **choices).model
    old, new = (bias_of(m, find_layers(m).layers[place]) for m in (model, pruned))
    assert np.array_equal(old[keys], new[keys])
    for layer in find_layers(pruned).layers:
        assert np.abs(bias_of(pruned, layer)).max() < 10, layer.name
    if len(old) > 16:  # queries and values have a use for it
        assert not np.array_equal(old[:16], new[:16])
        assert not np.array_equal(old[32:], new[32:])


def bias_of(model: onnx.ModelProto, layer: Layer) -> np.ndarray:
    constant = getattr(layer.bias, "constant", None)
    if constant is None:
        return np.zeros(layer.shape[0])
    stored = next(t for t in model.graph.initializer if t.name == constant.tensor)
    return constant.view(onnx.numpy_helper.to_array(stored)).reshape(-1)


# Precisions.

KINDS = {
    "float16": (onnx.TensorProto.FLOAT16, np.float16),
    "double": (onnx.TensorProto.DOUBLE, np.float64),
}


def converted(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """All single precision of a model in another one; without annotations of shapes and types."""
    to, dtype = KINDS[kind]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            info.type.tensor_type.elem_type = to
    attributes = [a for node in graph.node for a in node.attribute]
    for attribute in attributes:
        if attribute.name in ("to", "dtype") and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = to
    for tensor in (*graph.initializer, *(a.t for a in attributes if a.name == "value")):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return copy


# ONNX Runtime has no double precision for Conv, Erf and LSTM on the CPU.
PRECISIONS = {
    "float16": ("mlp-dynamo", "lenet-torchscript", "resnet-norms", "bert-dynamo", "llama-dynamo"),
    "double": ("mlp-dynamo", "gpt2-dynamo", "llama-dynamo"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, names in PRECISIONS.items() for n in names]
)
def test_the_precision_of_a_model_is_kept(kind, name):
    path = fixture(name)
    model, (to, dtype) = converted(model_of(path), kind), KINDS[kind]
    feeds = {
        n: x.astype(dtype) if x.dtype.kind == "f" else x for n, x in inputs_of(path, 24).items()
    }
    result = onnx_ecp.optimize(model, feeds, sparsity=0.5)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    kinds = {t.data_type for t in result.model.graph.initializer} & set(floats)
    assert kinds == {to}
    y, z = outputs_of(model, feeds), outputs_of(result.model, feeds)
    assert z.dtype == y.dtype == dtype
    single = onnx_ecp.optimize(model_of(path), inputs_of(path, 24), sparsity=0.5)
    same = [np.mean(single.masks[n] == mask) for n, mask in result.masks.items()]
    assert np.mean(same) > 0.9
    assert result.report.gap.relative_error < 1.5 * single.report.gap.relative_error + 1e-3


def test_weights_stored_in_bfloat16_stay_so():
    path = fixture("mlp-dynamo")
    model = onnx.ModelProto()
    model.CopyFrom(model_of(path))
    weights = [layer.weight.tensor for layer in found_in(path).layers]
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            name = tensor.name
            values = onnx.numpy_helper.to_array(tensor)
            half = onnx.helper.make_tensor(
                f"{name}/half", onnx.TensorProto.BFLOAT16, values.shape, values.ravel()
            )
            cast = onnx.helper.make_node("Cast", [half.name], [name], to=onnx.TensorProto.FLOAT)
            tensor.CopyFrom(half)
            model.graph.node.insert(0, cast)
    result = onnx_ecp.optimize(model, inputs_of(path, 24), sparsity=0.5)
    left = find_layers(result.model).layers  # some units are dead and gone
    assert {layer.weight.dtype for layer in left} == {onnx.TensorProto.BFLOAT16}
    assert result.report.units
    assert sum(int((~mask).sum()) for mask in result.masks.values()) == 264
    assert np.isfinite(outputs_of(result.model, inputs_of(path))).all()
