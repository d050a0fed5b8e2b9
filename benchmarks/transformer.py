"""A transformer encoder keeps its accuracy at .8 (half a point) and .9 (two points).

Two blocks over the rows of a digit as tokens, trained here with PyTorch on the 10,000 training
digits and kept in ``benchmarks/cache``. Calibrated on 1,000 of them without labels; no fine-tuning;
accuracy on the official test digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from contest import ONNXSIM, compete_on, ours
from encoders import Shape, encoder
from networks import load_digits, plain
from onnx import numpy_helper
from outcome import Claim, above, finish, pivot, publish, table

CACHE = Path(__file__).resolve().parent / "cache" / "transformer.onnx"
SHAPE = Shape(tokens=28, features=28, width=64, heads=4, hidden=128, blocks=2, classes=10)
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
# Points that may be lost against the dense network.
MOST = {0.8: 0.5, 0.9: 2.0}
CONTESTANTS = {
    "magnitude": ours("magnitude"),
    "onnxsim Wanda, global": ONNXSIM["onnxsim Wanda, global"],
    "onnxsim Wanda, per row": ONNXSIM["onnxsim Wanda, per row"],
    "onnxsim SparseGPT": ONNXSIM["onnxsim SparseGPT"],
    "ecp": ours("ecp"),
    "ecp-refit": ours("ecp-refit"),
}
EPOCHS = 40


def network() -> onnx.ModelProto | None:
    """The trained network; None where it is not there and PyTorch, to train it, is not either."""
    if not CACHE.exists():
        try:
            import torch  # noqa: F401
        except ImportError:
            print("skipped: PyTorch is not installed, and it is needed to train the network.")
            return None
        CACHE.parent.mkdir(exist_ok=True)
        onnx.save(trained(encoder(SHAPE)), CACHE)
    return onnx.load(CACHE)


def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Calibration inputs, test inputs and their labels."""
    chosen = np.sort(np.random.default_rng(0).choice(10_000, 1_000, replace=False))
    test, labels = rows_of_digits("test")
    return {"x": rows_of_digits("train")[0][chosen]}, {"x": test}, labels


def main() -> int:
    model = network()
    if model is None:
        return 0
    data = digits()
    rows = list(compete_on("transformer", model, *data, CONTESTANTS, SPARSITIES))
    publish("transformer", rows)
    dense = rows[0]["dense"]
    print(f"dense {dense:.2f} %")
    for value in ("accuracy", "error", "seconds"):
        print(f"\n{value}:\n{table(pivot(rows, 'method', 'sparsity', value))}")
    claims: list[Claim] = [
        above(f"ecp-refit at {row['sparsity']}", row["accuracy"], dense - MOST[row["sparsity"]])
        for row in rows
        if row["method"] == "ecp-refit" and row["sparsity"] in MOST
    ]
    return finish(claims)


def rows_of_digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, 28, 28) and labels."""
    x, y = load_digits(part)
    return plain(x).reshape(-1, 28, 28), y


def trained(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with trained weights; digits are moved by up to two pixels in training."""
    import torch
    import torch_graph

    torch.manual_seed(0)
    x, y = map(torch.from_numpy, rows_of_digits("train"))
    weights = torch_graph.stored(model)
    learned = [w.requires_grad_() for w in weights.values() if w.is_floating_point()]
    optimizer = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.01)
    steps = EPOCHS * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        batch = torch.randint(len(x), (128,))
        shifts = torch.randint(-2, 3, (2,)).tolist()
        inputs = torch.roll(x[batch], shifts, dims=(1, 2))
        logits = torch_graph.run(model, weights, {"x": inputs})["y"]
        loss = torch.nn.functional.cross_entropy(logits, y[batch].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
    for tensor in model.graph.initializer:
        values = weights[tensor.name].detach().numpy()
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


if __name__ == "__main__":
    sys.exit(main())
