"""A process that watches over the one that works, where compiled code cannot be interrupted.

A kernel, the creation of a session or the decompression of a file may run for minutes without
heeding a signal, and a foreign model may crash the process. So the command line works in a child
process; its parent holds the time limit, passes signals on, and says what happened where the child
no longer can. The child tells it what it must know through a pipe. Nothing here is heavy to import.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from onnx_ecp.errors import CalibrationError, Interrupted, OnnxEcpError, OutputError, ProviderError

# Seconds that the child has to end by itself once it should.
GRACE = 1.0
# What a crash of compiled code looks like; the others were sent by somebody.
_CRASHES = tuple(
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGFPE", "SIGBUS", "SIGABRT", "SIGILL", "SIGSYS")
    if hasattr(signal, name)
)
_channel: int | None = None
# Files of this process that stand in their places.
written: list[str] = []


def tell(what: str, value: str = "") -> None:
    """Tell the parent something, where there is one.

    Args:
        what: "limit" with its seconds, or none for no limit; "committing" while files take their
            places, "committed" after it; "temporary" or "kept" with an absolute path; "ended".
        value: what belongs to it.
    """
    if what == "kept":
        written.append(value)
    if _channel is not None:
        with suppress(OSError):
            os.write(_channel, f"{what} {value}".encode("utf-8", "surrogateescape") + b"\0")


def supervised(work: Callable[[], int], explain: Callable[[OnnxEcpError], int]) -> int:
    """Do the work in a child process and give its exit code.

    Args:
        work: what to do; its value is the exit code.
        explain: says what went wrong where the child could not; its value is the exit code.
    """
    if not hasattr(os, "fork") or threading.active_count() > 1:
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    told, telling = os.pipe()
    watched, watching = os.pipe()  # closes when the parent is gone
    # The child inherits blocked signals: none may arrive before there is somebody to pass it on.
    handled = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    child = os.fork()
    if child == 0:
        os.close(told)
        os.close(watching)
        _work_as_child(work, telling, watched, before)
    os.close(telling)
    os.close(watched)
    try:
        return _Watch(child, told).until_the_end(before, explain)
    finally:
        os.close(told)
        os.close(watching)


def _work_as_child(work: Callable[[], int], telling: int, watched: int, unblocked: Any) -> NoReturn:
    """Work, and end at once: threads that cannot be interrupted are not waited for."""
    global _channel
    _channel = telling
    code = 1
    try:
        threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        code = work()
        code = _flushed(code)
    finally:
        tell("ended")
        os._exit(code)


def _flushed(code: int) -> int:
    """The exit code, after what is still to be printed was."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or OutputError.exit_code
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    return code


def _end_with_parent(watched: int) -> None:
    with suppress(OSError):
        os.read(watched, 1)
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class _Watch:
    """What the parent knows of the child.

    Args:
        child: its process.
        told: where it tells.
        limit: seconds that were asked for; None without a limit.
        until: when it must have ended; None while it may work on.
        signalled: the signal that was passed on.
        committing: whether files take their places, which must not be cut off.
        kept: files that stand in their places.
        temporary: files and folders to remove where it no longer can.
        ended: whether the child came to its end, instead of being ended from inside.
    """

    child: int
    told: int
    limit: float | None = None
    until: float | None = None
    signalled: int = 0
    committing: bool = False
    kept: list[str] = field(default_factory=list)
    temporary: set[str] = field(default_factory=set)
    ended: bool = False
    rest: bytes = b""

    def until_the_end(self, unblocked: Any, explain: Callable[[OnnxEcpError], int]) -> int:
        """Wait for the child; its exit code, or that of what happened to it."""
        handlers = {
            number: signal.signal(number, self._pass_on)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        try:
            cut = self._listen()
            _, status = os.waitpid(self.child, 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        code = os.waitstatus_to_exitcode(status)
        if code >= 0 and self.ended:
            return code
        for path in self.temporary:
            self._remove(path)
        return explain(self._left(code) if code >= 0 else self._what_happened(-code, cut))

    def _listen(self) -> bool:
        """Until the child closes the pipe, which its end does; whether it had to be killed."""
        cut = False
        while True:
            left = None if self.until is None or self.committing else self.until - time.monotonic()
            if left is not None and left <= 0:
                with suppress(ProcessLookupError):
                    os.kill(self.child, signal.SIGKILL)
                return True
            # A signal between the check and the waiting is seen a moment later.
            ready, _, _ = select.select(
                [self.told], [], [], 0.2 if left is None else min(left, 0.2)
            )
            if ready:
                data = os.read(self.told, 65536)
                if not data:
                    return cut
                self._hear(data)

    def _hear(self, data: bytes) -> None:
        *messages, self.rest = (self.rest + data).split(b"\0")
        for message in messages:
            what, _, value = message.decode("utf-8", "surrogateescape").partition(" ")
            if what == "limit":
                self.limit = float(value) if value else None
                if not self.signalled:
                    end = time.monotonic() + GRACE
                    self.until = None if self.limit is None else end + self.limit
            elif what in ("committing", "committed"):
                self.committing = what == "committing"
            elif what == "ended":
                self.ended = True
            elif what == "temporary":
                self.temporary.add(value)
            elif what == "kept":
                self.kept.append(value)
                self.temporary.discard(value)

    def _pass_on(self, number: int, frame: Any) -> None:
        if not self.signalled:
            self.signalled = number
            self.until = time.monotonic() + GRACE
        with suppress(ProcessLookupError):
            os.kill(self.child, number)

    def _left(self, code: int) -> OnnxEcpError:
        """Why the child is gone without having come to its end."""
        return CalibrationError(
            f"the process was left with code {code}: a calibration script, or a library, did that.",
            hint=f"{self._written()} Look for os._exit in the script.",
        )

    def _written(self) -> str:
        return f"Written: {', '.join(self.kept)}." if self.kept else "Nothing was written."

    def _what_happened(self, number: int, cut: bool) -> OnnxEcpError:
        """Why the child was ended by a signal."""
        written = self._written()
        if self.signalled:
            return Interrupted(self.signalled, written)
        if cut:
            return ProviderError(
                f"the time limit of {self.limit:g} s is over.",
                hint=f"Raise --timeout, or use fewer --samples. {written}",
            )
        name = signal.Signals(number).name
        if number in _CRASHES:
            why = (
                "A file that was being read was cut short, or the disk failed."
                if name == "SIGBUS"
                else "Something in the model makes its kernels crash, such as an integer division "
                "by zero or indices beyond an array; run it in ONNX Runtime alone to see."
            )
            return ProviderError(
                f"ONNX Runtime, or another compiled library, crashed ({name}).",
                hint=f"{written} {why}",
            )
        return ProviderError(
            f"the process was ended by {name}, most likely because memory ran out.",
            hint=f"{written} Use a smaller --batch-size, fewer --samples or a lower --max-memory.",
        )

    @staticmethod
    def _remove(path: str) -> None:
        with suppress(OSError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
