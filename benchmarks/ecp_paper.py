"""The experiments of the ECP paper (arXiv:2602.20467): digits, and the diffusion-sorption equation.

Fully-connected networks are trained, pruned at once and not tuned; the test loss is shown over the
share of weights that are gone. ``exact`` is the variant that does not linearise: the importance of
a weight is the change of the outputs that is left after its removal and the best shift of its bias,

    I_ij = min_d E sum_k (y_k(W_ij = 0, b_i + d) - y_k)^2

found by search, with one run of ONNX Runtime per weight and candidate. Everything sees training
inputs only; of a method that draws, losses are means over three draws.

The equation is that of PDEBench (Takamoto et al., 2022): R(u) u_t = D u_xx on (0, 1), t up to
500, u(0) = 1, u(1) = D u_x, u constant at first. A network learns u from x, t and the initial
value, from solutions with Gaussian noise; its loss is measured on other solutions, without noise.

The claims are those of the abstract and of public summaries. Widths, training, noise levels and
ratios are our own choice. Without the folder of networks.py the digits are left out.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from contest import ours
from networks import SHARED, accuracy, fully_connected, load_digits, made, outputs, plain
from onnx import helper, numpy_helper
from outcome import RESULTS, Claim, Row, finish, pivot, publish, table, text

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
METHODS = ("random", "gradient-magnitude", "magnitude", "ecp", "exact")
BASELINES = METHODS[:3]
DRAWS = 3
NOISE = (0.0, 0.02, 0.05, 0.1)
NETWORKS_PER_NOISE = 3
# Candidates per round of the search for a shift, and rounds; each round looks between the
# neighbours of the best one, so the last step is 1/256 of the range.
CANDIDATES, ROUNDS = 9, 4
# Samples for the exact variant: its cost is |W| times CANDIDATES * ROUNDS runs of them.
EXACT_SAMPLES = 512

# When a claim holds: a wide range of ratios ends here, ...
RANGE = 0.9
# ... losses that differ by less than this share are equal, ...
TIE = 0.01
# ... and weights can go if they cost no more points of accuracy than this.
DROP = 2.0

Loss = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Trained:
    """A network and its data.

    Args:
        weights: (out, in) of every layer.
        biases: (out,) of every layer.
        activation: operator between the layers.
        inputs: training inputs.
        test: test inputs.
        target: test targets.
        loss: of outputs and targets.
    """

    weights: list[np.ndarray]
    biases: list[np.ndarray]
    activation: str
    inputs: np.ndarray
    test: np.ndarray
    target: np.ndarray
    loss: Loss

    @property
    def model(self) -> onnx.ModelProto:
        """As ONNX."""
        return fully_connected(self.weights, self.biases, self.activation)


def main() -> int:
    claims = []
    if (SHARED / "data").exists():
        rows = mnist()
        publish("ecp_paper_mnist", rows)
        print(table(pivot(rows, "method", "sparsity", "loss")))
        claims += mnist_claims(rows)
    else:
        rows = []
        print(f"MNIST is left out: there is no {SHARED / 'data'}.")
    others = diffusion()
    publish("ecp_paper_diffusion", others)
    print(table(pivot(others, "run", "sparsity", "loss")))
    draw(rows, others)
    return finish([*claims, *diffusion_claims(others)])


# The two experiments


def mnist() -> list[Row]:
    """784-32-16-10 with ReLU, cross entropy on the official test digits."""
    from sklearn.neural_network import MLPClassifier

    (x, y), (test, labels) = load_digits("train"), load_digits("test")
    x, test = plain(x), plain(test)
    network = fit(MLPClassifier((32, 16), max_iter=40, alpha=1e-4, tol=0, random_state=0), x, y)
    trained = Trained(*network, "Relu", x, test, labels, cross_entropy)
    dense = accuracy(outputs(trained.model, {"x": test}), labels)
    return [
        {**row, "accuracy": accuracy(outputs(m, {"x": test}), labels), "dense accuracy": dense}
        for row, m in measured(trained, {"data": "digits"})
    ]


def diffusion() -> list[Row]:
    """3-32-32-1 with tanh; per noise level the geometric mean over networks of the test loss."""
    from sklearn.neural_network import MLPRegressor

    rng = np.random.default_rng(0)
    x, clean = points(solve(rng.uniform(0, 0.2, 60)), 6000, rng)
    test, target = points(solve(rng.uniform(0, 0.2, 40)), 4000, rng)
    rows: list[Row] = []
    for noise in NOISE:
        found = []
        for seed in range(NETWORKS_PER_NOISE):
            y = clean + noise * clean.std() * np.random.default_rng(seed).normal(size=clean.shape)
            kind = MLPRegressor(
                hidden_layer_sizes=(32, 32), activation="tanh", learning_rate_init=3e-3,
                max_iter=200, tol=0, alpha=0, random_state=seed,
            )  # fmt: skip
            network = fit(kind, x, y)
            trained = Trained(*network, "Tanh", x, test, target[:, None], squared_error)
            found += [row for row, _ in measured(trained, {"noise": noise, "seed": seed})]
        for method in METHODS:
            for ratio in RATIOS:
                same = [r for r in found if (r["method"], r["sparsity"]) == (method, ratio)]
                means = {key: geometric([r[key] for r in same]) for key in ("loss", "dense")}
                seconds = float(np.mean([r["seconds"] for r in same]))
                run = f"noise {100 * noise:g} %, {method}"
                row = {"run": run, "noise": noise, "method": method, "sparsity": ratio}
                idle = float(target.var())
                rows.append({**row, **means, "idle": idle, "seconds": seconds})
    return rows


def fit(kind: Any, x: np.ndarray, y: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights (out, in) and biases of a scikit-learn network; its epochs are its budget."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        kind.fit(x, y)
    return [w.T for w in kind.coefs_], list(kind.intercepts_)


def cross_entropy(y: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log softmax at the label."""
    y = y - y.max(axis=1, keepdims=True)
    return float((np.log(np.exp(y).sum(axis=1)) - y[np.arange(len(y)), labels]).mean())


