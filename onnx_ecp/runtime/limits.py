"""What a run may take: time, threads, memory."""

from __future__ import annotations

import contextvars
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController

from onnx_ecp.errors import ProviderError
from onnx_ecp.runtime.supervision import tell

_DEADLINE: contextvars.ContextVar[tuple[float, float] | None] = contextvars.ContextVar(
    "deadline", default=None
)
_THREADS: contextvars.ContextVar[int | None] = contextvars.ContextVar("threads", default=None)


@contextmanager
def deadline(seconds: float | None, *, soft: bool = False) -> Iterator[None]:
    """Let everything inside end with ProviderError after this many seconds (None: no limit).

    A limit around it holds too. A ``soft`` one is that of an attempt that may fail: work that
    cannot be interrupted may exceed it, where any other makes the parent end the process.
    """
    outer = _DEADLINE.get()
    until = None if seconds is None else (time.monotonic() + seconds, seconds)
    if until is None or (outer is not None and outer <= until):
        yield
        return
    token = _DEADLINE.set(until)
    if not soft:
        tell("limit", repr(seconds))
    try:
        yield
    finally:
        _DEADLINE.reset(token)
        if not soft:
            tell("limit", "" if outer is None else repr(max(0.0, outer[0] - time.monotonic())))


def check_deadline() -> float | None:
    """Seconds left, None without a limit; raises ProviderError when none are."""
    limit = _DEADLINE.get()
    if limit is None:
        return None
    left = limit[0] - time.monotonic()
    if left <= 0:
        raise ProviderError(
            f"the time limit of {limit[1]:g} s is over.",
            hint="Raise --timeout, or use fewer --samples.",
        )
    return left


@cache
def _blas() -> Any:
    return ThreadpoolController()  # type: ignore[no-untyped-call]


@contextmanager
def blas_threads(limit: int | None) -> Iterator[None]:
    """Let NumPy's matrix products use this many threads inside (None: their own choice)."""
    with _blas().limit(limits=limit, user_api="blas"):
        yield


@contextmanager
def threads_of(limit: int | None) -> Iterator[None]:
    """Let everything inside but ONNX Runtime use this many threads (None: all cores)."""
    token = _THREADS.set(limit)
    try:
        with blas_threads(limit):
            yield
    finally:
        _THREADS.reset(token)


def workers() -> int:
    """Threads that may work side by side: those of ``threads_of``, else one per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _THREADS.get() or cores or 1


def arithmetic() -> tuple[Any, ...]:
    """What the last digits of sums depend on here: the machine, its threads, its products."""
    names = ("internal_api", "version", "architecture", "num_threads")
    blas = [[module.get(name) for name in names] for module in _blas().info()]
    return platform.machine(), workers(), sorted(blas, key=repr)


def free_memory() -> int:
    """Bytes that this process could still take without swapping, as far as the system tells."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found += [int(x.split()[1]) * 1024 for x in file if x.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        most, used = (group.joinpath(f"memory.{x}").read_text() for x in ("max", "current"))
        if most.strip() != "max":
            found.append(int(most) - int(used))
    except (OSError, ValueError):
        pass  # not Linux, or no control group with a limit
    if not found and hasattr(os, "sysconf"):  # what is free, macOS does not tell
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(min(found, default=2**32), 2**20)


def parse_duration(value: float | str) -> float:
    """Seconds: a number, or one with s, m or h behind it.

    >>> parse_duration("1.5m"), parse_duration(90)
    (90.0, 90.0)

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(value).strip().lower())
    if match is None:
        raise ValueError(f"{value!r} is no time")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
