"""Draw the picture of the README from the tables of ``against_peers.py`` and ``units.py``.

    python benchmarks/picture.py

Left: test accuracy of LeNet-300-100 over the share of zeros, by the default and by every method of
onnxsim. Right: test accuracy over measured latency, when whole units are removed.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

import matplotlib
from outcome import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The name of a row, how it is called, its colour.
ZEROS = (
    ("ecp-refit", "onnx-ecp (default)", "#1f6fd6"),
    ("onnxsim SparseGPT", "onnxsim SparseGPT", "#d97706"),
    ("onnxsim Wanda, global", "onnxsim Wanda", "#6b7280"),
    ("onnxsim magnitude, global", "onnxsim magnitude", "#b0b5bd"),
)
UNITS = (
    ("ecp-refit", "onnx-ecp (default)", "#1f6fd6"),
    ("onnxsim structured Wanda", "onnxsim structured Wanda", "#d97706"),
    ("ecp", "bias compensation alone (ecp)", "#6b7280"),
    ("magnitude", "magnitude", "#b0b5bd"),
)


def main() -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    lines(left, rows("against_peers_lenet300"), "sparsity", ZEROS)
    left.set(xlabel="share of zeros", ylabel="test accuracy, %", title="Zeros: smaller files")
    lines(right, rows("units_lenet300"), "latency", UNITS)
    right.set(xlabel="latency, share of the original's", title="Whole units: faster inference")
    right.invert_xaxis()
    figure.savefig(RESULTS / "picture.png", dpi=130)


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a table, as text."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lines(
    axes: plt.Axes, found: list[dict[str, str]], x: str, shown: Sequence[tuple[str, str, str]]
) -> None:
    """One line per method, and a dashed one for the original network."""
    axes.axhline(float(found[0]["dense"]), color="#444", lw=0.8, ls="--")
    for name, label, colour in shown:
        points = sorted((float(r[x]), float(r["accuracy"])) for r in found if r["method"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=colour, label=label)
    axes.set_ylim(0, 101)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)


if __name__ == "__main__":
    main()
