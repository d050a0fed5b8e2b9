"""The defaults of ecp-refit, each against its alternatives, on training digits alone.

Calibration takes some of the 10,000 training digits, accuracy and error are read on others; the
official test digits are not touched. One choice is changed at a time. The networks have learned
from these digits, so accuracies are higher than on new ones and the output error says more. The
claim for every choice: in the geometric mean over all points, no alternative that is not slower by
design leaves less than 95 % of the default's error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from contest import Feeds, compete_on, ours
from networks import NETWORKS, Network
from outcome import Claim, Row, finish, pivot, publish, table

from onnx_ecp.methods import COMPENSATIONS, METHODS, Method, View
from onnx_ecp.pruning import joint_refit as joint
from onnx_ecp.pruning import loop as pruning

DEFAULT = METHODS["ecp-refit"]
# Fewer than the official runs take: what is left judges.
SAMPLES = {"mlpnet": 2_000, "lenet5": 200, "tribuo": 200}
SPARSITIES = {"mlpnet": (0.9, 0.95), "lenet300": (0.9, 0.95)}
JUDGED = 5_000
# An alternative may be better by this much before a default counts as wrong.
SLACK = 0.05
# Twice the work: what it would gain is in the table, for those who have the time.
SLOWER = {"32 stages", "joint, 6 rounds"}


def averaged(view: View) -> np.ndarray:
    """The importance per position at which a weight is used, instead of the sum over positions."""
    return np.asarray(DEFAULT.importance(view) * view.seen.count / view.seen.rows)


def shrunk(q: float) -> Method:
    """The default with the same shrinkage in importance and refit."""
    name = f"joint, shrinkage {q}"
    COMPENSATIONS[name] = replace(COMPENSATIONS["joint"], shrinkage=q)
    return replace(DEFAULT, shrinkage=q, compensation=name)


# By name: what is not as in the default; a method of its own where it is no option.
ALTERNATIVES: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (DEFAULT, {}),
    "4 stages": (DEFAULT, {"stages": 4}),
    "8 stages": (DEFAULT, {"stages": 8}),
    "32 stages": (DEFAULT, {"stages": 32}),
    "layer by layer": (DEFAULT, {"compensation": "refit"}),
    "importance ecp": (DEFAULT, {"importance": "ecp"}),
    "importance magnitude": (DEFAULT, {"importance": "magnitude"}),
    "importance wanda": (DEFAULT, {"importance": "wanda"}),
    "averaged over positions": (replace(DEFAULT, importance=averaged), {}),
    "metric kl": (DEFAULT, {"metric": "kl"}),
    "shrinkage 0": (shrunk(0.0), {}),
    "shrinkage 0.1": (shrunk(0.1), {}),
    "shrinkage 0.5": (shrunk(0.5), {}),
    "floor 0": (replace(DEFAULT, floor=0.0), {}),
    "damping 1e-3": (DEFAULT, {"damping": 1e-3}),
    "damping 1e-1": (DEFAULT, {"damping": 1e-1}),
    "joint, ridge x 0.1": (DEFAULT, {}),
    "joint, ridge x 10": (DEFAULT, {}),
    "joint, 1 round": (DEFAULT, {}),
    "joint, 6 rounds": (DEFAULT, {}),
}
# Constants of the joint refit that some alternatives change: where, which, to what.
CONSTANTS: dict[str, tuple[ModuleType, str, float]] = {
    "joint, ridge x 0.1": (joint, "RIDGE", joint.RIDGE * 0.1),
    "joint, ridge x 10": (joint, "RIDGE", joint.RIDGE * 10),
    "joint, 1 round": (pruning, "ROUNDS", 1),
    "joint, 6 rounds": (pruning, "ROUNDS", 6),
}


def main() -> int:
    rows = [row for name in sys.argv[1:] or NETWORKS for row in measured(name, NETWORKS[name])]
    publish("choices", rows)
    for value in ("accuracy", "error"):
        print(f"\n{value}")
        print(table(pivot(rows, "choice", "point", value)))
    summary = list(summaries(rows))
    publish("choices_summary", summary)
    print(table(summary))
    return finish(
        Claim(
            f"{row['choice']}: {row['error / default']:.3f} of the default's error",
            row["error / default"] >= 1 - SLACK,
        )
        for row in summary[1:]
        if row["choice"] not in SLOWER
    )


def measured(name: str, network: Network) -> Iterator[Row]:
    """Every alternative at every sparsity of one network."""
    calibration, judged, labels = split(network, SAMPLES.get(name, network.samples))
    model = onnx.load(network.path)
    for choice, (method, choices) in ALTERNATIVES.items():
        METHODS["ecp-refit"] = method
        sparsities = SPARSITIES.get(name, (0.9,))
        contestant = {choice: ours("ecp-refit", **choices)}
        with patch.object(*CONSTANTS.get(choice, (joint, "RIDGE", joint.RIDGE))):
            for row in compete_on(name, model, calibration, judged, labels, contestant, sparsities):
                yield {"choice": choice, "point": f"{name} {row['sparsity']}", **row}
    METHODS["ecp-refit"] = DEFAULT


def split(network: Network, count: int) -> tuple[Feeds, Feeds, np.ndarray]:
    """Calibration inputs, and other training digits with their labels."""
    feeds, labels = network.digits("train")
    order = np.random.default_rng(0).permutation(len(labels))
    chosen, rest = np.sort(order[:count]), np.sort(order[count : count + JUDGED])
    return (
        {name: x[chosen] for name, x in feeds.items()},
        {name: x[rest] for name, x in feeds.items()},
        labels[rest],
    )


def summaries(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """By choice, over all points: mean and worst loss of accuracy, error and time as ratios."""
    default = {row["point"]: row for row in rows if row["choice"] == "default"}
    for choice in dict.fromkeys(row["choice"] for row in rows):
        own = [row for row in rows if row["choice"] == choice]
        pairs = [(row, default[row["point"]]) for row in own]
        gains = np.array([a["accuracy"] - b["accuracy"] for a, b in pairs])
        yield {
            "choice": choice,
            "accuracy - default, mean": round(float(gains.mean()), 4),
            "worst": float(gains.min()),
            "best": float(gains.max()),
            "error / default": _geometric([a["error"] / b["error"] for a, b in pairs]),
            "seconds / default": _geometric([a["seconds"] / b["seconds"] for a, b in pairs]),
        }


def _geometric(ratios: list[float]) -> float:
    return float(np.exp(np.log(ratios).mean()))


if __name__ == "__main__":
    sys.exit(main())
