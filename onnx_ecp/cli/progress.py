"""Bars on a terminal: how far each kind of work is, and how long it will still take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Pace:
    """How fast work goes on, averaged since it began.

    The speed of the last half minute, which Rich goes by, is unknown where one step takes longer.

    Args:
        began: seconds on some clock.
        done: steps that were done then.
    """

    began: float
    done: int

    def left(self, now: float, done: int, of: int) -> str:
        """Hours, minutes and seconds to the last step; dashes before a step is done.

        >>> Pace(began=100.0, done=1).left(now=160.0, done=4, of=10)
        '0:02:00'
        """
        if done <= self.done:
            return "-:--:--"
        each = (now - self.began) / (done - self.done)
        return str(timedelta(seconds=round(each * (of - done))))


@contextmanager
def bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, one for each kind of work; nothing where nobody would see them."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        tasks: dict[str, TaskID] = {}
        last: dict[str, int] = {}
        paces: dict[str, Pace] = {}

        def advance(what: str, done: int, of: int) -> None:
            now = time.monotonic()
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=of, left="")
            if done < last.get(what, done + 1):  # for the first time, or again in the next stage
                paces[what] = Pace(now, done)
            last[what] = done
            left = paces[what].left(now, done, of)
            shown.update(tasks[what], completed=done, total=of, left=left)

        yield advance
