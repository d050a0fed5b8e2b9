"""Which units go: one ranking by importance per cost, with a floor for every group.

Cost is what a unit's rows and columns take: weights ("params"), or multiplications ("flops": every
weight counts once per position that its layer is applied at).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_ecp.layers import Layer
from onnx_ecp.structure.groups import Group, Structure

COSTS = ("params", "flops")
# Units that go together, and their rank.
Block = tuple[float, np.ndarray]


@dataclass(frozen=True)
class Budget:
    """What the layers cost, and what of it units take.

    Args:
        structure: the units.
        prices: by layer name, cost of one weight.
    """

    structure: Structure
    prices: Mapping[str, float]

    def total(self, keep: np.ndarray) -> float:
        """Cost of all layers with the units ``keep`` (units,) bool."""
        rows, columns = self._kept(keep)
        return sum(p * rows[name] * columns[name] for name, p in self.prices.items())

    def of_units(self, keep: np.ndarray) -> np.ndarray:
        """(units,): what is saved when one unit goes and all others ``keep`` stay."""
        rows, columns = self._kept(keep)
        saved = np.zeros(len(keep))
        for name, price in self.prices.items():
            saved += price * columns[name] * _times(self.structure.rows[name], len(keep))
            saved += price * rows[name] * _times(self.structure.columns[name], len(keep))
        return saved

    def _kept(self, keep: np.ndarray) -> tuple[dict[str, int], dict[str, int]]:
        """Numbers of rows and of columns that stay, by layer name."""
        rows = {n: int(self.structure.rows_kept(n, keep).sum()) for n in self.prices}
        columns = {n: int(self.structure.columns_kept(n, keep).sum()) for n in self.prices}
        return rows, columns


def budget(
    structure: Structure, layers: Sequence[Layer], cost: str, positions: Mapping[str, int]
) -> Budget:
    """Prices in one kind of cost.

    Args:
        structure: the units.
        layers: all layers of the structure.
        cost: a name in COSTS.
        positions: by layer name, how often a sample applies it.
    """
    prices: dict[str, float] = {}
    stored: set[str] = set()
    for layer in layers:
        shared = layer.weight.tensor in stored
        stored.add(layer.weight.tensor)
        prices[layer.name] = positions[layer.name] if cost == "flops" else float(not shared)
    return Budget(structure, prices)


def choose(
    scores: np.ndarray,
    keep: np.ndarray,
    groups: Sequence[Group],
    costs: Budget,
    ranked_by: Budget,
    *,
    target: float,
    floor: float = 0.0,
    multiple: int = 1,
) -> np.ndarray:
    """Units (units,) bool that stay so that the cost of all layers is at most ``target``.

    As many go as that needs and no more; all that may go, where it cannot be reached.

    Args:
        scores: (units,) importance; the smallest per cost goes first.
        keep: (units,) bool, what is still there.
        groups: of the units.
        costs: what the target is counted in.
        ranked_by: what importance is divided by.
        target: cost that is wanted.
        floor: least share of the units of a group that stay.
        multiple: the number of units that stay in a group is a multiple of it, where units go.
    """
    prices = ranked_by.of_units(keep)
    blocks: list[Block] = []
    for group in groups:
        blocks += _blocks(group, scores, prices, keep, floor, multiple)
    blocks.sort(key=lambda block: block[0])
    enough, most = 0, len(blocks)
    while enough < most:  # the cost falls with every block
        middle = (enough + most) // 2
        if costs.total(_without(keep, blocks[:middle])) <= target:
            most = middle
        else:
            enough = middle + 1
    return _given_back(keep, blocks[:enough], groups, costs, target)


def _given_back(
    keep: np.ndarray,
    blocks: Sequence[Block],
    groups: Sequence[Group],
    costs: Budget,
    target: float,
) -> np.ndarray:
    """What stays without the blocks; those that the target can do without come back, best first.

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
        if costs.total(rest) > target:
            rest[block] = False
            full.add(number)
    return rest


def _blocks(
    group: Group,
    scores: np.ndarray,
    prices: np.ndarray,
    keep: np.ndarray,
    floor: float,
    multiple: int,
) -> list[Block]:
    """Units of a group that may go, in the order in which they do, with the rank of each step."""
    alive = group.units[keep[group.units]]
    alive = alive[np.argsort(scores[alive] / prices[alive], kind="stable")]
    step = multiple if group.width == 1 else 1
    least = max(int(np.ceil(floor * len(group.units))), 1)
    least = -(-least // step) * step
    blocks, first, rank = [], 0, 0.0
    size = len(alive) % step or step
    while len(alive) - first - size >= least:
        block = alive[first : first + size]
        rank = max(rank, float(scores[block].sum() / prices[block].sum()))
        blocks.append((rank, block))
        first, size = first + size, step
    return blocks


def _without(keep: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    rest = keep.copy()
    for _, block in blocks:
        rest[block] = False
    return rest


def _times(units: np.ndarray, number: int) -> np.ndarray:
    """(units,): how often every unit occurs."""
    return np.bincount(units[units >= 0], minlength=number)
