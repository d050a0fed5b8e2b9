"""Pages and tables in HTML: no network, no script, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from onnx_ecp.report.pictures.text import shown
from onnx_ecp.report.style import STYLE

# Rows at either end of a table; a row takes at most 2 kB, whatever the names are.
_ENDS = 40


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page of these parts, empty ones left out.

    Args:
        title: HTML.
        parts: HTML.
        style: CSS besides the common one.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled table; cells are HTML; a column that ends in ``>`` is aligned at the right."""
    if not rows:
        return ""
    kinds = [' class="n"' if column.endswith(">") else "" for column in columns]
    head = _row("th", [escape(column.rstrip(">")) for column in columns], kinds)
    lines = [_row("td", row, kinds) for row in rows]
    if len(lines) > 2 * _ENDS:
        omitted = f"... {len(lines) - 2 * _ENDS:,} more, all in the JSON report"
        middle = f'<tr><td colspan="{len(columns)}">{omitted}</td></tr>'
        lines = [*lines[:_ENDS], middle, *lines[-_ENDS:]]
    body = "\n".join([head, *lines])
    return f'<h2>{title}</h2>\n<div class="wide"><table>\n{body}\n</table></div>'


def _row(tag: str, cells: Iterable[str], kinds: Iterable[str]) -> str:
    inner = "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{inner}</tr>"


def number(value: float | None) -> str:
    """Four digits; nothing for None."""
    return "" if value is None else f"{value:.4g}"


def warning_box(warnings: Sequence[str]) -> str:
    """What the user must know, and what to do about it."""
    lines = "\n".join(f'<p class="warning">{with_code(shown(text, 500))}</p>' for text in warnings)
    return f'<section class="warnings">\n{lines}\n</section>' if lines else ""


def with_code(sentence: str) -> str:
    """HTML of a sentence, its commands in backticks set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", sentence)
