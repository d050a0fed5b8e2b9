"""Importance of a unit when the layer that reads it is refitted on the others.

A reader computes z = W a. With the weighted covariance C of a, damped, and S = E[g g^T] for the
adjoints g of z, the best change of the other columns leaves of the columns B of one unit

    I_B = tr(V_B ([C^-1]_BB)^-1 V_B^T)          V = S^(1/2) W

which is OBS one level up (``methods/obs.py``), with units of any width, and with errors of several
z that add up in the outputs or cancel there. Units that can stand in for each other all look cheap,
and cannot all go: so they go one after the other, cheapest first, and after each one V and C^-1 are
what the refit of the others makes of them.

A dimension of keys, rows K of a layer k = W a with adjoints g, is read by queries. What goes is
sum_K g_K (k_K - E k_K) at every position, so with the covariance of k, where S is that of g,

    I_K = sum_(i, j in K) S_ij (W C W^T)_ij

A unit that is summed up is to be zero, so with E[z z^T] in the place of W C W^T; z = W a + b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_ecp.layers import Layer
from onnx_ecp.linalg.masked import damped
from onnx_ecp.statistics.gram import Gram
from onnx_ecp.statistics.moments import Moments
from onnx_ecp.statistics.observer import Observation
from onnx_ecp.units.groups import Structure

# Every step changes the whole of C^-1. Layers that read more columns rank their units once a stage.
WIDEST = 1024


@dataclass(frozen=True)
class OutputMetric:
    """Adds up S, batch by batch, for the layers that read units; ``measure`` calls it.

    Args:
        readers: names of the layers, those that make keys for queries to read included.
        sums: by layer name and group, sum of g g^T over rows and probes, (groups, out, out).
    """

    readers: frozenset[str]
    sums: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def of(structure: Structure) -> OutputMetric:
        """For the readers of a structure, and the layers that make keys."""
        readers = (name for name, units in structure.columns.items() if np.any(units >= 0))
        made = [*structure.keys.items(), *structure.silent.items()]
        return OutputMetric(frozenset([*readers, *(name for name, rows in made if rows.any())]))

    def __call__(self, seen: Observation, moments: Mapping[str, Moments]) -> None:
        """Take in one batch, of the layers in turn."""
        for name in self.readers & moments.keys():
            g = seen.adjoints[name].swapaxes(0, 1)
            g = g.reshape(len(g), -1, g.shape[-1])
            part = (g.swapaxes(1, 2) @ g).astype(np.float64)
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def join(self, other: OutputMetric) -> None:
        """Take in the sums over other samples."""
        for name, part in other.sums.items():
            self.sums[name] = self.sums[name] + part if name in self.sums else part


def scores_of_reader(
    weight: np.ndarray,
    gram: Gram,
    metric: np.ndarray,
    units: np.ndarray,
    there: np.ndarray,
    damping: float,
    steps: int,
) -> dict[int, float]:
    """Importance by unit, as one layer that reads them sees it.

    Groups of a layer are taken to err independently: what a unit costs in each is added up.

    Args:
        weight: W, (out, in).
        gram: of the layer's input.
        metric: S, (groups, out per group, out per group).
        units: (in,), the unit of every column, negative for none.
        there: (in,) bool, the columns that are read.
        damping: ridge as a share of the mean diagonal of the covariance.
        steps: how many units may go before the layer is looked at again; 0 ranks them at once.
    """
    columns = np.flatnonzero(there)
    covariance = gram.covariance[:, columns[:, None], columns]
    inverse = np.stack([np.linalg.inv(damped(own, damping)) for own in covariance])
    w = weight[:, columns].reshape(len(metric), -1, len(columns))
    v = np.stack([_root(s) @ own for s, own in zip(metric, w, strict=True)])
    of = units[columns]
    present = np.unique(of[of >= 0])
    blocks = [np.flatnonzero(of == unit) for unit in present]
    # The bias alone leaves the variance; the damping must not make a refit look worse.
    alone = np.array(
        [float(((v[..., b] @ covariance[..., b[:, None], b]) * v[..., b]).sum()) for b in blocks]
    )
    costs = np.minimum(eliminated(v, inverse, blocks, steps), alone)
    return dict(zip(present.tolist(), np.maximum(costs, 0).tolist(), strict=True))


def scores_of_keys(
    weight: np.ndarray, gram: Gram, metric: np.ndarray, units: np.ndarray, number: int
) -> np.ndarray:
    """(number,): importance by unit of the dimensions of keys that a layer makes.

    Args:
        weight: W, (out, in).
        gram: of the layer's input.
        metric: S, (1, out, out).
        units: (out,), the unit of every row, negative for none.
        number: of units.
    """
    return _of_rows(metric[0] * (weight @ gram.covariance[0] @ weight.T), units, number)


def scores_of_summed(
    weight: np.ndarray,
    gram: Gram,
    bias: np.ndarray,
    metric: np.ndarray,
    units: np.ndarray,
    number: int,
) -> np.ndarray:
    """(number,): importance by unit of the rows that a layer makes for a sum over them.

    Args:
        weight: W, (out, in).
        gram: of the layer's input.
        bias: b, (out,).
        metric: S, (groups, out per group, out per group).
        units: (out,), the unit of every row, negative for none.
        number: of units.
    """
    w = weight.reshape(len(metric), -1, weight.shape[1])
    mean = (w @ gram.mean_now[..., None])[..., 0] + bias.reshape(len(metric), -1)
    second = w @ gram.covariance @ w.swapaxes(1, 2) + mean[:, :, None] * mean[:, None]
    parts = zip(metric * second, units.reshape(len(metric), -1), strict=True)
    return np.sum([_of_rows(part, own, number) for part, own in parts], axis=0)  # type: ignore[no-any-return]


def _of_rows(together: np.ndarray, units: np.ndarray, number: int) -> np.ndarray:
    """(number,): entries (out, out) summed where row and column are of the same unit."""
    same = (units[:, None] == units) & (units >= 0)
    cost = np.where(same, together, 0.0).sum(axis=1)
    return np.maximum(np.bincount(units[units >= 0], cost[units >= 0], minlength=number), 0)


def eliminated(
    v: np.ndarray, inverse: np.ndarray, blocks: Sequence[np.ndarray], steps: int
) -> np.ndarray:
    """(blocks,): what every block costs when its turn comes; never less than those before it.

    Args:
        v: (..., out, in); what is added up may lie on further axes in front.
        inverse: C^-1, (..., in, in).
        blocks: of columns.
        steps: after which the rest costs what it costs then.
    """
    v, inverse = v.copy(), inverse.copy()
    costs, left, least = np.zeros(len(blocks)), list(range(len(blocks))), 0.0
    for _ in range(min(steps, len(blocks) - 1)):
        now = _costs(v, inverse, [blocks[i] for i in left])
        first = left.pop(int(now.argmin()))
        costs[first] = least = max(least, float(now.min()))
        gone = blocks[first]
        share = np.linalg.solve(inverse[..., gone[:, None], gone], inverse[..., gone, :])
        v -= v[..., gone] @ share
        inverse -= inverse[..., gone] @ share
    costs[left] = np.maximum(_costs(v, inverse, [blocks[i] for i in left]), least)
    return costs


def _costs(v: np.ndarray, inverse: np.ndarray, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """(blocks,): tr(V_B ([C^-1]_BB)^-1 V_B^T)."""
    if all(len(block) == 1 for block in blocks):
        columns = np.concatenate(blocks)
        energy = np.square(v[..., columns]).sum(axis=-2)
        left = energy / np.diagonal(inverse, axis1=-2, axis2=-1)[..., columns]
        return np.asarray(left.reshape(-1, len(columns)).sum(axis=0))
    return np.array([_cost(v[..., b], inverse[..., b[:, None], b]) for b in blocks])


def _cost(v: np.ndarray, inverse: np.ndarray) -> float:
    return float((v.swapaxes(-1, -2) * np.linalg.solve(inverse, v.swapaxes(-1, -2))).sum())


def _root(metric: np.ndarray) -> np.ndarray:
    """R with R^T R = metric."""
    values, vectors = np.linalg.eigh(metric)
    return np.asarray(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


def steps_of(
    structure: Structure, layer: Layer, units: np.ndarray, keep: np.ndarray, share: float
) -> int:
    """How many units of a reader go one after the other.

    Units that others read too are ranked at once: each reader would have an order of its own.

    Args:
        structure: of the units.
        layer: the reader.
        units: (in,), those of its columns.
        keep: (units,) bool, what is still there.
        share: of all units there that is to go in this stage.
    """
    own = [group for group in structure.groups if np.isin(group.units[0], units)]
    if layer.groups * layer.shape[1] > WIDEST or any(len(group.consumers) > 1 for group in own):
        return 0
    there = sum(int(keep[group.units].sum()) for group in own)
    return int(np.ceil(min(1.0, 4 * share) * there))
