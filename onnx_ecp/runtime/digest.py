"""One text that stands for values: equal values have equal digests, in every process."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from onnx_ecp.runtime.versions import versions

# The package whose functions are known by their places: its source is part of what computes.
PACKAGE = __name__.partition(".")[0]


class UnknownValueError(Exception):
    """A value that has no digest, such as a function that somebody else wrote."""


def digest(*values: Any) -> str:
    """SHA-256 of values, in hexadecimal; mappings and sequences in their order.

    Numbers, texts, paths, arrays, protobuf messages, enums, dataclasses, mappings, sequences and
    sets of these, and functions of this package. Fields whose names begin with an underscore are
    notes that a value makes for itself, and do not count.

    >>> digest({"a": 1.0}) == digest({"a": 1.0}), digest([1]) == digest([True])
    (True, False)

    Raises:
        UnknownValueError: a value is none of these.
    """
    total = hashlib.sha256()
    for value in values:
        _add(total, value)
    return total.hexdigest()


def _add(total: Any, value: Any) -> None:
    """Take in one value, with its kind and its length: none runs into the next."""
    match value:
        case None | bool() | int() | float() | str() if not isinstance(value, Enum):
            _piece(total, type(value).__name__, repr(value).encode("utf-8", "backslashreplace"))
        case bytes():
            _piece(total, "bytes", value)
        case PurePath():
            _piece(total, "path", str(value).encode("utf-8", "surrogateescape"))
        case np.ndarray() | np.generic():
            _add_array(total, np.asarray(value))
        case np.dtype():
            _piece(total, "dtype", str(value).encode())
        case Mapping():
            _piece(total, "mapping", str(len(value)).encode())
            for key, item in value.items():
                _add(total, key)
                _add(total, item)
        case list() | tuple():
            _piece(total, "sequence", str(len(value)).encode())
            for item in value:
                _add(total, item)
        case set() | frozenset():
            _add(total, sorted(digest(item) for item in value))
        case Enum():
            _add(total, (type(value).__qualname__, value.name))
        case type():
            _add(total, (value.__module__, value.__qualname__))
        case types.FunctionType():
            _add_function(total, value)
        case partial():
            _add(total, (value.func, value.args, dict(value.keywords)))
        case _ if is_dataclass(value):
            counted = [f.name for f in fields(value) if not f.name.startswith("_")]
            _add(total, (type(value), {name: getattr(value, name) for name in counted}))
        case _ if hasattr(value, "SerializeToString"):
            _add(total, type(value).__name__)
            _add_message(total, value)
        case _:
            raise UnknownValueError(f"a {type(value).__name__} has no digest")


def _piece(total: Any, kind: str, data: bytes | memoryview) -> None:
    total.update(f"{kind} {len(data)}:".encode())
    total.update(data)


def _add_array(total: Any, array: np.ndarray) -> None:
    if array.dtype.hasobject:
        _add(total, (array.shape, [str(item) for item in array.reshape(-1)]))
        return
    _add(total, (str(array.dtype), array.shape))
    _piece(total, "array", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _add_message(total: Any, message: Any) -> None:
    try:
        _piece(total, "message", message.SerializeToString(deterministic=True))
    except EncodeError:  # over 2 GB: of a model piece by piece what makes the numbers
        graph = message.graph
        for part in (*message.opset_import, *message.functions, *graph.node, *graph.initializer):
            _add_message(total, part)


def _add_function(total: Any, function: types.FunctionType) -> None:
    """Of this package, by its place and by what it holds on to."""
    if function.__module__.partition(".")[0] != PACKAGE:
        raise UnknownValueError(
            f"nothing is known of {function.__module__}.{function.__qualname__}"
        )
    line = function.__code__.co_firstlineno
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    _add(total, (function.__module__, function.__qualname__, line, held, function.__defaults__))


@cache
def of_this_installation() -> str:
    """The digest of what computes: the source of this package and the versions it works with."""
    root = Path(__file__).parents[1]
    source = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.py"))}
    return digest(source, versions())
