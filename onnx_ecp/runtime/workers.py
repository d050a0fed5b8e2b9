"""Work on parts of the data in other processes, here or on other machines.

A crew has places, each an executor of one worker; neighbouring parts go to one place, so that a
worker meets the parts again that it holds already. What tasks have in common (an observer, a
state, a part of the data) is sent once and held by the worker under the digest of its content: a
task names what it needs, and a worker that lacks some of it answers so and is sent it. A worker
that dies is replaced, and its tasks are done anew by the new one, which has all to be sent. What
the parts give is added up two by two, neighbours first, at the place where both are and by the
driver where they are not: the order follows from the number of parts alone, and sums are the same
for any number of workers.
"""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import wait as first_of
from typing import Any

from onnx_ecp.errors import ProviderError, UsageError, is_from_command_line, named_as_options
from onnx_ecp.runtime.digest import of_this_installation
from onnx_ecp.runtime.limits import blas_threads, check_deadline
from onnx_ecp.runtime.progress import Progress, silent

# Into how many parts data are cut at most.
PARTS = 16
# How often a task may lose its worker.
LOSSES = 3
# What a worker holds for later tasks, in bytes as they were sent.
HELD_BYTES = 2 * 2**30
# Seconds for Dask's scheduler to answer, and for workers to come back.
PATIENCE = 30


@dataclass(frozen=True)
class Held:
    """Something that workers hold.

    Args:
        key: equal keys, equal values.
        value: can be pickled.
    """

    key: str
    value: Any

    @cached_property
    def payload(self) -> bytes:
        """What is sent."""
        return pickle.dumps(self.value, pickle.HIGHEST_PROTOCOL)


@dataclass(frozen=True)
class Job:
    """What is done with one part.

    Args:
        held: what it needs beside what all jobs need, and workers may hold.
        given: the last arguments; they are sent every time.
    """

    held: tuple[Held, ...]
    given: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Missing:
    """The answer of a worker that lacks something.

    Args:
        keys: of what.
    """

    keys: tuple[str, ...]


@dataclass
class _Store:
    """What this worker holds, those used last at the end."""

    values: OrderedDict[str, tuple[Any, int]] = field(default_factory=OrderedDict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, key: str, value: Any, size: int) -> None:
        """Hold something."""
        self.values[key] = value, size

    def trim(self, needed: Collection[str]) -> None:
        """Let go what was used longest ago where all is too much, but nothing that is needed."""
        total = sum(size for _, size in self.values.values())
        for key in [key for key in self.values if key not in needed]:
            if total <= HELD_BYTES:
                return
            total -= self.values.pop(key)[1]

    def get(self, key: str) -> Any:
        """Something that is held."""
        self.values.move_to_end(key)
        return self.values[key][0]


_STORE = _Store()


def hold(key: str, value: Any, size: int = 0) -> None:
    """Let this worker hold something for later tasks, as if it had been sent."""
    _STORE.put(key, value, size)


def release(key: str) -> None:
    """Let this worker no longer hold something."""
    _STORE.values.pop(key, None)


def held_here(key: str, make: Callable[[], Any], size: int = 0) -> Any:
    """What this worker holds under a key, made where it does not; it takes about ``size`` bytes."""
    if key not in _STORE.values:
        hold(key, make(), size)
    return _STORE.get(key)


