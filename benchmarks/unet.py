"""A U-Net with ConvTranspose, trained here: less error than magnitude pruning at .5 and .8.

Discs and squares of any size and brightness on uneven, noisy ground: the class of every pixel is to
be told. The network (two levels down, two up by ConvTranspose, skips by Concat) is trained from
random weights on made-up images by Adam and cross-entropy, with the gradients of the observation
graph; no training framework takes part. Calibration takes training images without their labels;
errors and accuracies are those of other images.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
from contest import ours
from networks import made, outputs, relative_error
from onnx import helper, numpy_helper
from outcome import Claim, Row, above, finish, publish, table

from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.graph import load
from onnx_ecp.layers import find_layers
from onnx_ecp.statistics.objective import Objective, Parameters
from onnx_ecp.statistics.observer import Observer, State, original_state

SIZE, CLASSES = 24, ("ground", "disc", "square")
# Channels of each level.
WIDTHS = (8, 16, 32)
TRAINING, CALIBRATION, TEST = 3000, 256, 500
STEPS, BATCH, RATE = 3000, 16, 5e-3
SPARSITIES = (0.5, 0.8)
CONTESTANTS = {"magnitude": ours("magnitude"), "ecp": ours("ecp"), "ecp-refit": ours("ecp-refit")}


def main() -> int:
    images, classes = drawn(TRAINING, seed=1)
    model = trained(images, classes)
    test, wanted = drawn(TEST, seed=2)
    whole = outputs(model, {"x": test})
    rows: list[Row] = [{"sparsity": 0.0, "method": "dense", "error": 0.0, **told(whole, wanted)}]
    print(table(rows), flush=True)
    for sparsity in SPARSITIES:
        for method, prune in CONTESTANTS.items():
            y = outputs(prune(model, {"x": images[:CALIBRATION]}, sparsity), {"x": test})
            error = relative_error(y, whole)
            rows.append({"sparsity": sparsity, "method": method, "error": error} | told(y, wanted))
            print(table(rows[-1:]), flush=True)
    publish("unet", rows)
    print(table(rows))
    return finish([*learnt(rows[0]), *(c for s in SPARSITIES for c in less_error(rows, s))])


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 1, SIZE, SIZE) and the class of every pixel (count, SIZE, SIZE)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    images, classes = np.zeros((count, 1, SIZE, SIZE)), np.zeros((count, SIZE, SIZE), np.int64)
    for image, pixels in zip(images[:, 0], classes, strict=True):
        slope = rng.normal(0, 0.5, 2) / SIZE
        image += slope[0] * x + slope[1] * y
        for _ in range(rng.integers(1, 4)):
            kind, radius = rng.integers(1, 3), rng.uniform(2.5, 5.5)
            across, down = (np.abs(axis - rng.uniform(3, SIZE - 3)) for axis in (x, y))
            far = np.hypot(across, down) if kind == 1 else np.maximum(across, down)
            image[far < radius] += rng.choice([-1, 1]) * rng.uniform(0.7, 1.3)
            pixels[far < radius] = kind
        image += rng.normal(0, 0.25, image.shape)
    return images.astype(np.float32), classes


def network(rng: np.random.Generator) -> onnx.ModelProto:
    """The U-Net with random weights, He et al. (arXiv:1502.01852), and biases of zero."""
    nodes, stored = [], []

    def layer(op: str, x: str, into: int, out: int, kernel: int, name: str) -> str:
        transposed, gain = op == "ConvTranspose", 2 / (into * (kernel**2 if op == "Conv" else 1))
        shape = ((into, out) if transposed else (out, into)) + (kernel, kernel)
        for suffix, values in (("w", rng.normal(0, np.sqrt(gain), shape)), ("b", np.zeros(out))):
            stored.append(numpy_helper.from_array(values.astype(np.float32), f"{name}.{suffix}"))
        attributes = {"strides": [2, 2]} if transposed else {"pads": [kernel // 2] * 4}
        z = "y" if name == "head" else f"{name}.z"
        nodes.append(helper.make_node(op, [x, f"{name}.w", f"{name}.b"], [z], name, **attributes))
        return z

    def block(x: str, into: int, out: int, name: str) -> str:
        for part, channels in (("a", into), ("b", out)):
            z = layer("Conv", x, channels, out, 3, f"{name}{part}")
            x = f"{name}{part}.y"
            nodes.append(helper.make_node("Relu", [z], [x]))
        return x

    x, into, skips = "x", 1, []
    for level, width in enumerate(WIDTHS):
        if level:
            pooled = f"pool{level}"
            halves = {"kernel_shape": [2, 2], "strides": [2, 2]}
            nodes.append(helper.make_node("MaxPool", [x], [pooled], **halves))
            x = pooled
        x = block(x, into, width, f"down{level}")
        skips.append(x)
        into = width
    for level, width in reversed(list(enumerate(WIDTHS[:-1]))):
        up = layer("ConvTranspose", x, into, width, 2, f"up{level}")
        nodes.append(helper.make_node("Concat", [up, skips[level]], [f"both{level}"], axis=1))
        x = block(f"both{level}", 2 * width, width, f"back{level}")
        into = width
    layer("Conv", x, into, len(CLASSES), 1, "head")
    shape = ["n", 1, SIZE, SIZE]
    return made(nodes, stored, shape, ["n", len(CLASSES), SIZE, SIZE])


def trained(images: np.ndarray, classes: np.ndarray) -> onnx.ModelProto:
    """The U-Net after ``STEPS`` steps of Adam (arXiv:1412.6980), the rate falling to zero."""
    rng = np.random.default_rng(0)
    proto = network(rng)
    model, layers = load(proto), find_layers(proto).layers
    data = Calibration({"x": images}, True, "drawn", False, 0)
    observer = Observer(model, layers, next(data.batches(2)), metric="l2-raw", threads=1)
    start = original_state(model, layers)
    objective = Objective(observer, start)
    theta = Parameters(layers, {x.weight.tensor: np.ones(x.shape, np.bool_) for x in layers})
    moved = theta.of(start)
    first, second = np.zeros((2, moved.size))
    for step in range(1, STEPS + 1):
        chosen = rng.choice(len(images), BATCH, replace=False)
        [batch] = data.take(chosen).batches(BATCH)
        g = gradient(objective, theta.state(start, moved), batch, classes[chosen], theta)
        first += 0.1 * (g - first)
        second += 0.001 * (g * g - second)
        spread = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        rate = RATE * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        moved -= rate * first / (1 - 0.9**step) / spread
    return stored_in(proto, theta.state(start, moved))


def gradient(
    objective: Objective, state: State, batch: Batch, classes: np.ndarray, theta: Parameters
) -> np.ndarray:
    """(theta.size,): of the cross-entropy, its mean over the pixels of a batch."""
    logits = objective.observer.heads(state, batch)["y"].astype(np.float64)
    likely = np.exp(logits - logits.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    slope = likely - np.moveaxis(np.eye(len(CLASSES))[classes], -1, 1)
    return objective.gradient(state, batch, {"y": slope / classes.size}, theta)


def stored_in(proto: onnx.ModelProto, state: State) -> onnx.ModelProto:
    """A copy of the model with the weights and biases of a state."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for layer in find_layers(proto).layers:
        layer.store(copy, state.weights[layer.weight.tensor], state.shifts[layer.name])
    return copy


def told(y: np.ndarray, classes: np.ndarray) -> Row:
    """Percent of pixels told right, and of intersection over union, the mean over classes."""
    found = y.argmax(axis=1)
    both = [((found == k) & (classes == k)).sum() for k in range(len(CLASSES))]
    either = [((found == k) | (classes == k)).sum() for k in range(len(CLASSES))]
    share = np.mean(np.divide(both, either))
    return {"accuracy": float(100 * (found == classes).mean()), "overlap": float(100 * share)}


def learnt(dense: Row) -> list[Claim]:
    """The network has learnt something: more than where the shapes are."""
    return [above("overlap of the dense network", dense["overlap"], 70)]


def less_error(rows: list[Row], sparsity: float) -> list[Claim]:
    """Both methods have less error than magnitude pruning, the default less than half of it."""
    found = {row["method"]: row["error"] for row in rows if row["sparsity"] == sparsity}
    return [
        above(
            f"error of magnitude over {method}'s at {sparsity}", found["magnitude"] / error, least
        )
        for method, error, least in (
            ("ecp", found["ecp"], 1.0),
            ("ecp-refit", found["ecp-refit"], 2.0),
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
