"""Squared errors of outputs, kept sample by sample, so that what carries an error can be told."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnx_ecp.statistics.columns import by_column

# Numbers that are kept of an output: 64 MiB. Beyond, neighbours count as one sample.
MOST = 2**23


@dataclass(frozen=True)
class SampleSquares:
    """Of one output; those of two batches, one after the other, add up.

    Args:
        parts: (rows, columns) each, summed over the elements that a sample has of a column.
        per_row: how many neighbouring samples are a row.
        known: whether the rows of the output belong to samples.
    """

    parts: tuple[np.ndarray, ...]
    per_row: int = 1
    known: bool = True

    @staticmethod
    def of(squares: np.ndarray, axis: int | None, samples: int) -> SampleSquares:
        """Of one batch.

        Args:
            squares: elementwise, in the shape of the output.
            axis: of the columns; None for one column.
            samples: in the batch; they are the first axis of the output, or a part of it.
        """
        columns = by_column(squares, axis)
        whole = samples == 1 or (squares.ndim > 0 and axis != 0 and len(squares) % samples == 0)
        if not whole or columns.size > MOST:
            return SampleSquares((), known=False)
        with np.errstate(over="ignore"):
            summed = columns.reshape(samples, -1, columns.shape[1]).sum(axis=1)
        return SampleSquares((summed,))

    def __add__(self, other: SampleSquares) -> SampleSquares:
        """One column where their numbers differ."""
        if not (self.known and other.known):
            return SampleSquares((), known=False)
        a, b = self, other
        while a.per_row != b.per_row:
            a, b = (a.coarser(), b) if a.per_row < b.per_row else (a, b.coarser())
        parts = (*a.parts, *b.parts)
        if len({part.shape[1] for part in parts}) > 1:
            parts = tuple(part.sum(axis=1, keepdims=True) for part in parts)
        both = replace(a, parts=parts)
        rows = sum(map(len, parts))
        return both.coarser() if rows > 1 and rows * parts[0].shape[1] > MOST else both

    def coarser(self) -> SampleSquares:
        """Two rows as one."""
        rows = np.concatenate(self.parts)
        paired = np.add.reduceat(rows, np.arange(0, len(rows), 2), axis=0)
        return SampleSquares((paired,), 2 * self.per_row)

    def weighted(self, factors: np.ndarray) -> np.ndarray:
        """(rows,), the sum over columns, each by its factor; 0 x infinity is 0."""
        rows = np.concatenate(self.parts)
        if len(factors) != rows.shape[1]:
            rows = rows.sum(axis=1, keepdims=True)
        counted = factors > 0
        return np.asarray(rows[:, counted] @ factors[counted])
