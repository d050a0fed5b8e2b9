"""Reads arrays from files that nobody vouches for.

Declared sizes are compared with what is there before memory is taken; pickles are refused, so
nothing in a file is ever executed. Whatever is wrong with a file is a CalibrationError.
"""

from __future__ import annotations

import base64
import io
import json
import lzma
import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

from onnx_ecp.errors import CalibrationError
from onnx_ecp.graph.tensors import MOST_AXES

# Used where the system does not say how much memory is free.
FALLBACK_BUDGET = 4 * 2**30
# What zipfile and its decompressors raise on damaged, encrypted or exotic archives.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)
# What NumPy's letters mean to others.
_KINDS = {"U": "text", "S": "text", "M": "dates", "m": "times", "c": "complex numbers"}
_LFS_POINTER = b"version https://git-lfs"


def memory_budget() -> int:
    """Bytes that the arrays of one file may take: half of the memory that is free now."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        found = None
    return int(found[1]) * 1024 // 2 if found else FALLBACK_BUDGET


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory read-only."""
    try:
        with _opened(path) as stream:
            shape, fortran, dtype, offset = _header(stream, str(path))
            _check_size(shape, dtype, os.fstat(stream.fileno()).st_size - offset, str(path))
            order: Any = "F" if fortran else "C"
            # Of the file that was looked at, whatever has its name by now.
            return np.memmap(stream, dtype, mode="r", offset=offset, shape=shape, order=order)
    except (OSError, ValueError) as error:
        _unreadable(path, error)


def npz_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz file; nothing but its directory is read."""
    try:
        with _opened(path) as file, zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except _ZIP_ERRORS as error:
        _unreadable(path, error)


def npz_headers(path: Path, names: Collection[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the arrays called ``names`` of an .npz file, which are not unpacked."""
    try:
        with _opened(path) as file, zipfile.ZipFile(file) as archive:
            found = {}
            for name, info in _members(archive, names).items():
                shape, _, dtype, _ = _declared(archive, info, path)
                found[name] = shape, dtype
            return found
    except _ZIP_ERRORS as error:
        _unreadable(path, error)


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays called ``names`` of an .npz file; CalibrationError beyond ``memory_budget()``."""
    try:
        with _opened(path) as file, zipfile.ZipFile(file) as archive:
            wanted = _members(archive, names)
            check_budget(sum(info.file_size for info in wanted.values()), str(path))
            return {name: _member(archive, info, path) for name, info in wanted.items()}
    except _ZIP_ERRORS as error:
        _unreadable(path, error)


def _members(archive: zipfile.ZipFile, names: Collection[str]) -> dict[str, zipfile.ZipInfo]:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    return {name: members[name] for name in names}


def _declared(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """As ``_header``, and what the archive says of the size agrees with it."""
    origin = f"{path}: {info.filename}"
    with archive.open(info) as stream:
        shape, fortran, dtype, offset = _header(stream, origin)
    _check_size(shape, dtype, info.file_size - offset, origin)
    return shape, fortran, dtype, offset


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    shape, fortran, dtype, offset = _declared(archive, info, path)
    with archive.open(info) as stream:
        stream.read(offset)
        # A byte more would be one too many; the archive does not unpack more than it declares.
        data = stream.read(math.prod(shape) * dtype.itemsize + 1)
    return _array(shape, fortran, dtype, data, f"{path}: {info.filename}")


def _opened(path: Path) -> IO[bytes]:
    """A regular file, open for reading: a pipe or a device may never end, and is never waited for.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError("it is not a regular file")
    return os.fdopen(number, "rb")


def read_bytes(path: Path) -> bytes:
    """All of a regular file; CalibrationError beyond ``memory_budget()``."""
    with _opened(path) as file:
        check_budget(os.fstat(file.fileno()).st_size, str(path))
        return file.read()


def read_tensor(path: Path) -> tuple[str, np.ndarray]:
    """Name (may be empty) and values of a TensorProto file such as ``input_0.pb``."""
    try:
        tensor = TensorProto.FromString(read_bytes(path))
        if tensor.data_location == TensorProto.EXTERNAL:
            raise CalibrationError(
                f"{path}: the values are in another file, which is not read.",
                hint="Save the tensor with its values inside.",
            )
        return tensor.name, numpy_helper.to_array(tensor)
    except (DecodeError, OSError, ValueError, TypeError, KeyError) as error:
        _unreadable(path, error)


