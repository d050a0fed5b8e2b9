"""Time limits and signals hold, and crashes are told, where compiled code cannot be interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from onnx_ecp.errors import OnnxEcpError, ProviderError
from onnx_ecp.runtime import supervision
from onnx_ecp.runtime.limits import check_deadline, deadline
from onnx_ecp.runtime.supervision import supervised, tell

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
# Compiled code that heeds no signal and lets no other thread run.
STUCK = (
    "import ctypes; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}); "
    "print('ready', flush=True); ctypes.PyDLL(None).sleep(60)"  # before that, Python heeds it
)
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
PROGRAM = (
    START
    + """
import os, signal
from onnx_ecp.errors import OnnxEcpError, ProviderError
from onnx_ecp.runtime.limits import deadline
from onnx_ecp.runtime.supervision import supervised, tell
def explain(error):
    print(error.message, "|", error.hint, flush=True)
    return error.exit_code
def work():
    {work}
    return 0
code = supervised(work, explain)
print("code", code)
"""
)


def told(work: str, send: int = 0) -> list[str]:
    """What a supervised program prints, after a signal to its parent if any."""
    lines = work.replace("\n", "\n    ")
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(work=lines)], stdout=subprocess.PIPE, text=True
    ) as process:
        if send:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(send)
        output, _ = process.communicate(timeout=40)
    return output.splitlines()


def test_what_works_is_passed_on():
    assert told("print('done')") == ["done", "code 0"]
    assert told("return 7") == ["code 7"]


def test_a_limit_holds_where_nothing_can_be_interrupted():
    _, *found = told(f"with deadline(0.2):\n    {STUCK}")
    assert found[0].startswith("the time limit of 0.2 s is over. | ")
    assert "Nothing was written." in found[0]
    assert found[1] == "code 6"


def test_a_limit_that_was_kept_is_over():
    work = "import time\nwith deadline(0.1):\n    pass\ntime.sleep(1.5)\nprint('done')"
    assert told(work) == ["done", "code 0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_holds_where_nothing_can_be_interrupted(number):
    found = told(STUCK, number)
    assert found == ["interrupted. | Nothing was written.", f"code {128 + number}"]


@pytest.mark.parametrize("name", ["SIGFPE", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGKILL"])
def test_a_crash_is_told_with_its_name(name):
    found = told(f"os.kill(os.getpid(), signal.{name})")
    assert name in found[0]
    assert "Nothing was written." in found[0]
    assert found[1] == "code 6"


def test_what_was_written_before_is_told():
    found = told("tell('kept', 'out.onnx')\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert "Written: out.onnx." in found[0]


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    telling = "\n".join(f"tell('temporary', {str(tmp_path / x)!r})" for x in ("folder", "file"))
    told(f"{telling}\nos.kill(os.getpid(), signal.SIGKILL)")
    assert list(tmp_path.iterdir()) == []


STAGED = """
from pathlib import Path
from onnx_ecp.graph.staging import Staging
with Staging() as staging:
    assert staging.reserve(Path({folder!r}) / "reserved")
    staging.write(Path({folder!r}) / "file", [b"x"])
    {then}
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def test_what_a_killed_process_staged_is_removed(tmp_path):
    found = told(STAGED.format(folder=str(tmp_path), then=KILLED))
    assert "Nothing was written." in found[0]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_committed_stays_and_is_told(tmp_path):
    found = told(STAGED.format(folder=str(tmp_path), then=f"staging.commit(); {KILLED}"))
    assert f"Written: {tmp_path / 'file'}." in found[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_limit_around_holds_after_one_inside():
    found = told(f"with deadline(0.5):\n    with deadline(0.1):\n        pass\n    {STUCK}")
    assert found[0] == "ready"
    assert found[1].startswith("the time limit of ")
    assert found[2] == "code 6"


def test_files_that_take_their_places_are_not_cut_off():
    found = told("import time\nwith deadline(0.1):\n    tell('committing')\n    time.sleep(1.6)")
    assert found == ["code 0"]


def test_a_child_does_not_outlive_its_parent(tmp_path):
    work = "import time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    program = PROGRAM.format(work=work.replace("\n", "\n    "))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("it is still there")


def test_without_a_parent_nothing_is_told():
    assert supervision._channel is None
    tell("kept", "out.onnx")
    with deadline(60):
        pass


def test_threads_are_not_forked():
    """A copy of a process with threads may hold locks for ever: there the work is done at once."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:

        def explain(error: OnnxEcpError) -> int:
            return error.exit_code

        assert supervised(os.getpid, explain) == os.getpid()
    finally:
        stop.set()
        thread.join()


def test_the_limit_of_an_attempt_is_not_that_of_the_process():
    work = "import time\nwith deadline(0.1, soft=True):\n    time.sleep(1.5)\nprint('done')"
    assert told(work) == ["done", "code 0"]


def test_a_limit_around_holds_inside():
    with deadline(0.0), deadline(60), pytest.raises(ProviderError, match="time limit of 0 s"):
        check_deadline()
    with deadline(60), deadline(0.0), pytest.raises(ProviderError, match="time limit of 0 s"):
        check_deadline()
    with deadline(0.0), deadline(None), pytest.raises(ProviderError):
        check_deadline()
