"""Sensitivities and statistics cost a bounded number of forward passes, at any width and depth.

The unit is one pass of the model over the same samples by ONNX Runtime. Measured are the reverse
graph alone, the reverse graph with the sums of all layers (what a method that needs sensitivities
pays for a look at its data), and the same sums by PyTorch autograd with float64 products (one
backward per seed, or all seeds at once by vmap, whichever is faster). One thread, CPU seconds,
ways in turns, medians over the ratios of neighbours. The sums must agree. Networks, weights and
inputs are random; probes are those that the tool chooses: one for every output of a sample up to
16 of them, else a single random one.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from encoders import Build, Shape, decoder, encoder
from observation_speed import (
    AGREEMENT,
    Case,
    Setting,
    Sums,
    by_reverse_graph,
    by_torch,
    disagreement,
    prepared,
)
from outcome import Claim, finish, publish, table
from timing import in_turns

CLASSES, TOKENS, SIDE = 10, 32, 16
TURNS, WARM_UP = 5, 1
# Where a Relu's input is within rounding of zero, PyTorch may see the other slope: a wide layer has
# such units, and each changes the sums of its sample. With Tanh instead they agree to 1e-7.
KINKS_AGREEMENT = 1e-3


def mlp(width: int, depth: int) -> onnx.ModelProto:
    """So many hidden layers."""
    build = Build(np.random.default_rng(0))
    h = "x"
    for i in range(depth):
        h = build("Relu", build.linear(f"hidden{i}", h, width, width))
    build.linear("head", h, width, CLASSES, output="y")
    return build.model([width], [CLASSES])


def cnn(width: int, depth: int) -> onnx.ModelProto:
    """So many convolutions with kernels of 3 x 3; the image keeps its size."""
    build = Build(np.random.default_rng(0))
    h, channels = "x", 3
    for i in range(depth):
        deviation = (2 / (9 * channels)) ** 0.5
        kernel = build.rng.normal(0, deviation, (width, channels, 3, 3))
        inputs = [
            build.store(f"conv{i}/weight", kernel),
            build.store(f"conv{i}/b", np.zeros(width)),
        ]
        h = build("Relu", build("Conv", h, *inputs, pads=[1, 1, 1, 1]))
        channels = width
    mean = build("Flatten", build("GlobalAveragePool", h))
    build.linear("head", mean, width, CLASSES, output="y")
    return build.model([3, SIDE, SIDE], [CLASSES])


def transformer(width: int, depth: int) -> Shape:
    """So many blocks."""
    return Shape(TOKENS, width, width, 4, 4 * width, depth, CLASSES)


# By kind: from width and depth to a network; widths; depths; samples.
KINDS: dict[str, tuple[Callable[[int, int], onnx.ModelProto], tuple[int, ...], int]] = {
    "MLP": (mlp, (64, 256, 1024), 512),
    "CNN": (cnn, (8, 16, 32), 64),
    "encoder": (lambda w, d: encoder(transformer(w, d)), (64, 128, 256), 16),
    "decoder": (lambda w, d: decoder(transformer(w, d)), (64, 128, 256), 16),
}
DEPTHS = (2, 4, 8)


def main() -> int:
    rows, claims = [], []
    for kind, (network, widths, samples) in KINDS.items():
        for width, depth in itertools.product(widths, DEPTHS):
            row = {"network": kind, "width": width, "depth": depth}
            row |= cost(network(width, depth), samples)
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
            gap, most = row["disagreement"], KINKS_AGREEMENT if kind == "MLP" else AGREEMENT
            text = f"{kind} {width} x {depth}: sums of torch agree to {most}: {gap:.1e}"
            claims.append(Claim(text, gap <= most))
            text = f"{kind} {width} x {depth}: torch takes {row['torch / ours']:.2f} times as long"
            claims.append(Claim(text, row["torch / ours"] > 1))
    publish("cost_in_forwards", rows)
    print(table(rows))
    return finish(claims)


def cost(model: onnx.ModelProto, samples: int) -> dict[str, Any]:
    """One row: what is measured on one network."""
    sizes, outputs = (
        [d.dim_value for d in value.type.tensor_type.shape.dim][1:]
        for value in (model.graph.input[0], model.graph.output[0])
    )
    inputs = np.random.default_rng(1).normal(size=(samples, *sizes)).astype(np.float32)
    setting, observer = prepared("random", Case(model, {"x": inputs}))
    batches = list(setting.data.batches(setting.size))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )

    def forward() -> None:
        for batch in batches:
            session.run(None, batch.feeds)

    def reverse() -> None:
        for batch in batches:
            observer.observe(setting.state, batch)

    def ours() -> Sums:
        return by_reverse_graph(setting, observer)

    theirs = fastest_torch(setting)
    gap = disagreement(ours(), theirs())
    times = in_turns([forward, reverse, ours, theirs], TURNS, WARM_UP, clock=time.process_time)
    forwards = np.median(times / times[:, :1], axis=0)
    return {
        "parameters": sum(math.prod(t.dims) for t in model.graph.initializer),
        "rows": samples * (1 if len(sizes) == 1 else SIDE**2 if len(sizes) == 3 else TOKENS),
        "outputs": math.prod(outputs),
        "probes": observer.probes,
        "forward ms": 1e3 * float(np.median(times[:, 0])),
        "reverse graph": float(forwards[1]),
        "with sums": float(forwards[2]),
        "torch": float(forwards[3]),
        "torch / ours": float(np.median(times[:, 3] / times[:, 2])),
        "disagreement": gap,
    }


def fastest_torch(setting: Setting) -> Callable[[], Sums]:
    """One backward per seed, or all at once: what takes less time in the second of two rounds."""
    ways = [lambda: by_torch(setting, at_once=False), lambda: by_torch(setting, at_once=True)]
    return ways[int(in_turns(ways, 1, 1, clock=time.process_time).argmin())]


if __name__ == "__main__":
    sys.exit(main())
