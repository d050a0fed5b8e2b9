"""Tables: a column is an input of its name, or a feature of the model's only input."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_ecp.data.feeds import LABEL_NAMES, package
from onnx_ecp.data.untrusted import check_budget, read_bytes
from onnx_ecp.errors import CalibrationError
from onnx_ecp.graph import InputSpec

Column = Sequence[Any]


def read_csv(path: Path, inputs: Sequence[InputSpec]) -> dict[str, np.ndarray]:
    """Arrays (rows, ...) by input name, of a comma-separated file in UTF-8.

    A first row that is not all numbers holds names; without one, every column is a feature.

    Raises:
        CalibrationError: it is no table, or does not fit the model's inputs.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise CalibrationError(
            f"{path}: cannot be read: {error}.",
            hint="Write it as comma-separated values in UTF-8.",
        ) from error
    named = bool(rows) and not all(map(_is_number, rows[0]))
    names = rows.pop(0) if named else [str(i) for i in range(len(rows[0]) if rows else 0)]
    odd = next((i for i, row in enumerate(rows) if len(row) != len(names)), None)
    if odd is not None:
        raise CalibrationError(
            f"{path}: row {odd} has {len(rows[odd])} cells; {len(names)} expected.",
            hint="Quote cells that hold commas.",
        )
    if len(set(names)) < len(names):
        raise CalibrationError(
            f"{path}: two columns have the same name.", hint="Give every column its own name."
        )
    columns = zip(*rows, strict=True) if rows else ((),) * len(names)
    return _by_input(path, dict(zip(names, columns, strict=True)), inputs)


def read_parquet(path: Path, inputs: Sequence[InputSpec]) -> dict[str, np.ndarray]:
    """Arrays (rows, ...) by input name, of a Parquet file, which pyarrow reads.

    Raises:
        CalibrationError: it is no table, does not fit the model's inputs, or pyarrow is missing.
    """
    package("pyarrow", f"{path}: a Parquet table", "pyarrow")
    parquet = package("pyarrow.parquet", f"{path}: a Parquet table", "pyarrow")
    try:
        file = parquet.ParquetFile(io.BytesIO(read_bytes(path)))
        meta = file.metadata
        check_budget(8 * meta.num_rows * meta.num_columns, str(path))
        table = file.read()
        columns = {name: table[name].to_pylist() for name in table.column_names}
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise CalibrationError(
            f"{path}: cannot be read: {error}.",
            hint="Write the file again; it is damaged or of another format.",
        ) from error
    return _by_input(path, columns, inputs)


def _by_input(
    path: Path, columns: Mapping[str, Column], inputs: Sequence[InputSpec]
) -> dict[str, np.ndarray]:
    """The columns as the model takes them."""
    if all(spec.name in columns for spec in inputs):
        return {spec.name: _as_input(path, columns[spec.name], spec) for spec in inputs}
    features = {name: column for name, column in columns.items() if name not in LABEL_NAMES}
    if len(inputs) == 1 and features:
        (spec,) = inputs
        parts = [_numbers(path, name, column, spec) for name, column in features.items()]
        return {spec.name: np.stack(parts, axis=1)}
    missing = ", ".join(repr(spec.name) for spec in inputs if spec.name not in columns)
    raise CalibrationError(
        f"{path}: has no column for the inputs {missing}.",
        hint="Name the columns as the model names its inputs; for one input, columns are features.",
    )


def _as_input(path: Path, column: Column, spec: InputSpec) -> np.ndarray:
    """(rows,) or (rows, 1), whichever the input is."""
    array = _numbers(path, spec.name, column, spec)
    return array[:, None] if spec.shape is not None and len(spec.shape) == 2 else array


def _numbers(path: Path, name: str, column: Column, spec: InputSpec) -> np.ndarray:
    """A column (rows,) in the input's type; nothing is rounded to whole numbers."""
    kind = spec.dtype if spec.dtype is not None else np.dtype(np.float32)
    read = _whole if kind.kind in "iu" else float
    values = []
    for row, cell in enumerate(column):
        try:
            values.append(read(cell))
        except (TypeError, ValueError, OverflowError):
            wanted = "a number" if read is float else "a whole number"
            raise CalibrationError(
                f"{path}: row {row}, column {name!r}: {cell!r} is not {wanted}.",
                hint="Encode categories as the model does, drop other columns, fill empty cells.",
            ) from None
    try:
        return np.array(values, dtype=kind)
    except (OverflowError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"{path}: column {name!r} does not fit the input, which is {kind}.",
            hint="Encode it as the model does.",
        ) from error


def _whole(cell: Any) -> int:
    """A whole number, also where it is written as 3.0; ValueError for others."""
    try:
        if not isinstance(cell, float):
            return int(cell)
    except ValueError:
        pass
    if not float(cell).is_integer():
        raise ValueError
    return int(float(cell))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
