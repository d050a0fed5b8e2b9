"""A sweep for the terminal and for files: text table, CSV, JSON; ``curves`` makes the page."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from onnx_ecp.errors import UsageError
from onnx_ecp.graph import check_output, printable, write_whole
from onnx_ecp.report import curves
from onnx_ecp.report.as_json import dumps, encode
from onnx_ecp.report.sweep import Sweep, SweepPoint

SCHEMA = 2
# What the mark of a point says.
WORTH = "no other point is as good and smaller after gzip, or as small and better."
# Characters of a sentence that are shown.
_SENTENCE = 400


def as_csv(sweep: Sweep) -> str:
    """One header row, one row per point, in full precision; what is not known is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(
        file, [f.name for f in dataclasses.fields(SweepPoint)], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(dataclasses.asdict(point) for point in sweep.points)
    return file.getvalue()


def as_json(sweep: Sweep) -> str:
    """The fields of ``Sweep``, the schema's number, and which points are worth having."""
    worth = [k for k, point in enumerate(sweep.points) if point in sweep.worth_having]
    return dumps({"schema": SCHEMA, **encode(sweep), "worth_having": worth})


WRITERS: dict[str, Callable[[Sweep], str]] = {
    ".csv": as_csv,
    ".html": curves.page,
    ".json": as_json,
}


def check_target(path: str | Path, *, force: bool) -> None:
    """Find out before the long work whether a sweep can be written there.

    Args:
        path: of the file.
        force: whether a file that is there may be replaced.

    Raises:
        UsageError: the suffix names no format.
        OutputError: the file exists, the directory is missing or read-only, or the path is one.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise UsageError(
            f"{path}: a sweep cannot be written as {path.suffix!r}.",
            hint=f"Name the file *{' or *'.join(WRITERS)}.",
        )
    check_output(path, force=force, source=None)


def write(sweep: Sweep, paths: Sequence[str | Path]) -> None:
    """Write a sweep in the formats of the paths' suffixes, over what is there; each file whole.

    Raises:
        UsageError: a suffix names no format; nothing was written.
        OutputError: a file cannot be written.
    """
    for path in paths:
        check_target(path, force=True)
    texts = [WRITERS[Path(path).suffix.lower()](sweep) for path in paths]
    for path, text in zip(paths, texts, strict=True):
        write_whole(path, text.encode())


def tables(sweep: Sweep) -> Group:
    """All points, and what they were calibrated and judged on."""
    data = sweep.calibration
    facts = Table.grid(padding=(0, 2))
    source = printable(data.source, _SENTENCE)
    facts.add_row("calibration", f"{source}: {data}")
    facts.add_row("evaluation", printable(sweep.evaluation, _SENTENCE))
    shared = f"{sweep.shared_seconds:.1f} s of it shared by all points"
    facts.add_row("time", f"{sweep.seconds:.1f} s, {shared}")
    warnings = [
        Text(f"warning: {printable(text, _SENTENCE)}", style="bold yellow")
        for text in sweep.warnings
    ]
    return Group(_points(sweep), Text(f"*: {WORTH}\n"), facts, *warnings)


def _points(sweep: Sweep) -> Table:
    """Columns that would be empty are left out."""
    original = sweep.original
    dense = ["original", "", "", "", "", _percent(sweep.accuracy), _number(sweep.r2)]
    worth = sweep.worth_having
    rows = [[*dense, str(original.compressed_bytes), ""]]
    rows += [_row(point, point in worth) for point in sweep.points]
    columns = ["method", "target", "", "error", "top-1\nagreement", "accuracy", "R2"]
    columns += ["gzip", "seconds"]
    used = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for k in used:
        table.add_column(
            columns[k], justify="right" if k else "left", no_wrap=k > 0, overflow="fold"
        )
    last = "original"
    for row in rows:
        if row[0] != last:
            table.add_section()
        last = row[0]
        table.add_row(*(row[k] for k in used))
    return table


def _row(point: SweepPoint, worth: bool) -> list[str]:
    return [
        printable(point.method),
        printable(point.target),
        "*" * worth,
        _number(point.relative_error),
        _percent(point.agreement),
        _percent(point.accuracy),
        _number(point.r2),
        str(point.compressed_bytes),
        f"{point.seconds:.3f}",
    ]


def ok_line(sweep: Sweep, paths: Sequence[str]) -> str:
    """The last line on stdout: the files, then ``key=value`` separated by blanks."""
    names = [printable(path) for path in paths] or ["(nothing written)"]
    fields = {
        "points": len(sweep.points),
        "methods": len(sweep.methods),
        "samples": sweep.evaluation.samples,
        "seconds": f"{sweep.seconds:.1f}",
    }
    return " ".join(["OK", *names, *(f"{name}={value}" for name, value in fields.items())])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
