"""Write the tables of docs/benchmarks/ anew from the CSV files in ``results``.

A comment ``<!-- FILE index, column, value -->`` stands above the pivot of a CSV file,
``<!-- FILE -->`` or ``<!-- FILE: column, ... -->`` above the rows themselves.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from outcome import RESULTS, Row, pivot, table

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
# The comment, and the table that may follow it.
PLACE = re.compile(r"(<!-- ([\w-]+)(:?)([^>]*) -->\n)(?:\|.*\n)*")


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        page.write_text(PLACE.sub(filled, page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(place: re.Match[str]) -> str:
    """A comment with its table below; without one where there is no CSV file."""
    comment, name, colon, words = place.groups()
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return comment
    rows = read(path)
    keys = [word.strip() for word in words.split(",")] if words.strip() else []
    if keys and colon:
        rows = [{key: row[key] for key in keys} for row in rows]
    elif keys:
        index, column, value = keys
        rows = pivot(rows, index, column, value)
    return f"{comment}{table(rows)}\n"


def read(path: Path) -> list[Row]:
    """Rows of a CSV file, numbers as they stand there."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
