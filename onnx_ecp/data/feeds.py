"""What readers of tables, texts, images and sounds have in common: files in, feeds by input out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from onnx_ecp.errors import CalibrationError

# Arrays under these names are labels: calibration passes over them.
LABEL_NAMES = ("y", "labels")


def package(name: str, kind: str, install: str) -> ModuleType:
    """An optional package that reads a kind of file.

    Args:
        name: of the module.
        kind: what it reads, for the error.
        install: its name on PyPI.

    Raises:
        CalibrationError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CalibrationError(
            f"{kind} needs the package {install}, which is not installed.",
            hint='Install it: `pip install "onnx-ecp[sources]"`.',
        ) from error


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files of a folder and the folders in it that end so, in any case, sorted by path."""
    found = []
    for place, _, names in os.walk(folder):
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in suffixes]
    return sorted(found)
