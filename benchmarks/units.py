"""Whole units removed: accuracy against what is left, methods side by side, and real latency.

    python benchmarks/units.py [network ...]

Claims: lenet300 keeps 95.3 % with 0.23 and 94.8 % with 0.15 of its weights; lenet5 loses at most
half a point with half of its multiplications; latency follows the multiplications. Every method
gets the same calibration digits, none sees labels. onnxsim removes channels by a share of its own,
which is searched so that as many weights are left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from contest import Feeds, onnxsim_pruning
from networks import NETWORKS, Network, accuracy, outputs
from outcome import Claim, above, finish, publish, table

import onnx_ecp
from onnx_ecp.model import Model
from onnx_ecp.structure.outcome import Work
from onnx_ecp.structure.smaller import work

# Shares of the weights (lenet300) or of the multiplications (lenet5) that are left.
LEFT = {"lenet300": (0.4, 0.23, 0.15, 0.07), "lenet5": (0.75, 0.5, 0.25)}
TARGET = {"lenet300": "weights", "lenet5": "flops"}
OURS = ("ecp-refit", "ecp", "flap", "wanda", "magnitude")
# One thread and a large batch: what is timed is arithmetic, not the start of a run.
BATCH, THREADS = 64, 1
REPEATS, WARM_UP = 300, 20

Pruning = Callable[[onnx.ModelProto, Feeds, float], onnx.ModelProto]


def ours(method: str, target: str) -> Pruning:
    """One of our methods."""

    def prune(model: onnx.ModelProto, feeds: Feeds, left: float) -> onnx.ModelProto:
        goal: dict[str, Any] = {"sparsity": 1 - left}
        if target == "flops":
            goal = {"speedup": 1 / left, "cost": "flops"}
        return onnx_ecp.optimize(model, feeds, method=method, granularity="unit", **goal).model

    return prune


def onnxsim_wanda(target: str) -> Pruning:
    """Structured Wanda of onnxsim, at the share of channels that leaves as much."""

    def prune(model: onnx.ModelProto, feeds: Feeds, left: float) -> onnx.ModelProto:
        apply = onnxsim_pruning("apply_structured_wanda_pruning", global_sparsity=True)
        whole = getattr(measured(model, feeds), target)
        low, high, best = 0.0, 1.0, model
        for _ in range(8):
            middle = (low + high) / 2
            found = apply(model, feeds, middle)
            if getattr(measured(found, feeds), target) <= left * whole:
                best, high = found, middle
            else:
                low = middle
        return best

    return prune


def measured(model: onnx.ModelProto, feeds: Feeds) -> Work:
    """What the layers of a model take."""
    return work(Model(model, None, None), {n: x[:2] for n, x in feeds.items()}, {})


def latency_ratio(before: onnx.ModelProto, after: onnx.ModelProto, feeds: Feeds) -> float:
    """Time of one batch, models in turns; the median of the ratios of neighbours."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    sessions = [
        onnxruntime.InferenceSession(m.SerializeToString(), options, ["CPUExecutionProvider"])
        for m in (before, after)
    ]
    batch = {n: np.ascontiguousarray(x[:BATCH]) for n, x in feeds.items()}
    times = np.zeros((REPEATS, 2))
    for turn in times:
        for i, session in enumerate(sessions):
            began = time.perf_counter()
            session.run(None, batch)
            turn[i] = time.perf_counter() - began
    return float(np.median(times[WARM_UP:, 1] / times[WARM_UP:, 0]))


def is_valid(model: onnx.ModelProto) -> bool:
    """Whether the checker is content, shape inference included."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def rows(name: str, network: Network) -> Iterator[dict[str, Any]]:
    """One row per method and goal."""
    model, target = onnx.load(network.path), TARGET[name]
    feeds, _ = network.digits("train", network.samples)
    test, labels = network.digits("test")
    whole = measured(model, feeds)
    contestants = {method: ours(method, target) for method in OURS}
    contestants["onnxsim structured Wanda"] = onnxsim_wanda(target)
    for left in LEFT[name]:
        for method, prune in contestants.items():
            pruned = prune(model, feeds, left)
            after = measured(pruned, feeds)
            yield {
                "network": name,
                "method": method,
                "left": left,
                "accuracy": accuracy(outputs(pruned, test), labels),
                "dense": accuracy(outputs(model, test), labels),
                "weights": after.weights / whole.weights,
                "flops": after.flops / whole.flops,
                "latency": latency_ratio(model, pruned, test),
                "full_check": is_valid(pruned),
            }


def claims(found: Sequence[dict[str, Any]]) -> Iterator[Claim]:
    """What the table must show."""
    by = {(row["network"], row["left"], row["method"]): row for row in found}
    for left, least in ((0.23, 95.3), (0.15, 94.8)):
        row = by.get(("lenet300", left, "ecp-refit"))
        if row:
            yield above(f"lenet300, {row['weights']:.3f} of the weights", row["accuracy"], least)
    row = by.get(("lenet5", 0.5, "ecp-refit"))
    if row:
        what = f"lenet5, {row['flops']:.3f} of the multiplications"
        yield above(what, row["accuracy"], row["dense"] - 0.5)
    for (name, left, method), row in by.items():
        if method == "ecp-refit":
            yield Claim(f"{name}, {left} left: full_check passes", row["full_check"])
            others = max(r["accuracy"] for k, r in by.items() if k[:2] == (name, left))
            yield Claim(f"{name}, {left} left: no method is better", row["accuracy"] >= others)
            close = bool(np.isclose(row["latency"], row["flops"], rtol=0.1))
            text = f"latency x{row['latency']:.3f} is x{row['flops']:.3f} of the multiplications"
            yield Claim(f"{name}, {left} left: {text}, within 10 %", close)


def main(names: Sequence[str]) -> int:
    """Measure, publish, judge."""
    found = []
    for name in names or LEFT:
        for row in rows(name, NETWORKS[name]):
            found.append(row)
            print(*row.values(), file=sys.stderr, flush=True)
    publish("units", found)
    print(table(found))
    return finish(claims(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
