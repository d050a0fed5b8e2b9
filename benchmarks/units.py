"""Whole units removed: accuracy against what is left and against latency, methods side by side.

    python benchmarks/units.py [network ...]

Claims: lenet300 keeps 95.3 % with 0.23 and 94.8 % with 0.15 of its weights; lenet5 loses at most
half a point with half of its multiplications; a transformer encoder (transformer.py) at most one
point with half of the weights of its blocks, heads and feed-forward units alike; one hidden layer
of 100 sigmoids (scikit-learn) at most one point with half of its weights and 512 digits. Every
method gets the same calibration digits, none sees labels. onnxsim removes channels by a share of
its own, which is searched so that as much is left; it has none to remove in the transformer's
attention.

These networks are small: latency is that of starting operators as much as of arithmetic. latency.py
is about what happens where arithmetic takes the time.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import transformer
from contest import Feeds, onnxsim_pruning
from networks import NETWORKS, accuracy, fully_connected, load_digits, outputs, plain
from outcome import RESULTS, Claim, above, finish, publish, table
from timing import ratio_in_turns

import onnx_ecp
from onnx_ecp.evaluation.work import Work, work
from onnx_ecp.graph import Model

# Shares that are left: of all weights, of the multiplications, of the weights of the blocks.
LEFT = {
    "lenet300": (0.4, 0.23, 0.15, 0.07),
    "lenet5": (0.75, 0.5, 0.25),
    "transformer": (0.75, 0.5, 0.35),
    "sigmoids": (0.75, 0.5, 0.25),
}
TARGET = {"lenet300": "weights", "lenet5": "flops", "transformer": "weights", "sigmoids": "weights"}
SIGMOIDS, FEW = 100, 512
OURS = ("ecp-refit", "ecp", "flap", "wanda", "magnitude")
BATCH, THREADS = 64, 1
REPEATS, WARM_UP = 300, 20

Pruning = Callable[[onnx.ModelProto, Feeds, float], onnx.ModelProto]


def ours(method: str, target: str) -> Pruning:
    """One of our methods."""

    def prune(model: onnx.ModelProto, feeds: Feeds, left: float) -> onnx.ModelProto:
        goal: dict[str, Any] = {"sparsity": 1 - left}
        if target == "flops":
            goal = {"speedup": 1 / left, "cost": "flops", "unit_multiple": 1}
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


def latency_ratio(
    before: onnx.ModelProto, after: onnx.ModelProto, feeds: Feeds, size: int = BATCH
) -> float:
    """Time of one batch, models in turns; the median of the ratios of neighbours."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    sessions = [
        onnxruntime.InferenceSession(m.SerializeToString(), options, ["CPUExecutionProvider"])
        for m in (before, after)
    ]
    batch = {n: np.ascontiguousarray(x[:size]) for n, x in feeds.items()}
    return ratio_in_turns(sessions, batch, REPEATS, WARM_UP)


