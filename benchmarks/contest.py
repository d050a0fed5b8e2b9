"""Ways to prune, ours and others', behind one signature; and the contest between them.

A contestant takes a model, calibration inputs by name and a sparsity (0.8 or "2:4") and gives the
pruned model. All see the same calibration inputs; none sees labels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from networks import NETWORKS, accuracy, outputs, relative_error
from outcome import Claim, Row, shown, text
from scipy.stats import binomtest

import onnx_ecp
from onnx_ecp.api.inspect import inspect

Feeds = dict[str, np.ndarray]
Contestant = Callable[[onnx.ModelProto, Feeds, float | str], onnx.ModelProto]
# Batches for onnxsim: large enough that its time is not that of calling ONNX Runtime.
BATCH = 256


def ours(method: str, **choices: Any) -> Contestant:
    """A method of this project with its defaults, except for ``choices``."""

    def prune(model: onnx.ModelProto, feeds: Feeds, sparsity: float | str) -> onnx.ModelProto:
        result = onnx_ecp.optimize(model, feeds, method=method, sparsity=sparsity, **choices)
        return result.model

    return prune


def onnxsim_pruning(function: str, **choices: Any) -> Contestant:
    """A pruning function of onnxsim, on all calibration inputs."""

    def prune(model: onnx.ModelProto, feeds: Feeds, sparsity: float | str) -> onnx.ModelProto:
        import onnxsim

        wanted = dict(choices)
        if isinstance(sparsity, str):
            wanted["n"], wanted["m"] = map(int, sparsity.split(":"))
        else:
            wanted["sparsity"] = sparsity
        if "magnitude" not in function:
            wanted["calibration_data"] = batches(feeds)
        return getattr(onnxsim, function)(copied(model), **wanted)

    return prune


def onnxsim_sparsegpt_tuned(
    model: onnx.ModelProto, feeds: Feeds, sparsity: float | str
) -> onnx.ModelProto:
    """SparseGPT, then onnxsim's distillation with the masks fixed, in blocks as large as it can.

    Its closed-form ``apply_pruning_finetune`` declines unstructured results; this is what it has
    for them. Learning rate, batch size and steps were chosen on training digits (lenet300 at .9):
    better and faster than its defaults.
    """
    import onnxsim

    tuned, _ = onnxsim.apply_block_finetune_all_blocks(
        model,
        onnxsim_pruning("apply_sparsegpt_pruning")(model, feeds, sparsity),
        calibration_data=batches(feeds),
        num_iterations=3000,
        learning_rate=3e-3,
        batch_size=128,
        max_layers_per_block=99,
        preserve_sparsity=True,
    )
    return tuned


def batches(feeds: Feeds, size: int = BATCH) -> list[Feeds]:
    """Calibration inputs as onnxsim takes them."""
    count = len(next(iter(feeds.values())))
    return [{n: x[i : i + size] for n, x in feeds.items()} for i in range(0, count, size)]


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, for functions that might change what they are given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


ONNXSIM: dict[str, Contestant] = {
    "onnxsim magnitude, global": onnxsim_pruning("apply_magnitude_pruning", global_sparsity=True),
    "onnxsim magnitude, per row": onnxsim_pruning("apply_magnitude_pruning"),
    "onnxsim Wanda, global": onnxsim_pruning("apply_wanda_pruning", global_sparsity=True),
    "onnxsim Wanda, per row": onnxsim_pruning("apply_wanda_pruning"),
    "onnxsim SparseGPT": onnxsim_pruning("apply_sparsegpt_pruning"),
}


def compete(
    name: str,
    contestants: Mapping[str, Contestant],
    sparsities: Sequence[float | str],
    samples: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per contestant and sparsity; accuracy and error on the official test digits.

    Args:
        name: of a network in ``networks.NETWORKS``.
        contestants: by the name that the table shows.
        sparsities: what is asked of each.
        samples: calibration digits; None takes the network's own number.
    """
    network = NETWORKS[name]
    feeds, _ = network.digits("train", samples or network.samples)
    test, labels = network.digits("test")
    model = onnx.load(network.path)
    yield from compete_on(name, model, feeds, test, labels, contestants, sparsities)


def compete_on(
    name: str,
    model: onnx.ModelProto,
    feeds: Feeds,
    test: Feeds,
    labels: np.ndarray,
    contestants: Mapping[str, Contestant],
    sparsities: Sequence[float | str],
) -> Iterator[dict[str, Any]]:
    """The same for any model, with calibration inputs, test inputs and labels."""
    for sparsity in sparsities:
        for label, prune in contestants.items():
            began = time.monotonic()
            pruned, seconds = prune(model, feeds, sparsity), time.monotonic() - began
            scores = judged(model, pruned, test, labels)
            row = {"network": name, "method": label, "sparsity": sparsity, **scores}
            row |= {"seconds": seconds, "samples": len(next(iter(feeds.values())))}
            print(" ".join(map(text, shown(row).values())), file=sys.stderr, flush=True)
            yield row


def judged(
    model: onnx.ModelProto, pruned: onnx.ModelProto, test: Feeds, labels: np.ndarray
) -> dict[str, Any]:
    """Accuracy and relative output error of a pruned model, and the share of its weights gone.

    ``right`` (n,) bool tells the samples whose class it finds.
    """
    before, after = outputs(model, test), outputs(pruned, test)
    return {
        "right": after.argmax(axis=1) == labels,
        "accuracy": accuracy(after, labels),
        "dense": accuracy(before, labels),
        "error": relative_error(after, before),
        "zeros": gone(model, pruned),
    }


# A difference in accuracy counts from here on: the probability of one as large by chance alone.
BY_CHANCE = 0.05


def not_behind(where: str, mine: Row, peers: Sequence[Row]) -> Claim:
    """The claim that no peer is more accurate, as far as the samples can tell.

    A peer may have a few more right by chance: the exact test of McNemar (1947) asks how likely so
    many of the samples that only one of the two has right fall to the peer where both are as good.
    """
    best = max(peers, key=lambda row: float(row["accuracy"]))
    ours = int((mine["right"] & ~best["right"]).sum())
    theirs = int((best["right"] & ~mine["right"]).sum())
    chance = binomtest(theirs, ours + theirs, alternative="greater").pvalue if theirs else 1.0
    ahead = "ahead" if ours >= theirs else f"behind, p = {chance:.2g}"
    text = (
        f"{where}: accuracy of {mine['method']} {mine['accuracy']:.2f}, of {best['method']} "
        f"{best['accuracy']:.2f} ({ours} right only here, {theirs} only there: {ahead})"
    )
    return Claim(text, ours >= theirs or chance > BY_CHANCE)


def gone(model: onnx.ModelProto, pruned: onnx.ModelProto) -> float:
    """Share of the weights of the prunable layers that are zero or no longer there."""
    before, after = inspect(model), inspect(pruned)
    return 1 - (after.weights - after.zeros) / before.weights
