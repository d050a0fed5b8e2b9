"""Random and magnitude pruning of wide networks: the gap against width and share, and its theory.

The setting of Qian & Klabjan (ICML 2021, arXiv:2105.10065): the weights of a network are
independent draws, uniform on [-K / sqrt(d), K / sqrt(d)], d the inputs of one unit; a share r of
them goes, at random or by magnitude. Three layers without biases, ReLU between them:
fully-connected ones of width d, and convolutions of 3 x 3 with d = 9 times the channels. Inputs are
uniform on the unit sphere.

Measured beside ``onnx-ecp bound --method``: the relative gap ||F(x) - f(x)|| / R(x), R(x) the
product of the layers' norms, the largest over inputs; and the gap as a share of the outputs,
sqrt(sum ||F(x) - f(x)||^2 / sum ||f(x)||^2), which nothing bounds but which says what is lost. All
are means over draws of weights and masks.

The claims are those of the abstract and of the norms that its proofs rest on; K, depth, widths and
shares are our own choice.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from networks import fully_connected, made, outputs, relative_error
from onnx import helper, numpy_helper
from outcome import RESULTS, Claim, Row, finish, publish, table, text

from onnx_ecp.evaluation import bounds
from onnx_ecp.evaluation.bounds.norms import matrix_norm

K = math.sqrt(3)  # entries of variance 1 / d, so that activations keep their size
WIDTHS = {"FCN": (32, 64, 128, 256, 512), "CNN": (8, 16, 32, 64, 128)}
SHARES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7)
METHODS = ("random", "magnitude")
# ||dW|| is K / sqrt 3 (1 + sqrt(out / in)) r^POWER: (2 K / sqrt 3) r^POWER for square layers. It
# takes large matrices: with less than so many dropped weights the largest row or column decides.
FEW_DROPPED = 10
POWER = {"random": 0.5, "magnitude": 1.5}
ALPHA = 0.5  # of the share d^-ALPHA that shrinks with the width
CONFIDENCE = 0.95
DRAWS, INPUTS = 5, 32
IMAGE, SHOWN_SHARE = 8, 0.1


@dataclass(frozen=True)
class Drawn:
    """A network with random weights.

    Args:
        kind: "FCN" or "CNN".
        weights: (out, in), or (out, in, 3, 3), of every layer.
    """

    kind: str
    weights: list[np.ndarray]

    @property
    def model(self) -> onnx.ModelProto:
        """As ONNX."""
        if self.kind == "FCN":
            return fully_connected(self.weights, [np.zeros(len(w)) for w in self.weights])
        nodes, stored, tensor = [], [], "x"
        for i, w in enumerate(self.weights):
            z = "y" if i == len(self.weights) - 1 else f"z{i}"
            stored.append(numpy_helper.from_array(w.astype(np.float32), f"w{i}"))
            nodes.append(helper.make_node("Conv", [tensor, f"w{i}"], [z], pads=[1, 1, 1, 1]))
            if z != "y":
                tensor = f"a{i}"
                nodes.append(helper.make_node("Relu", [z], [tensor]))
        shapes = (["n", w, IMAGE, IMAGE] for w in (self.weights[0].shape[1], len(self.weights[-1])))
        return made(nodes, stored, *shapes)

    @property
    def norm(self) -> float:
        """R(x) for ||x|| = 1; a pixel lies in up to 9 windows, so a convolution has 3 ||W||."""
        each = 1.0 if self.kind == "FCN" else 3.0
        return math.prod(each * matrix_norm(w.reshape(len(w), -1)) for w in self.weights)

    def without(self, method: str, share: float, rng: np.random.Generator) -> Drawn:
        """Every weight with this probability, or the smallest of all layers together."""
        if method == "random":
            keep = [rng.random(w.shape) >= share for w in self.weights]
        else:
            sizes = np.concatenate([np.abs(w).ravel() for w in self.weights])
            least = np.quantile(sizes, share)
            keep = [np.abs(w) > least for w in self.weights]
        return Drawn(self.kind, [w * k for w, k in zip(self.weights, keep, strict=True)])


def main() -> int:
    rows = [
        measured(kind, width, method, share)
        for kind, widths in WIDTHS.items()
        for method in METHODS
        for width in widths
        for share in dict.fromkeys((*(SHARES if width == widths[-1] else (SHOWN_SHARE,)),
                                    shrinking(kind, width)))
    ]  # fmt: skip
    publish("qian_klabjan", rows)
    print(table(rows))
    publish("qian_klabjan_widest", [
        {name: row[name] for name in ("network", "width", "method", "share", "of the outputs",
                                      "gap", "typical", "expected", "limit")}
        for row in rows
        if row["width"] == WIDTHS[row["network"]][-1] and row["share"] in SHARES
    ])  # fmt: skip
    draw(rows)
    return finish([*norms(rows), *vanishing(rows), *covered(rows), *magnitude_is_better(rows)])


def shrinking(kind: str, width: int) -> float:
    """The share d^-ALPHA."""
    return float(inputs_of_a_unit(kind, width) ** -ALPHA)


def inputs_of_a_unit(kind: str, width: int) -> int:
    return width if kind == "FCN" else 9 * width


def measured(kind: str, width: int, method: str, share: float) -> Row:
    """Theory and measurement at one point."""
    found = []
    for seed in range(DRAWS):
        rng = np.random.default_rng([seed, width])
        network = drawn(kind, width, rng)
        plan = bounds.plan(network.model, method, share, confidence=CONFIDENCE)
        pruned = network.without(method, share, rng)
        x = directions(kind, width, rng)
        before, after = (outputs(n.model, {"x": x}) for n in (network, pruned))
        gaps = np.linalg.norm((after - before).reshape(INPUTS, -1), axis=1) / network.norm
        middle = (network.weights[1] - pruned.weights[1]).reshape(width, -1)
        found.append(
            {
                "norm": matrix_norm(middle),
                "gap": float(gaps.max()),
                "typical": plan.typical,
                "expected": plan.expected,
                "limit": plan.gap,
                "held": float(gaps.max() <= plan.gap),
                "of the outputs": relative_error(after, before),
            }
        )
    means = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    theory = K / math.sqrt(3) * (1 + math.sqrt(width / inputs_of_a_unit(kind, width)))
    theory *= share ** POWER[method]
    row = {"network": kind, "method": method, "width": width, "share": share, "theory": theory}
    print(" ".join(map(text, (row | means).values())), file=sys.stderr, flush=True)
    return row | means


def drawn(kind: str, width: int, rng: np.random.Generator) -> Drawn:
    """Three layers of the same width."""
    d = inputs_of_a_unit(kind, width)
    shape = (width, width) if kind == "FCN" else (width, width, 3, 3)
    return Drawn(kind, [rng.uniform(-K, K, shape) / math.sqrt(d) for _ in range(3)])


def directions(kind: str, width: int, rng: np.random.Generator) -> np.ndarray:
    """Inputs of norm 1."""
    shape = (width,) if kind == "FCN" else (width, IMAGE, IMAGE)
    x = rng.normal(size=(INPUTS, math.prod(shape)))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.reshape(INPUTS, *shape).astype(np.float32)


# What was claimed


def norms(rows: Sequence[Row]) -> Iterator[Claim]:
    """The norms of what goes."""
    for kind, method in itertools.product(WIDTHS, METHODS):
        many = [row for row in of(rows, kind, method) if row["share"] * row["width"] >= FEW_DROPPED]
        off = max(abs(row["norm"] / row["theory"] - 1) for row in many)
        formula = "2 K / sqrt 3" if kind == "FCN" else "(1 + 1/3) K / sqrt 3"
        yield Claim(
            f"{kind}, {method}: ||dW|| is {formula} r^{POWER[method]:g} whatever the width: within "
            f"{100 * off:.1f} %, at most 10 %, at {len(many)} points where {FEW_DROPPED} and more "
            "weights of every row and column go",
            off <= 0.1,
        )


def vanishing(rows: Sequence[Row]) -> Iterator[Claim]:
    """Wide enough networks can lose d^-ALPHA of their weights within any gap."""
    for kind, method in itertools.product(WIDTHS, METHODS):
        curve = [r for r in of(rows, kind, method) if r["share"] == shrinking(kind, r["width"])]
        widths, gap, limit = (
            np.array([r[name] for r in curve]) for name in ("width", "of the outputs", "limit")
        )
        slope = np.polyfit(np.log(widths), np.log(gap), 1)[0]
        yield Claim(
            f"{kind}, {method}: where d^-{ALPHA:g} of the weights go, the gap falls with the "
            f"width, from {gap[0]:.3f} to {gap[-1]:.3f} of the outputs at {widths[-1]}, as "
            f"width^{slope:.2f} (theory {-ALPHA * POWER[method]:.2f})",
            bool(np.all(np.diff(gap) < 0)),
        )
        yield Claim(
            f"{kind}, {method}: and so does its bound at every step, from {limit[0]:.3g} to "
            f"{limit[-1]:.3g}",
            bool(np.all(np.diff(limit) < 0)),
        )


def of(rows: Sequence[Row], kind: str, method: str) -> list[Row]:
    return [row for row in rows if (row["network"], row["method"]) == (kind, method)]


def covered(rows: Sequence[Row]) -> Iterator[Claim]:
    """The probabilistic bounds hold."""
    for kind, method in itertools.product(WIDTHS, METHODS):
        same = of(rows, kind, method)
        held = float(np.mean([row["held"] for row in same]))
        times = float(np.median([row["limit"] / row["gap"] for row in same]))
        useful = sum(row["limit"] < 1 for row in same)
        yield Claim(
            f"{kind}, {method}: the bound at confidence {CONFIDENCE:g} held in {100 * held:.0f} % "
            f"of {len(same) * DRAWS} draws; {times:.0f} times the largest gap seen, in the "
            f"median; below 1, so not vacuous, at {useful} of {len(same)} points",
            held >= CONFIDENCE,
        )


def magnitude_is_better(rows: Sequence[Row]) -> Iterator[Claim]:
    gap = {(r["network"], r["width"], r["share"], r["method"]): r["gap"] for r in rows}
    points = [key[:3] for key in gap if key[3] == "random"]
    won = sum(gap[*point, "magnitude"] < gap[*point, "random"] for point in points)
    yield Claim(
        f"the gap of magnitude pruning is below that of random pruning at {won} of {len(points)} "
        "points",
        won == len(points),
    )


def draw(rows: Sequence[Row]) -> None:
    """The curves as ``results/qian_klabjan.png``, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no PNG: matplotlib is not installed.")
        return
    figure, panels = plt.subplots(2, 3, figsize=(13, 8), layout="constrained", sharey="row")
    for line, kind in zip(panels, WIDTHS, strict=True):
        last = WIDTHS[kind][-1]
        parts = {
            f"{kind}, width {last}": ("share", lambda r, last=last: r["width"] == last
                                      and r["share"] in SHARES),
            f"{kind}, share {SHOWN_SHARE:g}": ("width", lambda r: r["share"] == SHOWN_SHARE),
            f"{kind}, share d^-{ALPHA:g}": (
                "width", lambda r, kind=kind: r["share"] == shrinking(kind, r["width"])),
        }  # fmt: skip
        for panel, (title, (axis, wanted)) in zip(line, parts.items(), strict=True):
            for method, colour in zip(METHODS, ("tab:blue", "tab:orange"), strict=True):
                curve = [row for row in of(rows, kind, method) if wanted(row)]
                x = [r[axis] for r in curve]
                for name, style, label in (
                    ("limit", ":", f"bound at confidence {CONFIDENCE:g}"),
                    ("typical", "--", "with typical norms"),
                    ("gap", "o-", "measured, largest over inputs"),
                ):
                    y = [r[name] for r in curve]
                    panel.plot(x, y, style, color=colour, label=f"{method}: {label}")
            width = "width (units)" if kind == "FCN" else "width (channels)"
            name = "share of weights gone" if axis == "share" else width
            panel.set(title=title, xscale="log", yscale="log", xlabel=name)
            panel.set_xticks(x, [text(v) for v in x])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        line[0].set_ylabel("relative gap")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(RESULTS / "qian_klabjan.png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
