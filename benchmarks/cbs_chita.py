"""The table of CBS and CHITA on MLPNet: every method at .5 to .98, the published rows beside ours.

784-40-20-10, one shot, no training. Every method gets the same 10,000 training digits;
``woodfisher`` and ``cbs`` get their labels too, and rank and update by the empirical Fisher matrix
of the loss, as published. onnxsim's SparseGPT stands beside ours, which is also given the Gram
matrices of the original network (``sparsegpt, as onnxsim``) instead of those of the network that
the layers before make: that is what onnxsim does. Each method runs in a process of its own: one
sweep over all sparsities, with its CPU seconds and its peak of memory.

Usage: python benchmarks/cbs_chita.py [METHOD ...]; the rows of other methods are kept.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from contest import ONNXSIM, judged
from networks import NETWORKS
from onnx import numpy_helper
from outcome import RESULTS, Claim, Row, above, finish, near, pivot, publish, table
from published_rows import KNOWN
from tables import read

from onnx_ecp.api.output import stored
from onnx_ecp.api.sweep import grid_of, prepare
from onnx_ecp.methods import METHODS as ALL
from onnx_ecp.pruning import loop as pruning
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.statistics.layerwise import Network

NAME = "cbs_chita"
NETWORK = NETWORKS["mlpnet"]
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# Of the network as it is, on the official test digits.
DENSE = 93.97
# Accuracy in percent, from the tables of arXiv:2203.04466.
PUBLISHED = {
    "magnitude": tuple(KNOWN["magnitude"].values()),
    "woodfisher": (94.02, 93.77, 93.57, 91.69, 85.54, 38.26),
    "cbs": (93.96, 93.98, 93.90, 93.14, 88.92, 55.45),
}
WITH_LABELS = ("woodfisher", "cbs")
PEER, LIKE_PEER = "onnxsim SparseGPT", "sparsegpt, onnxsim's masks"
METHODS = (
    "random", "magnitude", "gradient-magnitude", "wanda", "flap", "obd", "ecp", "obs", PEER,
    LIKE_PEER, "sparsegpt", "cbs", "woodfisher", "obc", "ecp-refit",
)  # fmt: skip


def main() -> int:
    assert set(ALL) <= set(METHODS), "every method is in the table"
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(list(measured(sys.argv[2]))))
        return 0
    path = RESULTS / f"{NAME}.csv"
    rows = [dict(row) for row in read(path)] if path.exists() else []
    for method in sys.argv[1:] or METHODS:
        command = [sys.executable, __file__, "--one", method]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(table(found), flush=True)
        rows = [row for row in rows if row["method"] != method] + found
        rows.sort(key=lambda row: METHODS.index(row["method"]))
        publish(NAME, rows)
    publish(f"{NAME}_published", list(side_by_side(rows)))
    print(table(pivot(rows, "method", "sparsity", "accuracy")))
    draw(rows)
    return finish(claims(rows))


def draw(rows: list[Row]) -> None:
    """The curves, ours and the published ones, as ``results/cbs_chita.png``."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no PNG: matplotlib is not installed.")
        return
    figure, panel = plt.subplots(figsize=(9, 5), layout="constrained")
    places = range(len(SPARSITIES))
    colours = plt.get_cmap("tab20").colors
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        y = [float(row["accuracy"]) for row in rows if row["method"] == method]
        panel.plot(places, y, marker=".", color=colours[i], label=method)
        if method in PUBLISHED:
            panel.plot(
                places, PUBLISHED[method], "x", color=colours[i], label=f"{method}, published"
            )
    panel.axhline(DENSE, color="0.6", linestyle=":", label="not pruned")
    panel.set(title="MLPNet, one shot", xlabel="share of weights gone", ylabel="accuracy %")
    panel.set_xticks(places, map(str, SPARSITIES))
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(RESULTS / f"{NAME}.png", dpi=80)


