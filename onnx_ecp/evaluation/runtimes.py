"""Latency of two models in a runtime that is installed, and whether it computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from onnx_ecp.data.calibration import Batch
from onnx_ecp.errors import ModelError, ProviderError, UsageError, did_you_mean
from onnx_ecp.evaluation import worker
from onnx_ecp.evaluation.latency import Latency, latency_of
from onnx_ecp.evaluation.targets import TARGETS, check_taken, taken
from onnx_ecp.graph import Model, decode_sparse, printable, sparse_tensors
from onnx_ecp.runtime.limits import check_deadline, workers
from onnx_ecp.runtime.session import Session

# Names the Python that has the runtime, where it is not this one.
PYTHON = "ONNX_ECP_RUNTIME_PYTHON"
# By runtime, how it is installed.
INSTALL = {
    "onnxruntime": 'pip install "onnx-ecp[cpu]"',
    "openvino": "pip install openvino",
    "deepsparse": "pip install deepsparse==1.8.0 (x86, Python 3.11 or older, an environment of its "
    "own: it wants another onnx)",
}
# Largest difference of outputs, as a share of their largest value, that rounding can explain.
TOLERANCE = 1e-3
# How long both models are run.
TURNS, SECONDS = 20, 1.0


@dataclass(frozen=True)
class InRuntime:
    """How two models do in a runtime.

    Args:
        name: of the runtime.
        version: of its package.
        latency: of both models there.
        difference_a: largest difference of an output of model a from what ONNX Runtime computes, as
            a share of the largest value of that output.
        difference_b: the same of model b.
    """

    name: str
    version: str
    latency: Latency
    difference_a: float
    difference_b: float


def check_runtime(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        UsageError: with the closest names.
    """
    if name not in worker.RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}.", hint=did_you_mean(name, worker.RUNTIMES))


def in_runtime(
    name: str, a: Model, b: Model, batch: Batch, *, threads: int | None = None
) -> InRuntime:
    """Run two models in turns in a runtime, in a process of its own.

    Args:
        name: of the runtime.
        a: the original model.
        b: a model with the same inputs and outputs.
        batch: what both are fed.
        threads: threads within an operator; None takes one per core.

    Raises:
        UsageError: no such runtime.
        ModelError: the runtime does not take a model.
        ProviderError: it is not installed, fails, or computes something else.
    """
    check_runtime(name)
    used = threads or workers()
    expected = [Session(m.proto, base=m.base, threads=used).run(batch.feeds) for m in (a, b)]
    outputs = list(expected[0])
    with TemporaryDirectory(prefix="onnx-ecp-") as place:
        folder = Path(place)
        job = {
            "runtime": name,
            "models": [str(_file(m, name, folder / f"{k}.onnx")) for k, m in enumerate((a, b))],
            "inputs": list(batch.feeds),
            "outputs": outputs,
            "threads": used,
            "turns": TURNS,
            "seconds": SECONDS,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        np.savez(folder / "feeds.npz", *batch.feeds.values())
        _run(name, folder)
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        differences = [
            _difference(expected[k], outputs, folder / f"outputs_{k}.npz") for k in (0, 1)
        ]
    title = TARGETS[name].title
    for which, difference in zip("AB", differences, strict=True):
        if not difference <= TOLERANCE:
            raise ProviderError(
                f"{title} computes something else than ONNX Runtime for model {which}: outputs "
                f"differ by {difference:.2g} of their largest value.",
                hint="Its latency would be that of another model: report this to its makers.",
            )
    latency = latency_of(done["times"], used, batch.samples)
    return InRuntime(name, done["version"], latency, *differences)


def _file(model: Model, name: str, place: Path) -> Path:
    """A file of a model that the runtime takes: its own, or a copy in a form that it reads."""
    check_taken(model, name)
    fitting = taken(model, name)
    sparse = any(True for _ in sparse_tensors(model.proto))
    if fitting is model and not sparse and model.path is not None:
        return model.path.resolve()
    if model.base is not None and any(
        t.data_location == onnx.TensorProto.EXTERNAL for t in model.proto.graph.initializer
    ):
        raise ModelError(
            f"{printable(model.path or 'model')}: {TARGETS[name].title} needs another version of "
            "the file, which external data do not allow.",
            hint="Save it with its data inside.",
        )
    onnx.save(decode_sparse(fitting.proto), place)
    return place


def _run(name: str, folder: Path) -> None:
    """Let the worker do its job.

    Raises:
        ProviderError: it could not.
    """
    python, title = os.environ.get(PYTHON, sys.executable), TARGETS[name].title
    command = [python, str(Path(worker.__file__)), str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=check_deadline(), check=False
        )
    except subprocess.TimeoutExpired:
        check_deadline()
        raise
    except OSError as error:
        raise ProviderError(
            f"{PYTHON} is {printable(python)}: {error.strerror or error}.",
            hint="Name the Python of an environment in which the runtime is installed.",
        ) from error
    if done.returncode == 0:
        return
    told = _last_line(done.stderr)
    if done.returncode == worker.MISSING:
        raise ProviderError(
            f"{title} is not installed in the environment of {printable(python, 200)}: {told}.",
            hint=f"{INSTALL[name]}; name the Python that has it in {PYTHON}.",
        )
    how = f"died of signal {-done.returncode}" if done.returncode < 0 else f"failed: {told}"
    raise ProviderError(
        f"{title} {how}.", hint="See whether it runs both models by itself; batch sizes matter."
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return printable(lines[-1].strip().rstrip("."), 300) if lines else "it says nothing"


def _difference(expected: Mapping[str, np.ndarray], outputs: Sequence[str], path: Path) -> float:
    """The largest difference of an output, as a share of its largest value; inf where none fits."""
    worst = 0.0
    with np.load(path) as stored:
        for k, name in enumerate(outputs):
            x, y = expected[name], stored[f"arr_{k}"]
            if x.shape != y.shape:
                return float("inf")
            if not np.issubdtype(x.dtype, np.floating):
                continue  # classes may flip where two scores are equal but for rounding
            gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
            scale = float(np.abs(x).max(initial=0.0)) or 1.0
            worst = max(worst, float(gap.max(initial=0.0)) / scale)
    return worst
