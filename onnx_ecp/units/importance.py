"""Importance of a unit: what its removal does to the outputs once a constant took its place.

With the unit's activation a_c in the columns c of a consumer, G_c = sum_i W_ic g_i = v dy/da_c, and
centred activations, the removal changes the output by ``u = sum_c G_c a_c``, and a constant in its
place changes it back by a multiple of ``h = sum_c G_c``:

    I_j = min_d E (u - d h)^2 = E[u^2] - E[u h]^2 / E[h^2]

which with one column is METHOD section 5, ``E[G^2 a^2] - E[G^2 a]^2 / E[G^2]``. It is exact in the
first order, since a feeds nothing else; the importances of consumers of different tensors add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_ecp.layers import Layer
from onnx_ecp.statistics.moments import Moments
from onnx_ecp.statistics.observer import Observation, State
from onnx_ecp.units.groups import Structure


@dataclass(frozen=True)
class UnitSums:
    """Sums over the rows that consumers of one tensor see; they add up.

    Args:
        columns: (groups * in,), the unit of every column, one group after the other.
        uu: (units,), sum of u^2.
        uh: (units,), sum of u h.
        hh: (units,), sum of h^2.
        energy: (groups * in,), sum of G^2 of every column.
    """

    columns: np.ndarray
    uu: np.ndarray
    uh: np.ndarray
    hh: np.ndarray
    energy: np.ndarray

    @staticmethod
    def of(columns: np.ndarray, units: int, a: np.ndarray, gradient: np.ndarray) -> UnitSums:
        """Sums of one batch and probe.

        Args:
            columns: (groups * in,), the unit of every column.
            units: how many there are.
            a: centred activations (rows, groups * in).
            gradient: G, (rows, groups * in).
        """
        order = np.argsort(columns, kind="stable")
        order = order[columns[order] >= 0]
        present, starts = np.unique(columns[order], return_index=True)
        u, h = (gradient * a)[:, order], gradient[:, order]
        if len(present) < len(order):
            u, h = (np.add.reduceat(x, starts, axis=1) for x in (u, h))
        uu, uh, hh = np.zeros((3, units))
        for total, product in ((uu, u * u), (uh, u * h), (hh, h * h)):
            total[present] = product.sum(axis=0, dtype=np.float64)
        return UnitSums(columns, uu, uh, hh, np.square(gradient).sum(axis=0, dtype=np.float64))

    def __add__(self, other: UnitSums) -> UnitSums:
        """The sums over both sets of rows, or probes."""
        return UnitSums(
            self.columns,
            self.uu + other.uu,
            self.uh + other.uh,
            self.hh + other.hh,
            self.energy + other.energy,
        )

    def importance(self, moments: Moments, shrinkage: float) -> np.ndarray:
        """(units,) importance per sample, with shrunk sensitivities as for weights.

        For several columns, what is shrunk towards is that they act on their own.
        """
        mean, q = self.energy / moments.rows, shrinkage
        uu = (1 - q) * self.uu + q * self._by_unit(mean * moments.aa.reshape(-1))
        uh = (1 - q) * self.uh + q * self._by_unit(mean * moments.a.reshape(-1))
        hh = (1 - q) * self.hh + q * self._by_unit(self.energy)
        safe = hh > 1e-10 * uu.max(initial=0.0)
        explained = np.divide(uh**2, hh, out=np.zeros_like(hh), where=safe)
        # Cauchy-Schwarz makes the difference >= 0; rounding may not.
        return np.maximum(uu - explained, 0) / moments.count

    def _by_unit(self, values: np.ndarray) -> np.ndarray:
        return _added(self.columns, values, len(self.uu))


@dataclass(frozen=True)
class UnitObserver:
    """Adds up, batch by batch, what the importances of units need; ``measure`` calls it.

    Args:
        structure: the units.
        layers: of the network.
        state: whose weights are observed.
        sums: by name of a consumer and kind of units, of all consumers that see the same rows.
    """

    structure: Structure
    layers: Sequence[Layer]
    state: State
    sums: dict[tuple[str, int], UnitSums] = field(default_factory=dict)

    def __call__(self, seen: Observation, moments: Mapping[str, Moments]) -> None:
        """Take in one batch, in which the activations are centred as the moments are."""
        for readers in self._readers():
            name = readers[0].name
            if name not in moments:  # another turn's
                continue
            centre = moments[name].centre[:, None].astype(np.float32)
            a = _side_by_side(seen.inputs[name] - centre)
            columns = np.tile(self.structure.columns[name], readers[0].groups)
            of_column = self.structure.units_at(columns)
            for gradient in self._gradients(readers, seen):
                for kind, units in enumerate(of_column):
                    part, key = UnitSums.of(units, self.structure.units, a, gradient), (name, kind)
                    self.sums[key] = self.sums[key] + part if key in self.sums else part

    def importance(self, moments: Mapping[str, Moments], shrinkage: float) -> np.ndarray:
        """(units,) importance, in the units of the squared output."""
        parts = [sums.importance(moments[n], shrinkage) for (n, _), sums in self.sums.items()]
        return np.sum(parts, axis=0)

    def _readers(self) -> list[list[Layer]]:
        """Consumers of units, those together that see the same rows of the same tensor."""
        found: dict[tuple[str, str], list[Layer]] = {}
        for layer in self.layers:
            if np.any(self.structure.columns[layer.name] >= 0):
                # Kernels differ, so what one Conv sees is another's only by accident.
                rows = "" if layer.reads_vectors else layer.name
                found.setdefault((layer.input, rows), []).append(layer)
        return list(found.values())

    def _gradients(self, readers: Sequence[Layer], seen: Observation) -> Iterator[np.ndarray]:
        """G (rows, groups * in) of every probe, summed over the readers."""
        weights = {layer.name: _matrix(layer, self.state) for layer in readers}
        for probe in range(len(seen.adjoints[readers[0].name])):
            parts = [seen.adjoints[n][probe] @ w for n, w in weights.items()]
            yield _side_by_side(np.sum(parts, axis=0))


def _matrix(layer: Layer, state: State) -> np.ndarray:
    """W by group, (groups, out per group, in)."""
    matrix = layer.weight.matrix(state.weights[layer.weight.tensor]).astype(np.float32)
    return np.asarray(matrix.reshape(layer.groups, -1, layer.shape[1]))


def _side_by_side(rows: np.ndarray) -> np.ndarray:
    """(groups, rows, in) as (rows, groups * in)."""
    return np.asarray(rows.swapaxes(0, 1).reshape(rows.shape[1], -1))


def read_by_unit(structure: Structure, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """(units,): the importances (out, in) of all weights that read a unit, summed."""
    total = np.zeros(structure.units)
    for name, columns in structure.columns.items():
        for units in structure.units_at(columns):
            total += _added(units, scores[name].sum(axis=0), len(total))
    return total


def met_by_unit(structure: Structure, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """(units,): the importances of all weights that make keys, or units that are summed.

    Without its key a dimension of queries does nothing: its weights are no further cost.
    """
    total = np.zeros(structure.units)
    for name, keys in structure.keys.items():
        units = structure.dimensions(name)[keys]
        total += _added(units, scores[name].sum(axis=1)[keys], len(total))
    for name, rows in structure.silent.items():
        units = structure.units_at(structure.rows[name])[0][rows]
        total += _added(units, scores[name].sum(axis=1)[rows], len(total))
    return total


def _added(units: np.ndarray, values: np.ndarray, number: int) -> np.ndarray:
    """(number,): values of entries, summed over the entries of every unit."""
    of_unit = units >= 0
    return np.bincount(units[of_unit], values[of_unit], minlength=number)
