"""What runs leave for later runs: a folder of results, by a digest of all they depend on.

An entry is one ``.npz`` file of arrays and one text of JSON, named after its key and after the
digest of its own bytes. It is written whole, or not at all; what is cut, changed or of somebody
else is not read. A key says what computes (the source of this package, the versions, the threads),
on what, and how: with and without the folder a run gives the same result.
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import os
import re
import tempfile
import time
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from onnx_ecp.errors import OutputError, UsageError
from onnx_ecp.runtime.digest import UnknownValueError, digest, of_this_installation
from onnx_ecp.runtime.lazy import size_text
from onnx_ecp.runtime.limits import arithmetic
from onnx_ecp.runtime.records import pack, unpack
from onnx_ecp.runtime.supervision import tell
from onnx_ecp.runtime.workers import crew

T = TypeVar("T")
# What a result is, for people, and all that it depends on but what computes: together its key.
Asked = tuple[str, Callable[[], Sequence[Any]]]
# Of the files; another number, and entries of the one before are foreign.
FORMAT = 1
# What a folder may take unless told otherwise.
LIMIT = 10 * 2**30
_NAME = re.compile(r"([0-9a-f]{40})\.([0-9a-f]{40})\.npz")
_RECORD = "record"
_BLOCK = 2**20
# What reading something that is no entry raises.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)
_CURRENT: contextvars.ContextVar[Cache | None] = contextvars.ContextVar("cache", default=None)


@dataclass(frozen=True)
class Entry:
    """A file of the folder.

    Args:
        name: of the file.
        what: is in it, for people; empty where it cannot be read.
        bytes: it takes.
        used: when it was written or read last, seconds since 1970.
        state: "whole", "damaged", "outdated" (of another version of the format), "unfinished" (of a
            run that was ended, or is at it) or "foreign".
    """

    name: str
    what: str
    bytes: int
    used: float
    state: str


class Cache:
    """A folder of results.

    Args:
        folder: made where it is missing, for its owner alone.
        limit: bytes that entries may take together; the oldest go first.

    Attributes:
        warnings: what the user must know, one sentence each.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = Path(folder), limit
        self.warnings: list[str] = []
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self.folder.stat().st_mode
        except OSError as error:
            raise OutputError(
                f"{folder}: {error.strerror or error}.", hint="Name a folder for --cache."
            ) from error
        if os.name == "posix" and mode & 0o022:
            self._warn(
                f"{folder}: others may write into this cache, and what they put there is taken for "
                "what was computed; use a folder of your own."
            )

    def get(self, key: str, kinds: Iterable[type]) -> Any:
        """The value that was kept under a key; None where there is none that is whole.

        Args:
            key: 40 hexadecimal digits.
            kinds: the dataclasses that it may be made of.
        """
        kinds = tuple(kinds)
        for path in sorted(self.folder.glob(f"{key}.*.npz")):
            match = _NAME.fullmatch(path.name)
            try:
                if match is None:
                    raise ValueError("its name is none that is given here")
                value = _read(path, key, match[2], kinds)
                os.utime(path)
            except FileNotFoundError:  # another run has made room
                continue
            except _UNREADABLE as error:
                self.ignore(path.name, str(error))
                continue
            return value
        return None

    def put(self, key: str, what: str, value: Any) -> None:
        """Keep a value; where that fails nothing is kept, and the user is told.

        Args:
            key: 40 hexadecimal digits.
            what: it is, for people.
            value: see ``records.pack``.
        """
        try:
            self._put(key, what, value)
        except OSError as error:
            self._warn(
                f"{self.folder}: the cache cannot be written ({error.strerror or error}); what "
                "was computed is not kept."
            )

    def ignore(self, name: str, why: str) -> None:
        """Tell the user that a file is left alone, and what is done instead."""
        self._warn(f"{self.folder / name}: ignored, and computed anew: {why}.")

    def _put(self, key: str, what: str, value: Any) -> None:
        handle, name = tempfile.mkstemp(prefix=".onnx-ecp-", suffix=".part", dir=self.folder)
        part = Path(name)
        tell("temporary", os.path.abspath(part))
        try:
            with os.fdopen(handle, "w+b") as stream:
                _write(stream, key, what, value)
                stream.flush()
                os.fsync(stream.fileno())
                own = _digest_of(stream)
            size = part.stat().st_size
            if size > self.limit:
                self._warn(
                    f"{self.folder}: {what} take {size_text(size)}, more than the limit of the "
                    f"cache ({size_text(self.limit)}): not kept."
                )
                return
            for old in self.folder.glob(f"{key}.*.npz"):  # damaged, or it would have been read
                old.unlink(missing_ok=True)
            os.replace(part, self.folder / f"{key}.{own}.npz")
        finally:
            part.unlink(missing_ok=True)
        self._make_room()

    def _make_room(self) -> None:
        """Remove what was used longest ago until the rest is within the limit."""
        found = []
        for path in self.folder.glob("*.npz"):
            with suppress(FileNotFoundError):
                if _NAME.fullmatch(path.name):
                    about = path.stat()
                    found.append((about.st_mtime_ns, path, about.st_size))
        total = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if total <= self.limit:
                return
            with suppress(OSError):  # Windows keeps what another run reads
                path.unlink(missing_ok=True)
                total -= size

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


@dataclass(frozen=True)
class Contents:
    """What lies in a folder, or was removed from it.

    Args:
        folder: its path.
        entries: the files, those used longest ago first.
        bytes: that they take together.
        removed: whether they are gone.
    """

    folder: str
    entries: tuple[Entry, ...]
    bytes: int
    removed: bool = False

    @staticmethod
    def of(folder: str | Path, entries: Iterable[Entry], *, removed: bool = False) -> Contents:
        """Those of files."""
        found = tuple(entries)
        return Contents(str(folder), found, sum(entry.bytes for entry in found), removed)


