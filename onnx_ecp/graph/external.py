"""Where the values of an external tensor lie: a regular file in the model's directory, or nowhere.

The location comes from the model, so it is hostile until proven otherwise: nothing outside the
directory is opened, not through ``..``, nor links of either kind, nor anything but a plain file.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np
from onnx import TensorProto

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.printable import printable

# By this location ONNX Runtime means an address in memory, to be found in "offset".
_MEMORY_MARK = "_ORT_MEM_ADDR_"
_MOVE_HINT = "Put the data file beside the model, as a file of its own (a copy, not a link)."


@dataclass(frozen=True)
class Extent:
    """A range of bytes in a file that exists.

    Args:
        base: the model's directory.
        parts: the way from there to a regular file.
        offset: in bytes.
        length: in bytes.
    """

    base: Path
    parts: tuple[str, ...]
    offset: int
    length: int

    @property
    def file(self) -> Path:
        """The path of the file."""
        return self.base.joinpath(*self.parts)


def is_external(tensor: TensorProto) -> bool:
    """Whether the values lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def location(tensor: TensorProto) -> str:
    """The path of the data file, relative to the model's directory, as the model says it."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def extent(tensor: TensorProto, size: int, base: Path | None) -> Extent:
    """The bytes of an external tensor, proven to be there.

    Args:
        tensor: an external tensor.
        size: bytes that its shape and element type take.
        base: the model's directory; None if there is none.

    Raises:
        ModelError: the location is not a regular file of its own inside ``base``, or the range is
            not ``size`` bytes inside it.
    """
    if base is None:
        raise ModelError(
            "the weights are in another file, but the model was given without its directory.",
            hint="Give the path of the model file instead of a ModelProto.",
        )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data):
        raise ModelError("external data: a key is given twice.", hint=_MOVE_HINT)
    place = entries.get("location", "")
    parts = _safe_parts(place)
    available = _size_of_regular(base, parts, place)
    offset = _number("offset", entries.get("offset", "0"))
    length = _number("length", entries.get("length", str(size)))
    if length != size:
        raise ModelError(
            f"external data: length {length}, but shape and element type take {size} bytes.",
            hint="The model is damaged: export it again.",
        )
    if offset + length > available:
        raise ModelError(
            f"external data: bytes {offset} to {offset + length} are asked for, but "
            f"{printable(parts[-1])} ends at {available}.",
            hint="The data file is truncated: copy or download it again.",
        )
    return Extent(base, parts, offset, length)


def _number(key: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", value):
        raise ModelError(
            f"external data: {key} '{printable(value, 30)}' is not a number of bytes.",
            hint="The model is damaged: export it again.",
        )
    return int(value)


def _size_of_regular(base: Path, parts: tuple[str, ...], place: str) -> int:
    """The size of a file; every step on the way is looked at without following links."""
    file, found = base, None
    for part in parts:
        file = file / part
        try:
            found = os.lstat(file)
        except OSError as error:
            raise ModelError(
                f"external data file '{printable(place)}': {error.strerror}.", hint=_MOVE_HINT
            ) from error
        if stat.S_ISLNK(found.st_mode):
            raise ModelError(
                f"external data '{printable(place)}' is a symbolic link.", hint=_MOVE_HINT
            )
    assert found is not None, "a safe location has at least one part"
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(
            f"external data '{printable(place)}' is not a regular file.", hint=_MOVE_HINT
        )
    if found.st_nlink > 1:
        raise ModelError(f"external data '{printable(place)}' is a hard link.", hint=_MOVE_HINT)
    return found.st_size


def _safe_parts(place: str) -> tuple[str, ...]:
    windows, posix = PureWindowsPath(place), PurePosixPath(place)
    if not posix.parts:
        raise ModelError("external data: the location is empty.", hint=_MOVE_HINT)
    if posix.is_absolute() or windows.drive or windows.root:
        raise ModelError(
            f"external data location '{printable(place)}' is absolute.", hint=_MOVE_HINT
        )
    if ".." in windows.parts or _MEMORY_MARK in place or not place.isprintable():
        raise ModelError(
            f"external data location '{printable(place)}' leaves the model's directory.",
            hint=_MOVE_HINT,
        )
    return posix.parts


def map_bytes(place: Extent) -> np.ndarray:
    """The bytes as a read-only array of uint8 that is read from the file on use."""
    if place.length == 0:
        return np.empty(0, np.uint8)
    try:
        with _opened(place) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise ValueError("it is no longer a regular file of its own")
            if found.st_size < place.offset + place.length:
                raise ValueError("it was cut short")
            return np.memmap(stream, np.uint8, "r", place.offset, (place.length,))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"external data file '{printable(place.file.name)}' cannot be read: {error}.",
            hint=_MOVE_HINT,
        ) from error


def _opened(place: Extent) -> BinaryIO:
    """The file, which may have been exchanged since it was looked at: no link is followed.

    Where the system can, directories are opened one after the other, each from the one before.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)
    plain = flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe hangs
    if os.open not in os.supports_dir_fd:
        return open(os.open(place.file, plain), "rb")
    *folders, name = place.parts
    at = os.open(place.base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            inside = os.open(folder, flags | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = inside
        return open(os.open(name, plain, dir_fd=at), "rb")
    finally:
        os.close(at)
