"""Dense, pruned, int8 and both: size, error, accuracy and latency, beside quantize_static.

Six files of each network: as given; pruned; and of either what onnxruntime.quantization's
quantize_static makes (QDQ, a scale per channel, activations in uint8, all its operators) and what
``--quantize int8`` makes. Errors are told on samples that nothing was computed from.

    python benchmarks/int8.py [NETWORK ...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from networks import NETWORKS, SHARED, Network
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from outcome import RESULTS, Claim, finish, publish, table
from tables import read
from timing import in_turns, of_neighbours

import onnx_ecp

DENSE, PRUNED, STATIC, BOTH_STATIC, OURS, BOTH = (
    "dense",
    "pruned",
    "quantize_static of dense",
    "quantize_static of pruned",
    "int8",
    "pruned, int8",
)
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A network, its samples and how it is pruned.

    Args:
        path: of the model.
        train: samples that all is computed from.
        test: others, which errors are told on.
        labels: of these.
        choices: of ``optimize``.
        batch: samples a run that is timed.
        prunes_once: whether int8 follows in a command of its own, to prune once only.
    """

    path: Path
    train: Feeds
    test: Feeds
    labels: np.ndarray
    choices: Mapping[str, Any]
    batch: int
    prunes_once: bool = False


def digits(network: Network, sparsity: float) -> Case:
    """A network for digits."""
    train, _ = network.digits("train", min(network.samples, 2_000))
    test, labels = network.digits("test")
    return Case(network.path, train, test, labels, {"sparsity": sparsity}, 64)


def photos(calibration: int = 24) -> Case:
    """EfficientNet-Lite0 on photographs; in one stage, from few of them, to be quick."""
    from PIL import Image

    files = sorted((SHARED / "data" / "imagenet500").glob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(file), np.float32) for file in files])
    x = ((pixels - 127) / 128).transpose(0, 3, 1, 2)
    labels = np.array([int(file.stem.split("_")[1]) for file in files])
    path = SHARED / "models" / "efficientnet_lite0.onnx"
    name = onnx.load(path).graph.input[0].name
    choices = {"sparsity": 0.4, "effort": "fast", "cleanup": False}
    return Case(path, {name: x[:calibration]}, {name: x[256:]}, labels[256:], choices, 1, True)


CASES: dict[str, Callable[[], Case]] = {
    "mlpnet": partial(digits, NETWORKS["mlpnet"], 0.9),
    "lenet300": partial(digits, NETWORKS["lenet300"], 0.9),
    "lenet5": partial(digits, NETWORKS["lenet5"], 0.8),
    "efficientnet_lite0": photos,
}


def main(names: Sequence[str]) -> int:
    rows, known = [], RESULTS / "int8.csv"
    others = [r for r in read(known) if r["network"] not in names] if known.exists() else []
    for name in names or CASES:
        if not SHARED.exists():
            print(f"{name} is left out: there is no {SHARED}.")
            continue
        found = measured(name, CASES[name]())
        print(table(found), flush=True)
        rows += found
        publish("int8", [*(others if names else []), *rows])
    return finish(claims(rows))


def measured(name: str, case: Case) -> list[dict[str, Any]]:
    """The six files of a network."""
    with tempfile.TemporaryDirectory() as folder:
        files = made(case, Path(folder))
        times = latencies(list(files.values()), case)
        floats = {STATIC: DENSE, OURS: DENSE, BOTH_STATIC: PRUNED, BOTH: PRUNED}
        rows = []
        for (what, path), ratio in zip(files.items(), times, strict=True):
            gap = onnx_ecp.compare(case.path, path, case.test).gap
            own = floats.get(what, what)
            rounding = onnx_ecp.compare(files[own], path, case.test).gap.relative_error
            rows.append(
                {
                    "network": name,
                    "file": what,
                    "KiB": path.stat().st_size / 1024,
                    "KiB, gzip": onnx_ecp.compare(path, path, few(case)).b.compressed_bytes / 1024,
                    "error": gap.relative_error,
                    "of rounding": rounding,
                    "accuracy": accuracy(path, case),
                    "latency, share": ratio,
                }
            )
    return rows


