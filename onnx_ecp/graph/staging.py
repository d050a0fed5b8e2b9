"""Files that appear together, once all of them are complete, or not at all.

They are written into a hidden folder beside where they will lie, so that they can be loaded and
checked there; to commit is to rename. What was there before stays until then.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from onnx_ecp.errors import OutputError
from onnx_ecp.graph.printable import printable
from onnx_ecp.runtime.supervision import tell


class Staging:
    """Collects files; a context manager that leaves nothing behind but what was committed.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Staging() as staging:
    ...     stage = staging.write(folder / "a.txt", [b"whole"])
    ...     before = (folder / "a.txt").exists()
    ...     staging.commit()
    >>> before, (folder / "a.txt").read_bytes()
    (False, b'whole')
    """

    def __init__(self) -> None:
        self._folders: dict[Path, Path] = {}
        self._files: list[tuple[Path, Path]] = []
        self._reserved: set[Path] = set()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for place in self._reserved:  # not committed
            place.unlink(missing_ok=True)
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    def reserve(self, path: Path) -> bool:
        """Take a name that no file has, so that no other run can; False where one has it."""
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
        tell("temporary", os.path.abspath(path))
        self._reserved.add(path)
        return True

    def write(self, path: Path, blocks: Iterable[bytes | memoryview]) -> Path:
        """Write the content of a file that will lie at ``path``; it is safe on the disk.

        Returns:
            Where it lies until then: under the same name, in another folder.
        """
        folder = self._folder(path.parent)
        stage = folder / path.name
        self._files.append((stage, path))
        with stage.open("xb") as stream:
            for block in blocks:
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        return stage

    def commit(self) -> None:
        """Let all files take their places, in the order in which they were written.

        A signal does not end it half-way. Where a file cannot take its place, those before it give
        theirs back.

        Raises:
            OutputError: a file cannot; what was there before is there again.
        """
        done: list[tuple[Path, Path | None]] = []
        tell("committing")
        for stage, path in self._files:
            try:
                before = None if path in self._reserved else _kept_aside(path, stage)
                _renamed(stage, path)
                _sync(path.parent)
            except OSError as error:
                for placed, old in reversed(done):
                    _given_back(placed, old)
                raise OutputError(
                    f"{printable(path, 200)}: {error.strerror or error}.",
                    hint="Free some space or choose another directory; nothing was changed.",
                ) from error
            done.append((path, before))
            self._reserved.discard(path)
            tell("kept", os.path.abspath(path))
        self._files = []
        tell("committed")

    def _folder(self, parent: Path) -> Path:
        """The hidden folder of our own beside what lies in a folder."""
        if parent not in self._folders:
            made = tempfile.mkdtemp(prefix=".onnx-ecp-", suffix=".tmp", dir=parent)
            self._folders[parent] = Path(made)
            tell("temporary", os.path.abspath(made))
        return self._folders[parent]


def _kept_aside(path: Path, stage: Path) -> Path | None:
    """A second name for the file that is replaced, and its permissions for the new one."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:  # there is none
        return None
    stage.chmod(mode)
    aside = stage.with_name(f"{stage.name}.before")
    with suppress(OSError):  # some file systems have no links
        os.link(path, aside)
        return aside
    return None


def _renamed(stage: Path, path: Path) -> None:
    """Rename, whatever signals arrive meanwhile."""
    while stage.exists():
        with suppress(KeyboardInterrupt):
            os.replace(stage, path)


def _given_back(path: Path, before: Path | None) -> None:
    with suppress(OSError):
        if before is None:
            path.unlink(missing_ok=True)
        else:
            os.replace(before, path)


def _sync(directory: Path) -> None:
    """Make a renaming last; Windows cannot, and some file systems will not."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
