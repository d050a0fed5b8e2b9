"""Files of PyTorch's exporters and ONNX Runtime's optimizers, ten architectures, tiny widths.

``benchmarks/exported_models.py --fixtures`` wrote them; it also compares them with torch.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_ecp
from onnx_ecp.calibration import Batch
from onnx_ecp.gradients.observer import Observer, original_state
from onnx_ecp.layers import Found, find_layers
from onnx_ecp.model import Model, signature
from onnx_ecp.statistics import reduce_positions

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
