"""The README shows what its first command prints; ``python tests/test_readme.py`` renews it."""

import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from click.testing import CliRunner

from onnx_ecp.cli.commands import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- The output of the command above. -->\n```text\n).*?(?=```\n)", re.S)


def printed() -> str:
    """What the command of the README prints where ``models`` is."""
    line = re.search(r"```sh\n.*&& onnx-ecp (.*)\n```", README.read_text())
    assert line is not None
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "models", Path(folder, "models"))
        os.chdir(folder)
        try:
            result = CliRunner().invoke(main, shlex.split(line[1]))
        finally:
            os.chdir(before)
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.stdout.strip("\n").splitlines()) + "\n"


def words(text: str) -> list[str]:
    """Its words without numbers: those depend on the last bits, so on the machine.

    Nor with what the clock says: whether the result is faster, and what would be where it is not.
    """
    text = re.sub(r"sha256.*|^time.*|.*last refit.* rejected.*", "", text, flags=re.M)
    text = re.sub(r"^What would be faster:.*?\n\n", "\n", text, flags=re.M | re.S)
    text = re.sub(r"(no faster|faster|slower)(?=;)|threads?$", "", text, flags=re.M)
    return re.sub(r"[-+]?[0-9][0-9,.e+-]*|─+", "#", text).split()


def test_the_readme_shows_what_its_first_command_prints():
    shown = BLOCK.search(README.read_text())
    assert shown is not None
    now = printed()
    assert words(shown[0]) == words(now)
    error = re.compile(r"error=(\S+)")
    then, today = (float(error.search(text)[1]) for text in (shown[0], now))
    assert 0.5 < today / then < 2


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda _: printed(), README.read_text()))
