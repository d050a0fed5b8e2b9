"""Small pictures of one colour as PNG: more of it or less, on whatever lies below."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

LEVELS = 16


def png(rows: Sequence[str], colour: tuple[int, int, int]) -> bytes:
    """A PNG whose pixels are hexadecimal digits: from 0, nothing, to f, all of the colour.

    Args:
        rows: equally long.
        colour: red, green, blue.
    """
    width, height = len(rows[0]), len(rows)
    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)  # 4 bits a pixel, a palette
    opaque = bytes(255 * level // (LEVELS - 1) for level in range(LEVELS))
    # Every row begins with its filter, and is filled up to whole bytes.
    packed = b"".join(b"\0" + bytes.fromhex(row + "0" * (width % 2)) for row in rows)
    chunks = {b"IHDR": header, b"PLTE": bytes(colour) * LEVELS, b"tRNS": opaque}
    chunks |= {b"IDAT": zlib.compress(packed, 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks.items())


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def data_uri(image: bytes) -> str:
    """What an ``img`` takes without a network."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
