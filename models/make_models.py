"""Trains the networks of this folder and writes NAME.onnx, NAME.npz and NAME-test.npz.

    python models/make_models.py [--out FOLDER] [NAME ...]

Needs scikit-learn (`pip install scikit-learn`). Seeds are fixed and the arithmetic runs in one
thread, so the same versions on the same machine write the same bytes. Prints the metric of every
network on its test file, computed through ONNX Runtime.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from threadpoolctl import threadpool_limits

SEED = 0
OPSET, IR_VERSION = 17, 8  # from 2022: every runtime still in use loads them

Arrays = Sequence[np.ndarray]
Spelled = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]  # nodes, initializers


@dataclass(frozen=True)
class Split:
    """Data of a task: float32 inputs (n, in) and targets (n,) or (n, out); no row is in two parts.

    The calibration inputs are the first ``calibration`` rows of the training part, which is
    shuffled: whoever compresses a network has some of what it was trained on, and no labels.
    """

    train: np.ndarray
    train_target: np.ndarray
    test: np.ndarray
    test_target: np.ndarray
    calibration: int


@dataclass(frozen=True)
class Task:
    """One network of this folder: data, estimator, and how it is spelled in ONNX."""

    data: Callable[[], Split]
    estimator: MLPClassifier | MLPRegressor
    layers: Callable[[Arrays, Arrays, Task], Spelled]
    activation: str
    input: str
    output: str
    score: Callable[[np.ndarray, np.ndarray], float]
    metric: str
    doc: str
    licence: str


def digits() -> Split:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn carries, pixels in [0, 1]."""
    pixels, digit = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(pixels))
    x, y = (pixels[order] / 16).astype(np.float32), digit[order].astype(np.int64)
    return Split(x[:1197], y[:1197], x[1197:], y[1197:], calibration=512)


def heat() -> Split:
    """Temperatures in a cooling rod, from the series solution of the heat equation.

    Inputs, uniform in [-1, 1]: the temperatures of both ends, five Fourier amplitudes of the
    deviation from the straight line between them at t = 0, and log10 of diffusivity times time,
    scaled to [-2.5, -0.5]. Outputs: the temperature at ten points inside the rod.
    """
    x = np.random.default_rng(SEED).uniform(-1, 1, size=(8000, 8))
    left, right, amplitude, fourier = x[:, :1], x[:, 1:2], x[:, 2:7], 10 ** (x[:, 7:] - 1.5)
    place, k = np.arange(1, 11) / 11, np.arange(1, 6) * np.pi
    decayed = amplitude * np.exp(-(k**2) * fourier)
    y = left * (1 - place) + right * place + decayed @ np.sin(np.outer(k, place))
    x, y = x.astype(np.float32), y.astype(np.float32)
    return Split(x[:6000], y[:6000], x[6000:], y[6000:], calibration=512)


