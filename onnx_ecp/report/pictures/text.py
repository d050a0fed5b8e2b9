"""Words and numbers in pictures: escaped, short."""

from __future__ import annotations

import math
from html import escape

from onnx_ecp.graph import printable


def shown(value: object, limit: int = 60) -> str:
    """HTML of a name: printable, cut, escaped."""
    return escape(printable(value, limit))


def short(value: float | None, digits: int = 3) -> str:
    """A number of few digits; nothing for None.

    >>> short(0.0456789), short(None), short(1234567.0)
    ('0.0457', '', '1.23e+06')
    """
    return "" if value is None else f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share as a width in CSS, between 0 and 100 %.

    >>> percent(0.5), percent(7.0), percent(float("nan"))
    ('50%', '100%', '0%')
    """
    return f"{100 * min(max(share, 0.0), 1.0):.4g}%" if math.isfinite(share) else "0%"


def size(count: int) -> str:
    """Bytes in a unit that leaves few digits.

    >>> size(512), size(204_800)
    ('512 B', '200 KiB')
    """
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.4g} {unit}"