def is_valid(model: onnx.ModelProto) -> bool:
    """Whether the checker is content, shape inference included."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


@dataclass(frozen=True)
class Contest:
    """A network and its digits; of the transformer, too, how many weights are in its blocks."""

    model: onnx.ModelProto
    feeds: Feeds
    test: Feeds
    labels: np.ndarray
    within: int | None = None

    def left(self, share: float, whole: Work) -> float:
        """The share of all weights that is left when ``share`` of those concerned is."""
        return share if self.within is None else 1 - (1 - share) * self.within / whole.weights


def contest(name: str) -> Contest | None:
    """What is pruned; None where it cannot be had."""
    if name == "sigmoids":
        return sigmoids()
    if name != "transformer":
        network = NETWORKS[name]
        feeds, _ = network.digits("train", network.samples)
        return Contest(onnx.load(network.path), feeds, *network.digits("test"))
    model = transformer.network()
    if model is None:
        return None
    blocks = sum(
        int(np.prod(x.dims)) for x in model.graph.initializer
        if x.name.startswith("block") and x.name.endswith("weight")
    )  # fmt: skip
    return Contest(model, *transformer.digits(), blocks)


def sigmoids() -> Contest | None:
    """One hidden layer of sigmoids, trained on the training digits, and few of these."""
    try:
        from sklearn.neural_network import MLPClassifier
    except ImportError:
        print("no sigmoids: scikit-learn is not installed.", file=sys.stderr)
        return None
    (x, y), (test, labels) = (load_digits(part) for part in ("train", "test"))
    found = MLPClassifier((SIGMOIDS,), activation="logistic", max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would like more than 60 epochs
        found.fit(plain(x), y)
    model = fully_connected([w.T for w in found.coefs_], found.intercepts_, "Sigmoid")
    return Contest(model, {"x": plain(x[:FEW])}, {"x": plain(test)}, labels)


def rows(name: str, given: Contest) -> Iterator[dict[str, Any]]:
    """One row per method and goal."""
    model, target = given.model, TARGET[name]
    whole = measured(model, given.feeds)
    contestants = {method: ours(method, target) for method in OURS}
    contestants["onnxsim structured Wanda"] = onnxsim_wanda(target)
    dense = accuracy(outputs(model, given.test), given.labels)
    for left in LEFT[name]:
        for method, prune in contestants.items():
            began = time.monotonic()
            pruned = prune(model, given.feeds, given.left(left, whole))
            seconds = time.monotonic() - began
            after = measured(pruned, given.feeds)
            if getattr(after, target) > 1.05 * given.left(left, whole) * getattr(whole, target):
                print(f"{name}: {method} cannot go down to {left}", file=sys.stderr)
                continue
            yield {
                "network": name,
                "method": method,
                "left": left,
                "accuracy": accuracy(outputs(pruned, given.test), given.labels),
                "dense": dense,
                "weights": after.weights / whole.weights,
                "flops": after.flops / whole.flops,
                "latency": latency_ratio(model, pruned, given.test),
                "full_check": is_valid(pruned),
                "seconds": seconds,
            }


def picture(name: str, found: Sequence[dict[str, Any]]) -> None:
    """Accuracy over latency as ``results/units_NAME.png``, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no PNG: matplotlib is not installed.")
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(row["method"] for row in found):
        points = sorted((r["latency"], r["accuracy"]) for r in found if r["method"] == method)
        marker = "o-" if method == "ecp-refit" else ".--"
        axes.plot(*zip(*points, strict=True), marker, label=method)
    axes.axhline(found[0]["dense"], color="gray", linewidth=0.8)
    axes.annotate("original", (1, found[0]["dense"]), va="bottom", ha="right", color="gray")
    axes.set_xlim(0, 1)
    axes.set_xlabel(
        f"latency of a batch of {BATCH} on ONNX Runtime, {THREADS} thread, original = 1"
    )
    axes.set_ylabel("accuracy on 10,000 test digits, %")
    axes.set_title(name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"units_{name}.png", dpi=90)
    plt.close(figure)


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
    row = by.get(("transformer", 0.5, "ecp-refit"))
    if row:
        what = "transformer, half of the weights of its blocks"
        yield above(what, row["accuracy"], row["dense"] - 1)
    row = by.get(("sigmoids", 0.5, "ecp-refit"))
    if row:
        yield above("sigmoids, half of the weights", row["accuracy"], row["dense"] - 1)
    for (name, left, method), row in by.items():
        if method == "ecp-refit":
            yield Claim(f"{name}, {left} left: full_check passes", row["full_check"])
            others = max(r["accuracy"] for k, r in by.items() if k[:2] == (name, left))
            yield Claim(f"{name}, {left} left: no method is better", row["accuracy"] >= others)


def main(names: Sequence[str]) -> int:
    """Measure, publish, judge."""
    found = []
    for name in names or LEFT:
        given = contest(name)
        if given is None:
            continue
        own = []
        for row in rows(name, given):
            own.append(row)
            print(*row.values(), file=sys.stderr, flush=True)
        publish(f"units_{name}", own)
        picture(name, own)
        found += own
    print(table(found))
    return finish(claims(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