def side_by_side(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Published rows and ours."""
    for method in PUBLISHED:
        for key, whose in (("published", "published"), ("accuracy", "here")):
            for row in rows:
                if row["method"] == method:
                    sparsity, value = row["sparsity"], row[key]
                    yield {"row": f"{method}, {whose}", "sparsity": sparsity, "accuracy": value}


def measured(method: str) -> Iterator[dict[str, Any]]:
    """One row per sparsity, of this process."""
    model = onnx.load(NETWORK.path)
    feeds, labels = NETWORK.digits("train", NETWORK.samples)
    test, truth = NETWORK.digits("test")
    made = onnxsim_models if method == PEER else our_models
    for sparsity, pruned, seconds in made(method, model, feeds, labels):
        scores = judged(model, pruned, test, truth)
        published = dict(zip(SPARSITIES, PUBLISHED.get(method, ()), strict=False))
        yield {
            "method": method,
            "sparsity": sparsity,
            "accuracy": scores["accuracy"],
            "published": published.get(sparsity, ""),
            "error": scores["error"],
            "CPU seconds": seconds,
            "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def onnxsim_models(
    method: str, model: onnx.ModelProto, feeds: dict[str, np.ndarray], labels: np.ndarray
) -> Iterator[tuple[float, onnx.ModelProto, float]]:
    """(sparsity, pruned model, CPU seconds)."""
    for sparsity in SPARSITIES:
        began = time.process_time()
        pruned = ONNXSIM[method](model, feeds, sparsity)
        yield sparsity, pruned, time.process_time() - began


def our_models(
    method: str, model: onnx.ModelProto, feeds: dict[str, np.ndarray], labels: np.ndarray
) -> Iterator[tuple[float, onnx.ModelProto, float]]:
    """The same by this project, with its defaults; what points share is measured once.

    The CPU seconds of a point are its own and an equal part of what all share.
    """
    with tempfile.TemporaryDirectory() as folder:
        known = None
        if method in WITH_LABELS:
            known = Path(folder) / "labels.npy"
            np.save(known, labels)
        began = time.process_time()
        name = "sparsegpt" if method == LIKE_PEER else method
        grid = grid_of(name, SPARSITIES, {}, labels=known)
        shared = prepare(model, feeds, grid, None, known)
        common = (time.process_time() - began) / len(SPARSITIES)
        for options, plan in zip(grid, shared.plans, strict=True):
            needs = plan.method.measures
            network = shared.networks[needs]
            began = time.process_time()
            if method == LIKE_PEER:
                state = with_masks(network, plan, ONNXSIM[PEER](model, feeds, options.sparsity))
            else:
                state = pruning.prune(network, plan, measured=shared.measured[needs]).state
            seconds = time.process_time() - began + common
            yield options.sparsity, stored(shared.source, network, state)[0].proto, seconds


def with_masks(network: Network, plan: Plan, like: onnx.ModelProto) -> pruning.State:
    """The weights that ``like`` removed are removed, every layer by itself.

    Each layer is solved with the inputs that the original network gives it.
    """
    stored = {t.name: numpy_helper.to_array(t) for t in like.graph.initializer}
    state = network.original
    for layer in network.layers:
        tensor = layer.weight.tensor
        keep = {x.weight.tensor: network.original.keep[x.weight.tensor] for x in network.layers}
        keep[tensor] = layer.weight.matrix(stored[tensor]) != 0
        groups = tuple(replace(g, masks={n: keep[n] for n in g.tensors}) for g in plan.groups)
        alone = pruning.stage(
            network, replace(plan, groups=groups), pruning.Pruned(network.original), 1.0
        ).state
        state = replace(
            state,
            weights={**state.weights, tensor: alone.weights[tensor]},
            keep={**state.keep, tensor: alone.keep[tensor]},
        )
    return state


def claims(rows: list[Row]) -> Iterator[Claim]:
    """What the table must show; only of the methods that have been run."""
    at = {(row["method"], float(row["sparsity"])): float(row["accuracy"]) for row in rows}
    for method, accuracies in PUBLISHED.items():
        for sparsity, published in zip(SPARSITIES, accuracies, strict=True):
            if (method, sparsity) not in at:
                continue
            name, ours = f"{method} at {sparsity}", at[method, sparsity]
            if (method, sparsity) == ("cbs", 0.98):
                yield above(name, ours, 50.0)
            else:
                yield near(name, ours, published, by=0.1 if method == "magnitude" else 1.0)
    for sparsity in SPARSITIES:
        if (PEER, sparsity) in at and (LIKE_PEER, sparsity) in at:
            name = f"{LIKE_PEER} at {sparsity}"
            yield near(name, at[LIKE_PEER, sparsity], at[PEER, sparsity], by=0.3)


if __name__ == "__main__":
    sys.exit(main())