class Crew:
    """The workers of a run.

    Args:
        places: an executor each.
        renewed: gives another executor for a place whose worker has died; None: the executors see
            to that themselves.
        threads: that a worker uses.
        there: whether any worker is there; asked while results are waited for.
    """

    def __init__(
        self,
        places: Sequence[Executor],
        renewed: Callable[[int], Executor] | None = None,
        threads: int = 1,
        there: Callable[[], bool] = lambda: True,
    ) -> None:
        self._places, self._renewed, self.threads = list(places), renewed, threads
        self._there, self._seen = there, time.monotonic()

    def map(
        self,
        function: Callable[..., Any],
        held: Sequence[Held],
        jobs: Sequence[Job],
        progress: Progress = silent,
        what: str = "",
        places: Sequence[int] | None = None,
    ) -> list[Any]:
        """``function(*values of held, *values of job.held, *job.given)`` for every job, in order.

        Args:
            function: of a module.
            held: what all jobs need.
            jobs: one for each part of the data.
            progress: called after every job.
            what: for progress.
            places: of the jobs; None: in turns.

        Raises:
            ProviderError: workers die again and again, or are of another version.
            OnnxEcpError: whatever a job raises.
        """
        results: list[Any] = [None] * len(jobs)
        lost = [0] * len(jobs)
        # What a job was found to lack, on whatever worker: with all of it, it can be done anywhere.
        lacking: list[set[str]] = [set() for _ in jobs]
        at = [i % len(self._places) for i in range(len(jobs))] if places is None else places
        waiting: dict[Future[Any], int] = {}
        common = (of_this_installation(), is_from_command_line(), self.threads, function)

        def submit(number: int) -> None:
            job = jobs[number]
            needed = (*held, *job.held)
            keys = [x.key for x in needed]
            payloads = {x.key: x.payload for x in needed if x.key in lacking[number]}
            place = at[number]
            try:
                future = self._places[place].submit(_done, *common, keys, payloads, job.given)
            except BrokenExecutor:
                future = Future()
                future.set_exception(BrokenExecutor("its worker has died"))
            waiting[future] = number

        def take(future: Future[Any], number: int) -> bool:
            """Whether a job is done; where it is not, it was submitted again."""
            try:
                found = future.result()
            except Exception as error:
                # Dask's own name for a task whose workers died again and again.
                if type(error).__name__ == "KilledWorker":
                    raise _too_many(error) from error
                if not isinstance(error, BrokenExecutor | CancelledError):
                    raise
                lost[number] += 1
                if lost[number] > LOSSES:
                    raise _too_many(error) from error
                self._renew(at[number])
                submit(number)
                return False
            if isinstance(found, _Missing):
                lacking[number].update(found.keys)
                submit(number)
                return False
            results[number] = found
            return True

        for number in range(len(jobs)):
            submit(number)
        done = 0
        try:
            while waiting:
                check_deadline()
                ready, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                if not ready and not self._is_there():
                    waiting.clear()  # there is nobody to be told that they are not wanted
                    raise ProviderError(
                        f"no worker has been there for {PATIENCE} seconds.",
                        hint="Look at the scheduler and its workers, and start again; with --cache "
                        "the run goes on where it was.",
                    )
                for future in ready:
                    if take(future, waiting.pop(future)):
                        done += 1
                        progress(what, done, len(jobs))
        finally:
            for future in waiting:
                future.cancel()
        return results

    def _is_there(self) -> bool:
        """Whether a worker was there lately."""
        now = time.monotonic()
        if now - self._seen > 1 and self._there():
            self._seen = now
        return now - self._seen < PATIENCE

    def total(
        self,
        function: Callable[..., Any],
        held: Sequence[Held],
        jobs: Sequence[Job],
        plus: Callable[[Any, Any], Any],
        progress: Progress = silent,
        what: str = "",
    ) -> Any:
        """The sum of what ``map`` would give, in an order that follows from the number of jobs.

        Args:
            function: see ``map``.
            held: see ``map``.
            jobs: at least one.
            plus: adds two results, that of the earlier job first; of a module.
            progress: called after every sum of a worker.
            what: for progress.
        """
        count, number = len(jobs), len(self._places)
        ends = [count * i // number for i in range(number + 1)]
        nodes = [
            (place, node)
            for place in range(number)
            for node in _nodes(ends[place], ends[place + 1], count)
        ]
        together = [
            Job(
                tuple(x for job in jobs[first:last] for x in job.held),
                (function, plus, len(held), [(len(j.held), j.given) for j in jobs[first:last]]),
            )
            for _, (first, last) in nodes
        ]
        places = [place for place, _ in nodes]
        found = self.map(_added_up, held, together, progress, what, places)
        known = {node: result for (_, node), result in zip(nodes, found, strict=True)}
        return _sum(known.get, plus, 0, _span(count), count)

    def _renew(self, place: int) -> None:
        """Another worker for a place, unless it has one already."""
        if self._renewed is None:
            return
        try:  # others that were lost with it may have seen to that
            self._places[place].submit(_nothing).cancel()
        except BrokenExecutor:
            self._places[place] = self._renewed(place)


def _span(count: int) -> int:
    """The least power of two that is as large."""
    return 1 << max(count - 1, 0).bit_length()


def _nodes(first: int, last: int, count: int) -> Iterator[tuple[int, int]]:
    """The largest nodes of the tree of sums over ``count`` parts that lie in a range of them."""

    def within(a: int, b: int) -> Iterator[tuple[int, int]]:
        end = min(b, count)
        if a >= last or end <= first:
            return
        if first <= a and end <= last:
            yield a, b
            return
        middle = (a + b) // 2
        yield from within(a, middle)
        yield from within(middle, b)

    yield from within(0, _span(count))


def _sum(
    known: Callable[[tuple[int, int]], Any],
    plus: Callable[[Any, Any], Any],
    a: int,
    b: int,
    count: int,
) -> Any:
    """The sum of a node of the tree, from those that are known."""
    found = known((a, b))
    if found is not None:
        return found
    middle = (a + b) // 2
    left = _sum(known, plus, a, middle, count)
    return left if middle >= count else plus(left, _sum(known, plus, middle, b, count))


def _added_up(*values: Any) -> Any:
    """The sum of the jobs of one node, on a worker."""
    *needed, function, plus, common, jobs = values
    shared, rest = needed[:common], iter(needed[common:])
    held = [[next(rest) for _ in range(number)] for number, _ in jobs]

    def one(node: tuple[int, int]) -> Any:
        a, b = node
        return function(*shared, *held[a], *jobs[a][1]) if b - a == 1 else None

    return _sum(one, plus, 0, _span(len(jobs)), len(jobs))


def _nothing() -> None:
    """A task that tells whether a place takes tasks."""


def _too_many(error: BaseException) -> ProviderError:
    return ProviderError(
        f"workers died {LOSSES + 1} times at the same part of the data.",
        hint="Most likely memory ran out, or a kernel crashed: use a smaller --batch-size, fewer "
        "--workers, or none to see the error. From a script, start work under "
        "`if __name__ == '__main__':`.",
    )


def _done(
    installation: str,
    from_command_line: bool,
    threads: int,
    function: Callable[..., Any],
    keys: Sequence[str],
    payloads: Mapping[str, bytes],
    given: tuple[Any, ...],
) -> Any:
    """One job, on the worker."""
    if installation != of_this_installation():
        raise ProviderError(
            "a worker has another version of onnx-ecp, or of what it computes with.",
            hint="Install the same versions everywhere.",
        )
    names = named_as_options() if from_command_line else nullcontext()
    token = _CREW.set(None)  # a worker has no workers
    try:
        with _STORE.lock, names, blas_threads(threads):
            for key, payload in payloads.items():
                hold(key, pickle.loads(payload), len(payload))  # from the run that it works for
            _STORE.trim(keys)
            missing = tuple(key for key in keys if key not in _STORE.values)
            if missing:
                return _Missing(missing)
            return function(*[_STORE.get(key) for key in keys], *given)
    finally:
        _CREW.reset(token)


_CREW: contextvars.ContextVar[Crew | None] = contextvars.ContextVar("crew", default=None)


def crew() -> Crew | None:
    """The workers of ``working``, if any."""
    return _CREW.get()


@contextmanager
def working(
    workers: int | None = None,
    dask: str | None = None,
    executor: Executor | Sequence[Executor] | None = None,
    threads: int | None = None,
) -> Iterator[None]:
    """Let parts of the data be looked at by workers inside.

    Args:
        workers: so many processes here.
        dask: address of a Dask scheduler, whose workers are used.
        executor: any other, such as one of mpi4py or of a cluster's batch system; best several with
            one worker each, since workers hold what they are sent.
        threads: that a worker uses; None: one.

    Raises:
        UsageError: more than one is given.
        ProviderError: Dask is not there, or its scheduler does not answer.
    """
    if sum(x is not None for x in (workers, dask, executor)) > 1:
        raise UsageError("--workers, --dask and an executor exclude each other.", hint="Give one.")
    using: AbstractContextManager[Crew | None]
    if workers is not None:
        using = _processes(workers, threads or 1)
    elif dask is not None:
        using = _cluster(dask, threads or 1)
    else:
        if isinstance(executor, Executor):  # nobody knows how many workers it has
            executor = [executor] * PARTS
        places = list(executor or ())
        using = nullcontext(Crew(places, None, threads or 1) if places else None)
    with using as found:
        token = _CREW.set(found)
        try:
            yield
        finally:
            _CREW.reset(token)


@contextmanager
def _processes(count: int, threads: int) -> Iterator[Crew]:
    """Processes of this machine, one a place; none outlives the run, however it ends."""
    made: list[ProcessPoolExecutor] = []

    def place(number: int) -> Executor:
        spawn = multiprocessing.get_context("spawn")  # threads of ONNX Runtime do not bear a fork
        with _trackers_silent():  # the first one starts one, which lets signals through again
            made.append(ProcessPoolExecutor(1, spawn, initializer=_begin))
        with _interrupts_blocked():
            made[-1].submit(_nothing)  # starts the worker
        return made[-1]

    try:
        yield Crew([place(number) for number in range(count)], place, threads)
    finally:
        processes = [p for pool in made for p in (getattr(pool, "_processes", None) or {}).values()]
        for pool in made:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            with suppress(OSError, ValueError):
                process.kill()
                process.join(PATIENCE)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Let a process that is started inside never see a Ctrl-C, which is its parent's."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _trackers_silent() -> Iterator[None]:
    """Let a tracker of semaphores that is started inside not warn where a killed run left some."""
    before = os.environ.get("PYTHONWARNINGS")
    silent = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = silent if not before else f"{before},{silent}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _begin() -> None:
    """A worker ends with its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"

    def end_with_parent() -> None:
        first_of([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _cluster(address: str, threads: int) -> Iterator[Crew]:
    """The workers of a Dask scheduler, one a place.

    Raises:
        ProviderError: Dask is not installed, nobody answers, or there are no workers.
    """
    try:
        import distributed
    except ImportError as error:
        raise ProviderError(
            "--dask needs the package distributed, which is not installed.",
            hint='Install it here and on the workers: pip install "onnx-ecp[distributed]".',
        ) from error
    try:
        client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ProviderError(
            f"{address}: no Dask scheduler answers.",
            hint="Start one with `dask scheduler`, and give its address, such as tcp://host:8786.",
        ) from error
    with client:

        def there() -> bool:
            with suppress(OSError, RuntimeError, ValueError, TimeoutError):
                return client.status == "running" and bool(client.nthreads())
            return False

        found = sorted(client.nthreads())
        if not found:
            raise ProviderError(
                f"{address}: the scheduler has no workers.",
                hint=f"Start some with `dask worker {address}`.",
            )
        # Where a worker is gone its tasks go to another one.
        places = [
            client.get_executor(workers=[one], allow_other_workers=True, pure=False)
            for one in found
        ]
        yield Crew(places, None, threads, there)
