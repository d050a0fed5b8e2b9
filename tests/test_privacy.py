"""No network, and no files but those that are asked for, whatever ONNX Runtime does by itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def environment(home, **more):
    kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")} | more


def optimize(folder, home, *before):
    """Run the command line in a folder, with a home of its own."""
    shutil.copy(ROOT / "models" / "digits.onnx", folder)
    shutil.copy(ROOT / "models" / "digits.npz", folder)
    arguments = ["optimize", "digits.onnx", "out.onnx", "-m", "ecp", "-q"]
    return subprocess.run(
        [*before, sys.executable, "-m", "onnx_ecp", *arguments],
        cwd=folder,
        env=environment(home, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_nothing_is_written_but_the_output(tmp_path):
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    optimize(folder, home)
    assert {path.name for path in folder.iterdir()} == {"digits.onnx", "digits.npz", "out.onnx"}
    assert list(home.rglob("*")) == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_socket_leads_anywhere(tmp_path):
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    trace = tmp_path / "trace"
    optimize(folder, home, "strace", "-f", "-qq", "-e", "trace=network", "-o", str(trace))
    lines = trace.read_text().splitlines()
    assert not [line for line in lines if "AF_INET" in line or "connect(" in line]


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_the_variable_is_set_unless_the_user_has(given, expected):
    code = "import onnx_ecp, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    more = {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(Path("/"), PYTHONPATH=str(ROOT), **more),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
