"""Names in a column of a table for the terminal: cut where the room is short.

What networks call their nodes begins and ends alike: ``/encoder/layer.0/attention/query/MatMul``.
So all names of a column are cut at one place: in the middle, or where it leaves more of them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

from onnx_ecp.graph import printable

# Characters that a column of names has at least, and that of a name are looked at.
LEAST, MOST = 14, 240
_GAP = "..."

Cut = Callable[[str], str]


class Names:
    """The names of one column."""

    def __init__(self) -> None:
        self._known: dict[str, None] = {}
        self._cuts: dict[int, Cut] = {}

    def __call__(self, name: object) -> Name:
        """A cell for this name, cut as all names that this column will have."""
        text = printable(name, MOST)
        self._known[text] = None
        return Name(text, self)

    def cut(self, width: int) -> Cut:
        """What makes names of at most so many characters; for all that the column has."""
        if width not in self._cuts:
            long = [name for name in self._known if cell_len(name) > width]
            self._cuts[width] = best_cut(long, width)
        return self._cuts[width]


class Name:
    """A name that a table cuts to the width of its column."""

    def __init__(self, text: str, column: Names) -> None:
        self.text, self.column = text, column

    def __str__(self) -> str:
        return self.text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """At least LEAST wide, at most the name."""
        width = cell_len(self.text)
        return Measurement(min(width, LEAST), width).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """The name, or what the cut leaves of it."""
        width = options.max_width
        whole = cell_len(self.text) <= width
        shown = self.text if whole else self.column.cut(width)(self.text)
        yield Text(shown, no_wrap=True, overflow="crop")


def cut(name: object, width: int, head: int | None = None) -> str:
    """Both ends of a name that is longer than ``width``.

    Args:
        name: of anything; what cannot be printed is escaped.
        width: characters that there is room for.
        head: of them before the gap; half of them by default.

    >>> cut("/encoder/layer.0/attention/query/MatMul", 22)
    '/encoder/l...ry/MatMul'
    >>> cut("fc1", 22)
    'fc1'
    """
    text, room = printable(name, MOST), width - len(_GAP)
    if len(text) <= width:
        return text
    if room < 2:
        return text[:width]
    head = -(-room // 2) if head is None else head
    return f"{text[:head]}{_GAP}{text[len(text) - (room - head) :]}"


def window(name: str, width: int, start: int) -> str:
    """What stands in a long name from a place on, between two gaps.

    >>> window("/encoder/layer.0/attention/query/MatMul", 16, 9)
    '...layer.0/at...'
    """
    return f"{_GAP}{name[start : start + width - 2 * len(_GAP)]}{_GAP}"


def best_cut(names: Sequence[str], width: int) -> Cut:
    """The cut that leaves most names apart; of equal ones that nearest the middle.

    Args:
        names: longer than ``width``.
        width: characters that there is room for.
    """
    room, longest = width - len(_GAP), max(map(len, names), default=0)
    heads = sorted(range(1, max(room, 2)), key=lambda head: abs(2 * head - room))
    cuts: list[Cut] = [partial(cut, width=width, head=head) for head in heads]
    if width > 3 * len(_GAP):
        starts = range(1, longest - width + len(_GAP))
        cuts += [partial(window, width=width, start=start) for start in starts]
    best, most = cuts[0] if cuts else partial(cut, width=width), 0
    for made in cuts:
        apart = len({made(name) for name in names})
        if apart > most:
            best, most = made, apart
        if most == len(set(names)):
            break
    return best


def told_apart(names: Iterable[object], width: int) -> list[str]:
    """The names, those longer than ``width`` all cut at the place that leaves most apart.

    >>> told_apart(["fc", "/encoder/layer.0/query/MatMul", "/encoder/layer.1/query/MatMul"], 20)
    ['fc', '/en...0/query/MatMul', '/en...1/query/MatMul']
    """
    shown = [printable(name, MOST) for name in names]
    made = best_cut([name for name in dict.fromkeys(shown) if len(name) > width], width)
    return [made(name) if len(name) > width else name for name in shown]
