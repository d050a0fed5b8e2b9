"""The reverse graph in ONNX Runtime beats torch autograd and finite differences at the same sums.

Sensitivities and statistics (bb, wb, ww of every layer) of the same batches: by the reverse graph;
by PyTorch autograd with the same products (forward, then one backward per seed to the
pre-activations, or all seeds at once by vmap, whichever is faster); by central differences. One
thread each, one process, rounds interleaved, the fastest round of each counts, in CPU seconds so
that other load on the machine matters little. The sums must agree. Beside it, without a claim,
PyTorch with float32 products within a batch: a cheaper sum than what the methods get.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("OMP_NUM_THREADS") != "1":  # read once, when NumPy is loaded
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_NUM_THREADS": "1"})

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from encoders import Shape, encoder
from networks import NETWORKS, load_digits, plain
from outcome import Claim, finish, publish, table

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.gradients.cotangents import plan
from onnx_ecp.graph import Model, decode_sparse, load
from onnx_ecp.layers import Layer, find_layers
from onnx_ecp.statistics.collection import measure
from onnx_ecp.statistics.observer import Observer, State, original_state

ROUNDS = 5
BATCH = 128
# Relative, in the Frobenius norm. The sums are float64, the network is float32.
AGREEMENT = 1e-5
# Differences err by up to 8e-3 near the kinks of ReLU and MaxPool, and the sums are of squares.
DIFFERENCES_AGREEMENT = 3e-2
Sums = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """A network and inputs to measure on.

    Args:
        model: the network.
        feeds: inputs by name.
        probes: as for the Observer.
        differences: samples for the finite differences, which take two runs per pre-activation;
            0 leaves them out.
    """

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    probes: int | None = None
    differences: int = 8


@dataclass(frozen=True)
class Setting:
    """What all three have in common."""

    model: Model
    layers: tuple[Layer, ...]
    state: State
    data: Calibration
    size: int
    probes: int | None
    centres: dict[str, np.ndarray]


def main() -> int:
    torch_missing = "" if _has_torch() else "PyTorch is not installed: compared without it."
    print(torch_missing)
    rows, claims = [], []
    for name, case in cases():
        row, more = compared(name, case, with_torch=not torch_missing)
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
        claims += more
    publish("observation_speed", rows)
    print(table(rows))
    return finish(claims)


def cases() -> Iterator[tuple[str, Case]]:
    """Networks by name."""
    for name, samples, few in (("mlpnet", 2000, 128), ("lenet300", 2000, 128), ("lenet5", 300, 8)):
        network = NETWORKS[name]
        inputs, _ = network.digits("train", samples)
        yield name, Case(onnx.load(network.path), inputs, differences=few)
    digits = plain(load_digits("train")[0][:300]).reshape(-1, 28, 28)
    small = encoder(Shape(28, 28, 64, 4, 128, 2, 10))
    yield "encoder 64, exact", Case(small, {"x": digits})
    yield "encoder 64, 1 probe", Case(small, {"x": digits}, probes=1)
    tokens = np.random.default_rng(0).normal(size=(48, 64, 64)).astype(np.float32)
    wide = encoder(Shape(64, 64, 256, 4, 1024, 2, 32))
    yield "encoder 256, 1 probe", Case(wide, {"x": tokens}, probes=1, differences=0)


def compared(name: str, case: Case, *, with_torch: bool) -> tuple[dict[str, Any], list[Claim]]:
    """One row, and what it claims."""
    setting, observer = prepared(name, case)
    ways: dict[str, Callable[[], Sums]] = {"reverse": lambda: by_reverse_graph(setting, observer)}
    if with_torch:
        ways["torch"] = lambda: by_torch(setting, at_once=False)
        ways["torch vmap"] = lambda: by_torch(setting, at_once=True)
        ways["float32 torch"] = lambda: by_torch(setting, at_once=False, double=False)
        ways["float32 torch vmap"] = lambda: by_torch(setting, at_once=True, double=False)
    sums, seconds = fastest(ways)
    row: dict[str, Any] = {"network": name, "samples": len(setting.data)}
    row |= {f"{way} s": s for way, s in seconds.items() if not way.startswith("float32")}
    claims = []
    if with_torch:
        best = min(seconds["torch"], seconds["torch vmap"])
        gap = max(disagreement(sums["reverse"], sums[way]) for way in ("torch", "torch vmap"))
        row |= {"torch / reverse": best / seconds["reverse"], "disagreement": gap}
        single = min(seconds["float32 torch"], seconds["float32 torch vmap"])
        row |= {"float32 torch / reverse": single / seconds["reverse"]}
        text = f"{name}: sums of torch agree to {AGREEMENT}: {gap:.1e}"
        claims.append(Claim(text, gap <= AGREEMENT))
        text = f"{name}: faster than torch: {best / seconds['reverse']:.2f} times"
        claims.append(Claim(text, best > seconds["reverse"]))
    row |= {"differences / reverse": "", "their disagreement": ""}
    if not case.differences:
        return row, claims
    times, gap = against_differences(setting, case.differences)
    row |= {"differences / reverse": times, "their disagreement": gap}
    text = f"{name}: finite differences agree to {DIFFERENCES_AGREEMENT}: {gap:.1e}"
    claims.append(Claim(text, gap <= DIFFERENCES_AGREEMENT))
    text = f"{name}: faster than finite differences: {times:.0f} times"
    return row, [*claims, Claim(text, times > 1)]


def prepared(name: str, case: Case) -> tuple[Setting, Observer]:
    """What all ways share, and the observer that one of them uses."""
    model = load(case.model)
    layers = tuple(find_layers(decode_sparse(case.model)).layers)
    data = Calibration(case.feeds, True, name, False, 0)
    observer = Observer(model, layers, next(data.batches(2)), probes=case.probes, threads=1)
    state = original_state(model, layers)
    first = observer.activations(state, next(data.batches(BATCH)))
    centres = {layer: a.mean(axis=1, dtype=np.float64) for layer, a in first.items()}
    return Setting(model, layers, state, data, BATCH, case.probes, centres), observer


def fastest(ways: dict[str, Callable[[], Sums]]) -> tuple[dict[str, Sums], dict[str, float]]:
    """Results, and the least seconds of some rounds, by way."""
    sums: dict[str, Sums] = {}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS + 1):  # the first warms up, and may as well count
        for name, way in ways.items():
            began = time.process_time()
            sums[name] = way()
            seconds[name] = min(seconds[name], time.process_time() - began)
    return sums, seconds


def by_reverse_graph(setting: Setting, observer: Observer) -> Sums:
    """What the pruning methods call."""
    moments = measure(observer, setting.state, setting.data, size=setting.size).moments
    return {name: (m.bb, m.wb, m.ww) for name, m in moments.items()}


def by_torch(setting: Setting, *, at_once: bool, double: bool = True) -> Sums:
    """The same sums, from autograd; products in float64, or in float32 within a batch."""
    import torch
    import torch_graph

    torch.set_num_threads(1)
    proto, layers = setting.model.proto, setting.layers
    weights = torch_graph.stored(proto)
    output = proto.graph.output[0].name
    sums: dict[str, list[Any]] = {}
    for batch in setting.data.batches(setting.size):
        feeds = {n: torch.from_numpy(x).requires_grad_() for n, x in batch.feeds.items()}
        values = torch_graph.run(proto, weights, feeds)
        y = values[output]
        seeds = torch.from_numpy(_seeds(setting, tuple(y.shape), batch.start))
        targets = [values[layer.output] for layer in layers]
        if at_once:
            adjoints = torch.autograd.grad(y, targets, seeds, is_grads_batched=True)
        else:
            runs = [torch.autograd.grad(y, targets, v, retain_graph=True) for v in seeds]
            adjoints = [torch.stack(parts) for parts in zip(*runs, strict=True)]
        for layer, adjoint in zip(layers, adjoints, strict=True):
            a = torch.from_numpy(layer.rows_in(values[layer.input].detach().numpy()))
            g = torch.from_numpy(layer.rows_out(adjoint.numpy()))
            centre = torch.from_numpy(setting.centres[layer.name])
            if double:
                new = _products(a.double(), g.double(), centre)
            else:
                new = [x.double() for x in _products(a, g, centre.float())]
            old = sums.get(layer.name)
            sums[layer.name] = (
                new if old is None else [x + z for x, z in zip(old, new, strict=True)]
            )
    return {name: tuple(x.numpy() for x in parts) for name, parts in sums.items()}  # type: ignore[misc]


def _seeds(setting: Setting, shape: tuple[int, ...], start: int) -> np.ndarray:
    """The seeds of the reverse graph, (P, *shape of y)."""
    y = {"y": np.zeros(shape, np.float32)}
    chosen = plan(y, shape[0], metric="l2", probes=setting.probes, seed=0)
    return np.ascontiguousarray(chosen.seeds(y, range(start, start + shape[0]))["y"])


def _products(a: Any, g: Any, centre: Any) -> list[Any]:
    """bb, wb and ww of rows a (groups, rows, in) and adjoints g (P, groups, rows, out)."""
    s = g.square().sum(0)
    shifted = a - centre[:, None, :]
    wb, ww = (s.transpose(1, 2) @ x for x in (shifted, shifted.square()))
    return [s.sum(1).reshape(-1), wb.reshape(-1, a.shape[2]), ww.reshape(-1, a.shape[2])]


def against_differences(setting: Setting, samples: int) -> tuple[float, float]:
    """How many times slower central differences are on a few samples; disagreement of the sums."""
    few = setting.data.limit(samples, 0)
    first = next(few.batches(2))
    seconds, sums = {}, {}
    for engine in ("vjp", "numeric"):
        observer = Observer(
            setting.model, setting.layers, first, engine=engine, probes=setting.probes, threads=1
        )
        measure(observer, setting.state, few.limit(2, 0), size=2)  # warm up
        began = time.process_time()
        moments = measure(observer, setting.state, few, size=len(few)).moments
        seconds[engine] = time.process_time() - began
        sums[engine] = {name: (m.bb, m.wb, m.ww) for name, m in moments.items()}
    return seconds["numeric"] / seconds["vjp"], disagreement(sums["vjp"], sums["numeric"])


def disagreement(first: Sums, second: Sums) -> float:
    """Largest relative distance of two sums of a layer, in the Frobenius norm.

    wb is judged on the scale of its bound sqrt(bb ww): about the mean it may be all rounding.
    """
    worst = 0.0
    for name, (bb, wb, ww) in second.items():
        scales = bb, np.sqrt(bb[:, None] * ww), ww
        for x, y, scale in zip(first[name], (bb, wb, ww), scales, strict=True):
            worst = max(worst, float(np.linalg.norm(x - y) / np.linalg.norm(scale)))
    return worst


def _has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
