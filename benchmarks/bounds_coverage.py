"""Every bound holds as often as it says, and how loose it is.

Simulated where the truth is known: the inputs of models/heat.onnx are uniform, those of
models/digits.onnx are here test digits with Gaussian noise, so that there are as many new inputs as
wanted. The pruned networks are made by ``ecp``. ``looseness`` is the bound over what it bounds, in
the median over trials. Coverage may fall short of the confidence by three standard errors of the
simulation, not more.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from networks import NETWORKS, ROOT, SHARED, outputs
from outcome import Claim, Row, finish, publish, table

import onnx_ecp
from onnx_ecp.evaluation import bounds
from onnx_ecp.evaluation.bounds.norms import matrix_norm
from onnx_ecp.evaluation.bounds.pair import pair
from onnx_ecp.evaluation.bounds.sampling import conformal, upper_limit
from onnx_ecp.evaluation.bounds.telescoping import Reach, telescope
from onnx_ecp.graph import constants, load, read_tensor
from onnx_ecp.layers import find_layers

CONFIDENCE = 0.95
POPULATION, SAMPLES, TRIALS = 50_000, 100, 4000
FOLLOWED = 500  # inputs of the deterministic bound
MASKS = 400  # of the planning bounds
SHARES = (0.02, 0.1, 0.3)


@dataclass(frozen=True)
class Case:
    """Two models and where their inputs come from.

    Args:
        name: of the network.
        a: the original.
        b: the pruned one.
        draw: that many new inputs.
    """

    name: str
    a: onnx.ModelProto
    b: onnx.ModelProto
    draw: Callable[[int, np.random.Generator], np.ndarray]

    def gaps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(samples,) gaps, and whether the top class differs."""
        name = self.a.graph.input[0].name
        y, z = (outputs(model, {name: x}) for model in (self.a, self.b))
        return np.linalg.norm(z - y, axis=1), z.argmax(axis=1) != y.argmax(axis=1)


def main() -> int:
    cases = [heat(), digits()]
    rows = [row for case in cases for row in from_samples(case)]
    if SHARED.exists():
        cases.append(lenet5())
    else:
        print(f"lenet5 is left out: there is no {SHARED}.")
    rows += [followed(case) for case in cases]
    rows.append(boxed(cases[0]))
    for method in ("random", "magnitude"):
        for share in SHARES:
            rows += planned(cases[0], method, share)
    publish("bounds_coverage", rows)
    print(table(rows))
    return finish(map(covers, rows))


def heat() -> Case:
    """Uniform in [-1, 1]^8."""
    a = onnx.load(ROOT / "models" / "heat.onnx")
    return pruned("heat", a, lambda n, rng: rng.uniform(-1, 1, (n, 8)).astype(np.float32), 0.5)


def digits() -> Case:
    """Test digits with noise."""
    with np.load(ROOT / "models" / "digits-test.npz") as stored:
        pixels = stored["pixels"]

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        x = pixels[rng.integers(0, len(pixels), n)]
        return np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1).astype(np.float32)

    return pruned("digits", onnx.load(ROOT / "models" / "digits.onnx"), draw, 0.8)


def lenet5() -> Case:
    """Digits of MNIST."""
    network = NETWORKS["lenet5"]
    (x,) = network.digits("train", 2000, seed=1)[0].values()

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(x[rng.choice(len(x), n, replace=False)])

    return pruned("lenet5", onnx.load(network.path), draw, 0.5)


def pruned(
    name: str,
    a: onnx.ModelProto,
    draw: Callable[[int, np.random.Generator], np.ndarray],
    sparsity: float,
) -> Case:
    x = draw(500, np.random.default_rng(0))
    # A smaller graph would have no deterministic bound.
    choices = {"method": "ecp", "sparsity": sparsity, "cleanup": False}
    b = onnx_ecp.optimize(a, {a.graph.input[0].name: x}, **choices).model
    return Case(name, a, b, draw)


# Distribution-free


def from_samples(case: Case) -> Iterator[Row]:
    """Conformal and Clopper-Pearson bounds of many small draws from a large population."""
    rng = np.random.default_rng(1)
    gaps, flips = case.gaps(case.draw(POPULATION, rng))
    drawn = rng.integers(0, POPULATION, (TRIALS, SAMPLES))
    new = gaps[rng.integers(0, POPULATION, TRIALS)]
    found = np.array([conformal(gaps[i], 1 - CONFIDENCE).gap for i in drawn])
    yield row("conformal", case.name, new <= found, found / np.quantile(gaps, CONFIDENCE))
    limits = np.array([upper_limit(k, SAMPLES, CONFIDENCE) for k in range(SAMPLES + 1)])
    events = {"gap above eps": gaps > np.quantile(gaps, 0.9)}
    if case.name == "digits":
        events["top class differs"] = flips
    for what, happened in events.items():
        share = happened.mean()
        found = limits[happened[drawn].sum(axis=1)]
        yield row(f"Clopper-Pearson, {what}", case.name, found >= share, found / share)


