"""A model of more than 2 GB, and one of a billion parameters, go in and come out pruned.

A stack of residual feed-forward blocks over tokens, every weight 4096 x 4096 in one external data
file, is pruned by the command line in a process of its own. Its peak memory is stated as a
multiple of the weights, its time in forward passes over the same calibration samples. Then the
result is loaded by ONNX Runtime, and its zeros are counted.

Usage: python benchmarks/large_model.py [LAYERS[xWIDTH]] [METHOD ...]      33 layers are over 2 GB,
60 a billion parameters; 60x1024 is a small copy of that, in which all that takes memory has the
same share: a sixteenth of the weights, a quarter of the tokens, one sample in a batch as there.
Needs twice the size of the weights on the disk, and for methods that need sensitivities seven times
as much again for what does not fit in --max-memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from outcome import Claim, Row, finish, publish, table
from tables import read

SAMPLES, OUTPUTS = 16, 64
OVER_2_GB = "33"
SPARSITY = 0.5
# Times the weights, where these are so many million that the interpreter is small beside them.
MOST_MEMORY, LARGE = 3.0, 500
# Methods and the further options that they are run with.
METHODS = {
    "magnitude": [],
    "wanda": [],
    "ecp": [],
    "ecp-refit": ["--stages", "1"],
}


@dataclass(frozen=True)
class Size:
    """Of the model and its samples.

    Args:
        layers: square ones.
        width: of each.
        tokens: in a sample.
    """

    layers: int
    width: int
    tokens: int

    @staticmethod
    def of(text: str) -> Size:
        """LAYERS or LAYERSxWIDTH."""
        layers, _, width = text.partition("x")
        return Size(int(layers), int(width or 4096), int(width or 4096) // 32)


def main() -> int:
    size = Size.of(sys.argv[1] if len(sys.argv) > 1 else OVER_2_GB)
    methods = sys.argv[2:] or ["magnitude", "ecp"]
    with tempfile.TemporaryDirectory(prefix="large-model-") as name:
        folder = Path(name)
        model, inputs = folder / "in.onnx", folder / "in.npz"
        make(model, size)
        np.savez(inputs, x=samples(size))
        weights = model.with_suffix(".data").stat().st_size
        forward = forward_seconds(model, inputs)
        rows = []
        for method in methods:
            row = pruned(model, inputs, method, weights, forward)
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
            publish("large_model", [*others(rows), *rows])
    print(table(rows))
    return finish(list(claims(rows)))


def claims(rows: list[dict[str, Any]]) -> Iterator[Claim]:
    for row in rows:
        what = f"{row['million weights']} million weights, {row['method']}"
        ratio = row["peak / weights"]
        yield Claim(f"{what}: zeros as asked for, loads", bool(row["as asked"]))
        if row["million weights"] >= LARGE:
            text = f"{what}: peak memory {ratio:.2f} times the weights, at most {MOST_MEMORY:g}"
            yield Claim(text, ratio <= MOST_MEMORY)


def others(rows: list[dict[str, Any]]) -> list[Row]:
    """The published rows of other runs, which stay."""
    path = Path(__file__).parent / "results" / "large_model.csv"
    done = {(str(row["million weights"]), str(row["method"])) for row in rows}
    known = read(path) if path.exists() else []
    return [row for row in known if (row["million weights"], row["method"]) not in done]


def make(path: Path, size: Size) -> None:
    """The model and its data file, written piece by piece."""
    width = size.width
    rng = np.random.default_rng(0)
    nodes, stored, h = [], [], "x"
    with path.with_suffix(".data").open("wb") as data:

        def store(name: str, values: np.ndarray) -> str:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape)
            tensor.data_location = TensorProto.EXTERNAL
            data.write(bytes(-data.tell() % 4096))
            place = {"location": path.with_suffix(".data").name, "offset": data.tell()}
            for key, value in (place | {"length": values.nbytes}).items():
                tensor.external_data.add(key=key, value=str(value))
            data.write(values.tobytes())
            stored.append(tensor)
            return name

        def linear(name: str, x: str, outputs: int) -> str:
            weight = rng.standard_normal((width, outputs), np.float32) / np.float32(width**0.5)
            bias = rng.standard_normal(outputs, np.float32) * np.float32(0.1)
            inputs = [x, store(f"{name}.weight", weight)]
            nodes.append(helper.make_node("MatMul", inputs, [f"{name}.product"], name=name))
            inputs = [f"{name}.product", store(f"{name}.bias", bias)]
            nodes.append(helper.make_node("Add", inputs, [f"{name}.out"], name=f"{name}.add"))
            return f"{name}.out"

        def node(op: str, name: str, *inputs: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
            return name

        scale = store("norm.scale", np.ones(width, np.float32))
        for i in range(size.layers // 2):
            inner = node("LayerNormalization", f"norm{i}", h, scale)
            inner = node("Gelu", f"gelu{i}", linear(f"up{i}", inner, width))
            h = node("Add", f"block{i}", h, linear(f"down{i}", inner, width))
        if size.layers % 2:
            h = linear("odd", h, width)
        h = linear("head", node("LayerNormalization", "norm", h, scale), OUTPUTS)
        nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size.tokens, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size.tokens, OUTPUTS])],
        stored,
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opset)
    path.write_bytes(model.SerializeToString())


def samples(size: Size) -> np.ndarray:
    """(samples, tokens, width), with a spread that differs from feature to feature."""
    rng = np.random.default_rng(1)
    spread = np.exp(rng.standard_normal(size.width, np.float32))
    return rng.standard_normal((SAMPLES, size.tokens, size.width), np.float32) * spread


def forward_seconds(model: Path, inputs: Path) -> float:
    """CPU seconds of one pass over all samples, told from a quarter of them once all is loaded."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(model), options, ["CPUExecutionProvider"])
    x = np.load(inputs)["x"]
    session.run(None, {"x": x[:1]})
    began = time.process_time()
    session.run(None, {"x": x[: SAMPLES // 4]})
    return 4 * (time.process_time() - began)


def pruned(model: Path, inputs: Path, method: str, weights: int, forward: float) -> dict[str, Any]:
    """One run of the command line, and what is wrong with its result."""
    output, report = model.with_name("out.onnx"), model.with_name("report.json")
    arguments = [str(model), str(output), "--method", method, *METHODS[method]]
    arguments += ["--calibration", str(inputs), "--sparsity", str(SPARSITY), "--force"]
    arguments += ["--max-memory", str(weights), "--report", str(report), "--no-cleanup"]
    arguments += ["--batch-size", "1"]
    start = "from onnx_ecp.cli import main; main()"
    seconds, cpu, peak, anonymous = watched([sys.executable, "-c", start, "optimize", *arguments])
    session = ort.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": np.load(inputs)["x"][:1]})[0]
    wanted = json.loads(report.read_text())
    zeros, number = zeros_of(output)
    as_asked = zeros == round(SPARSITY * number) and bool(np.isfinite(y).all())
    return {
        "million weights": weights // 4_000_000,
        "method": " ".join([method, *METHODS[method]]),
        "zeros": f"{zeros}/{number}",
        "as asked": as_asked,
        "error": wanted["gap"]["relative_error"],
        "seconds": seconds,
        "CPU s": cpu,
        "forwards": cpu / forward,
        "peak MiB": peak >> 20,
        "peak / weights": peak / weights,
        "anonymous / weights": anonymous / weights,
    }


def watched(command: list[str]) -> tuple[float, float, int, int]:
    """Seconds, CPU seconds, peak resident bytes (mapped files included) and anonymous ones."""
    began = time.monotonic()
    process = subprocess.Popen(command)
    most = [0]

    def watch() -> None:
        while process.returncode is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            kib = [int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line]
            most[0] = max(most[0], *kib, 0)
            time.sleep(0.1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    seconds, cpu = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    return seconds, cpu, usage.ru_maxrss * 1024, most[0] * 1024


def zeros_of(path: Path) -> tuple[int, int]:
    """Zeros and number of the weights of all layers, read through their data file."""
    proto = onnx.load(path, load_external_data=False)
    zeros = number = 0
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".weight"):
            place = {entry.key: entry.value for entry in tensor.external_data}
            count = int(np.prod(tensor.dims))
            file, offset = path.with_name(place["location"]), int(place["offset"])
            values = np.memmap(file, np.float32, "r", offset, (count,))
            zeros, number = zeros + count - int(np.count_nonzero(values)), number + count
    return zeros, number


if __name__ == "__main__":
    sys.exit(main())
