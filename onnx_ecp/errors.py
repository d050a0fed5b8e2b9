"""What can go wrong that the user can change: one class per exit code of the command line."""

from __future__ import annotations

import contextvars
import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_FROM_COMMAND_LINE: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "from_command_line", default=False
)
_OPTION = re.compile(r"(?<![\w-])--(no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")


class OnnxEcpError(Exception):
    """Base of all errors of this library.

    Write options as the command line has them (``--max-error``). Raised from Python, the text
    names the arguments instead (```max_error```).

    Args:
        message: what was found and what was expected, with the values.
        hint: what the user can do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        if not _FROM_COMMAND_LINE.get():
            message, hint = named_as_arguments(message), named_as_arguments(hint)
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(OnnxEcpError):
    """An option or argument that does not exist or contradicts another."""

    exit_code = 2


class ModelError(OnnxEcpError):
    """A model file that is unreadable, invalid or unsupported."""

    exit_code = 3


class CalibrationError(OnnxEcpError):
    """Calibration or evaluation data that does not fit the model."""

    exit_code = 4


class TargetError(OnnxEcpError):
    """Nothing to prune, or a target that cannot be reached."""

    exit_code = 5


class ProviderError(OnnxEcpError):
    """ONNX Runtime is missing, failed, ran out of memory or time, or lacks the provider."""

    exit_code = 6


class QualityError(OnnxEcpError):
    """A quality gate failed; nothing was written."""

    exit_code = 7


class OutputError(OnnxEcpError):
    """The output cannot be written."""

    exit_code = 8


class Interrupted(OnnxEcpError):
    """SIGINT or SIGTERM arrived.

    Args:
        signal_number: 2 for SIGINT, 15 for SIGTERM; the exit code is 128 more.
        written: which files there are all the same.
    """

    def __init__(self, signal_number: int, written: str = "Nothing was written.") -> None:
        super().__init__("interrupted.", hint=written)
        self.exit_code = 128 + signal_number


def is_from_command_line() -> bool:
    """Whether errors name options as the command line has them."""
    return _FROM_COMMAND_LINE.get()


@contextmanager
def named_as_options() -> Iterator[None]:
    """Let errors name options as the command line has them."""
    token = _FROM_COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _FROM_COMMAND_LINE.reset(token)


def named_as_arguments(text: str) -> str:
    """Replace the options of the command line by the arguments of the Python calls.

    What stands between backticks is a command and stays.

    >>> named_as_arguments("--max-error is -1; see `onnx-ecp --help`. Use --no-cleanup.")
    '`max_error` is -1; see `onnx-ecp --help`. Use `cleanup=False`.'
    """
    parts = text.split("`")
    return "`".join(_OPTION.sub(_argument, x) if i % 2 == 0 else x for i, x in enumerate(parts))


def _argument(option: re.Match[str]) -> str:
    name = option[2].replace("-", "_")
    return f"`{name}=False`" if option[1] else f"`{name}`"


# So many known names fit into a hint.
_MOST_NAMES = 20


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known names, or all of them, if few, when none is close.

    >>> did_you_mean("magnitud", ["magnitude", "random"])
    "Did you mean 'magnitude'?"
    >>> did_you_mean("x", ["magnitude", "random"])
    'Known: magnitude, random.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return f"Known: {', '.join(known[:_MOST_NAMES])}{more}."
