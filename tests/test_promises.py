"""What SECURITY.md promises of the outside: no network, and no file but those that are named."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import onnx_ecp

ROOT = Path(__file__).parent.parent
# Prunes, and prints what a hook saw that SECURITY.md rules out.
WATCHED = """
import os, sys, tempfile
seen = []
def hook(event, arguments):
    if event.startswith("socket."):
        seen.append(event)
    if event == "open" and isinstance(arguments[0], str) and arguments[2] is not None:
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(os.path.abspath(arguments[0]))
sys.addaudithook(hook)
sys.path.insert(0, {root!r})
import onnx_ecp
onnx_ecp.optimize("in.onnx", "data.npz", output="out.onnx", report="r.json", masks="m.npz",
                  sparsity=0.5)
place = (os.getcwd(), tempfile.gettempdir())
print(*(x for x in seen if not x.startswith(place) and x != os.devnull), sep="\\n")
"""


@pytest.fixture
def folder(tmp_path, rng) -> Path:
    """A working directory with a model, data, and a home and a folder for temporary files."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        net (float[n, 8] x) => (float[n, 4] y) { h = MatMul(x, W) a = Relu(h) y = MatMul(a, V) }
    """)
    for name, shape in {"W": (8, 16), "V": (16, 4)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    work = tmp_path / "work"
    for made in (work, tmp_path / "home", tmp_path / "tmp"):
        made.mkdir()
    onnx.save(proto, work / "in.onnx")
    np.savez(work / "data.npz", x=rng.standard_normal((40, 8)).astype(np.float32))
    return work


def run(folder: Path, *before: str, **more: str) -> str:
    """What WATCHED prints with an empty home."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_", "PYTHON"))}
    environment = {
        **kept,
        "HOME": str(folder.parent / "home"),
        "TMPDIR": str(folder.parent / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }
    done = subprocess.run(
        [*before, sys.executable, "-c", WATCHED.format(root=str(ROOT))],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_socket_is_opened_and_no_other_file_is_written(folder):
    assert run(folder) == ""
    assert list((folder.parent / "home").iterdir()) == []
    assert list((folder.parent / "tmp").iterdir()) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "data.npz", "in.onnx", "m.npz", "out.onnx", "r.json",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_system_sees_no_socket_either(folder):
    trace = folder.parent / "trace"
    calls = "trace=socket,connect,openat,creat,mkdir,mkdirat"
    run(folder, "strace", "-f", "-qq", "-e", calls, "-o", str(trace))
    told = trace.read_text(errors="replace")
    assert "in.onnx" in told  # it did trace
    assert not re.search(r"\b(socket|connect)\(", told)
    written = re.findall(
        r'\b(?:openat\([^"]*|creat\(|mkdir\(|mkdirat\([^"]*)"([^"]*)"([^\n]*)', told
    )
    made = [path for path, flags in written if "O_CREAT" in flags]
    assert [x for x in made if x.startswith("/") and not x.startswith(str(folder.parent))] == []


def test_who_wants_the_runtime_to_report_may_say_so(folder):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, onnx_ecp; "
    code += "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, used in ({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0"):
        kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True
        )
        assert done.stdout.strip() == used
    assert onnx_ecp.__file__.startswith(str(ROOT))
