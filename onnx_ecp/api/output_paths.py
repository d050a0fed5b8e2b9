"""Where results go: no two of them into one file, and none over what is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from onnx_ecp.errors import UsageError

# (what it is, its path): "--masks" and "m.npz", for example.
Named = tuple[str, str | Path]

# What a folder of calibration data is read for.
_ARRAYS = (".npz", ".npy", ".pb")


def check_output_paths(results: Sequence[Named], sources: Iterable[Named]) -> None:
    """Refuse results that would overwrite each other, or what they are made from.

    A name that is not there yet is compared as it is resolved, one that is there by its file, so
    that links are seen through.

    Args:
        results: what will be written.
        sources: what is read; of a folder, the files of arrays in it.

    Raises:
        UsageError: two are one file; ``--force`` changes nothing about it.
    """
    for (one, path), (other, second) in combinations(results, 2):
        if same_file(path, second):
            raise UsageError(
                f"{one} and {other} are the same file, {path}: one would overwrite the other.",
                hint="Give every file a name of its own.",
            )
    known = list(sources)
    for what, path in results:
        for read, source in known:
            if same_file(path, source) or _is_array_of(path, source):
                raise UsageError(
                    f"{what} {path} would overwrite {read}.", hint="Choose another file to write."
                )


def same_file(a: str | Path, b: str | Path) -> bool:
    """Whether two paths are, or would be, one file."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # one is not there yet
        return os.path.realpath(a) == os.path.realpath(b)


def _is_array_of(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is a file of arrays in a folder of calibration data, now or next time."""
    if Path(path).suffix not in _ARRAYS or not os.path.isdir(folder):
        return False
    return Path(folder).resolve() in Path(path).resolve().parents
