"""Workers: the same bytes for 1, 2 and 3 of them and where one is killed; and what limits many.

Every network is pruned with processes of this machine, and with a local cluster of Dask (extra
`distributed`; without it those rows are left out). The rates of this machine (observing, sending,
adding, solving) say on paper how long a stage of a billion weights takes on 1 to 64 machines.

    python benchmarks/workers.py [NETWORK ...]
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
from networks import NETWORKS, ROOT, SHARED, fully_connected
from outcome import Claim, finish, publish, table

import onnx_ecp
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.graph import load
from onnx_ecp.layers import find_layers
from onnx_ecp.methods import COMPENSATIONS, LayerProblem
from onnx_ecp.runtime.workers import PARTS, Job, crew, working
from onnx_ecp.statistics.collection import measure
from onnx_ecp.statistics.gram import Gram
from onnx_ecp.statistics.observer import Observer, original_state

# The network on paper: layers of this width, and rows (samples times tokens) that are looked at.
LAYERS, WIDTH, ROWS = 60, 4096, 16_384
MACHINES = (1, 2, 4, 8, 16, 32, 64)
CORES = 16
# Bytes a second between machines: 10 Gbit/s.
NETWORK = 1.25e9
# What rates are measured on.
SIZE, SOME = 64 * 2**20, 1024


@dataclass(frozen=True)
class Case:
    """A network with its samples and choices."""

    model: Path
    data: Any
    choices: Mapping[str, Any]


def digits() -> Case:
    """The network of this repository."""
    folder = ROOT / "models"
    return Case(folder / "digits.onnx", folder / "digits.npz", {"sparsity": 0.8, "stages": 2})


def lenet5() -> Case:
    """Convolutions."""
    network = NETWORKS["lenet5"]
    x, _ = network.digits("train", 256)
    return Case(network.path, x, {"sparsity": 0.8, "effort": "fast"})


CASES: dict[str, Callable[[], Case]] = {"digits": digits, "lenet5": lenet5}


def run(case: Case, **how: Any) -> dict[str, Any]:
    """One run: seconds, error and the digest of the result."""
    began = time.perf_counter()
    usual = {"threads": 1, "measure": False, **case.choices}
    result = onnx_ecp.optimize(case.model, case.data, **usual, **how)
    content = result.model.SerializeToString(deterministic=True)
    assert result.report.gap is not None, "there are samples"
    return {
        "seconds": time.perf_counter() - began,
        "error": result.report.gap.relative_error,
        "sha256": hashlib.sha256(content).hexdigest()[:12],
    }


class Killing:
    """Kills a worker once, as soon as the first part has been looked at."""

    def __init__(self, worker: Callable[[], int]) -> None:
        self._worker, self.killed = worker, 0

    def __call__(self, what: str, done: int, of: int) -> None:
        """See ``Progress``."""
        if what == "sensitivities" and not self.killed:
            self.killed = self._worker()
            os.kill(self.killed, signal.SIGKILL)


@contextmanager
def cluster(count: int) -> Iterator[Any]:
    """A scheduler of Dask with so many processes of this machine."""
    import distributed

    distributed.utils.logging.getLogger("distributed").setLevel("CRITICAL")
    with distributed.LocalCluster(
        n_workers=count, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as found:
        yield found


def rows(name: str, case: Case) -> Iterator[dict[str, Any]]:
    """All runs of a network."""
    yield {"network": name, "workers": "none", **run(case)}
    for count in (1, 2, 3):
        yield {"network": name, "workers": f"{count} processes", **run(case, workers=count)}
    kill = Killing(lambda: int(active_children()[0].pid or 0))
    found = run(case, workers=2, progress=kill)
    yield {"network": name, "workers": "2 processes, one killed" * bool(kill.killed), **found}
    if find_spec("distributed") is None:
        return
    for count in (1, 2):
        with cluster(count) as dask:
            found = run(case, dask=dask.scheduler_address)
            yield {"network": name, "workers": f"Dask, {count}", **found}
    with cluster(2) as dask:
        kill = Killing(lambda: int(next(iter(dask.workers.values())).pid))
        found = run(case, dask=dask.scheduler_address, progress=kill)
        yield {"network": name, "workers": "Dask, 2, one killed" * bool(kill.killed), **found}


def sent(count: int) -> np.ndarray:
    """What a worker sends back."""
    return np.zeros(count, np.uint8)


def rates() -> dict[str, float]:
    """Of one core of this machine: what the paper is computed from."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((SOME, SOME)).astype(np.float32) for _ in range(2)]
    model = load(fully_connected(weights, [np.zeros(SOME, np.float32)] * 2))
    x = rng.standard_normal((1024, SOME)).astype(np.float32)
    data = Calibration({"x": x}, True, "", False, 0)
    layers = find_layers(model.proto).layers
    observer = Observer(model, layers, next(data.batches(2)), threads=1, probes=1)
    state = original_state(model, layers)
    found = {"observing": seconds(lambda: measure(observer, state, data, size=256))}
    found["observing"] = 2 * SOME**2 * len(x) / found["observing"]
    a = np.zeros(SIZE // 8)
    found["adding"] = SIZE / seconds(lambda: a + a)
    found["pickling"] = SIZE / seconds(lambda: pickle.loads(pickle.dumps(a, 5)))
    with working(workers=1):
        there = crew()
        assert there is not None, "there is one"
        jobs = [Job((), (SIZE,))]
        there.map(sent, [], jobs)
        found["sending"] = SIZE / seconds(lambda: there.map(sent, [], jobs))
    weight = weights[0].astype(float)
    gram = Gram.of(x[None], x[None], np.ones((1, len(x))), x.mean(axis=0)[None])
    keep = rng.random(weight.shape) < 0.5
    problem = LayerProblem(weight, weight, keep | True, keep, False, gram, 0.01)
    solve = COMPENSATIONS["refit"].solve
    assert solve is not None, "it is a refit"
    found["solving"] = SOME**3 / seconds(lambda: solve(problem), 1)
    return found


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The least of some runs."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def on_paper(rate: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Seconds of a stage with a refit, for so many machines of CORES cores."""
    weights = LAYERS * WIDTH**2
    moments, grams = 2 * 8 * weights, 2 * 8 * LAYERS * WIDTH**2
    for machines in MACHINES:
        busy = min(machines, PARTS)  # a part is one worker's
        observing = weights * ROWS / (rate["observing"] * CORES * busy)
        # Every machine adds up its parts, and sends the driver one sum.
        moved = busy * (moments + grams) * (machines > 1) / NETWORK
        adding = (PARTS / busy + busy) * (moments + grams) / rate["adding"]
        solving = LAYERS * WIDTH**3 / (rate["solving"] * CORES)
        # The model once to every machine, and every solved layer.
        sending = machines * 2 * 4 * weights * (machines > 1) / NETWORK
        parts = {
            "observing": observing, "network": moved + sending, "adding": adding, "solving": solving
        }  # fmt: skip
        total = sum(parts.values())
        most = max(parts, key=parts.__getitem__)
        yield {"machines": machines, **parts, "all": total, "limit": most}


def claims(found: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    """The same bytes."""
    for name in dict.fromkeys(row["network"] for row in found):
        own = [row for row in found if row["network"] == name and row["workers"] != "none"]
        same = len({row["sha256"] for row in own}) == 1
        yield Claim(f"{name}: the same bytes in all {len(own)} runs with workers", same)
        killed = sum("killed" in row["workers"] for row in own)
        yield Claim(f"{name}: a worker was killed in {killed} of them", killed > 0)


def main() -> None:
    there = ["digits", *(["lenet5"] if (SHARED / "models").is_dir() else [])]
    found = [row for name in sys.argv[1:] or there for row in rows(name, CASES[name]())]
    print(table(found))
    publish("workers", found)
    rate = rates()
    print("\n".join(f"{name}: {value:.3g} a second" for name, value in rate.items()))
    paper = list(on_paper(rate))
    print(table(paper))
    publish("workers_on_paper", paper)
    publish("workers_rates", [{k: f"{v:.2e}" for k, v in rate.items()}])
    sys.exit(finish(list(claims(found))))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # Dask leaves its files here
        main()
