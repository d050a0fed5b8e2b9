"""Where scattered zeros are speed: ONNX Runtime, OpenVINO and DeepSparse on the same files.

    python benchmarks/targets.py openvino=/path/venv/bin/python deepsparse=/path/other/bin/python

LeNet-300 pruned by the default method, six layers of 1,024 and EfficientNet-Lite0 pruned by
magnitude (latency does not ask which weights are left), at .8, .9 and .95, shapes kept. The dense
and the pruned file run in turns in every runtime, one thread, in a process of its own; outputs are
checked against ONNX Runtime's. A runtime that is not installed is left out with the reason; one
that does not live beside this package is named with its Python. The claims: no gain in ONNX Runtime
and OpenVINO, and a gain in DeepSparse for batches of 64 from .9 on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import networks
import numpy as np
import onnx
import onnx.version_converter
from outcome import Claim, environment, finish, publish, table

import onnx_ecp
from onnx_ecp.data import calibration
from onnx_ecp.errors import ProviderError
from onnx_ecp.evaluation.runtimes import PYTHON, in_runtime
from onnx_ecp.evaluation.worker import RUNTIMES
from onnx_ecp.graph import load, signature

SPARSITIES = (0.8, 0.9, 0.95)
# The file of LeNet-300 has opset 20; what all three runtimes take is older.
OPSET, IR = 17, 9
THREADS, WIDTH, LAYERS = 1, 1024, 6
# A runtime gains where the pruned file takes less than this share of the dense one's time.
GAIN = 0.9


@dataclass(frozen=True)
class Network:
    """A network, what it is fed, how it is pruned, and in which batches it is timed."""

    model: onnx.ModelProto
    inputs: np.ndarray
    choices: Mapping[str, Any]
    batches: tuple[int, ...]


def lenet300() -> Network:
    """784-300-100-10 on MNIST."""
    known = networks.NETWORKS["lenet300"]
    (inputs,) = known.digits("train", 1000)[0].values()
    model = onnx.version_converter.convert_version(onnx.load(known.path), OPSET)
    model.ir_version = IR
    return Network(model, inputs, {}, (1, 64))


def mlp() -> Network:
    """Six layers of 1,024 with random weights, the size of a feed-forward part."""
    rng = np.random.default_rng(0)
    lines, last = [], "x"
    for k in range(LAYERS):
        lines += [f"z{k} = Gemm<transB = 1>({last}, W{k})", f"a{k} = Relu(z{k})"]
        last = f"a{k}"
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> net (float[N, {WIDTH}] x) => '
        f"(float[N, {WIDTH}] {last}) {{ {' '.join(lines)} }}"
    )
    for k in range(LAYERS):
        values = rng.standard_normal((WIDTH, WIDTH)) * np.sqrt(2 / WIDTH)
        weight = onnx.numpy_helper.from_array(values.astype(np.float32), f"W{k}")
        model.graph.initializer.append(weight)
    inputs = rng.standard_normal((128, WIDTH)).astype(np.float32)
    return Network(model, inputs, {"method": "magnitude"}, (1, 64))


def efficientnet() -> Network:
    """EfficientNet-Lite0, its 1x1 convolutions and classifier pruned."""
    model = onnx.load(networks.SHARED / "models" / "efficientnet_lite0.onnx")
    shape = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    inputs = np.random.default_rng(0).random((16, *shape[1:]), dtype=np.float32)
    choices = {"method": "magnitude", "exclude": ("depthwise", "stem")}
    return Network(model, inputs, choices, (1, 16))


NETWORKS = {"LeNet-300": lenet300, "MLP 6 x 1024": mlp, "EfficientNet-Lite0": efficientnet}


def rows(pythons: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A row per network, batch, sparsity and runtime that is installed."""
    missing: dict[str, str] = {}
    for name, make in NETWORKS.items():
        network = make()
        with TemporaryDirectory() as folder:
            dense = Path(folder, "dense.onnx")
            onnx.save(network.model, dense)
            for sparsity in SPARSITIES:
                path = Path(folder, f"{sparsity}.onnx")
                report = onnx_ecp.optimize(
                    dense, network.inputs, output=path, sparsity=sparsity, cleanup=False,
                    measure=False, **network.choices,
                ).report  # fmt: skip
                for runtime in [r for r in RUNTIMES if r not in missing]:
                    for batch in network.batches:
                        try:
                            found = timed(runtime, pythons, dense, path, network.inputs, batch)
                        except ProviderError as error:
                            missing[runtime] = error.message
                            print(f"{runtime} is left out: {error.message}", file=sys.stderr)
                            break
                        row = {"network": name, "sparsity": sparsity, "batch": batch} | found
                        row["zeros"] = report.zeros_after
                        print(*row.values(), file=sys.stderr, flush=True)
                        yield row


def timed(
    runtime: str, pythons: Mapping[str, str], dense: Path, path: Path, inputs: np.ndarray, size: int
) -> dict[str, Any]:
    """Latency of both files in a runtime, for the first samples."""
    models = load(dense), load(path)
    samples = calibration.load(inputs, signature(models[0].proto))
    batch = next(samples.batches(size))
    os.environ[PYTHON] = pythons.get(runtime, sys.executable)
    there = in_runtime(runtime, *models, batch, threads=THREADS)
    latency = there.latency
    return {
        "runtime": f"{runtime} {there.version}",
        "ms dense": 1e3 * (latency.median_a or 0.0),
        "ms pruned": 1e3 * (latency.median_b or 0.0),
        "latency": latency.median_ratio,
        "from": (latency.spread or (np.nan,))[0],
        "to": (latency.spread or (np.nan,))[-1],
        "pruned is": latency.verdict,
        "difference": max(there.difference_a, there.difference_b),
    }


def claims(found: list[dict[str, Any]]) -> Iterator[Claim]:
    """Zeros are no speed in ONNX Runtime and OpenVINO, and are in DeepSparse."""
    for row in found:
        what = f"{row['network']}, batch {row['batch']}, {row['sparsity']}, {row['runtime']}"
        text = f"{what}: x{row['latency']:.2f} ({row['pruned is']})"
        if not row["runtime"].startswith("deepsparse"):
            yield Claim(text, row["latency"] > GAIN or row["pruned is"] == "no faster")
        elif row["batch"] == 64 and row["sparsity"] >= 0.9:
            yield Claim(text, row["latency"] < GAIN)


def main() -> int:
    """Measure, publish, judge."""
    found = list(rows(dict(x.split("=", 1) for x in sys.argv[1:])))
    publish("targets", found)
    print(table(found))
    print(environment())
    return finish(claims(found))


if __name__ == "__main__":
    sys.exit(main())