def made(case: Case, folder: Path) -> dict[str, Path]:
    """Path by name of file; the dense one first."""
    files = {DENSE: case.path}
    nothing = {"method": "magnitude", "sparsity": 0.0, "cleanup": False, "quantize": "int8"}
    for what, of, choices in (
        (PRUNED, DENSE, case.choices),
        (OURS, DENSE, nothing),
        (BOTH, PRUNED, nothing)
        if case.prunes_once
        else (BOTH, DENSE, {**case.choices, "quantize": "int8"}),
    ):
        files[what] = folder / f"{len(files)}.onnx"
        onnx_ecp.optimize(files[of], case.train, output=files[what], measure=False, **choices)
    for what, of in ((STATIC, DENSE), (BOTH_STATIC, PRUNED)):
        path = folder / f"{len(files)}.onnx"
        static(files[of], path, case.train)
        files[what] = path
    return {what: files[what] for what in (DENSE, PRUNED, STATIC, OURS, BOTH_STATIC, BOTH)}


class Reader(CalibrationDataReader):
    """Samples one by one."""

    def __init__(self, feeds: Feeds) -> None:
        count = len(next(iter(feeds.values())))
        self._feeds = ({n: x[i : i + 1] for n, x in feeds.items()} for i in range(count))

    def get_next(self) -> Any:
        """The next sample; None behind the last."""
        return next(self._feeds, None)


def static(source: Path, target: Path, train: Feeds) -> None:
    """What quantize_static makes of a file."""
    quantize_static(
        source,
        target,
        Reader(train),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def few(case: Case) -> Feeds:
    """Two samples."""
    return {name: x[:2] for name, x in case.test.items()}


def session(path: Path) -> onnxruntime.InferenceSession:
    """Of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def accuracy(path: Path, case: Case) -> float:
    """Percent of the test samples whose largest output is that of the label."""
    run, count, right = session(path), len(case.labels), 0
    size = 1 if run.get_inputs()[0].shape[0] == 1 else 256
    for i in range(0, count, size):
        (y,) = run.run(None, {name: x[i : i + size] for name, x in case.test.items()})
        right += int(np.sum(y.argmax(axis=1) == case.labels[i : i + size]))
    return 100 * right / count


def latencies(files: Sequence[Path], case: Case) -> list[float]:
    """Latency of every file as a share of that of the first: medians of neighbours in turns."""
    feeds = {name: x[: case.batch] for name, x in case.test.items()}
    sessions = [session(path) for path in files]
    if sessions[0].get_inputs()[0].shape[0] == 1:
        feeds = {name: x[:1] for name, x in feeds.items()}
    runs = [partial(one.run, None, feeds) for one in sessions]
    times = in_turns(runs, turns=20, warm_up=3, seconds=2.0)
    return [of_neighbours(times[:, [0, k]]) for k in range(len(files))]


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What the page says."""
    by = {(row["network"], row["file"]): row for row in rows}
    found = []
    for name in dict.fromkeys(row["network"] for row in rows):
        ours, others = by[name, BOTH], by[name, BOTH_STATIC]
        alone, dense = by[name, OURS], by[name, DENSE]
        for what, a, b in (("pruned", ours, others), ("dense", alone, by[name, STATIC])):
            text = f"{name}, {what}: rounding costs {a['of rounding']:.3g}"
            text += f", quantize_static {b['of rounding']:.3g}"
            found.append(Claim(text, a["of rounding"] < b["of rounding"]))
        sizes = [row["KiB, gzip"] for row in (ours, alone, dense)]
        text = f"{name}: gzip {sizes[0]:.0f} KiB pruned and in int8, {sizes[1]:.0f} in int8 alone"
        found.append(Claim(f"{text}, {sizes[2]:.0f} dense", sizes[0] < sizes[1] < sizes[2]))
        text = f"{name}: accuracy {ours['accuracy']:.2f}, dense {dense['accuracy']:.2f}"
        found.append(Claim(text, ours["accuracy"] >= dense["accuracy"] - 1.0))
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
