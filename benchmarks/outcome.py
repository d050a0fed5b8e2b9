"""What a benchmark leaves behind: a table on the screen, a CSV file, claims that hold or fail."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One sentence and whether the numbers bear it out."""

    text: str
    holds: bool


def above(what: str, value: float, least: float) -> Claim:
    """The claim that a value reaches a threshold."""
    return Claim(f"{what}: {value:.2f}, at least {least:.2f}", value >= least)


def near(what: str, value: float, wanted: float, by: float) -> Claim:
    """The claim that a value agrees with another one."""
    return Claim(f"{what}: {value:.2f}, {wanted:.2f} to {by:.2f}", abs(value - wanted) <= by + 1e-9)


def shown(row: Row) -> dict[str, Any]:
    """What of a row is for people: no arrays."""
    return {k: v for k, v in row.items() if not isinstance(v, np.ndarray)}


def publish(name: str, rows: Sequence[Row]) -> None:
    """Write ``results/NAME.csv``; rows have the same keys."""
    RESULTS.mkdir(exist_ok=True)
    rows = [shown(row) for row in rows]
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: text(v) for k, v in row.items()} for row in rows)


def table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a Markdown table."""
    columns = list(rows[0])
    cells = [columns, *([text(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def pivot(rows: Iterable[Row], index: str, column: str, value: str) -> list[dict[str, Any]]:
    """One row per index and one column per value of ``column``, in order of appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(str(row[column]) for row in rows))
    wide: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = wide.setdefault(str(row[index]), {index: row[index]} | dict.fromkeys(columns, ""))
        line[str(row[column])] = row[value]
    return list(wide.values())


def text(value: Any) -> str:
    """A cell: four significant digits, accuracies with two decimals."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def environment() -> str:
    """One line that says what the numbers were measured with."""
    names = ["onnx-ecp", "onnx", "onnxruntime", "numpy", "onnxsim", "polygraphy", "torch"]
    found = [f"{name} {_version(name)}" for name in names if _version(name)]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"Python {platform.python_version()}, {', '.join(found)}, {threads} threads"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def finish(claims: Iterable[Claim]) -> int:
    """Print every claim; 1 when one of them fails."""
    claims = list(claims)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}")
    failed = sum(not claim.holds for claim in claims)
    print(f"{len(claims) - failed} of {len(claims)} claims hold; {environment()}.")
    return 1 if failed else 0
