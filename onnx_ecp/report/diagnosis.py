"""What is installed, and whether it works: the values that are shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Args:
        name: what.
        found: its version, number or state.
        ok: whether onnx-ecp can work with it.
        advice: what to do, or empty.
    """

    name: str
    found: str
    ok: bool = True
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in the order of reading."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.ok for check in self.checks)
