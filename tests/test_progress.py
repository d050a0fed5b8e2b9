"""What a terminal shows while work goes on."""

import io
import re
import sys
from types import SimpleNamespace

from onnx_ecp.cli import progress


class Terminal(io.StringIO):
    """A stderr that says it is one."""

    def isatty(self):
        return True


def shown(calls, monkeypatch):
    """The last frame after calls of (seconds on the clock, what, done, of), spaces made one."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress.bars(False) as advance:
        for now, *call in calls:
            monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda now=now: now))
            advance(*call)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[━╸╺]", "", terminal.getvalue())
    return [" ".join(line.split()) for line in plain.splitlines()]


def test_steps_longer_than_half_a_minute_have_an_estimate(monkeypatch):
    calls = [(60.0 * n, "sensitivities", n, 10) for n in range(1, 5)]
    assert "sensitivities 4/10 0:06:00" in shown(calls, monkeypatch)


def test_what_begins_again_in_the_next_stage_has_an_estimate_of_its_own(monkeypatch):
    first = [(0.0, "stages", 0, 3), (10.0, "refit", 1, 2), (70.0, "refit", 2, 2)]
    calls = [*first, (80.0, "stages", 1, 3), (90.0, "refit", 1, 2)]
    lines = shown(calls, monkeypatch)
    assert "stages 1/3 0:02:40" in lines
    assert "refit 1/2 -:--:--" in lines


def test_nothing_is_shown_to_nobody(capsys):
    with progress.bars(False) as advance:
        advance("stages", 0, 3)
    assert capsys.readouterr() == ("", "")
