"""Reports as JSON: schema 2, keys in the order of the dataclasses' fields.

The schema is the dataclasses: an object per dataclass, a list per tuple, ``null`` for None. JSON
has no NaN and no infinities: they are the strings "NaN", "Infinity" and "-Infinity".
``headline``, ``totals``, ``sparsity`` of a layer and ``warnings`` of bounds are computed, for
readers that only read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from onnx_ecp.errors import UsageError
from onnx_ecp.evaluation.bounds import Bounds
from onnx_ecp.evaluation.bounds.planning import Planning
from onnx_ecp.evaluation.compare import Comparison
from onnx_ecp.report import Report, bounding
from onnx_ecp.report.diagnosis import Diagnosis
from onnx_ecp.report.inspection import Inspection

SCHEMA = 2
_COMPUTED = ("schema", "headline", "totals")
_TOTALS = ("weights", "zeros_before", "zeros_after", "sparsity")


def report_to_dict(report: Report) -> dict[str, Any]:
    """JSON values of a report; see ``Report.to_dict``."""
    values = encode(report)
    for row, layer in zip(report.layers, values["layers"], strict=True):
        layer["sparsity"] = row.sparsity
    if report.bounds is not None:
        values["bounds"] = to_dict(report.bounds)
    totals = {name: getattr(report, name) for name in _TOTALS}
    return {"schema": SCHEMA, "headline": report.headline, "totals": totals, **values}


def report_from_dict(values: Mapping[str, Any]) -> Report:
    """The report of JSON values; see ``Report.from_dict``."""
    if values.get("schema") != SCHEMA:
        raise UsageError(
            f"a report of schema {values.get('schema')!r}; this version reads schema {SCHEMA}.",
            hint="Read it with the version of onnx-ecp that wrote it (see its `versions`).",
        )
    fields = {name: v for name, v in values.items() if name not in _COMPUTED}
    if "layers" in fields:
        fields["layers"] = [
            {name: v for name, v in row.items() if name != "sparsity"} for row in fields["layers"]
        ]
    if fields.get("bounds"):
        fields["bounds"] = {n: v for n, v in fields["bounds"].items() if n != "warnings"}
    report = decode(Report, fields)
    assert isinstance(report, Report), "decode returns what it was asked for"
    return report


def to_dict(
    found: Report | Comparison | Bounds | Inspection | Planning | Diagnosis,
) -> dict[str, Any]:
    """JSON values of what a command found: its fields, and what its tables work out of them."""
    if isinstance(found, Report):
        return report_to_dict(found)
    values: dict[str, Any] = encode(found)
    match found:
        case Comparison():
            return {**values, "warnings": list(found.gap.warnings)}
        case Bounds():
            return {**values, "warnings": list(bounding.warnings(found))}
        case Diagnosis():
            return {**values, "ok": found.ok}
    return values


def dumps(values: Any) -> str:
    """Indented JSON text with a newline at its end; never NaN or Infinity literals."""
    return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=True) + "\n"


def encode(value: Any) -> Any:
    """JSON values of a dataclass and all that is in it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def decode(kind: Any, value: Any) -> Any:
    """The inverse of ``encode`` for a type: dataclass, tuple, optional, number, string."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else decode(arguments[0], value)
    if origin is tuple:
        return tuple(decode(arguments[0], item) for item in value)
    return float(value) if kind is float else value


def _decode_dataclass(kind: type, value: Any) -> Any:
    types_of = _field_types(kind)
    if not isinstance(value, Mapping) or set(value) != set(types_of):
        found = ", ".join(value) if isinstance(value, Mapping) else repr(value)
        raise UsageError(
            f"not the {kind.__name__} of a report of schema {SCHEMA}: {found}.",
            hint=f"Its fields are {', '.join(types_of)}.",
        )
    return kind(**{name: decode(types_of[name], item) for name, item in value.items()})


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}