def squared_error(y: np.ndarray, target: np.ndarray) -> float:
    """Mean over elements."""
    return float(np.square(y - target).mean())


def geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


# The equation


DIFFUSION, POROSITY, DENSITY, FREUNDLICH, EXPONENT = 5e-4, 0.29, 2880.0, 3.5e-4, 0.874
CELLS, TIMES = 1024, np.linspace(0, 500, 101)


def retardation(u: np.ndarray) -> np.ndarray:
    """R(u) = 1 + (1 - porosity) / porosity density k n_f u^(n_f - 1), away from u = 0."""
    solid = (1 - POROSITY) / POROSITY * DENSITY
    return 1 + solid * FREUNDLICH * EXPONENT * (u + 1e-6) ** (EXPONENT - 1)


def solve(initial: np.ndarray, cells: int = CELLS) -> tuple[np.ndarray, np.ndarray]:
    """Finite volumes, LSODA in time; boundary values stand in cells outside, as PDEBench's do.

    Args:
        initial: (n,) constant initial values.
        cells: of the grid.

    Returns:
        ``initial``, and u (n, times, cells).
    """
    from scipy.integrate import solve_ivp

    step = 1 / cells

    def rate(t: float, u: np.ndarray) -> np.ndarray:
        right = DIFFUSION * (u[-2] - u[-1]) / step
        around = np.concatenate([[1.0], u, [right]])
        return DIFFUSION / retardation(u) * np.diff(around, 2) / step**2

    solutions = [
        solve_ivp(
            rate, (0, TIMES[-1]), np.full(cells, u0), "LSODA", TIMES,
            lband=1, uband=1, rtol=1e-6, atol=1e-9,
        ).y.T
        for u0 in initial
    ]  # fmt: skip
    return initial, np.array(solutions)


