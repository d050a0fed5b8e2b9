"""How far apart outputs are, every column in units of its own spread over samples.

With a the original outputs, b others, and Var over samples and positions of a column c:

    of a column     e_c^2 = E (b - a)_c^2 / Var a_c
    of an output    mean of e_c^2 over its columns
    of all          mean over the outputs

so that neither the unit of a column (kelvin, pascal, pixels) nor its offset counts, and a constant
in its place has an error of 1. Columns that never vary have no spread, and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnx_ecp.errors import UsageError, did_you_mean

# A column whose standard deviation is less than so many roundings of its size never varies.
ROUNDINGS = 4.0


@dataclass(frozen=True)
class Spread:
    """What the columns of one output do over samples; the spreads of two batches add up.

    Args:
        axis: of the columns; None where the whole output is one.
        rank: number of axes of the output.
        samples: how many samples were seen.
        count: (columns,), finite elements.
        mean: (columns,).
        squares: (columns,), summed squared distances from the mean.
        rounding: relative, of the output's type.
        tiny: smallest normal number of that type; below, differences are rounding alone.
    """

    axis: int | None
    rank: int
    samples: int
    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    rounding: float
    tiny: float = 0.0

    @staticmethod
    def of(y: np.ndarray, axis: int | None, samples: int) -> Spread:
        """Of one batch of a floating-point output; elements that are not finite are left out."""
        x = by_column(y, axis).astype(np.float64)
        finite = np.isfinite(x)
        count = finite.sum(axis=0).astype(np.float64)
        mean = np.where(finite, x, 0.0).sum(axis=0) / np.maximum(count, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.square(np.where(finite, x - mean, 0.0)).sum(axis=0)
        kind = np.finfo(y.dtype)
        rounding, tiny = float(kind.eps), float(kind.tiny)
        return Spread(axis, y.ndim, samples, count, mean, squares, rounding, tiny)

    def __add__(self, other: Spread) -> Spread:
        """Of both (Chan, Golub & LeVeque, 1979); one column where their numbers differ."""
        if len(self.count) != len(other.count):
            return self.pooled() + other.pooled()
        count = self.count + other.count
        apart, whole = other.mean - self.mean, np.maximum(count, 1)
        return replace(
            self,
            samples=self.samples + other.samples,
            count=count,
            mean=self.mean + apart * other.count / whole,
            squares=self.squares + other.squares + apart**2 * self.count * other.count / whole,
        )

    def pooled(self) -> Spread:
        """The same output as one column."""
        whole = max(float(self.count.sum()), 1.0)
        mean = float(self.count @ self.mean) / whole
        squares = float(self.squares.sum() + self.count @ (self.mean - mean) ** 2)
        return replace(
            self,
            axis=None,
            count=self.count.sum(keepdims=True),
            mean=np.array([mean]),
            squares=np.array([squares]),
        )

    @property
    def variance(self) -> np.ndarray:
        """(columns,)."""
        return np.asarray(self.squares / np.maximum(self.count, 1))

    @property
    def mean_square(self) -> np.ndarray:
        """(columns,), about zero."""
        return np.asarray(self.variance + self.mean**2)

    @property
    def varies(self) -> np.ndarray:
        """(columns,) bool, whether there is more than rounding."""
        least = ROUNDINGS * self.rounding * np.sqrt(self.mean_square)
        return np.asarray(np.sqrt(self.variance) > np.maximum(least, self.tiny))

    @property
    def has_size(self) -> np.ndarray:
        """(columns,) bool, whether the root mean square is a normal number above zero."""
        return np.asarray(np.sqrt(self.mean_square) > self.tiny)

    @property
    def positions(self) -> np.ndarray:
        """(columns,), elements per sample."""
        return np.asarray(self.count / max(self.samples, 1))

    def along_axis(self, values: np.ndarray) -> np.ndarray:
        """Values (columns,) in a shape that broadcasts with the output, whatever axes are ahead."""
        behind = 0 if self.axis is None else self.rank - 1 - self.axis
        return values.reshape(-1, *(1,) * behind)


@dataclass(frozen=True)
class Measure:
    """In what unit, and with what share, every column of every output counts.

    Args:
        spreads: by output.
        shares: by output, (columns,), what a column's squared error counts; their sum is 1, or 0
            where no column counts.
        centred: whether the units are standard deviations; where no column of any output varies,
            as with a single sample, root mean squares take their place.
    """

    spreads: Mapping[str, Spread]
    shares: Mapping[str, np.ndarray]
    centred: bool = True

    @staticmethod
    def of(spreads: Mapping[str, Spread], weights: Mapping[str, float] | None = None) -> Measure:
        """Every output counts alike, and so does every column of an output that has a spread.

        Args:
            spreads: by output.
            weights: of the outputs, by name, and of their columns, by "name:column", where not 1.

        Raises:
            UsageError: a weight names no output or column, or nothing is left that counts.
        """
        centred = any(spread.varies.any() for spread in spreads.values())
        seen = {n: s.varies if centred else s.has_size for n, s in spreads.items()}
        of_outputs = dict.fromkeys(spreads, 1.0)
        of_columns = {name: counts.astype(np.float64) for name, counts in seen.items()}
        for text, weight in (weights or {}).items():
            name, column = _place(text, spreads)
            if column is None:
                of_outputs[name] = weight
            else:
                of_columns[name][column] *= weight
        for name, columns in of_columns.items():
            total = columns.sum()
            of_columns[name] = columns / total if total > 0 else columns
        counting = {n: w * float(of_columns[n].sum()) for n, w in of_outputs.items()}
        total = sum(counting.values())
        if weights and spreads and not total > 0:
            raise UsageError("with these --output-weights no output is left that counts.")
        shares = {n: of_columns[n] * of_outputs[n] / (total or 1.0) for n in spreads}
        return Measure(dict(spreads), shares, centred)

    def unit(self, name: str) -> np.ndarray:
        """(columns,), the squared error of a column that counts as 1.

        Of an output that never varies the mean square: it has no other size.
        """
        spread = self.spreads[name]
        return spread.variance if spread.varies.any() else spread.mean_square

    def known(self, name: str) -> np.ndarray:
        """(columns,) bool, whether a column of an output has a unit."""
        spread = self.spreads[name]
        return spread.varies if spread.varies.any() else spread.has_size

    def left_out(self, name: str) -> tuple[int, ...]:
        """The columns of an output that do not count because they never vary."""
        if not self.centred:
            return ()
        return tuple(np.flatnonzero(~self.spreads[name].varies).tolist())

    def per_element(self, name: str) -> np.ndarray:
        """(columns,), what squared errors of single elements of an output are multiplied by.

        Their sum over the elements of a sample, averaged over samples, is the squared error of all.
        """
        per_sample = self.unit(name) * self.spreads[name].positions
        share = self.shares[name]
        return np.divide(share, per_sample, out=np.zeros_like(share), where=share > 0)

    def factors(self) -> dict[str, np.ndarray]:
        """By output, what its elements are multiplied by so that squares add up to the error.

        In shapes that broadcast with the outputs; the sum over the elements of a sample, averaged
        over samples, is then the squared error of all.
        """
        return {
            name: spread.along_axis(np.sqrt(self.per_element(name)))
            for name, spread in self.spreads.items()
        }

    def columns(self, name: str, mean_squares: np.ndarray) -> np.ndarray:
        """(columns,), e_c; NaN for those without a spread.

        Args:
            name: of the output.
            mean_squares: (columns,), mean squared error.
        """
        unit = self.unit(name)
        nothing = np.full(len(unit), np.nan)
        return np.sqrt(np.divide(mean_squares, unit, out=nothing, where=self.known(name)))

    def output(self, name: str, mean_squares: np.ndarray) -> float:
        """The error of one output, also where it does not count in that of all."""
        share = self.shares[name]
        if not share.any():
            share = self.known(name).astype(np.float64)
        return _root_mean(share, self.columns(name, mean_squares), mean_squares)

    def overall(self, mean_squares: Mapping[str, np.ndarray]) -> float:
        """The error of all outputs, by output the mean squared errors (columns,)."""
        parts = [
            (self.shares[n], self.columns(n, mean_squares[n]), mean_squares[n])
            for n in self.spreads
        ]
        if not parts:
            return 0.0
        return _root_mean(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def by_column(y: np.ndarray, axis: int | None) -> np.ndarray:
    """(elements, columns) of an output."""
    return y.reshape(-1, 1) if axis is None else np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis])


def _root_mean(shares: np.ndarray, errors: np.ndarray, squares: np.ndarray) -> float:
    """Of the errors that have a share; where none has, 0 or infinite, as squares are."""
    counted = shares > 0
    if not counted.any():
        return np.inf if squares.any() else 0.0
    return float(np.sqrt(np.average(np.square(errors[counted]), weights=shares[counted])))


def _place(text: str, spreads: Mapping[str, Spread]) -> tuple[str, int | None]:
    """Output and column that "name" or "name:column" says."""
    if text in spreads:
        return text, None
    name, _, column = text.rpartition(":")
    if name not in spreads or not column.isdecimal():
        raise UsageError(
            f"--output-weights: {text!r} is no output, and no column of one.",
            hint=did_you_mean(text, spreads),
        )
    size = len(spreads[name].count)
    if int(column) >= size:
        raise UsageError(
            f"--output-weights: output {name!r} has no column {column}; it has {size}.",
            hint="Columns count from 0.",
        )
    return name, int(column)
