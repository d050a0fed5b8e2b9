"""What repeats a run in a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_ecp.api.options import Options


def command_line(
    model: str | Path | onnx.ModelProto,
    calibration: Any,
    output: str | Path | None,
    options: Options,
) -> str:
    """One line for a shell that asks for the same; empty where something was in memory.

    Args:
        model: as it was given.
        calibration: as it was given.
        output: the file that was to be written.
        options: as they were given.
    """
    in_files = isinstance(model, str | Path) and isinstance(calibration, str | Path | None)
    if not in_files or isinstance(options.labels, np.ndarray):
        return ""
    words = ["onnx-ecp", "optimize", str(model)]
    words += [] if output is None else [str(output)]
    words += [] if calibration is None else ["--calibration", str(calibration)]
    usual = Options()
    for field in fields(Options):
        value = getattr(options, field.name)
        if value != getattr(usual, field.name):
            words += option_words(f"--{field.name.replace('_', '-')}", value)
    if output is None and not options.dry_run:
        words.append("--dry-run")
    return shlex.join(words)


def option_words(flag: str, value: Any) -> Iterator[str]:
    """What stands on a command line for the value of an option.

    >>> list(option_words("--include", ("a", "b"))), list(option_words("--cleanup", False))
    (['--include', 'a', '--include', 'b'], ['--no-cleanup'])
    """
    match value:
        case bool():
            yield flag if value else f"--no-{flag.removeprefix('--')}"
        case Mapping():
            for name, item in value.items():
                pair = ":" + ",".join(map(str, item)) if isinstance(item, tuple) else f"={item}"
                yield from (flag, f"{name}{pair}")
        case tuple():
            for item in value:
                yield from (flag, str(item))
        case _:
            yield from (flag, str(value))
