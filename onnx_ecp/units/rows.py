"""What happened to units, for reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.units.groups import Structure

MEET = "queries meet keys"
"""Who reads units that no layer reads."""


@dataclass(frozen=True)
class UnitRow:
    """What one group of units lost.

    Args:
        producers: names of the layers that make the units.
        consumers: names of the layers that read them; none where queries meet keys.
        width: rows of the first producer per unit: 1, the size of a head, or the number of heads.
        before: number of units in the given model.
        after: number of units in the result.
        why: "removed"; "dead" where clean-up took them away; "unread" where the producers are a
            tensor of which a Gather takes what the consumer still reads.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    width: int
    before: int
    after: int
    why: str = "removed"


@dataclass(frozen=True)
class UnitGroup:
    """Units that the same layers make and read.

    Args:
        producers: names of the layers that make the units.
        consumers: names of the layers that read them; none where queries meet keys.
        units: how many there are.
        width: rows of the first producer per unit: 1, the size of a head, or the number of heads.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: int
    width: int


@dataclass(frozen=True)
class Speedup:
    """How many times as fast a model was to become, and became.

    Args:
        asked: what was asked for.
        predicted: of the layers that lost units, by the times of each alone.
        measured: both models in turns.
    """

    asked: float
    predicted: float
    measured: Latency

    @property
    def reached(self) -> float:
        """Times as fast as the original, measured."""
        return 1 / self.measured.ratio


def unit_groups(structure: Structure) -> tuple[UnitGroup, ...]:
    """The groups without the numbers of their units."""
    return tuple(
        UnitGroup(group.producers, group.consumers, len(group.units), group.width)
        for group in structure.groups
    )


def unit_rows(structure: Structure, keep: np.ndarray, why: str = "removed") -> list[UnitRow]:
    """A row for every group that lost units; with "removed", for all."""
    rows = []
    for group in structure.groups:
        after = int(keep[group.units].sum())
        if why == "removed" or after < len(group.units):
            row = UnitRow(
                group.producers, group.consumers, group.width, len(group.units), after, why
            )
            rows.append(row)
    return rows
