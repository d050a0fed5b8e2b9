"""The curvature of the outputs, or of the loss, in the weights: kept as rows, never as a matrix.

    H = (1/N) sum_r g_r g_r^T = G^T G / N

A row g_r is the gradient in all weights of what one seed picks (``gradients.seeds``): of the loss
of one sample, or of one direction of its outputs in the metric. N samples have N rows or a few
times as many, d weights as many columns; everything that methods ask of H takes products with G,
and systems no larger than the smaller of both numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from onnx_ecp.layers import Layer
from onnx_ecp.linalg.cholesky import Cholesky
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.statistics.observer import Observation

# Gradients that are expanded to float64 at a time may take this much.
CHUNK_BYTES = 64 * 2**20


class Gradients(Protocol):
    """Rows of gradients of one stored tensor (out, in)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def columns(self, units: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """(k, rows) float64: the gradients of k weights W[units, inputs]."""

    def times(self, values: np.ndarray) -> np.ndarray:
        """(rows,): G v for values (out, in)."""

    def back(self, factors: np.ndarray) -> np.ndarray:
        """(out, in): G^T u for factors (rows,)."""

    def squares(self) -> np.ndarray:
        """(out, in): the sum of squares over rows."""


@dataclass(frozen=True)
class Outer:
    """Rows g a^T of a layer that is applied once per sample, kept as their factors.

    Args:
        g: (out, rows), adjoints.
        a: (in, rows), inputs.
    """

    g: np.ndarray
    a: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.g), len(self.a)

    def columns(self, units: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """See ``Gradients``."""
        return np.multiply(self.g[units], self.a[inputs], dtype=np.float64)

    def times(self, values: np.ndarray) -> np.ndarray:
        """See ``Gradients``."""
        return np.asarray(((values @ self.a) * self.g).sum(axis=0))

    def back(self, factors: np.ndarray) -> np.ndarray:
        """See ``Gradients``."""
        return np.asarray((self.g * factors) @ self.a.T)

    def kernel(self) -> np.ndarray:
        """(rows, rows): G G^T, without G."""
        g, a = self.g.astype(np.float64), self.a.astype(np.float64)
        return np.asarray((g.T @ g) * (a.T @ a))

    def squares(self) -> np.ndarray:
        """See ``Gradients``."""
        return np.asarray(np.square(self.g, dtype=np.float64) @ np.square(self.a).T)


@dataclass(frozen=True)
class Full:
    """Rows as they are: of layers applied at several positions, or shared.

    Args:
        values: (rows, out, in).
    """

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[1], self.values.shape[2]

    def columns(self, units: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """See ``Gradients``."""
        return self.values[:, units, inputs].T.astype(np.float64)

    def times(self, values: np.ndarray) -> np.ndarray:
        """See ``Gradients``."""
        return np.asarray(self.values.reshape(len(self.values), -1) @ values.reshape(-1))

    def back(self, factors: np.ndarray) -> np.ndarray:
        """See ``Gradients``."""
        return np.asarray(factors @ self.values.reshape(len(self.values), -1)).reshape(self.shape)

    def squares(self) -> np.ndarray:
        """See ``Gradients``."""
        return np.square(self.values, dtype=np.float64).sum(axis=0)


@dataclass(frozen=True, eq=False)
class Curvature:
    """H of a block of stored tensors, on the weights that are there.

    Args:
        rows: by stored tensor, its gradients; all have the same number of rows.
        present: by stored tensor, (out, in), what H has rows and columns for.
        divisor: N, times the unit of what the rows are gradients of (see ``CurvatureObserver``).
    """

    rows: Mapping[str, Gradients]
    present: Mapping[str, np.ndarray]
    divisor: float
    _inverses: dict[float, Inverse] = field(default_factory=dict)

    def blocks(self) -> tuple[Curvature, ...]:
        """One block per stored tensor: what couples them is left out."""
        return tuple(
            Curvature({name: rows}, {name: self.present[name]}, self.divisor)
            for name, rows in self.rows.items()
        )

    def times(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """(rows,): G v for values (out, in) by stored tensor."""
        present = self.present
        return sum(g.times(np.where(present[n], values[n], 0.0)) for n, g in self.rows.items())  # type: ignore[return-value]

    def back(self, factors: np.ndarray) -> dict[str, np.ndarray]:
        """By stored tensor (out, in): G^T u for factors (rows,)."""
        return {n: np.where(self.present[n], g.back(factors), 0.0) for n, g in self.rows.items()}

    def diagonal(self) -> dict[str, np.ndarray]:
        """By stored tensor (out, in): the diagonal of H."""
        return {
            n: np.where(self.present[n], g.squares() / self.divisor, 0.0)
            for n, g in self.rows.items()
        }

    def inverse(self, damping: float) -> Inverse:
        """``(damping I + H)^-1``; computed once."""
        if damping not in self._inverses:
            self._inverses[damping] = Inverse(self, damping)
        return self._inverses[damping]

    def fit(
        self, keep: Mapping[str, np.ndarray], target: np.ndarray, damping: float
    ) -> dict[str, np.ndarray]:
        """The d on the support that minimises ``|G d - t|^2 / N + damping |d|^2``.

        Args:
            keep: by stored tensor, (out, in), the support K.
            target: t, (rows,).
            damping: > 0.

        Returns:
            By stored tensor (out, in), zero outside of the support. With t = G_P w_P this is
            ``(damping I + H_KK)^-1 H_KP w_P``.
        """
        support = {n: keep[n] & self.present[n] for n in self.rows}
        ridge = damping * self.divisor
        if _size(support) <= len(target):
            g = np.concatenate([np.zeros((0, len(target))), *self._chunks(support)])
            system = g @ g.T
            return _scattered(Cholesky(system, ridge).solve(g @ target), support)
        solution = self.back(Cholesky(self.kernel(support), ridge).solve(target))
        return {n: np.where(support[n], d, 0.0) for n, d in solution.items()}

    def kernel(self, support: Mapping[str, np.ndarray]) -> np.ndarray:
        """(rows, rows): G_S G_S^T."""
        total: np.ndarray | float = 0.0
        for name, gradients in self.rows.items():
            if isinstance(gradients, Outer) and support[name].all():
                total = total + gradients.kernel()
                continue
            for part in self._chunks({name: support[name]}):
                check_deadline()
                total = total + part.T @ part
        return np.asarray(total)

    def _chunks(self, support: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        """(k, rows): the gradients of the weights of a support, some at a time, in order."""
        for name in support:
            gradients = self.rows[name]
            units, inputs = np.nonzero(support[name])
            first = gradients.columns(units[:1], inputs[:1])
            step = max(CHUNK_BYTES // max(first.nbytes, 1), 1)
            for i in range(0, len(units), step):
                yield gradients.columns(units[i : i + step], inputs[i : i + step])


class Inverse:
    """``(damping I + H)^-1`` on the weights that are there, by Woodbury's identity.

        (l I + G^T G / N)^-1 = (I - G^T (l N I + G G^T)^-1 G) / l

    Where there are fewer weights than rows the matrix itself is inverted.

    Args:
        curvature: H.
        damping: l > 0.

    Attributes:
        diagonal: by stored tensor, (out, in), 0 where nothing is there.
    """

    def __init__(self, curvature: Curvature, damping: float) -> None:
        self._curvature, self._damping = curvature, damping
        present, ridge = curvature.present, damping * curvature.divisor
        chunks = curvature._chunks(present)
        self._small: np.ndarray | None = None
        rows = len(curvature.times({n: np.zeros(t.shape) for n, t in present.items()}))
        if _size(present) <= rows:
            g = np.concatenate([np.zeros((0, rows)), *chunks])
            matrix = g @ g.T / curvature.divisor
            matrix.flat[:: len(matrix) + 1] += damping
            self._small = np.linalg.inv(matrix)
            values = np.diagonal(self._small)
        else:
            self._kernel = Cholesky(curvature.kernel(present), ridge)
            explained = [np.square(self._kernel.half(part.T)).sum(axis=0) for part in chunks]
            # At most 1; rounding may not keep that where the damping is tiny beside H.
            values = np.maximum(1 - np.concatenate(explained), np.finfo(np.float64).eps) / damping
        self.diagonal = _scattered(values, present)

    def times(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By stored tensor (out, in): the product with values (out, in)."""
        present = self._curvature.present
        if self._small is not None:
            flat = np.concatenate([values[n][mask] for n, mask in present.items()])
            return _scattered(self._small @ flat, present)
        u = self._curvature.back(self._kernel.solve(self._curvature.times(values)))
        return {n: np.where(present[n], values[n] - u[n], 0.0) / self._damping for n in u}


class CurvatureObserver:
    """Collects rows of gradients batch by batch; ``measure`` calls it.

    Layers with several positions need batches of one sample: nobody else can tell which rows are
    of one sample.

    Args:
        layers: of the network; what they share has one row for all of them.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._parts: dict[str, list[Gradients]] = {layer.name: [] for layer in layers}

    def __call__(self, seen: Observation, moments: Mapping[str, object]) -> None:
        """Take the rows of one batch, of the layers in turn."""
        for name in moments:
            self._parts[name].append(
                _gradients(seen.inputs[name], seen.adjoints[name], seen.samples)
            )

    def join(self, other: CurvatureObserver) -> None:
        """Take in the rows of samples that follow."""
        for name, parts in other._parts.items():
            self._parts[name] += parts

    def curvature(
        self, present: Mapping[str, np.ndarray], samples: int, unit: float = 1.0
    ) -> Curvature:
        """H of all layers together.

        Args:
            present: by stored tensor, (out, in), what the network still has.
            samples: how many the rows are of.
            unit: that H is divided by, so that a damping means the same whatever the outputs: 1
                for a loss in nats, the mean squared output where rows are gradients of outputs.
        """
        rows: dict[str, Gradients] = {}
        for layer in self._layers:
            own, tensor = _joined(self._parts.pop(layer.name)), layer.weight.tensor
            rows[tensor] = Full(_full(rows[tensor]) + _full(own)) if tensor in rows else own
        return Curvature(rows, {n: present[n] for n in rows}, samples * unit)


def _gradients(a: np.ndarray, g: np.ndarray, samples: int) -> Gradients:
    """Rows, one per probe and sample, from inputs (groups, rows, in) and adjoints (P, ...)."""
    groups, rows, width = a.shape
    if groups == 1 and rows == samples:
        return Outer(
            np.ascontiguousarray(g[:, 0].reshape(-1, g.shape[3]).T),
            np.ascontiguousarray(np.tile(a[0], (len(g), 1)).T),
        )
    x = a.reshape(groups, samples, -1, width)
    v = g.reshape(len(g), groups, samples, rows // samples, g.shape[3]).swapaxes(3, 4)
    by_group = (v @ x).transpose(0, 2, 1, 3, 4)  # probes, samples, groups, out per group, in
    return Full(by_group.reshape(len(g) * samples, -1, width))


def _joined(parts: Sequence[Gradients]) -> Gradients:
    if all(isinstance(part, Outer) for part in parts):
        return Outer(*(np.concatenate([getattr(p, x) for p in parts], axis=1) for x in ("g", "a")))
    return Full(np.concatenate([_full(part) for part in parts]))


def _full(part: Gradients) -> np.ndarray:
    """(rows, out, in)."""
    if isinstance(part, Outer):
        return np.asarray(part.g.T[:, :, None] * part.a.T[:, None, :])
    assert isinstance(part, Full), "there are two kinds"
    return part.values


def _size(support: Mapping[str, np.ndarray]) -> int:
    return sum(int(np.count_nonzero(mask)) for mask in support.values())


def _scattered(values: np.ndarray, support: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values in the order of ``_chunks`` back in their places, by stored tensor."""
    found, first = {}, 0
    for name, mask in support.items():
        number = int(np.count_nonzero(mask))
        found[name] = np.zeros(mask.shape)
        found[name][mask] = values[first : first + number]
        first += number
    return found
