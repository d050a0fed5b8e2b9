"""How much work the default puts in: named recipes, one row each in ``EFFORTS``.

Measured by ``benchmarks/engine.py`` on four networks at .7 to .95: four stages in which ADMM
chooses the weights of a layer leave .98 to 1.16 of the output error that sixteen stages of the
ranking alone leave, in .27 to .52 of the CPU time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """A recipe for the default method.

    Args:
        stages: where single weights go.
        unit_stages: where whole units go: nothing but stages tells that two can stand in for each
            other.
        compensation: a name in COMPENSATIONS.
        summary: what it is for, in one line.
    """

    stages: int
    unit_stages: int
    compensation: str
    summary: str


EFFORTS: dict[str, Effort] = {
    "fast": Effort(1, 4, "refit", "one look at the network and one refit: seconds"),
    "balanced": Effort(4, 16, "joint", "four stages and the joint refit"),
    "best": Effort(16, 32, "joint", "sixteen stages and the joint refit: the last percent"),
}
DEFAULT = "balanced"
