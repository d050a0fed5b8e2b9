"""Time and memory of the refit: layers up to 4096 x 4096, a BERT-base-shaped model.

Time and peak memory of whole runs of ``ecp-refit``, each in a fresh process: networks with one
square layer whose width doubles, with one stage and without the joint refit at the end, and (with
``--bert``) an encoder of the shape of BERT-base with random weights, by the default as it is: all
its stages, and the joint refit. What dominates is read off a profile. With ``--direct``, wide
layers are solved by conjugate gradients and, once more, directly. With ``--stages``, a smaller
encoder says what stages add to the peak of memory.

Usage: python benchmarks/refit_scale.py [WIDTH ... | --bert | --direct | --stages]
"""

from __future__ import annotations

import cProfile
import json
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from encoders import Shape, encoder
from onnx import helper, numpy_helper
from outcome import Claim, finish, publish, table

import onnx_ecp
from onnx_ecp.linalg import masked as refit
from onnx_ecp.runtime.session import Session

WIDTHS = (256, 512, 1024, 2048, 4096)
SAMPLES = 2048
BERT = Shape(tokens=128, features=768, width=768, heads=12, hidden=3072, blocks=12, classes=2)
BERT_SAMPLES = 64
SMALL = Shape(tokens=16, features=1024, width=1024, heads=8, hidden=4096, blocks=2, classes=2)
SMALL_SAMPLES = 16
STAGES = (1, 2, 4, 8)
# What the last of STAGES may add to the peak of one, as a share of it.
GROWTH = 0.1
# Functions of the package among which the time is divided; none of them calls another one, but the
# joint refit, which measures and runs the network.
PARTS = {
    "refit_jointly": "joint refit",
    "solve": "solving",
    "inverse_diagonal": "inverses",
    "of": "Gram sums",
    "expand": "statistics",
    "run": "ONNX Runtime",
}
MINUTES = 10 * 60.0
# Relative difference of the output error that conjugate gradients may make.
DIFFERENCE = 1e-2
CG_STEPS = refit.CG_STEPS


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(int(sys.argv[2]), float(sys.argv[3]))))
        return 0
    if sys.argv[1:2] == ["--one-bert"]:
        print(json.dumps(bert()))
        return 0
    if sys.argv[1:2] == ["--bert"]:
        rows = [fresh("--one-bert")]
        publish("refit_scale_bert", rows)
        print(table(rows))
        return finish([whole(row) for row in rows])
    if sys.argv[1:2] == ["--one-staged"]:
        print(json.dumps(staged(int(sys.argv[2]))))
        return 0
    if sys.argv[1:2] == ["--stages"]:
        rows = [fresh("--one-staged", str(stages)) for stages in STAGES]
        publish("refit_scale_stages", rows)
        print(table(rows))
        first, last = rows[0]["peak MiB"], rows[-1]["peak MiB"]
        text = f"peak of {STAGES[-1]} stages: {last} MiB, of one: {first} MiB"
        return finish([Claim(text, last <= (1 + GROWTH) * first)])
    if sys.argv[1:2] == ["--direct"]:
        rows = [direct(width) for width in WIDTHS[:3]]
        publish("refit_scale_direct", rows)
        print(table(rows))
        return finish([close(row) for row in rows])
    widths = [int(w) for w in sys.argv[1:]] or WIDTHS
    rows = []
    for width in widths:
        for sparsity in (0.5, 0.9):
            rows.append(fresh("--one", str(width), str(sparsity)))
            publish("refit_scale", rows)
    print(table(rows))
    slowest = max(row["CPU s"] for row in rows)
    text = f"{max(widths)} x {max(widths)}: {slowest:.0f} s of CPU time, at most {MINUTES:.0f} s"
    return finish([Claim(text, slowest <= MINUTES)])


def direct(width: int) -> dict[str, Any]:
    """Output errors at half the weights, by conjugate gradients and by direct solutions."""
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(SAMPLES, 64)).astype(np.float32)}
    model = square(width, rng)
    row: dict[str, Any] = {"width": width}
    for name, steps in (("conjugate gradients", refit.CG_STEPS), ("direct", 10**9)):
        refit.CG_STEPS = steps  # so many steps always cost more than a direct solution
        began = time.process_time()
        report = onnx_ecp.optimize(
            model,
            feeds,
            sparsity=0.5,
            stages=1,
            compensation="refit",
            include="square",
            importance="ecp",
        ).report
        assert report.gap is not None, "optimize compares"
        row[f"error, {name}"] = report.gap.relative_error
        row[f"CPU s, {name}"] = time.process_time() - began
    refit.CG_STEPS = CG_STEPS
    return row


