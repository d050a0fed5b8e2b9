"""How long the efforts take beside onnxsim's SparseGPT, and what error each leaves.

CPU seconds of one process, one thread each, measured in turns in one run; the error is that of
``statistics.columns`` on the official test digits, in units of each output's own spread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
import onnx
from contest import Contestant, onnxsim_pruning, ours
from networks import NETWORKS, accuracy, outputs
from outcome import Claim, Row, finish, publish, table

WAYS: dict[str, Contestant] = {
    "onnxsim SparseGPT": onnxsim_pruning("apply_sparsegpt_pruning"),
    "fast": ours("ecp-refit", effort="fast", threads=1),
    "balanced": ours("ecp-refit", effort="balanced", threads=1),
    "best": ours("ecp-refit", effort="best", threads=1),
    "sixteen stages of the ranking": ours("ecp-refit", stages=16, support="ranking", threads=1),
}
SPARSITIES = (0.7, 0.9, 0.95)
# Times as long as SparseGPT at most, and share of its error at most.
MOST_TIME = {"fast": 1.5, "balanced": 5.0}
MOST_ERROR = 0.5


def main() -> int:
    rows = [row for name in sys.argv[1:] or ("mlpnet", "lenet300", "lenet5", "tribuo")
            for row in measured(name)]  # fmt: skip
    publish("engine", rows)
    print(table(rows))
    return finish(claims(rows))


def measured(name: str) -> Iterator[Row]:
    """One row per sparsity and way."""
    network = NETWORKS[name]
    feeds, _ = network.digits("train", network.samples)
    test, labels = network.digits("test")
    model = onnx.load(network.path)
    wanted = outputs(model, test)
    for sparsity in SPARSITIES:
        peer = 0.0
        for way, prune in WAYS.items():
            began = time.process_time()
            pruned = prune(model, feeds, sparsity)
            seconds = time.process_time() - began
            peer = peer or seconds
            found = outputs(pruned, test)
            errors = np.square(found - wanted).mean(axis=0) / wanted.var(axis=0)
            yield {
                "network": name,
                "sparsity": sparsity,
                "way": way,
                "CPU seconds": seconds,
                "times SparseGPT's": seconds / peer,
                "error": float(np.sqrt(errors.mean())),
                "accuracy": accuracy(found, labels),
            }


def claims(rows: list[Row]) -> Iterator[Claim]:
    """Times and errors against SparseGPT; four stages with ADMM against sixteen without."""
    at = {(row["network"], row["sparsity"], row["way"]): row for row in rows}
    for (network, sparsity, way), row in at.items():
        peer = at[network, sparsity, "onnxsim SparseGPT"]
        where = f"{network} at {sparsity}, {way}"
        if way in MOST_TIME:
            ratio = row["times SparseGPT's"]
            yield Claim(f"{where}: {ratio:.2f} times SparseGPT's CPU", ratio <= MOST_TIME[way])
            share = row["error"] / peer["error"]
            yield Claim(f"{where}: {share:.2f} of SparseGPT's error", share <= MOST_ERROR)
        if way == "balanced":
            share = row["error"] / at[network, sparsity, "sixteen stages of the ranking"]["error"]
            yield Claim(f"{where}: {share:.3f} of the error of sixteen stages", share <= 1.05)


if __name__ == "__main__":
    sys.exit(main())
