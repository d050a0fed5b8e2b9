"""The outermost fields of a model file, looked at byte by byte to say how the file is broken.

Protobuf says only that it cannot parse, and it parses many things that are no model: fields it
does not know it keeps, whatever they are.
"""

from __future__ import annotations

import onnx

from onnx_ecp.errors import ModelError

_AGAIN = "Download or export the model again."
# ONNX numbers its fields consecutively and has used 26; what is far beyond is not a newer ONNX.
_LARGEST_FIELD = 100
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH, _OPSETS = 7, 8
_TYPES = {
    number: _BYTES if field.type in (field.TYPE_MESSAGE, field.TYPE_STRING) else _VARINT
    for number, field in onnx.ModelProto.DESCRIPTOR.fields_by_number.items()
}


def check_wire(data: bytes) -> None:
    """Refuse bytes that are not a sequence of a model's fields up to the very end.

    Raises:
        ModelError: the file is truncated, is followed by something else, or is no model at all.
    """
    seen: set[int] = set()
    at = 0
    while at < len(data):
        start = at
        try:
            key, at = _varint(data, at)
            number, kind = key >> 3, key & 7
            known = _TYPES.get(number, kind) == kind and 0 < number <= _LARGEST_FIELD
            if not known or kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
                raise ValueError(f"no field of a model: {number}")
            at = _end(data, at, kind)
        except (IndexError, ValueError) as error:
            raise _broken(seen, start, len(data)) from error
        if at > len(data):
            if number in _TYPES and not {_GRAPH, _OPSETS} <= seen:
                raise ModelError(
                    f"the file is truncated: its length is {len(data)} bytes, not {at}.",
                    hint=_AGAIN,
                )
            raise _broken(seen, start, len(data))
        seen.add(number)


def _broken(seen: set[int], start: int, length: int) -> ModelError:
    if {_GRAPH, _OPSETS} <= seen:
        return ModelError(
            f"{length - start} bytes at the end of the file do not belong to the model "
            "(trailing garbage, or the last field is truncated).",
            hint=_AGAIN,
        )
    return ModelError("not an ONNX model, or corrupt.", hint=_AGAIN)


def _end(data: bytes, at: int, kind: int) -> int:
    """Where the field ends whose value begins at ``at``."""
    if kind == _VARINT:
        return _varint(data, at)[1]
    if kind == _BYTES:
        length, at = _varint(data, at)
        return at + length
    return at + (8 if kind == _FIXED64 else 4)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Value and end; IndexError at the end of the data, ValueError when it is too long."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
