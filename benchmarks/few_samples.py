"""Few calibration samples do not make ``ecp-refit`` collapse: it stays above magnitude."""

from __future__ import annotations

import sys

from contest import compete, ours
from outcome import RESULTS, Claim, Row, above, finish, pivot, publish, table

SAMPLES = (64, 128, 256, 512, 2000)
SPARSITIES = (0.8, 0.9)
CONTESTANTS = {"magnitude": ours("magnitude"), "ecp-refit": ours("ecp-refit")}


def main() -> int:
    rows: list[Row] = []
    for name in ("lenet300", "mlpnet"):
        for samples in SAMPLES:
            for row in compete(name, CONTESTANTS, SPARSITIES, samples):
                rows.append({"run": "{network}, {method}, {sparsity}".format(**row), **row})
    publish("few_samples", rows)
    print(table(pivot(rows, "run", "samples", "accuracy")))
    draw(rows)
    return finish(no_collapse(rows))


def no_collapse(rows: list[Row]) -> list[Claim]:
    """At every point of the curves ecp-refit is above magnitude."""
    magnitude = {_point(row): row["accuracy"] for row in rows if row["method"] == "magnitude"}
    return [
        above("{} at {}, {} samples".format(*_point(row)), row["accuracy"], magnitude[_point(row)])
        for row in rows
        if row["method"] == "ecp-refit"
    ]


def _point(row: Row) -> tuple[str, float, int]:
    return row["network"], row["sparsity"], row["samples"]


def draw(rows: list[Row]) -> None:
    """The curves as ``results/few_samples.png``, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no PNG: matplotlib is not installed.")
        return
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, name in zip(panels, ("lenet300", "mlpnet"), strict=True):
        for method, marker in (("ecp-refit", "o"), ("magnitude", "x")):
            for sparsity, style in zip(SPARSITIES, ("-", "--"), strict=True):
                curve = [r for r in rows if (r["network"], r["method"], r["sparsity"]) ==
                         (name, method, sparsity)]  # fmt: skip
                x, y = ([row[key] for row in curve] for key in ("samples", "accuracy"))
                panel.plot(x, y, style, marker=marker, label=f"{method} at {sparsity}")
        panel.axhline(rows[0]["dense"] if name == "lenet300" else rows[-1]["dense"], color="0.7")
        panel.set(title=name, xscale="log", xlabel="calibration samples", ylabel="accuracy %")
        panel.set_xticks(SAMPLES, map(str, SAMPLES))
    panels[0].legend()
    figure.savefig(RESULTS / "few_samples.png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
