"""Values as JSON and arrays, for files that anybody may have written: reading runs nothing.

Numbers, texts, sequences, mappings by name, arrays, and dataclasses that the reader names. What is
read is a value of these kinds or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from onnx_ecp.runtime.lazy import LazyArrays

Keep = Callable[[np.ndarray], str]
Load = Callable[[str], np.ndarray]


class Later(Mapping[str, Any]):
    """Values by name that are read each time they are asked for; nothing is held.

    Args:
        items: by name, what ``unpack`` takes.
        read: makes a value of it.
    """

    def __init__(self, items: Mapping[str, Any], read: Callable[[Any], Any]) -> None:
        self._items, self._read = dict(items), read

    def __getitem__(self, name: str) -> Any:
        """Read one."""
        return self._read(self._items[name])

    def __contains__(self, name: object) -> bool:
        """Whether there is one; nothing is read."""
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        """The names in order."""
        return iter(self._items)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._items)


def pack(value: Any, keep: Keep) -> Any:
    """A value as JSON.

    Args:
        value: of the kinds named above; a mapping that is no dict is one to be read bit by bit.
        keep: takes an array and gives the name it is found by.

    Raises:
        TypeError: it is of another kind.
    """
    match value:
        case None | bool() | int() | float() | str() if not isinstance(value, np.generic):
            return value
        case np.ndarray() | np.generic():
            return {"array": keep(np.asarray(value))}
        case list() | tuple():
            return [pack(item, keep) for item in value]
        case LazyArrays():
            known = {n: pack(value[n], keep) for n in value if value.knows(n)}
            return {"names": list(value), "known": known, "later": {
                n: pack(value[n], keep) for n in value if not value.knows(n)
            }}  # fmt: skip
        case dict():
            return {"dict": {_name(n): pack(item, keep) for n, item in value.items()}}
        case Mapping():
            return {"later": {_name(n): pack(item, keep) for n, item in value.items()}}
        case _ if is_dataclass(value) and not isinstance(value, type):
            own = [f.name for f in fields(value) if not f.name.startswith("_")]
            packed = {name: pack(getattr(value, name), keep) for name in own}
            return {"kind": type(value).__name__, "fields": packed}
        case _:
            raise TypeError(f"a {type(value).__name__} cannot be kept")


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a name is a text, not {name!r}")
    return name


def unpack(value: Any, kinds: Iterable[type], load: Load) -> Any:
    """The value that ``pack`` made JSON of; sequences come back as tuples.

    Args:
        value: JSON.
        kinds: the dataclasses that may be in it.
        load: gives an array by its name.

    Raises:
        ValueError, KeyError, TypeError: it is none that ``pack`` makes.
    """
    known = {kind.__name__: kind for kind in kinds}

    def read(packed: Any) -> Any:
        match packed:
            case None | bool() | int() | float() | str():
                return packed
            case list():
                return tuple(read(item) for item in packed)
            case {"array": str(name), **rest} if not rest:
                return load(name)
            case {"names": list(names), "known": dict(here), "later": dict(later), **rest} if (
                not rest
            ):
                arrays = Later(later, read)
                return LazyArrays(
                    names, arrays.__getitem__, {n: read(item) for n, item in here.items()}
                )
            case {"dict": dict(items), **rest} if not rest:
                return {name: read(item) for name, item in items.items()}
            case {"later": dict(items), **rest} if not rest:
                return Later(items, read)
            case {"kind": str(kind), "fields": dict(values), **rest} if not rest:
                return known[kind](**{name: read(item) for name, item in values.items()})
        raise ValueError("this is no value that was kept")

    return read(value)
