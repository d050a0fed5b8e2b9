"""Clean-up puts a Gather in front of a layer where that makes the layer faster, and only there.

A Gather along the last axis copies single elements. Against a product with ``out`` columns that
pays only where many inputs are dead, or many outputs read them: ``structure.cleanup.is_faster``
says so from sizes alone. Here both ways are timed in turns, one thread, and the verdict is
compared.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
from outcome import Claim, finish, publish, table
from timing import ratio_in_turns

from onnx_ecp.units.cleanup import is_faster

INPUTS = (256, 784, 3072)
OUTPUTS = (32, 128, 512, 2048)
SHARES = (0.1, 0.25, 0.5, 0.75)
BATCHES = (1, 64)
REPEATS, WARM_UP = 60, 10
# What timing on a machine with other work on it can tell.
NOISE = 1.05


def main() -> int:
    """Time all sizes, publish, judge."""
    rows = [row(*sizes) for sizes in itertools.product(INPUTS, OUTPUTS, SHARES)]
    publish("dead_inputs", rows)
    print(table(rows))
    gathered = [r for r in rows if r["gathered"]]
    slower = [r for r in gathered if r["batch 64"] > NOISE]
    missed = [r for r in rows if not r["gathered"] and r["batch 64"] < 0.8]
    text = f"{len(gathered) - len(slower)} of {len(gathered)} layers that get a Gather are faster"
    other = f"{len(missed)} of {len(rows) - len(gathered)} others would have been, by a fifth"
    return finish([Claim(f"{text} at batch 64", not slower), Claim(other, len(missed) <= 2)])


def row(inputs: int, outputs: int, share: float) -> dict[str, Any]:
    """One layer: time with a Gather as a share of the time without, by batch size."""
    read = round(share * inputs)
    found: dict[str, Any] = {"inputs": inputs, "read": read, "outputs": outputs}
    for batch in BATCHES:
        found[f"batch {batch}"] = ratio(inputs, read, outputs, batch)
    found["gathered"] = is_faster(inputs, read, outputs)
    return found


def ratio(inputs: int, read: int, outputs: int, batch: int) -> float:
    """Median over neighbours in time."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((inputs, outputs)).astype(np.float32)
    kept = np.sort(rng.choice(inputs, read, replace=False))
    sessions = [
        session("y = MatMul(x, W)", inputs, {"W": weight}),
        session(
            "g = Gather<axis = -1>(x, i) y = MatMul(g, W)", inputs, {"W": weight[kept], "i": kept}
        ),
    ]
    feeds = {"x": rng.standard_normal((batch, inputs)).astype(np.float32)}
    return ratio_in_turns(sessions, feeds, REPEATS, WARM_UP)


def session(body: str, inputs: int, stored: dict[str, np.ndarray]) -> onnxruntime.InferenceSession:
    """A network of a few nodes, on one thread."""
    header = '<ir_version: 8, opset_import: ["": 17]>'
    model = onnx.parser.parse_model(
        f"{header} net (float[N, {inputs}] x) => (float[N, M] y) {{{body}}}"
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(x, n) for n, x in stored.items())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )


if __name__ == "__main__":
    sys.exit(main())
