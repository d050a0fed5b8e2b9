"""The networks and data that the benchmarks measure on.

They lie in a folder ``shared`` beside the checkout, or where ONNX_ECP_SHARED says; see
docs/benchmarks/README.md for what they are and where they come from. Calibration always uses
training digits; the official test digits are for final numbers only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ONNX_ECP_SHARED", ROOT.parent / "shared"))


def plain(x: np.ndarray) -> np.ndarray:
    """Digits as x / 255."""
    return (x / 255).astype(np.float32)


def standardised(x: np.ndarray) -> np.ndarray:
    """Digits with the mean and deviation that torchvision's examples use."""
    return ((x / 255 - 0.1307) / 0.3081).astype(np.float32)


@dataclass(frozen=True)
class Network:
    """One network of the benchmarks.

    Args:
        file: name below shared/models.
        shape: of one input.
        scale: from uint8 digits to inputs.
        samples: calibration digits by default.
    """

    file: str
    shape: tuple[int, ...]
    scale: Callable[[np.ndarray], np.ndarray]
    samples: int

    @property
    def path(self) -> Path:
        """Where the model lies."""
        return SHARED / "models" / self.file

    @property
    def input(self) -> str:
        """Name of its input."""
        return str(onnx.load(self.path).graph.input[0].name)

    def digits(self, part: str, count: int | None = None, seed: int = 0) -> tuple[dict, np.ndarray]:
        """Inputs by name and labels: of "train" a random choice of ``count``, of "test" all."""
        x, y = load_digits(part)
        if count is not None and count < len(x):
            chosen = np.sort(np.random.default_rng(seed).choice(len(x), count, replace=False))
            x, y = x[chosen], y[chosen]
        return {self.input: self.scale(x).reshape(-1, *self.shape)}, y


NETWORKS = {
    "mlpnet": Network("mlpnet_mnist.onnx", (784,), standardised, 10_000),
    "lenet300": Network("lenet300_mnist.onnx", (784,), plain, 2_000),
    "lenet5": Network("lenet5_mnist.onnx", (1, 28, 28), plain, 300),
    "leaky5x20": Network("real_mnist5x20_leaky_relu.onnx", (1, 28, 28), plain, 2_000),
    "softmax": Network("real_mnist_softmax_last.onnx", (1, 28, 28), plain, 2_000),
    "tribuo": Network("real_mnist_cnn_tribuo.onnx", (1, 28, 28), standardised, 300),
}


def load_digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 digits (n, 784) and labels (n,) of "train" or "test"."""
    with np.load(SHARED / "data" / f"mnist_{part}10k.npz") as arrays:
        return arrays["x"], arrays["y"]


def fully_connected(
    weights: Sequence[np.ndarray], biases: Sequence[np.ndarray], activation: str = "Relu"
) -> onnx.ModelProto:
    """A network with input "x" and output "y", spelled as torch.onnx does.

    Args:
        weights: of every layer, (out, in).
        biases: (out,) each.
        activation: operator between the layers.
    """
    nodes, stored, tensor = [], [], "x"
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        z = "y" if i == len(weights) - 1 else f"z{i}"
        for name, values in ((f"w{i}", weight), (f"b{i}", bias)):
            stored.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
        nodes.append(helper.make_node("Gemm", [tensor, f"w{i}", f"b{i}"], [z], f"fc{i}", transB=1))
        if z != "y":
            tensor = f"a{i}"
            nodes.append(helper.make_node(activation, [z], [tensor]))
    return made(nodes, stored, ["n", weights[0].shape[1]], ["n", len(weights[-1])])


def made(
    nodes: Sequence[onnx.NodeProto],
    stored: Sequence[onnx.TensorProto],
    shape_in: Sequence[int | str],
    shape_out: Sequence[int | str],
) -> onnx.ModelProto:
    """A checked model with input "x" and output "y"."""
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", shape_in), ("y", shape_out))
    ]
    graph = helper.make_graph(list(nodes), "net", ends[:1], ends[1:], list(stored))
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def outputs(model: onnx.ModelProto | str | Path, feeds: dict) -> np.ndarray:
    """First output for all samples, float64."""
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # others leave initializers behind that nothing reads
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    size = 1000
    count = len(next(iter(feeds.values())))
    parts = [
        session.run(None, {n: x[i : i + size] for n, x in feeds.items()})[0]
        for i in range(0, count, size)
    ]
    return np.concatenate(parts).astype(np.float64)


def accuracy(y: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent."""
    return float(100 * (y.argmax(axis=1) == labels).mean())


def relative_error(y: np.ndarray, reference: np.ndarray) -> float:
    """sqrt(sum |y - reference|^2 / sum |reference|^2)."""
    return float(np.sqrt(np.square(y - reference).sum() / np.square(reference).sum()))
