"""Marks on the entries of tensor axes: which of them live and die together, and which must stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Axis:
    """The one axis of a tensor along which units lie.

    Args:
        index: of the axis, counted from the front.
        marks: (length,), the mark of every entry.
    """

    index: int
    marks: np.ndarray


class Marks:
    """Sets of marks that can be joined and pinned (union-find); marks are numbered from 0."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._pinned: dict[int, str] = {}

    def fresh(self, number: int) -> np.ndarray:
        """Marks (number,), each in a set of its own."""
        first = len(self._parent)
        self._parent.extend(range(first, first + number))
        return np.arange(first, first + number)

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Let the entries of two axes, one by one, share their fate."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._unite(self.root(a), self.root(b))

    def pin(self, marks: Iterable[int], reason: str) -> None:
        """These entries stay; of several reasons the first counts."""
        for mark in marks:
            self._pinned.setdefault(self.root(int(mark)), reason)

    def reason(self, mark: int) -> str:
        """Why an entry stays; empty where it may go."""
        return self._pinned.get(self.root(mark), "")

    def root(self, mark: int) -> int:
        """The representative of a mark's set: its smallest mark."""
        parent = self._parent
        while parent[mark] != mark:
            parent[mark] = parent[parent[mark]]
            mark = parent[mark]
        return mark

    def roots(self, marks: Iterable[int]) -> np.ndarray:
        """(entries,): the representatives of several marks."""
        return np.array([self.root(int(mark)) for mark in marks], int)

    def _unite(self, a: int, b: int) -> None:
        if a == b:
            return
        root, other = min(a, b), max(a, b)
        self._parent[other] = root
        if other in self._pinned:
            self._pinned.setdefault(root, self._pinned.pop(other))
