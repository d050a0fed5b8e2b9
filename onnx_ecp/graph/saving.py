"""Write a model whole or not at all: the old output stays until the new one is on the disk.

It is written beside its place (``staging``), external data under a name that no file has, and
renamed: the data first, then the model that refers to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from onnx_ecp.errors import ModelError, OutputError, UsageError, did_you_mean
from onnx_ecp.graph.encodings import ENCODINGS
from onnx_ecp.graph.external import is_external
from onnx_ecp.graph.loading import data_files, read_file
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import tensors
from onnx_ecp.graph.staging import Staging
from onnx_ecp.graph.tensors import byte_size, clear_values, has_bytes, renewed, stored_bytes

# Protobuf's limit is 2 GiB; beyond this the weights go into a data file. Tests lower it.
LARGEST_FILE = 2**31 - 2**24
# Offsets are multiples of a page, so that a runtime can map the tensors.
_ALIGNMENT = 4096
_SMALL = 1024
_BLOCK = 2**24


def check_output(path: str | Path, *, force: bool, source: Path | None) -> None:
    """Find out before the long work whether the output can be written.

    Args:
        path: the output.
        force: whether an existing file, the source included, may be overwritten.
        source: the model that is read, None for one that is no file.

    Raises:
        OutputError: it cannot be, or must not.
    """
    path = Path(path)
    label, parent = printable(path, 200), path.parent
    _check_name(path, label)
    if not parent.is_dir():
        raise OutputError(f"{label}: there is no such directory.", hint=f"mkdir -p {parent}")
    if path.is_dir():
        raise OutputError(f"{label}: is a directory.", hint="Give the path of a file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{label}: the directory is not writable.", hint="Choose another one.")
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise OutputError(f"{label}: is not a regular file.", hint="Choose another output.")
    if force:
        if path.exists() and not os.access(path, os.W_OK):
            raise OutputError(f"{label}: is read-only.", hint="Choose another output, or chmod it.")
        return
    if source is not None and path.exists() and os.path.exists(source) and path.samefile(source):
        raise OutputError(
            f"{label}: is the input itself.", hint="Choose another output, or use --force."
        )
    raise OutputError(f"{label}: exists already.", hint="Use --force to overwrite it.")


def _check_name(path: Path, label: str) -> None:
    """Refuse what no file can be called."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(f"{label}: {why}.", hint="Choose another output.") from error


