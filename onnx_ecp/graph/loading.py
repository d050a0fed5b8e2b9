"""From a file to a validated model, and what else is asked of model files: size and digest."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.external import is_external, location
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import FileState, Model, tensors
from onnx_ecp.graph.sorting import NOTE, sorted_copy
from onnx_ecp.graph.validation import validate
from onnx_ecp.graph.wire import check_wire

MAX_FILE = 2**31 - 1
# A pipe that has taken the place of the file is not waited for.
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_BLOCK = 2**22
# What is packed at most to tell how large a model is after gzip, which takes minutes for gigabytes.
MOST_COMPRESSED = 2**28
_ONNX_HINT = "Give a model in ONNX's binary format, such as torch.onnx.export writes it."
# How other things that are called .onnx by mistake begin: (offset, bytes, what, hint).
_STRANGERS = (
    (0, b"version https://git-lfs", "is a git-lfs pointer, not the model", "Run `git lfs pull`."),
    (0, b"\x1f\x8b", "is compressed with gzip", "Unpack it with gunzip."),
    (0, b"PK\x03\x04", "is a zip archive (or a PyTorch file)", _ONNX_HINT),
    (4, b"ORTM", "is in ONNX Runtime's own format", "Give the .onnx file it was made from."),
    (4, b"TFL3", "is a TensorFlow Lite model", "Convert it with tf2onnx."),
    (0, b"\x89HDF", "is an HDF5 (Keras) file", "Convert it with tf2onnx."),
)


def load(source: str | Path | onnx.ModelProto) -> Model:
    """Load a model and prove that it may be worked with.

    Nothing is allocated, inferred or run before the cheap checks have passed. Weights in external
    files are looked through for NaN but stay where they are. An IR version or opset newer than the
    installed libraries is no error here: see ``runtime_support``.

    Args:
        source: path of a model file, or a proto, which is not changed, and only copied where its
            nodes have to be sorted.

    Raises:
        ModelError: the model is unreadable, invalid, or its weights are not finite.
    """
    if isinstance(source, onnx.ModelProto):
        proto = sorted_copy(source)
        validate(proto, None)
        return Model(proto, None, None, notes=_notes(source, proto))
    path = Path(source)
    try:
        given = _parse(read_file(path))
        proto = sorted_copy(given)
        seen = {file: _state(file) for file in data_files(proto, path.parent)}
        validate(proto, path.parent)
    except ModelError as error:
        raise ModelError(f"{printable(path, 200)}: {error.message}", hint=error.hint) from error
    return Model(proto, path, path.parent, notes=_notes(given, proto), seen=seen)


def check_unchanged(model: Model) -> None:
    """Refuse what was made from data files that are no longer those that were validated.

    Raises:
        ModelError: one was replaced, written to or removed since the model was loaded.
    """
    for file, state in model.seen.items():
        if _state(file) != state:
            raise ModelError(
                f"{printable(model.path or 'the model', 200)}: its data file "
                f"{printable(file.name)} was changed or replaced after it was checked.",
                hint="Run it again when nothing writes to the file, or on a copy.",
            )


def _state(file: Path) -> FileState:
    try:
        found = file.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _notes(given: onnx.ModelProto, used: onnx.ModelProto) -> tuple[str, ...]:
    return () if used is given else (NOTE,)


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of less than 2 GB.

    Raises:
        ModelError: it is none, or cannot be read.
    """
    try:
        _check_regular(path.stat())
        descriptor = os.open(path, _READING)
        try:  # what is checked is what is read, whatever the path leads to by now
            found = os.fstat(descriptor)
            _check_regular(found)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(found.st_size)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{reason}.", hint="Check the path and its permissions.") from error


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ModelError("not a regular file.", hint="Give the path of the .onnx file.")
    if found.st_size > MAX_FILE:
        raise ModelError(
            f"{found.st_size} bytes: an ONNX file cannot be larger than 2 GB.", hint=_ONNX_HINT
        )


def _parse(data: bytes) -> onnx.ModelProto:
    if not data:
        raise ModelError("the file is empty.", hint="Download or export the model again.")
    for offset, mark, what, hint in _STRANGERS:
        if data.startswith(mark, offset):
            raise ModelError(f"{what}.", hint=hint)
    if _is_text(data[:1024]):
        raise ModelError("is text, not an ONNX model.", hint=_ONNX_HINT)
    check_wire(data)
    try:
        return onnx.ModelProto.FromString(data)  # type: ignore[no-any-return]
    except DecodeError as error:
        # The message is protobuf's own; there is no code.
        what = "nested too deeply" if "Depth" in str(error) else "corrupt inside the graph"
        raise ModelError(f"{what}.", hint="Download or export the model again.") from error


def _is_text(head: bytes) -> bool:
    """Whether it could be HTML, JSON or prose; a model starts with a small control byte."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()  # the cut went through a character
    return all(c.isprintable() or c in "\r\n\t\ufeff" for c in text)


def data_files(proto: onnx.ModelProto, base: Path) -> list[Path]:
    """The external data files that a model refers to, sorted; not checked."""
    places = {location(tensor) for _, tensor in tensors(proto) if is_external(tensor)}
    return [base / place for place in sorted(places)]


def compressed_size(source: str | Path | bytes) -> int:
    """Bytes after gzip, level 6, of serialised bytes or of a model file with its data files.

    Of more than ``MOST_COMPRESSED`` bytes every so many blocks of 4 MiB is compressed, and the
    result scaled up: gzip looks back 32 KiB, so it compresses blocks as it compresses the whole.
    """
    packer = zlib.compressobj(6, wbits=31)
    if isinstance(source, bytes):
        return len(packer.compress(source)) + len(packer.flush())
    source = Path(source)
    files = [source, *data_files(_parse(read_file(source)), source.parent)]
    step = -(-sum(file.stat().st_size for file in files) // MOST_COMPRESSED)
    whole = taken = packed = 0
    for index, block in enumerate(_blocks(source)):
        whole += len(block)
        if index % max(step, 1) == 0:
            taken += len(block)
            packed += len(packer.compress(block))
    packed += len(packer.flush())
    return round(packed * whole / taken)


def digest(source: str | Path | Model | onnx.ModelProto) -> str:
    """SHA-256 of a model, in hexadecimal.

    Of a file, or a Model that came from one, the bytes of the file and its external data files;
    of a proto, its deterministic serialisation.
    """
    if isinstance(source, Model):
        source = source.path or source.proto
    blocks = _serialised(source) if isinstance(source, onnx.ModelProto) else _blocks(Path(source))
    total = hashlib.sha256()
    for block in blocks:
        total.update(block)
    return total.hexdigest()


def _serialised(proto: onnx.ModelProto) -> Iterator[bytes]:
    try:
        yield proto.SerializeToString(deterministic=True)
    except EncodeError:
        # Over 2 GB: piece by piece what makes the numbers.
        for part in (*proto.opset_import, *proto.functions, *proto.graph.node):
            yield part.SerializeToString(deterministic=True)
        for tensor in proto.graph.initializer:
            yield tensor.SerializeToString(deterministic=True)


def _blocks(path: Path) -> Iterator[bytes]:
    """A validated model file and its data files, piece by piece."""
    data = read_file(path)
    yield data
    for file in data_files(_parse(data), path.parent):
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                yield block
