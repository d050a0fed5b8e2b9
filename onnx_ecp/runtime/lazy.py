"""Arrays that may be too many for memory: computed when asked for, or in a temporary file.

What is large in a run (statistics, scores, activations between two layers) goes through here, so
that memory is bounded by ``--max-memory`` and not by the model or the number of samples.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from onnx_ecp.errors import ProviderError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(value: int | str) -> int:
    """Bytes: a number, or one with K, M, G or T behind it (powers of 1024).

    >>> parse_size("1.5G"), parse_size(4096)
    (1610612736, 4096)

    Raises:
        ValueError: it is none, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ValueError(f"{value!r} is no size")
    return size


def size_text(size: int) -> str:
    """A size in bytes as ``parse_size`` takes it, in few digits, rounded up.

    >>> size_text(1610612736), size_text(4097), size_text(100)
    ('1.5G', '4.1K', '100')
    """
    unit = max((u for u, bytes_ in _UNITS.items() if bytes_ <= size), key=_UNITS.__getitem__)
    tenths = -(-10 * size // _UNITS[unit])
    return f"{tenths / 10:g}{unit}" if tenths < 10_000 else f"{-(-tenths // 10)}{unit}"


class LazyArrays(Mapping[str, np.ndarray]):
    """Arrays by name that are computed each time they are asked for; nothing is kept.

    Args:
        names: in order.
        compute: from a name to its array.
        known: names whose arrays are there already.
    """

    def __init__(
        self,
        names: Iterable[str],
        compute: Callable[[str], np.ndarray],
        known: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._known = known or {}
        # Where all are known nothing is computed any more: what that would take is let go, such as
        # the arrays that these have replaced.
        self._compute = _absent if self._names.keys() <= self._known.keys() else compute

    def __getitem__(self, name: str) -> np.ndarray:
        """Compute one, unless it is known."""
        if name not in self._names:
            raise KeyError(name)
        return self._known[name] if name in self._known else self._compute(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is one; nothing is computed."""
        return name in self._names

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arrays themselves: all are computed."""
        return LazyArrays.of, (dict(self),)

    def __iter__(self) -> Iterator[str]:
        """The names in order."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)

    @staticmethod
    def of(known: Mapping[str, np.ndarray]) -> LazyArrays:
        """Arrays that are all there."""
        return LazyArrays(known, _absent, known)

    def knows(self, name: str) -> bool:
        """Whether an array is there without being computed."""
        return name in self._known

    def replaced(self, name: str, array: np.ndarray) -> LazyArrays:
        """The same with another array for one name."""
        return LazyArrays(self._names, self._compute, {**self._known, name: array})


def _absent(name: str) -> np.ndarray:
    raise KeyError(name)


class Spill(MutableMapping[Any, np.ndarray]):
    """Arrays by key: in memory as long as they fit there together, else in a temporary file.

    What is read back from the file is a new array; the file has no name and dies with the shelf.

    Args:
        limit: bytes that may stay in memory; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._here: dict[Hashable, np.ndarray] = {}
        self._held = 0
        self._places: dict[Hashable, tuple[int, np.dtype, tuple[int, ...]]] = {}
        self._free: dict[int, list[int]] = {}  # offsets by length: lengths come again and again
        self._end = 0
        self._file: Any = None

    def __setitem__(self, key: Hashable, array: np.ndarray) -> None:
        """Keep an array; one that was there under this key goes."""
        self.pop(key, None)
        if self._limit is None or self._held + array.nbytes <= self._limit:
            self._here[key] = array
            self._held += array.nbytes
        else:
            self._places[key] = (self._write(array), array.dtype, array.shape)

    def __getitem__(self, key: Hashable) -> np.ndarray:
        """The array, read back where it is in the file."""
        if key in self._here:
            return self._here[key]
        offset, dtype, shape = self._places[key]
        array = np.empty(shape, dtype)
        self._file.seek(offset)
        read = self._file.readinto(_bytes(array))
        assert read == array.nbytes, "what was written is there"
        return array

    def __contains__(self, key: object) -> bool:
        """Whether there is one; nothing is read."""
        return key in self._here or key in self._places

    def __delitem__(self, key: Hashable) -> None:
        """Forget an array."""
        if key in self._here:
            self._held -= self._here.pop(key).nbytes
        else:
            offset, dtype, shape = self._places.pop(key)
            length = int(np.prod(shape)) * dtype.itemsize
            self._free.setdefault(length, []).append(offset)

    def __iter__(self) -> Iterator[Any]:
        """All keys."""
        yield from self._here
        yield from self._places

    def __len__(self) -> int:
        """How many arrays there are."""
        return len(self._here) + len(self._places)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arrays themselves, wherever they are; the copy keeps to the same limit."""
        return _refilled, (self._limit, dict(self))

    @property
    def spilled(self) -> int:
        """Bytes of the temporary file."""
        return self._end

    def _write(self, array: np.ndarray) -> int:
        """Write an array where one of its length was, or at the end; the offset."""
        free = self._free.get(array.nbytes)
        offset = free.pop() if free else self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(offset)
            rest = _bytes(np.ascontiguousarray(array))
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise ProviderError(
                f"the temporary file in {tempfile.gettempdir()} cannot be written: "
                f"{error.strerror or error}.",
                hint="Free some space, name another directory in TMPDIR, or raise --max-memory.",
            ) from error
        self._end = max(self._end, offset + array.nbytes)
        return offset


def _refilled(limit: int | None, arrays: Mapping[Any, np.ndarray]) -> Spill:
    spill = Spill(limit)
    spill.update(arrays)
    return spill


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