# Deterministic


def followed(case: Case) -> Row:
    """The bound of every single input."""
    x = case.draw(FOLLOWED, np.random.default_rng(2))
    both = pair(load(case.a), load(case.b))
    name = case.a.graph.input[0].name
    found = np.concatenate(
        [
            telescope(both, {name: Reach.of(part, np.zeros_like(part))})
            for part in np.array_split(x, 1 + len(x) // 64)
        ]
    )
    gaps, _ = case.gaps(x)
    # Rounding in float32 is not part of the bound.
    held = gaps <= found * (1 + 1e-5) + 1e-6
    return row("deterministic, per sample", case.name, held, found / gaps, confidence=1.0)


def boxed(case: Case) -> Row:
    """The bound of all inputs, against the corners of the box and inputs inside."""
    box = bounds.bound(case.a, case.b, input_range={"": (-1.0, 1.0)}).box
    assert box is not None, "a range was given"
    assert box.gap is not None, box.refused
    corners = np.array(np.meshgrid(*[[-1, 1]] * 8), np.float32).reshape(8, -1).T
    gaps, _ = case.gaps(np.concatenate([corners, case.draw(POPULATION, np.random.default_rng(3))]))
    return row("deterministic, input range", case.name, gaps <= box.gap, box.gap / gaps.max(), 1.0)


# Before pruning


def planned(case: Case, method: str, share: float) -> Iterator[Row]:
    """Limits and expectations of the planning, over masks or over weights like those given.

    What is bounded is prod_l (1 + ||dW_l|| / ||W_l||) - 1; that the relative gap of the outputs is
    below it, ``qian_klabjan.py`` measures.
    """
    model = load(case.a)
    stored = constants(case.a)
    weights = {
        layer.name: layer.weight.matrix(read_tensor(model, stored[layer.weight.tensor]))
        for layer in find_layers(case.a).layers
    }
    plan = bounds.plan(case.a, method, share, confidence=CONFIDENCE)
    norms = {name: matrix_norm(w) for name, w in weights.items()}
    least = np.quantile(np.concatenate([np.abs(w).ravel() for w in weights.values()]), share)
    rng = np.random.default_rng(4)
    found = []
    for _ in range(MASKS):
        if method == "random":
            gone = {name: w * (rng.random(w.shape) < share) for name, w in weights.items()}
        else:
            fresh = {name: redrawn(w, rng) for name, w in weights.items()}
            gone = {name: w * (np.abs(w) <= least) for name, w in fresh.items()}
        found.append(math.prod(1 + matrix_norm(gone[n]) / norms[n] for n in norms) - 1)
    values = np.array(found)
    name = f"{case.name}, {100 * share:g} %"
    yield row(f"planning, {method}: limit", name, values <= plan.gap, plan.gap / values)
    within = np.full(MASKS, values.mean() <= plan.expected)
    loose = plan.expected / values.mean()
    yield row(f"planning, {method}: expected, of the mean", name, within, loose, 1.0)


def redrawn(w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Independent draws from the absolute values of a layer, with random signs."""
    return np.abs(rng.choice(w.ravel(), w.shape)) * rng.choice([-1.0, 1.0], w.shape)


def row(
    bound: str,
    network: str,
    held: np.ndarray,
    looseness: np.ndarray | float,
    confidence: float = CONFIDENCE,
) -> Row:
    return {
        "bound": bound,
        "network": network,
        "confidence": confidence,
        "trials": len(held),
        "coverage": float(held.mean()),
        "looseness": float(np.median(looseness)),
    }


def covers(row: Row) -> Claim:
    """Coverage at or above the confidence, within the noise of the simulation."""
    wanted, trials = row["confidence"], row["trials"]
    noise = 3 * math.sqrt(wanted * (1 - wanted) / trials)
    return Claim(
        f"{row['bound']}, {row['network']}: held in {100 * row['coverage']:.2f} % of {trials} "
        f"trials, {100 * wanted:g} % said; {row['looseness']:.3g} times what it bounds",
        row["coverage"] >= wanted - noise,
    )


if __name__ == "__main__":
    sys.exit(main())