def close(row: dict[str, Any]) -> Claim:
    """The claim that it makes no difference how wide layers are solved."""
    one, other = row["error, conjugate gradients"], row["error, direct"]
    text = f"width {row['width']}: error {one:.5g} by conjugate gradients, {other:.5g} directly"
    return Claim(text, abs(one / other - 1) < DIFFERENCE)


def fresh(*arguments: str) -> dict[str, Any]:
    """One run in its own process, so that its peak memory is its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(row, file=sys.stderr, flush=True)
    return row


def one(width: int, sparsity: float) -> dict[str, Any]:
    """A network 64 - width - width - 16 of which the square layer is pruned, in one stage."""
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(SAMPLES, 64)).astype(np.float32)}
    model = square(width, rng)
    row = {"width": width, "sparsity": sparsity, "samples": SAMPLES}
    chosen = {"sparsity": sparsity, "stages": 1, "compensation": "refit", "include": "square"}
    return row | profiled(lambda: onnx_ecp.optimize(model, feeds, **chosen))


def square(width: int, rng: np.random.Generator) -> onnx.ModelProto:
    """Three layers, the middle one square."""
    sizes = {"first": (64, width), "square": (width, width), "last": (width, 16)}
    stored = [
        numpy_helper.from_array((rng.normal(size=s) / s[0] ** 0.5).astype(np.float32), f"{n}/w")
        for n, s in sizes.items()
    ]
    nodes, x = [], "x"
    for name in sizes:
        nodes.append(helper.make_node("MatMul", [x, f"{name}/w"], [f"{name}/z"], name=name))
        nodes.append(helper.make_node("Relu", [f"{name}/z"], [f"{name}/a"]))
        x = f"{name}/a"
    nodes[-1] = helper.make_node("Identity", ["last/z"], ["y"])
    kinds = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 64), ("y", 16))
    ]
    graph = helper.make_graph(nodes, "square", kinds[:1], kinds[1:], stored)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def bert() -> dict[str, Any]:
    """The encoder, from file to file, with nothing chosen."""
    inputs = tokens(BERT, BERT_SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.onnx"), Path(folder, "out.onnx")
        onnx.save(encoder(BERT), source)
        row = profiled(
            lambda: onnx_ecp.optimize(source, {"x": inputs}, output=target, progress=told)
        )
        row["loads"] = "y" in Session(target).outputs
    return {"model": "BERT-base shape", "samples": BERT_SAMPLES} | row


def staged(stages: int) -> dict[str, Any]:
    """The smaller encoder by ``ecp`` in some stages, from a file."""
    inputs = tokens(SMALL, SMALL_SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.onnx")
        onnx.save(encoder(SMALL), source)
        report = onnx_ecp.optimize(source, {"x": inputs}, method="ecp", stages=stages).report
    return {
        "stages": stages,
        "weights": report.weights,
        "MiB of weights": 4 * report.weights // 2**20,
        "peak MiB": peak_memory(),
    }


def tokens(shape: Shape, samples: int) -> np.ndarray:
    """Random inputs of an encoder."""
    size = (samples, shape.tokens, shape.features)
    return np.random.default_rng(0).normal(size=size).astype(np.float32)


def peak_memory() -> int:
    """The largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def told(what: str, done: int, of: int) -> None:
    """Say how far a long run is."""
    if what in ("stages", "joint refit"):
        print(f"{time.strftime('%H:%M:%S')} {what} {done} of {of}", file=sys.stderr, flush=True)


def whole(row: dict[str, Any]) -> Claim:
    """The claim that the run went to its end and removed what it was to remove."""
    return Claim(
        f"BERT-base shape: {row['zeros']} of {row['weights']} weights are gone",
        row["loads"] and row["zeros"] == row["weights"] // 2,
    )


def profiled(run: Callable[[], onnx_ecp.Result]) -> dict[str, Any]:
    """Seconds, peak memory, and shares of the time."""
    profile = cProfile.Profile()
    began, cpu = time.monotonic(), time.process_time()
    report = profile.runcall(run).report
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    assert report.gap is not None, "optimize compares"
    row: dict[str, Any] = {
        "weights": report.weights,
        "zeros": report.zeros_after,
        "seconds": seconds,
        "CPU s": cpu,
        "peak MiB": peak_memory(),
        "error": report.gap.relative_error,
    }
    return row | {f"{part} %": round(100 * s / seconds) for part, s in parts(profile).items()}


def parts(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds in the functions of PARTS, callees included."""
    seconds = dict.fromkeys(PARTS.values(), 0.0)
    for (file, _, name), (_, _, _, total, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if "onnx_ecp" in file and name in PARTS:
            seconds[PARTS[name]] += total
    return seconds


if __name__ == "__main__":
    sys.exit(main())