def contents(folder: str | Path) -> Contents:
    """What lies in a folder; every entry is read to its end.

    Raises:
        UsageError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder}: no such folder.", hint="Name the one given to --cache.")
    found = sorted(_entries(Path(folder)), key=lambda entry: (entry.used, entry.name))
    return Contents.of(folder, found)


def clear(folder: str | Path) -> Contents:
    """Remove all that was kept in a folder, damaged or not; the files of others stay.

    Raises:
        UsageError: there is no such folder.
        OutputError: a file cannot be removed.
    """
    gone = [entry for entry in contents(folder).entries if entry.state != "foreign"]
    for entry in gone:
        try:
            Path(folder, entry.name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: {error.strerror or error}.",
                hint="Clear a folder that you may write into.",
            ) from error
    return Contents.of(folder, gone, removed=True)


def _entries(folder: Path) -> Iterator[Entry]:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.is_file():
                about = path.stat()
                what, state = _told(path)
                yield Entry(path.name, what, about.st_size, about.st_mtime, state)


@contextmanager
def caching(folder: str | Path | None, limit: int | None = None) -> Iterator[None]:
    """Let everything inside keep what takes long in a folder, and look there first (None: no)."""
    token = _CURRENT.set(None if folder is None else Cache(folder, limit or LIMIT))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Cache | None:
    """The folder of ``caching``, if any."""
    return _CURRENT.get()


def cache_warnings() -> Sequence[str]:
    """What the user must know of the cache."""
    cache = _CURRENT.get()
    return () if cache is None else tuple(cache.warnings)


def recalled(
    asked: Asked,
    compute: Callable[[], T],
    kinds: Iterable[type] = (),
    fits: Callable[[T], bool] = lambda found: True,
    others: Iterable[Asked] = (),
    worth: Callable[[T], bool] = lambda found: True,
) -> T:
    """What was computed before of the same, else compute it and keep it.

    Args:
        asked: what it is, and what it depends on.
        compute: does the work.
        kinds: the dataclasses that it may be made of.
        fits: whether something read can be the result: its names, its number.
        others: what would do as well, where it is there.
        worth: whether a result is to be kept.
    """
    cache = _CURRENT.get()
    if cache is None:
        return compute()
    try:
        keys = [_key(one) for one in (asked, *others)]
    except UnknownValueError:
        return compute()
    for key in keys:
        found = cache.get(key, kinds)
        if found is not None and fits(found):
            return found
        if found is not None:
            cache.ignore(key, "it holds something else")
    found = compute()
    if worth(found):
        cache.put(keys[0], asked[0], found)
    return found


def _key(asked: Asked) -> str:
    what, of = asked
    # Sums over parts of the data are rounded otherwise than sums over all; not so on more workers.
    apart = (there := crew()) and there.threads
    return digest(FORMAT, of_this_installation(), arithmetic(), apart, what, *of())[:40]


def _write(stream: Any, key: str, what: str, value: Any) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        count = 0

        def keep(array: np.ndarray) -> str:
            nonlocal count
            name, count = f"a{count}", count + 1
            add(name, array)
            return name

        def add(name: str, array: np.ndarray) -> None:
            info = zipfile.ZipInfo(f"{name}.npy")  # without the time: equal values, equal bytes
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)

        record = {"format": FORMAT, "key": key, "what": what, "value": pack(value, keep)}
        add(_RECORD, np.frombuffer(json.dumps(record).encode(), np.uint8))


class _Arrays:
    """The arrays of a file, read from it when they are asked for; it stays open for them."""

    def __init__(self, path: Path, expected: str) -> None:
        stream = path.open("rb")
        weakref.finalize(self, stream.close)
        if _digest_of(stream) != expected:
            raise ValueError("it was cut or changed")
        self._archive = zipfile.ZipFile(stream)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one."""
        with self._archive.open(f"{name}.npy") as member:
            found: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
            return found


def _record(arrays: _Arrays) -> Mapping[str, Any]:
    """The text of an entry.

    Raises:
        ValueError: it is of another format.
    """
    record = json.loads(arrays[_RECORD].tobytes())
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError("it is of another format")
    return record


def _read(path: Path, key: str, expected: str, kinds: Iterable[type]) -> Any:
    arrays = _Arrays(path, expected)
    record = _record(arrays)
    if record["key"] != key:
        raise ValueError("it is of something else")
    return unpack(record["value"], kinds, arrays.__getitem__)


def _told(path: Path) -> tuple[str, str]:
    """What is in a file, for people, and its state."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return "", "unfinished" if re.fullmatch(r"\.onnx-ecp-\w+\.part", path.name) else "foreign"
    try:
        arrays = _Arrays(path, match[2])
    except _UNREADABLE:
        return "", "damaged"
    try:
        record = _record(arrays)
        return str(record["what"]), "whole" if record["key"] == match[1] else "damaged"
    except _UNREADABLE:
        return "", "outdated"


def _digest_of(stream: BinaryIO) -> str:
    stream.seek(0)
    total = hashlib.sha256()
    while block := stream.read(_BLOCK):
        total.update(block)
    return total.hexdigest()[:40]


def age_text(entry: Entry, now: float | None = None) -> str:
    """How long ago an entry was used, for people.

    >>> age_text(Entry("", "", 0, 0.0, ""), 7300.0)
    '2 h'
    """
    seconds = max((time.time() if now is None else now) - entry.used, 0.0)
    unit, length = next(
        (u, n)
        for u, n in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
        if seconds >= n or n == 1
    )
    return f"{seconds // length:.0f} {unit}"