def points(
    solved: tuple[np.ndarray, np.ndarray], count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random points of solutions: (x, t, initial value) scaled to [-1, 1], (count, 3), and u."""
    initial, u = solved
    i, t, c = (rng.integers(0, size, count) for size in u.shape)
    places = np.stack([(c + 0.5) / u.shape[2], TIMES[t] / TIMES[-1], initial[i] / 0.2], axis=1)
    return (2 * places - 1).astype(np.float32), u[i, t, c]


# Pruning


def measured(trained: Trained, about: Row) -> Iterator[tuple[Row, onnx.ModelProto]]:
    """One row and pruned model per method and ratio."""
    original = trained.model
    dense = trained.loss(outputs(original, {"x": trained.test}), trained.target)
    for method in METHODS:
        began = time.process_time()
        scored = exact_scores(trained) if method == "exact" else None
        once = time.process_time() - began
        for ratio in RATIOS:
            losses, seconds = [], []
            for seed in range(DRAWS if method == "random" else 1):
                began = time.process_time()
                if scored is not None:
                    model = without(trained, *scored, ratio)
                else:
                    model = ours(method, seed=seed, cleanup=False)(
                        original, {"x": trained.inputs}, ratio
                    )
                seconds.append(once + time.process_time() - began)
                losses.append(trained.loss(outputs(model, {"x": trained.test}), trained.target))
            row = {**about, "method": method, "sparsity": ratio, "loss": float(np.mean(losses))}
            row |= {"dense": dense, "seconds": float(np.mean(seconds))}
            print(" ".join(map(text, row.values())), file=sys.stderr, flush=True)
            yield row, model


def exact_scores(trained: Trained) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Importance and best bias shift of every weight, (out, in) each, by layer."""
    rng = np.random.default_rng(0)
    a = trained.inputs[rng.choice(len(trained.inputs), EXACT_SAMPLES, replace=False)]
    scores, shifts = [], []
    for layer, (weight, bias) in enumerate(zip(trained.weights, trained.biases, strict=True)):
        rest = tail(trained, layer)
        z = (a @ weight.T + bias).astype(np.float32)
        found = [best_shifts(rest, z, i, a * row) for i, row in enumerate(weight)]
        scores.append(np.array([score for score, _ in found]))
        shifts.append(np.array([shift for _, shift in found]))
        a = np.maximum(z, 0) if trained.activation == "Relu" else np.tanh(z)
    return scores, shifts


def tail(trained: Trained, layer: int) -> Callable[[np.ndarray], np.ndarray]:
    """From pre-activations of a layer to the network's outputs, through ONNX Runtime."""
    width, last = len(trained.weights[layer]), layer == len(trained.weights) - 1
    nodes = [helper.make_node("Identity" if last else trained.activation, ["x"], ["h"])]
    stored = []
    for i in range(layer + 1, len(trained.weights)):
        for name, values in ((f"w{i}", trained.weights[i]), (f"b{i}", trained.biases[i])):
            stored.append(numpy_helper.from_array(values.astype(np.float32), name))
        end = i == len(trained.weights) - 1
        before, after = nodes[-1].output[0], "y" if end else f"z{i}"
        nodes.append(helper.make_node("Gemm", [before, f"w{i}", f"b{i}"], [after], transB=1))
        if not end:
            nodes.append(helper.make_node(trained.activation, [after], [f"a{i}"]))
    nodes[-1].output[0] = "y"
    model = made(nodes, stored, ["n", width], ["n", len(trained.biases[-1])])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda z: session.run(None, {"x": z})[0]


def best_shifts(
    rest: Callable[[np.ndarray], np.ndarray], z: np.ndarray, unit: int, taken: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(in,) least mean squared output change without each weight of one unit, (in,) its shift.

    Args:
        rest: from pre-activations to outputs.
        z: (n, out) of the original network.
        unit: whose weights are tried.
        taken: (n, in) what each of its weights adds to its pre-activation.
    """
    y = rest(z)
    low, high = taken.min(axis=0), taken.max(axis=0)
    best, where = np.zeros(len(low)), low.astype(np.float64)
    tried = np.flatnonzero(high > low)  # what is constant is made good by itself
    low, high = low[tried].astype(np.float64), high[tried].astype(np.float64)
    for _ in range(ROUNDS):
        grid = np.linspace(low, high, CANDIDATES)  # (candidates, tried)
        errors = np.stack([change(rest, z, y, unit, taken[:, tried], d) for d in grid])
        least = errors.argmin(axis=0)
        best[tried] = np.take_along_axis(errors, least[None], 0)[0]
        where[tried] = np.take_along_axis(grid, least[None], 0)[0]
        step = (high - low) / (CANDIDATES - 1)
        low, high = where[tried] - step, where[tried] + step
    return best, where


def change(
    rest: Callable[[np.ndarray], np.ndarray],
    z: np.ndarray,
    y: np.ndarray,
    unit: int,
    taken: np.ndarray,
    shift: np.ndarray,
) -> np.ndarray:
    """(in,) mean squared output change without each weight, with its own shift of the bias."""
    errors = []
    for part in np.array_split(np.arange(taken.shape[1]), 1 + taken.shape[1] // 64):
        moved = np.repeat(z[None], len(part), axis=0)  # (part, n, out)
        moved[:, :, unit] += (shift[part] - taken[:, part]).T.astype(np.float32)
        found = rest(moved.reshape(-1, z.shape[1])).reshape(len(part), *y.shape)
        errors.append(np.square(found - y, dtype=np.float64).sum(axis=2).mean(axis=1))
    return np.concatenate(errors)


def without(
    trained: Trained, scores: list[np.ndarray], shifts: list[np.ndarray], ratio: float
) -> onnx.ModelProto:
    """The network without the weights of least importance, each one's shift added to its bias."""
    flat = np.concatenate([score.ravel() for score in scores])
    gone = np.zeros(flat.size, np.bool_)
    gone[np.argsort(flat, kind="stable")[: round(ratio * flat.size)]] = True
    ends = np.cumsum([score.size for score in scores])[:-1]
    masks = [g.reshape(s.shape) for g, s in zip(np.split(gone, ends), scores, strict=True)]
    weights = [np.where(g, 0, w) for g, w in zip(masks, trained.weights, strict=True)]
    biases = [
        b + np.where(g, d, 0).sum(axis=1)
        for g, d, b in zip(masks, shifts, trained.biases, strict=True)
    ]
    return fully_connected(weights, biases, trained.activation)


# What was claimed


def mnist_claims(rows: list[Row]) -> Iterator[Claim]:
    loss = {(r["method"], r["sparsity"]): r["loss"] for r in rows}
    idle = math.log(10)  # the loss of equal scores
    yield compared("digits", [points_of(loss, "ecp", BASELINES, idle)], "ecp", BASELINES)
    at = {r["sparsity"]: r["accuracy"] for r in rows if r["method"] == "ecp"}
    dense = rows[0]["dense accuracy"]
    for ratio in (0.8, 0.9):
        yield Claim(
            f"digits: {100 * ratio:.0f} % of the weights can go without tuning: accuracy "
            f"{at[ratio]:.2f} of {dense:.2f}, at most {DROP:g} points less",
            at[ratio] >= dense - DROP,
        )
    exact = points_of(loss, "exact", ("ecp",), idle)
    yield compared("digits", [exact], "the exact variant", ("ecp",))


def diffusion_claims(rows: list[Row]) -> Iterator[Claim]:
    ecp, exact = [], []
    for noise in NOISE:
        same = [r for r in rows if r["noise"] == noise]
        loss = {(r["method"], r["sparsity"]): r["loss"] for r in same}
        ecp.append(points_of(loss, "ecp", BASELINES, same[0]["idle"]))
        exact.append(points_of(loss, "exact", ("ecp",), same[0]["idle"]))
    levels = ", ".join(f"{100 * noise:g}" for noise in NOISE)
    where = f"diffusion-sorption, noise {levels} %"
    yield compared(where, ecp, "ecp", BASELINES)
    yield compared(where, exact, "the exact variant", ("ecp",))
    seconds = {
        method: float(np.mean([r["seconds"] for r in rows if r["method"] == method]))
        for method in ("ecp", "exact")
    }
    times = seconds["exact"] / seconds["ecp"]
    yield Claim(
        f"the exact variant is expensive: {seconds['exact']:.2f} s of processor time where ecp "
        f"takes {seconds['ecp']:.3f} s, {times:.0f} times as much",
        times > 10,
    )


Points = tuple[int, list[str]]


def points_of(
    loss: Mapping[tuple[str, float], float], method: str, others: Sequence[str], idle: float
) -> Points:
    """At how many points a method is compared, and those where its loss is the higher one.

    Args:
        loss: by method and ratio.
        method: that is to be the lower one.
        others: whom it is compared with, at every ratio of the range.
        idle: the loss of a constant; where both are above it, there is nothing to compare.
    """
    pairs = [
        (other, ratio)
        for other in others
        for ratio in RATIOS
        if ratio <= RANGE and min(loss[method, ratio], loss[other, ratio]) < idle
    ]
    higher = [(o, r) for o, r in pairs if loss[method, r] > (1 + TIE) * loss[o, r]]
    return len(pairs), [f"{other} at {text(ratio)}" for other, ratio in higher]


def compared(where: str, found: Sequence[Points], method: str, others: Sequence[str]) -> Claim:
    """The claim that a method is never the worse one."""
    counts = ", ".join(f"{count - len(higher)} of {count}" for count, higher in found)
    lost = ", ".join(dict.fromkeys(point for _, higher in found for point in higher))
    return Claim(
        f"{where}: the test loss of {method} is at most that of {', '.join(others)}: "
        f"at {counts} points up to {RANGE}" + (f"; above {lost}" if lost else ""),
        not lost,
    )


def draw(digits: list[Row], others: list[Row]) -> None:
    """The curves as ``results/ecp_paper.png``, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no PNG: matplotlib is not installed.")
        return
    parts = [("digits: cross entropy", digits)] if digits else []
    parts += [
        (f"diffusion-sorption, noise {100 * noise:g} %: squared error",
         [r for r in others if r["noise"] == noise])
        for noise in NOISE
    ]  # fmt: skip
    figure, panels = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for panel in panels.flat[len(parts) :]:
        panel.axis("off")
    for panel, (title, rows) in zip(panels.flat, parts, strict=False):
        for method, marker in zip(METHODS, "vs^ox", strict=True):
            curve = [r for r in rows if r["method"] == method]
            x, y = ([r[key] for r in curve] for key in ("sparsity", "loss"))
            panel.plot(x, y, marker=marker, label=method)
        panel.axhline(rows[0]["dense"], color="0.6", linestyle=":", label="not pruned")
        idle = rows[0].get("idle", math.log(10))
        panel.axhline(idle, color="0.3", linestyle="--", label="best constant")
        panel.set(title=title, yscale="log", xlabel="share of weights gone", ylabel="test loss")
        panel.grid(alpha=0.3)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    panels.flat[-1].legend(handles, labels, loc="center", title="method")
    figure.savefig(RESULTS / "ecp_paper.png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
