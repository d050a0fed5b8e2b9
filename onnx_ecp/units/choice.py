"""Which units go: one ranking by importance per cost, with a floor for every group.

Cost is what a unit's rows and columns take: weights ("params"), multiplications ("flops": every
weight counts once per position that its layer is applied at), or time ("latency": see ``latency``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnx_ecp.layers import Layer
from onnx_ecp.units.groups import Group, Structure

COSTS = ("params", "flops", "latency")
# What is saved is positive, or ranks would be infinite: far below a tick of any clock.
NOTHING = 1e-15
# Units that go together, and their rank.
Block = tuple[float, np.ndarray]
# The numbers of units, ascending, at which a group may stop.
Stops = Callable[[Group], np.ndarray]


class Price(Protocol):
    """What a layer costs, depending on how many rows and columns it has."""

    def of(self, rows: int, columns: int) -> float:
        """The cost of the layer."""

    def of_row(self, rows: int, columns: int) -> float:
        """What one row less saves."""

    def of_column(self, rows: int, columns: int) -> float:
        """What one column less saves."""


@dataclass(frozen=True)
class PerWeight:
    """A layer whose weights all cost the same.

    Args:
        price: of one weight.
    """

    price: float

    def of(self, rows: int, columns: int) -> float:
        """The cost of the layer."""
        return self.price * rows * columns

    def of_row(self, rows: int, columns: int) -> float:
        """What one row less saves."""
        return self.price * columns

    def of_column(self, rows: int, columns: int) -> float:
        """What one column less saves."""
        return self.price * rows


@dataclass(frozen=True)
class Budget:
    """What the layers cost, and what of it units take.

    Args:
        structure: the units.
        prices: by layer name.
        stepped: whether costs fall in steps: what units save then depends on how many go.
    """

    structure: Structure
    prices: Mapping[str, Price]
    stepped: bool = False

    def total(self, keep: np.ndarray) -> float:
        """Cost of all layers with the units ``keep`` (units,) bool."""
        return sum(price.of(*self._size(name, keep)) for name, price in self.prices.items())

    def of_units(self, keep: np.ndarray) -> np.ndarray:
        """(units,): what is saved when one unit goes and all others ``keep`` stay; 0 if gone."""
        saved = np.zeros(len(keep))
        for name, price in self.prices.items():
            size = self._size(name, keep)
            saved += price.of_row(*size) * self._times(self.structure.rows[name], keep)
            saved += price.of_column(*size) * self._times(self.structure.columns[name], keep)
        return saved

    def of_blocks(
        self, keep: np.ndarray, group: Group, blocks: Sequence[np.ndarray], prices: np.ndarray
    ) -> list[float]:
        """What every block of units of a group saves, gone after those in front of it.

        Args:
            keep: (units,) bool, what is still there; all other groups stay as they are.
            group: the blocks' own.
            blocks: units that go together.
            prices: (units,), from ``of_units``.
        """
        if not self.stepped:
            return [float(prices[block].sum()) for block in blocks]
        touched = set(group.producers + group.consumers) & set(self.prices)
        own = Budget(self.structure, {name: self.prices[name] for name in touched})
        totals, rest = [own.total(keep)], keep.copy()
        for block in blocks:
            rest[block] = False
            totals.append(own.total(rest))
        return [max(a - b, NOTHING) for a, b in itertools.pairwise(totals)]

    def _times(self, atoms: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """(units,): how many of the entries, given their atoms, are there and go with a unit."""
        units = self.structure.units_at(atoms[self.structure.kept(atoms, keep)])
        return np.bincount(units[units >= 0], minlength=len(keep))

    def _size(self, layer: str, keep: np.ndarray) -> tuple[int, int]:
        """Numbers of rows and of columns that stay."""
        rows = self.structure.rows_kept(layer, keep)
        return int(rows.sum()), int(self.structure.columns_kept(layer, keep).sum())


def budget(
    structure: Structure, layers: Sequence[Layer], cost: str, positions: Mapping[str, int]
) -> Budget:
    """Prices that are known without a clock.

    Args:
        structure: the units.
        layers: all layers of the structure.
        cost: "params" or "flops".
        positions: by layer name, how often a sample applies it.
    """
    prices: dict[str, PerWeight] = {}
    stored: set[str] = set()
    for layer in layers:
        shared = layer.weight.tensor in stored
        stored.add(layer.weight.tensor)
        price = positions[layer.name] if cost == "flops" else float(not shared)
        prices[layer.name] = PerWeight(price)
    return Budget(structure, prices)


def multiples(group: Group, of: int = 1) -> np.ndarray:
    """(k,): numbers of units of which every layer has a multiple of rows and columns.

    Of dimensions of heads, every head has a multiple of them.
    """
    step = of if group.inside else of // math.gcd(of, group.entries)
    return np.arange(step, len(group.units) + 1, step)


def choose(
    scores: np.ndarray,
    keep: np.ndarray,
    groups: Sequence[Group],
    ranked_by: Budget,
    fits: Callable[[np.ndarray], bool],
    *,
    floor: float = 0.0,
    stops: Stops = multiples,
) -> np.ndarray:
    """Units (units,) bool that stay, so that what stays fits.

    As many go as that needs and no more; all that may go, where it cannot be reached.

    Args:
        scores: (units,) importance; the smallest per price goes first.
        keep: (units,) bool, what is still there.
        groups: of the units.
        ranked_by: what importance is divided by.
        fits: whether units (units,) bool may stay; what a part of them costs is no more.
        floor: least share of the units of a group that stay.
        stops: how many units of a group may stay, where units go.
    """
    prices = ranked_by.of_units(keep)
    ranks = scores / np.maximum(prices, NOTHING)
    held = last_ones(ranked_by.structure, ranks, keep)
    blocks: list[Block] = []
    for group in groups:
        units = _blocks(group, ranks, keep, held, floor, stops(group))
        saved = ranked_by.of_blocks(keep, group, units, prices)
        blocks += zip(_ranks([scores[b].sum() for b in units], saved), units, strict=True)
    blocks.sort(key=lambda block: block[0])
    enough = _enough(keep, blocks, fits)
    rest = _given_back(keep, blocks[:enough], groups, fits)
    last = blocks[enough - 1][1] if enough else np.zeros(0, int)
    if len(last) < 2:
        return rest
    # The block that made it fit may be large: perhaps smaller ones behind it cost less.
    (own,) = (group.units for group in groups if last[0] in group.units)
    before, behind = blocks[: enough - 1], blocks[enough:]
    others = before + [block for block in behind if block[1][0] not in own]
    spared = _given_back(keep, others[: _enough(keep, others, fits)], groups, fits)
    cheaper = scores[keep & ~spared].sum() < scores[keep & ~rest].sum()
    return spared if cheaper and fits(spared) else rest


def _enough(keep: np.ndarray, blocks: Sequence[Block], fits: Callable[[np.ndarray], bool]) -> int:
    """How many of the first blocks have to go, so that what stays fits; all where none do."""
    enough, most = 0, len(blocks)
    while enough < most:  # the cost falls with every block
        middle = (enough + most) // 2
        if fits(_without(keep, blocks[:middle])):
            most = middle
        else:
            enough = middle + 1
    return enough


def _given_back(
    keep: np.ndarray,
    blocks: Sequence[Block],
    groups: Sequence[Group],
    fits: Callable[[np.ndarray], bool],
) -> np.ndarray:
    """What stays without the blocks; those that fit nevertheless come back, best first.

    Where units differ in size, the last one to go often saves more than was still needed.
    """
    group_of = np.empty(len(keep), int)
    for number, group in enumerate(groups):
        group_of[group.units] = number
    rest, full = _without(keep, blocks), set[int]()
    for _, block in reversed(blocks):
        number = int(group_of[block[0]])
        if number in full:
            continue
        rest[block] = True
        if not fits(rest):
            rest[block] = False
            full.add(number)
    return rest


def last_ones(structure: Structure, ranks: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """(units,) bool: units that stay, so that something stays of every part of every tensor.

    A group always keeps one: that is enough for all parts in which it lies as a whole.
    """
    held = np.zeros(len(keep), np.bool_)
    whole = [group.units for group in structure.groups]
    for part in structure.parts:
        there = part[keep[part]]
        if not held[there].any() and not any(np.isin(units, part).all() for units in whole):
            held[there[np.argmax(ranks[there])]] = True
    return held


def in_order(
    group: Group, ranks: np.ndarray, keep: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, int]:
    """Units of a group that are there, in the order in which they go, and how many stay anyway.

    Args:
        group: the units.
        ranks: (units,), the smallest goes first.
        keep: (units,) bool, what is still there.
        held: (units,) bool, see ``last_ones``.
    """
    alive = group.units[keep[group.units]]
    return alive[np.lexsort((ranks[alive], held[alive]))], max(int(held[alive].sum()), 1)


def _blocks(
    group: Group,
    ranks: np.ndarray,
    keep: np.ndarray,
    held: np.ndarray,
    floor: float,
    stops: np.ndarray,
) -> list[np.ndarray]:
    """Units of a group that may go together, in the order in which they do."""
    alive, least = in_order(group, ranks, keep, held)
    least = max(int(np.ceil(floor * len(group.units))), least)
    ends = stops[(stops >= least) & (stops < len(alive))][::-1]
    return np.split(alive, len(alive) - ends)[:-1]


def _ranks(scores: Sequence[float], saved: Sequence[float]) -> list[float]:
    """Importance per cost of every block of a group, so that none goes before those in front of it.

    A block that saves little stands for more together with those behind it: neighbours are pooled.
    """
    pools: list[tuple[float, float, int]] = []  # importance, cost, number of blocks
    for score, cost in zip(scores, saved, strict=True):
        number = 1
        while pools and pools[-1][0] * cost >= score * pools[-1][1]:
            before = pools.pop()
            score, cost, number = before[0] + score, before[1] + cost, before[2] + number
        pools.append((score, cost, number))
    return [score / cost for score, cost, number in pools for _ in range(number)]


def _without(keep: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    rest = keep.copy()
    for _, block in blocks:
        rest[block] = False
    return rest
