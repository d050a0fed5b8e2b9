"""Clean-up makes the same network smaller, and never slower unless the size alone is to count.

    python benchmarks/cleanup.py

Unstructured pruning to high sparsity, then what clean-up leaves: a dense model without the units
that nobody reads, and without the inputs, where that is faster or wherever it is smaller. Latency
is that of a batch of 1 and of 64, one thread, against the original.
"""

from __future__ import annotations

import itertools
import sys

import onnx
from networks import NETWORKS, accuracy, outputs
from outcome import Claim, finish, publish, table
from units import latency_ratio, measured

import onnx_ecp
from onnx_ecp.units.cleanup import UNREAD

SPARSITIES = {"mlpnet": (0.95, 0.98), "lenet300": (0.95, 0.98)}


def main() -> int:
    """Prune, clean up, measure, judge."""
    rows, claims = [], []
    for name, sparsities in SPARSITIES.items():
        network = NETWORKS[name]
        model = onnx.load(network.path)
        feeds, _ = network.digits("train", 2_000)
        test, labels = network.digits("test")
        for sparsity, unread in itertools.product(sparsities, UNREAD):
            done = onnx_ecp.optimize(model, feeds, sparsity=sparsity, unread_inputs=unread)
            after = measured(done.model, feeds).weights
            rows.append(
                {
                    "network": name,
                    "sparsity": sparsity,
                    "unread inputs": unread,
                    "accuracy": accuracy(outputs(done.model, test), labels),
                    "units": " ".join(f"{x.before}-{x.after}" for x in done.report.units),
                    "weights": after / measured(model, feeds).weights,
                    "gzip": done.report.result.compressed_bytes
                    / done.report.original.compressed_bytes,
                    "latency, 1": latency_ratio(model, done.model, test, 1),
                    "latency, 64": latency_ratio(model, done.model, test),
                }
            )
            print(*rows[-1].values(), file=sys.stderr, flush=True)
            if unread == "faster":
                slowest = max(rows[-1]["latency, 1"], rows[-1]["latency, 64"])
                text = f"{name} at {sparsity}: x{slowest:.3f} of the latency at most, not slower"
                claims.append(Claim(text, slowest <= 1.05))
            claims.append(Claim(f"{name} at {sparsity}: smaller", after < done.report.weights))
    publish("cleanup", rows)
    print(table(rows))
    return finish(claims)


if __name__ == "__main__":
    sys.exit(main())
