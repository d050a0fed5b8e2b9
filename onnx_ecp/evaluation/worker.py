"""Run models in another runtime, in a process of its own; needs NumPy and that runtime alone.

    python worker.py FOLDER

FOLDER holds ``job.json`` (the keys of ``main``) and ``feeds.npz``; written are ``outputs_K.npz`` of
every model and ``done.json``. The Python that runs this may be another one, without onnx-ecp: some
runtimes do not live beside it. A runtime that is missing ends with exit code 3.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

MISSING = 3
WARM_UP = 3

Feeds = Mapping[str, np.ndarray]
# The version of a runtime, and what runs a model once.
Loaded = tuple[str, Callable[[], Sequence[Any]]]


def version_of(package: str) -> str:
    """The version of an installed package; empty where its metadata are missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def in_onnxruntime(path: str, feeds: Feeds, outputs: Sequence[str], threads: int) -> Loaded:
    """A model in ONNX Runtime, on the CPU."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return version_of("onnxruntime"), lambda: session.run(outputs, feeds)  # type: ignore[no-any-return]


def in_openvino(path: str, feeds: Feeds, outputs: Sequence[str], threads: int) -> Loaded:
    """A model in OpenVINO, on the CPU; in float32, as ONNX Runtime computes."""
    runtime = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = runtime.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run() -> Sequence[Any]:
        request.infer(feeds)
        return [request.get_tensor(name).data for name in outputs]

    return version_of("openvino"), run


def in_deepsparse(path: str, feeds: Feeds, outputs: Sequence[str], threads: int) -> Loaded:
    """A model in DeepSparse, whose engines are built for one batch size."""
    os.environ.setdefault("NM_LOGGING", "0")
    engines = importlib.import_module("deepsparse.engine")
    samples = max((len(x) for x in feeds.values() if x.ndim), default=1)
    engine = engines.Engine(path, batch_size=samples, num_cores=threads)
    arrays = [np.ascontiguousarray(x) for x in feeds.values()]
    return version_of("deepsparse"), lambda: engine.run(arrays)  # type: ignore[no-any-return]


RUNTIMES = {
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
    "deepsparse": in_deepsparse,
}


def main(folder: str) -> int:
    """Load, run, compare nothing: what came out and how long it took is written down."""
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    with np.load(os.path.join(folder, "feeds.npz")) as stored:
        feeds = {name: stored[f"arr_{k}"] for k, name in enumerate(job["inputs"])}
    load, version = RUNTIMES[job["runtime"]], ""
    runs: list[Callable[[], Sequence[Any]]] = []
    try:
        for path in job["models"]:
            version, run = load(path, feeds, job["outputs"], job["threads"])
            runs.append(run)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return MISSING
    for k, run in enumerate(runs):
        np.savez(os.path.join(folder, f"outputs_{k}.npz"), *map(np.array, run()))
    for _ in range(WARM_UP):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    began = time.monotonic()
    while len(times[0]) < job["turns"] or time.monotonic() - began < job["seconds"]:
        for k, run in enumerate(runs):
            start = time.perf_counter()
            run()
            times[k].append(time.perf_counter() - start)
    with open(os.path.join(folder, "done.json"), "w", encoding="utf-8") as file:
        json.dump({"version": version, "times": times}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
