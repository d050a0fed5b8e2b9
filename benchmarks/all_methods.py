"""Every method on every network, without labels: ``ecp-refit`` has the smallest output error.

One sparsity, the same calibration digits for all (2,000 at most), one sweep per network.

Usage: python benchmarks/all_methods.py [NETWORK ...]; the rows of other networks are kept.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from networks import NETWORKS
from outcome import RESULTS, Claim, Row, finish, pivot, publish, table
from tables import read

import onnx_ecp
from onnx_ecp.api.sweep import sweep

SPARSITY = 0.8
MOST_SAMPLES = 2_000


def main() -> int:
    path = RESULTS / "all_methods.csv"
    rows: list[Row] = list(read(path)) if path.exists() else []
    for name in sys.argv[1:] or NETWORKS:
        rows = [row for row in rows if row["network"] != name] + list(measured(name))
        publish("all_methods", rows)
        found = [row for row in rows if row["network"] == name]
        print(table(found), flush=True)
    for value in ("accuracy", "error", "seconds"):
        print(table(pivot(rows, "method", "network", value)))
    return finish(claims(rows))


def measured(name: str) -> Iterator[Row]:
    """One row per method; accuracy and error on the official test digits."""
    network = NETWORKS[name]
    feeds, _ = network.digits("train", min(network.samples, MOST_SAMPLES))
    test, labels = network.digits("test")
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "labels.npy"
        np.save(known, labels.astype(np.int64))
        swept = sweep(
            network.path,
            feeds,
            methods=list(onnx_ecp.METHODS),
            sparsities=[SPARSITY],
            evaluation=test,
            labels=known,
        )
    for point in swept.points:
        yield {
            "network": name,
            "method": point.method,
            "sparsity": point.sparsity,
            "accuracy": point.accuracy,
            "dense": swept.accuracy,
            "error": point.relative_error,
            "seconds": point.seconds,
        }


def claims(rows: list[Row]) -> Iterator[Claim]:
    """ecp-refit against the best of the others."""
    for name in dict.fromkeys(row["network"] for row in rows):
        errors = {r["method"]: float(r["error"]) for r in rows if r["network"] == name}
        mine = errors.pop("ecp-refit")
        best = min(errors, key=lambda method: errors[method])
        text = f"{name}: error of ecp-refit {mine:.4g}, of {best} {errors[best]:.4g}"
        yield Claim(text, mine <= errors[best])


if __name__ == "__main__":
    sys.exit(main())