def save(
    proto: onnx.ModelProto,
    path: str | Path,
    *,
    base: Path | None,
    encoding: str = "dense",
    pruned: Collection[str] = (),
    force: bool = False,
    source: Path | None = None,
    late: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """Write a model; the file is there completely, or what was there before is.

    Args:
        proto: the model; it is not changed.
        path: the output.
        base: as of ``stage``.
        encoding: as of ``stage``.
        pruned: as of ``stage``.
        force: whether an existing file may be overwritten.
        source: the model file that the proto comes from.
        late: as of ``stage``.

    Returns:
        The files written: the model, then its data file if it has one.

    Raises:
        UsageError: the encoding does not exist, or the model is too old for it.
        ModelError: a new value is beyond the range of its element type.
        OutputError: the file cannot be written; nothing was changed.
    """
    path = Path(path)
    check_output(path, force=force, source=source)
    stale = stale_data(path, proto, base, source)
    with Staging() as staging:
        staged = stage(proto, path, staging, base=base, encoding=encoding, pruned=pruned, late=late)
        staging.commit()
    remove(stale)
    return [path.with_name(file.name) for file in staged]


def stage(
    proto: onnx.ModelProto,
    path: Path,
    staging: Staging,
    *,
    base: Path | None,
    encoding: str = "dense",
    pruned: Collection[str] = (),
    late: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """Write a model that will lie at ``path``, so that it can be loaded before it does.

    A model with external tensors, or of more than ``LARGEST_FILE`` bytes, gets one data file
    ``OUTPUT.data`` (or ``OUTPUT.data.1``, ... if that exists).

    Args:
        proto: the model; it is not changed.
        path: the output.
        staging: where it is written.
        base: directory of the proto's external data, None if it has none.
        encoding: a key of ``ENCODINGS``.
        pruned: names of the stored tensors that are written in that encoding, where it is smaller.
        late: by name, new values of external initializers of the main graph; read one by one.

    Returns:
        Where it lies now: the model, then its data file if it has one.

    Raises:
        UsageError: the encoding does not exist, or the model is too old for it.
        ModelError: a new value is beyond the range of its element type.
        OutputError: it cannot be written; nothing was changed.
    """
    if encoding not in ENCODINGS:
        raise UsageError(
            f"unknown format '{printable(encoding)}'.", hint=did_you_mean(encoding, ENCODINGS)
        )
    encoded = ENCODINGS[encoding](proto, pruned, base)
    try:
        return _write(encoded, path, _Values(base, late or {}), staging)
    except OSError as error:
        raise _unwritable(path, error) from error


def stale_data(
    path: Path, proto: onnx.ModelProto, base: Path | None, source: Path | None
) -> list[Path]:
    """The data file of an older output, unless it belongs to this proto or to the source."""
    return _stale_data(path, keep=_identities(_data_of(source)) | _identities(_files(proto, base)))


def remove(files: Iterable[Path]) -> None:
    """Remove old data files: the output is whole without them, so one that stays is no failure."""
    for file in files:
        with suppress(OSError):
            file.unlink()


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that it is there completely, or what was there before is.

    Raises:
        OutputError: it cannot be written; nothing was changed.
    """
    path = Path(path)
    try:
        with Staging() as staging:
            staging.write(path, [content])
            staging.commit()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{printable(path, 200)}: {error.strerror or error}.",
        hint="Free some space or choose another directory; nothing was changed.",
    )


@dataclass(frozen=True)
class _Values:
    """Where the bytes of tensors are read.

    Args:
        base: directory of external data.
        late: by name, new values of external initializers.
    """

    base: Path | None
    late: Mapping[str, np.ndarray]

    def is_new(self, tensor: TensorProto) -> bool:
        """Whether there are new values of a tensor."""
        return is_external(tensor) and tensor.name in self.late

    def __call__(self, tensor: TensorProto) -> np.ndarray:
        """The bytes (n,) uint8."""
        if self.is_new(tensor):
            array = np.ascontiguousarray(renewed(tensor, self.late[tensor.name], self.base))
            return array.reshape(-1).view(np.uint8)
        return stored_bytes(tensor, self.base)


def _write(proto: onnx.ModelProto, path: Path, values: _Values, staging: Staging) -> list[Path]:
    if not _needs_data(proto):
        return [staging.write(path, [_serialised(proto)])]
    data = _reserved(path, staging)
    proto, places = _divided(proto, data.name, values)
    content = [_serialised(proto)]  # before anything is written
    if not places:
        return [staging.write(path, content)]
    staged = staging.write(data, _blocks(places, values))
    return [staging.write(path, content), staged]


def _serialised(proto: onnx.ModelProto) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except EncodeError as error:
        raise OutputError(
            "what must be inside the model file takes more than 2 GB.",
            hint="Sparse initializers and Constant nodes cannot lie outside; use --format dense.",
        ) from error


# External data.


@dataclass(frozen=True)
class _Place:
    """Where the values of a tensor, read from where they are now, go in the data file."""

    tensor: TensorProto
    offset: int


def _needs_data(proto: onnx.ModelProto) -> bool:
    """Whether the model has external data now, or is too large for one file."""
    stored = [tensor for _, tensor in tensors(proto)]
    if any(is_external(tensor) for tensor in stored):
        return True
    if stored_size(proto) > LARGEST_FILE:
        return True
    try:
        return bool(proto.ByteSize() > LARGEST_FILE)
    except EncodeError:
        return True


def stored_size(proto: onnx.ModelProto) -> int:
    """Bytes that the values of all stored tensors take, wherever they lie."""
    return sum(byte_size(tensor) for _, tensor in tensors(proto))


def _divided(
    proto: onnx.ModelProto, file: str, values: _Values
) -> tuple[onnx.ModelProto, list[_Place]]:
    """A copy that refers to ``file`` for its large initializers and all that was external."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    places: list[_Place] = []
    known: dict[tuple[str, ...], int] = {}
    end = 0
    for tensor, moved in _movable(proto, copy):
        size = byte_size(tensor)
        if size < _SMALL:
            if is_external(tensor):
                clear_values(moved)
                moved.raw_data = values(tensor).tobytes()
            continue
        # Tensors that shared their bytes go on sharing them.
        identity = tuple(sorted(f"{e.key}={e.value}" for e in tensor.external_data))
        if values.is_new(tensor):
            identity = ()
        offset = known.get(identity) if identity else None
        if offset is None:
            offset = known[identity] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offset + size
            places.append(_Place(tensor, offset))
        clear_values(moved)
        moved.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", offset), ("length", size)):
            moved.external_data.add(key=key, value=str(value))
    return copy, places


def _movable(
    proto: onnx.ModelProto, copy: onnx.ModelProto
) -> Iterator[tuple[TensorProto, TensorProto]]:
    """Tensors that may lie outside, each with its copy."""
    graphs = zip(proto.graph.initializer, copy.graph.initializer, strict=True)
    yield from ((a, b) for a, b in graphs if not is_external(a) and has_bytes(a))
    everywhere = zip(tensors(proto), tensors(copy), strict=True)
    yield from ((a, b) for (_, a), (_, b) in everywhere if is_external(a))


def _blocks(places: Iterable[_Place], values: _Values) -> Iterator[bytes | memoryview]:
    """The content of the data file, piece by piece: one new tensor at most is in memory."""
    end = 0
    for place in places:
        yield bytes(place.offset - end)
        raw = values(place.tensor)
        for start in range(0, raw.size, _BLOCK):
            yield raw[start : start + _BLOCK].data
        end = place.offset + raw.size


def _reserved(path: Path, staging: Staging) -> Path:
    """The first of ``OUTPUT.data``, ``OUTPUT.data.1``, ... that no file has; now it is taken."""
    data, count = path.with_name(f"{path.name}.data"), 0
    while os.path.lexists(data) or not staging.reserve(data):
        count += 1
        data = path.with_name(f"{path.name}.data.{count}")
    return data


def _stale_data(path: Path, keep: set[tuple[int, int]]) -> list[Path]:
    """Data files that the old output at ``path`` refers to, of the names that ``save`` gives."""
    ours = re.compile(re.escape(f"{path.name}.data") + r"(\.[0-9]+)?")
    candidates = [
        file
        for file in _data_of(path)
        if ours.fullmatch(file.name) and file.parent == path.parent and not file.is_symlink()
    ]
    return [file for file in candidates if not _identities([file]) & keep]


def _data_of(path: Path | None) -> list[Path]:
    """The data files that a model file refers to; none where it is no model."""
    if path is None or not path.is_file():
        return []
    try:
        return _files(onnx.ModelProto.FromString(read_file(path)), path.parent)
    except (DecodeError, ModelError):
        return []


def _files(proto: onnx.ModelProto, base: Path | None) -> list[Path]:
    return data_files(proto, base) if base is not None else []


def _identities(files: Iterable[Path]) -> set[tuple[int, int]]:
    """Device and inode of those files that exist."""
    found = set()
    for file in files:
        with suppress(OSError, ValueError):
            state = file.stat()
            found.add((state.st_dev, state.st_ino))
    return found