def gemm_layers(weights: Arrays, biases: Arrays, task: Task) -> Spelled:
    """The spelling of torch.onnx: Gemm with transB = 1, weights stored (out, in)."""
    nodes, stored, tensor = [], [], task.input
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        last = i == len(weights) - 1
        name, z = f"layers.{2 * i}", task.output if last else f"z{i}"
        stored += [_tensor(f"{name}.weight", weight.T), _tensor(f"{name}.bias", bias)]
        inputs = [tensor, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Gemm", inputs, [z], name=f"/{name}/Gemm", transB=1))
        if not last:
            tensor = f"a{i}"
            nodes.append(_activation(task, z, tensor, f"/layers.{2 * i + 1}"))
    return nodes, stored


def matmul_layers(weights: Arrays, biases: Arrays, task: Task) -> Spelled:
    """The spelling of tf2onnx: MatMul and Add, weights stored (in, out)."""
    nodes, stored, tensor = [], [], task.input
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        last = i == len(weights) - 1
        name, z = f"dense_{i}", task.output if last else f"dense_{i}/BiasAdd:0"
        product = f"{name}/MatMul:0"
        stored += [_tensor(f"{name}/kernel", weight), _tensor(f"{name}/bias", bias)]
        matmul, add = [tensor, f"{name}/kernel"], [product, f"{name}/bias"]
        nodes.append(helper.make_node("MatMul", matmul, [product], name=f"{name}/MatMul"))
        nodes.append(helper.make_node("Add", add, [z], name=f"{name}/BiasAdd"))
        if not last:
            tensor = f"{name}/{task.activation}:0"
            nodes.append(_activation(task, z, tensor, name))
    return nodes, stored


def _activation(task: Task, z: str, a: str, prefix: str) -> onnx.NodeProto:
    return helper.make_node(task.activation, [z], [a], name=f"{prefix}/{task.activation}")


def _tensor(name: str, values: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)


def accuracy(target: np.ndarray, output: np.ndarray) -> float:
    return float(accuracy_score(target, output.argmax(axis=1)))


def determination(target: np.ndarray, output: np.ndarray) -> float:
    return float(r2_score(target, output))


TASKS = {
    "digits": Task(
        data=digits,
        estimator=MLPClassifier((256, 128), max_iter=100, alpha=1e-3, tol=0, random_state=SEED),
        layers=gemm_layers,
        activation="Relu",
        input="pixels",
        output="logits",
        score=accuracy,
        metric="accuracy",
        doc="Handwritten digits of 8 x 8 pixels in [0, 1], MLP 64-256-128-10.",
        licence="Apache-2.0; data: UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
    ),
    "heat": Task(
        data=heat,
        estimator=MLPRegressor(
            hidden_layer_sizes=(192, 192),
            activation="tanh",
            learning_rate_init=2e-3,
            max_iter=150,
            tol=0,
            alpha=1e-6,
            random_state=SEED,
        ),
        layers=matmul_layers,
        activation="Tanh",
        input="parameters",
        output="temperature",
        score=determination,
        metric="R2",
        doc="Temperatures at ten points of a cooling rod, MLP 8-192-192-10.",
        licence="Apache-2.0",
    ),
}


def fit(task: Task, split: Split) -> tuple[Arrays, Arrays]:
    """Train; returns the float64 weights (in, out) and biases (out,) of every layer."""
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is the budget
        task.estimator.fit(split.train, split.train_target)
    return task.estimator.coefs_, task.estimator.intercepts_


def to_onnx(name: str, task: Task, weights: Arrays, biases: Arrays) -> onnx.ModelProto:
    nodes, stored = task.layers(weights, biases, task)
    sizes = len(weights[0]), len(biases[-1])
    ends = [
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["batch", size])
        for tensor, size in zip((task.input, task.output), sizes, strict=True)
    ]
    graph = helper.make_graph(nodes, name, ends[:1], ends[1:], stored, doc_string=task.doc)
    model = helper.make_model(
        graph,
        producer_name="onnx-ecp models/make_models.py",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        doc_string=task.doc,
    )
    helper.set_model_props(model, {"licence": task.licence})
    onnx.checker.check_model(model, full_check=True)
    return model


def make(name: str, out: Path) -> None:
    """Train one network, write its three files into ``out``, print its metric."""
    task = TASKS[name]
    split = task.data()
    weights, biases = fit(task, split)
    model = to_onnx(name, task, weights, biases)
    onnx.save(model, out / f"{name}.onnx")
    np.savez_compressed(out / f"{name}.npz", **{task.input: split.train[: split.calibration]})
    np.savez_compressed(
        out / f"{name}-test.npz", **{task.input: split.test, "y": split.test_target}
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run([task.output], {task.input: split.test})
    count = sum(weight.size for weight in weights)
    value = task.score(split.test_target, output)
    print(f"{name}: {count} weights, {task.metric} {value:.4f} on {len(split.test)} test rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TASKS)}; all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(TASKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(TASKS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or TASKS:
        make(name, arguments.out)


if __name__ == "__main__":
    main()