def read_polygraphy(path: Path) -> list[dict[str, np.ndarray]]:
    """The feeds of a file written by ``polygraphy run --save-inputs``."""
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        _unreadable(path, error)
    if not isinstance(content, list) or not all(isinstance(feed, dict) for feed in content):
        raise CalibrationError(
            f"{path}: not a list of named inputs.",
            hint="Write it with `polygraphy run MODEL --onnxrt --save-inputs FILE.json`.",
        )
    return [
        {name: _polygraphy_array(value, f"{path}: {name!r}") for name, value in feed.items()}
        for feed in content
    ]


def _polygraphy_array(value: Any, origin: str) -> np.ndarray:
    """From {"array": base64 of a .npy file, "polygraphy_class": "ndarray"}."""
    # Files of old versions have another mark, and nothing under this one.
    known = isinstance(value, dict) and value.get("polygraphy_class", "ndarray") == "ndarray"
    if not known or not isinstance(value.get("array"), str):
        raise CalibrationError(
            f"{origin}: not a NumPy array as Polygraphy writes it.",
            hint="Save NumPy arrays; other kinds, such as torch tensors, are pickles.",
        )
    try:
        stream = io.BytesIO(base64.b64decode(value["array"], validate=True))
        shape, fortran, dtype, offset = _header(stream, origin)
        stream.seek(offset)
        return _array(shape, fortran, dtype, stream.read(), origin)
    except ValueError as error:
        raise CalibrationError(
            f"{origin}: cannot be read: {error}.",
            hint="Write the file again, with `polygraphy run --save-inputs`.",
        ) from error


# No header of a plain array is longer; what follows is not read to find that out.
_LONGEST_HEADER = 2**14


def _header(stream: IO[bytes], origin: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """What the header of a .npy stream declares, checked: shape, Fortran order, dtype, its size.

    A header may claim to be gigabytes long, so a bounded part of the stream is read.
    """
    head = io.BytesIO(stream.read(_LONGEST_HEADER))
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, fortran, dtype = read[np.lib.format.read_magic(head)](head)
    except _ZIP_ERRORS:
        raise
    except Exception as error:
        # NumPy lets pass whatever Python's tokenizer and literal parser raise on a hostile header.
        raise ValueError(f"damaged .npy header ({type(error).__name__})") from error
    if dtype.hasobject:
        raise CalibrationError(
            f"{origin}: holds pickled Python objects, which are not read: they could run code.",
            hint="Save plain numeric arrays; of samples that differ in shape one for each: "
            'np.savez(file, **{f"NAME/{i}": x for i, x in enumerate(samples)}).',
        )
    if dtype.kind not in "biuf":
        raise CalibrationError(
            f"{origin}: holds {_KINDS.get(dtype.kind, dtype)}, not numbers.",
            hint="Save plain numeric arrays.",
        )
    if any(isinstance(size, bool) for size in shape):
        raise ValueError(f"damaged .npy header: shape {shape}")
    if any(size < 0 for size in shape):
        raise ValueError(f"negative size in shape {shape}")
    if len(shape) > MOST_AXES:
        raise ValueError(f"{len(shape)} axes; at most {MOST_AXES} are supported")
    return shape, fortran, dtype, head.tell()


def _array(
    shape: tuple[int, ...], fortran: bool, dtype: np.dtype, data: bytes, origin: str
) -> np.ndarray:
    _check_size(shape, dtype, len(data), origin)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _check_size(shape: tuple[int, ...], dtype: np.dtype, there: int, origin: str) -> None:
    """In Python integers, which do not overflow."""
    declared = math.prod(shape) * dtype.itemsize
    if declared == 0:
        raise CalibrationError(
            f"{origin}: the array is empty, shape {shape}.", hint="At least one sample is needed."
        )
    if declared != there:
        raise CalibrationError(
            f"{origin}: shape {shape} of {dtype} takes {declared} bytes, but {there} are there.",
            hint="The file is truncated or damaged: write it again, one array per file.",
        )


def check_budget(declared: int, origin: str) -> None:
    """CalibrationError where ``declared`` bytes are more than ``memory_budget()``."""
    budget = memory_budget()
    if declared > budget:
        raise CalibrationError(
            f"{origin}: unpacks to {declared} bytes; at most {budget}, "
            "half of the free memory, are read.",
            hint="Use fewer samples, or .npy files, which need no unpacking.",
        )


def _unreadable(path: Path, error: Exception) -> NoReturn:
    hint = "Write the file again; it is damaged or of another format."
    try:
        with _opened(path) as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                hint = "It is a git-lfs pointer: run `git lfs pull`."
    except OSError:
        hint = "Give the path of a regular file that may be read."
    raise CalibrationError(f"{path}: cannot be read: {error}.", hint=hint) from error
