"""What a cache saves: a second run at another sparsity, and a run that was ended.

EfficientNet-Lite0 on photographs where ONNX_ECP_SHARED has them, and the digits of ``models/``.
Every row is a process of its own, on one thread; ``looks`` counts the batches that were observed,
seconds are those of the processor: other work on the machine does not count.
Bytes are compared with those of a run without a cache.

    python benchmarks/cache.py [NETWORK ...]
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import ROOT, SHARED
from outcome import Claim, finish, publish, table

# Of what the first run took, what the second may take.
SHARE = 0.1
PHOTOS = 500
# Runs one job in a process of its own: argv[1] has the choices, argv[2] a stage to be killed after.
PROGRAM = """
import json, os, signal, sys, time
import onnx_ecp
from onnx_ecp.statistics.observer import Observer

looks = []
for name in ("observe", "add", "activations"):
    def counted(self, *given, real=getattr(Observer, name), **named):
        looks.append(1)
        return real(self, *given, **named)
    setattr(Observer, name, counted)

def end(what, done, of):
    if (what, done) == ("stages", int(sys.argv[2])):
        os.kill(os.getpid(), signal.SIGKILL)

began = time.process_time()
choices = json.loads(sys.argv[1])
result = onnx_ecp.optimize(choices.pop("model"), choices.pop("data"), progress=end, **choices)
took = time.process_time() - began
print(json.dumps({"seconds": took, "looks": len(looks), "error": result.report.gap.relative_error}))
"""


@dataclass(frozen=True)
class Case:
    """A network with its samples.

    Args:
        model: its file.
        data: file of the samples.
        method: one that looks at the network once.
        photographs: whether it is the large one: the claim is about it.
    """

    model: Path
    data: Path
    method: str
    photographs: bool = False


def digits(folder: Path) -> Case:
    """The network for digits of this repository."""
    return Case(ROOT / "models" / "digits.onnx", ROOT / "models" / "digits.npz", "ecp")


def efficientnet(folder: Path) -> Case:
    """EfficientNet-Lite0 on photographs."""
    from PIL import Image

    path = SHARED / "models" / "efficientnet_lite0.onnx"
    files = sorted((SHARED / "data" / "imagenet500").glob("*.jpg"))[:PHOTOS]
    pixels = np.stack([np.asarray(Image.open(file), np.float32) for file in files])
    x = np.ascontiguousarray(((pixels - 127) / 128).transpose(0, 3, 1, 2))
    np.savez(folder / "photos.npz", **{onnx.load(path).graph.input[0].name: x})
    return Case(path, folder / "photos.npz", "ecp", photographs=True)


CASES: dict[str, Callable[[Path], Case]] = {"digits": digits, "efficientnet_lite0": efficientnet}


def run(case: Case, out: Path, *, ended: int = 0, **choices: Any) -> dict[str, Any]:
    """One run: seconds, looks, error and the digest of what it wrote."""
    files = {"model": str(case.model), "data": str(case.data), "output": str(out)}
    usual = {"threads": 1, "force": True, "measure": False}
    given = json.dumps({**files, **usual, **choices})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given, str(ended or -1)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if ended:
        assert done.returncode == -9, done.stderr
        return {"seconds": "", "looks": "", "error": "", "sha256": ""}
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told | {"sha256": hashlib.sha256(out.read_bytes()).hexdigest()[:12]}


def rows(name: str, case: Case, folder: Path) -> Iterator[Mapping[str, Any]]:
    """Runs of one network, in order."""
    cache, out = str(folder / f"{name}.cache"), folder / "out.onnx"
    once: dict[str, Any] = {"method": case.method}
    if case.photographs:  # shapes are kept, as on the other pages of this network
        once["cleanup"] = False
    stages = {"sparsity": 0.8, "stages": 4}
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("first, .4", {**once, "sparsity": 0.4, "cache": cache}),
        ("second, .6", {**once, "sparsity": 0.6, "cache": cache}),
        ("without a cache, .6", {**once, "sparsity": 0.6}),
    ]
    if not case.photographs:
        jobs += [
            ("four stages, killed after two", {**stages, "cache": cache, "ended": 2}),
            ("the same, continued", {**stages, "cache": cache}),
            ("the same, without a cache", stages),
        ]
    for what, choices in jobs:
        yield {"network": name, "run": what, **run(case, out, **choices)}


def claims(found: list[Mapping[str, Any]]) -> Iterator[Claim]:
    """What the numbers are to bear out."""
    by_run = {(row["network"], row["run"]): row for row in found}
    for name in dict.fromkeys(row["network"] for row in found):
        first, second = by_run[name, "first, .4"], by_run[name, "second, .6"]
        plain = by_run[name, "without a cache, .6"]
        yield Claim(f"{name}: the second run observes nothing", second["looks"] == 0)
        yield Claim(f"{name}: the same bytes", second["sha256"] == plain["sha256"])
        if name == "efficientnet_lite0":
            share = second["seconds"] / first["seconds"]
            yield Claim(f"{name}: the second run takes {share:.3f} of the first", share < SHARE)
        if (name, "the same, continued") in by_run:
            continued = by_run[name, "the same, continued"]
            whole = by_run[name, "the same, without a cache"]
            less = continued["looks"] < whole["looks"]
            yield Claim(f"{name}: what was ended is not observed again", less)
            same = continued["sha256"] == whole["sha256"]
            yield Claim(f"{name}: continued to the same bytes", same)


def main() -> None:
    photos = (SHARED / "data" / "imagenet500").is_dir()
    names = sys.argv[1:] or [name for name in CASES if photos or name == "digits"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        found = [row for name in names for row in rows(name, CASES[name](folder), folder)]
    print(table(found))
    publish("cache", found)
    sys.exit(finish(list(claims(found))))


if __name__ == "__main__":
    main()
