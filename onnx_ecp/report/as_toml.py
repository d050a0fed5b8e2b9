"""The settings of a run as a file for ``onnx-ecp optimize --config``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_ecp.report import Report

# What belongs to one run, not to the settings: whether, and over what, it writes.
_OF_ONE_RUN = ("force", "dry_run", "masks")


def settings(report: Report) -> str:
    """TOML by which ``onnx-ecp optimize MODEL OUTPUT --config FILE`` does the same again.

    What was not said is left out, unless it has a plain default; what came of it is in comments. A
    setting that was an array in memory is a comment too.
    """
    lines = [f"# {_one_line(text)}" for text in _told(report)]
    calibration = _calibration(report.command)
    tables: list[str] = []
    if calibration is not None:
        lines.append(f"calibration = {_value(calibration)}")
    for name, value in report.options.items():
        key = name.replace("_", "-")
        if value is None or value in ({}, []) or name in _OF_ONE_RUN:
            continue
        if name == "labels" and str(value).startswith("array "):
            lines.append(f"# {key}: {_one_line(str(value))}, which was in memory")
        elif isinstance(value, Mapping):
            pairs = [f"{_value(str(k))} = {_value(v)}" for k, v in value.items()]
            tables += ["", f"[{key}]", *pairs]
        else:
            lines.append(f"{key} = {_value(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _told(report: Report) -> list[str]:
    recipe = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in vars(report.recipe).items()
        if value not in (None, "")
    )
    return [
        "Settings for onnx-ecp optimize MODEL OUTPUT --config THIS_FILE.",
        f"Written by onnx-ecp {report.versions.onnx_ecp} for {report.original.path or 'a model'}, "
        f"sha256 {report.original.sha256}.",
        f"What was not said became: {recipe}.",
    ]


def _calibration(command: str) -> str | None:
    """The path that was given; None where the data lay beside the model or in memory."""
    words = shlex.split(command)
    return words[words.index("--calibration") + 1] if "--calibration" in words else None


def _value(value: Any) -> str:
    """A TOML value; its strings are written as JSON's, whose escapes of controls TOML has too."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text.encode("utf-8", "replace").decode()  # a path that is no text


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
