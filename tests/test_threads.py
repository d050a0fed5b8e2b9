"""However many layers there are, the number of threads stays the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys, threading, time, re
import numpy as np, onnx
from onnx import helper, numpy_helper
import onnx_ecp

def deep(layers):
    rng = np.random.default_rng(0)
    nodes, stored, at = [], [], "x"
    for k in range(layers):
        values = np.eye(4) + 0.05 * rng.standard_normal((4, 4))
        stored.append(numpy_helper.from_array(values.astype(np.float32), f"w{k}"))
        nodes.append(helper.make_node("MatMul", [at, f"w{k}"], [f"h{k}"], f"m{k}"))
        nodes.append(helper.make_node("Tanh", [f"h{k}"], [f"r{k}"]))
        at = f"r{k}"
    ends = [helper.make_tensor_value_info(n, 1, ["n", 4]) for n in ("x", at)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

most, done = [0], threading.Event()

def watch():
    while not done.wait(0.002):
        status = open("/proc/self/status").read()
        most[0] = max(most[0], int(re.search(r"Threads:\\s+(\\d+)", status)[1]))

watcher = threading.Thread(target=watch)
watcher.start()
x = np.random.default_rng(1).standard_normal((40, 4)).astype(np.float32)
onnx_ecp.optimize(
    deep(int(sys.argv[1])), x, sparsity=0.3, effort="fast", measure=False, threads=2, metric="l2"
)
done.set()
watcher.join()
print(most[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads in /proc")
def test_threads_do_not_grow_with_layers():
    def threads(layers):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(layers)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        return int(re.search(r"\d+", done.stdout)[0])

    few, many = threads(18), threads(40)
    assert many <= few + 3


def test_only_the_last_sessions_stay_open():
    from onnx_ecp.runtime.session import Openings

    opened = []
    pool = Openings(lambda model: opened.append(model) or model, most=2)
    for model in ("a", "b", "a", "c", "a", "b"):
        assert pool.session(model) == model
    assert opened == ["a", "b", "c", "b"]
