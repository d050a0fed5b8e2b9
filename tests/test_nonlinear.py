"""Effects that are measured are those of the removal, and the gradient is that of the loss."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.api.options import Options
from onnx_ecp.api.preparation import gather, load
from onnx_ecp.errors import UsageError
from onnx_ecp.pruning import effects
from onnx_ecp.runtime.session import Session

NETWORKS = {
    "Gemm": (
        "g (float[n,5] x) => (float[n,3] y) { h = Gemm(x, W, b) r = Tanh(h) y = Gemm(r, V, c) }",
        {"W": (5, 4), "b": (4,), "V": (4, 3), "c": (3,)},
        (5,),
    ),
    "MatMul and Add": (
        "g (float[n,5] x) => (float[n,3] y) "
        "{ h = MatMul(x, W) k = Add(h, b) r = Relu(k) y = MatMul(r, V) }",
        {"W": (5, 4), "b": (4,), "V": (4, 3)},
        (5,),
    ),
    "Conv": (
        "g (float[n,2,4,4] x) => (float[n,3] y) "
        "{ h = Conv <kernel_shape = [2,2]> (x, W, b) r = Relu(h) p = GlobalAveragePool(r) "
        "f = Flatten(p) y = MatMul(f, V) }",
        {"W": (4, 2, 2, 2), "b": (4,), "V": (4, 3)},
        (2, 4, 4),
    ),
}


def network(kind, rng):
    text, shapes, sample = NETWORKS[kind]
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model, rng.standard_normal((40, *sample)).astype(np.float32)


def stored(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def changed(model, **values):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy


def patches(kind, x):
    """(rows, in) of what the first layer sees."""
    if kind != "Conv":
        return x
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), (2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 8)


@pytest.mark.parametrize("kind", NETWORKS)
def test_effects_are_what_the_runtime_computes_without_a_weight(kind, rng):
    model, x = network(kind, rng)
    choices = {"method": "nonlinear", "seed": 0}
    found = onnx_ecp.importance(model, x, **choices)
    first = next(iter(found.values()))
    weight, bias = stored(model)["W"], stored(model)["b"]
    matrix = weight.reshape(4, -1) if kind == "Conv" else weight.T
    assert first.shape == matrix.shape
    data = data_of(model, x, **choices)
    train = data.train.arrays["x"]
    y = Session(model).run({"x": train})["y"]
    everywhere = np.concatenate(
        [Session(model).run({"x": part.arrays["x"]})["y"] for part in data.seen]
    )
    for i, j in [(0, 0), (1, 3), (3, matrix.shape[1] - 1)]:
        one, shifted = matrix.copy(), bias.copy()
        one[i, j] = 0
        shifted[i] += matrix[i, j] * patches(kind, train)[:, j].mean()
        back = one.reshape(weight.shape) if kind == "Conv" else np.ascontiguousarray(one.T)
        other = Session(changed(model, W=back, b=shifted)).run({"x": train})["y"]
        error = (np.square(other - y).mean(axis=0) / everywhere.var(axis=0)).mean()
        assert first[i, j] == pytest.approx(error, rel=0.02)


def data_of(model, x, **choices):
    """The samples as a run divides them."""
    return gather(load(model), x, Options.of(**choices))


def test_more_weights_than_runs_are_refused(rng, monkeypatch):
    model, x = network("Gemm", rng)
    monkeypatch.setattr(effects, "MOST", 31)
    with pytest.raises(UsageError, match="32 are more than 31"):
        onnx_ecp.optimize(model, x, method="nonlinear", sparsity=0.5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_prunes_and_says_how_far_it_is(kind, rng):
    model, x = network(kind, rng)
    seen = []
    found = onnx_ecp.optimize(
        model, x, method="nonlinear", sparsity=0.4, measure=False,
        progress=lambda what, done, of: seen.append((what, done, of)),
    )  # fmt: skip
    assert found.report.sparsity == pytest.approx(0.4, abs=0.05)
    weights = [s for s in seen if s[0] == "weights"]
    assert weights[-1][1] == weights[-1][2]


def test_with_labels_the_gradient_is_that_of_the_loss(rng):
    """|W| |dL/dW|, against finite differences of the cross entropy through ONNX Runtime."""
    model, x = network("Gemm", rng)
    labels = rng.integers(0, 3, len(x))
    found = onnx_ecp.importance(model, x, method="gradient-magnitude", labels=labels)
    data = data_of(model, x, method="gradient-magnitude", labels=labels)
    train, known = data.train.arrays["x"], data.train.labels.reshape(-1)
    weight = stored(model)["V"]

    def loss(values):
        z = Session(changed(model, V=values)).run({"x": train})["y"].astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        return -(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))[range(len(z)), known].mean()

    for i, j in [(0, 0), (1, 2), (3, 1)]:
        up, down = weight.copy(), weight.copy()
        up[i, j] += 0.05
        down[i, j] -= 0.05
        slope = (loss(up) - loss(down)) / 0.1
        assert list(found.values())[-1][j, i] == pytest.approx(
            abs(weight[i, j] * slope), rel=0.03, abs=1e-4
        )
