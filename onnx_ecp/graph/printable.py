"""Names from models and files as they may safely be shown: one line, no control characters."""

from __future__ import annotations


def printable(name: object, limit: int = 60) -> str:
    r"""A name with everything unprintable escaped, cut to about ``limit`` characters.

    Terminal escapes, line breaks and marks that reorder text are not printable; letters of any
    script are. Bytes (a name that is not UTF-8) are shown with escapes too.

    >>> printable("fc1.weight")
    'fc1.weight'
    >>> printable("\x1b[31mred\nline")
    '\\x1b[31mred\\nline'
    >>> printable("w" * 1000, limit=8)
    'wwwwwwww... (1000 characters)'
    """
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown if len(text) <= limit else f"{shown[:limit]}... ({len(text)} characters)"
