"""The basis of a head is free: one in which the last dimensions carry least, for all heads alike.

Inside a head, queries q meet keys k in q^T k, and the layer behind reads values v as W v. For any
invertible R

    q' = R^-T q,  k' = R k        v' = R v,  W' = W R^-1

change nothing. With C the covariance of k and M = E[q q^T], or C of v and M = W^T W, there is an R

    R C R^T = R^-T M R^-1 = S     diagonal, descending

(balanced truncation: Moore, IEEE Trans. Autom. Control 26(1), 1981): without the last r dimensions
q^T k, or W v, then loses least, as far as q and k are independent. Dimensions are removed from all
heads at a time; in these bases the cheapest of every head go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnx_ecp.layers import Layer, edit
from onnx_ecp.statistics.gram import Gram
from onnx_ecp.units.groups import Group, Structure

# Of the mean of the diagonal: directions that carry less than this do not make R singular.
RIDGE = 1e-6


@dataclass(frozen=True)
class Heads:
    """Two places at which the dimensions of heads lie, and the layers there.

    Args:
        first: layer of the rows that become R z: keys, or values.
        rows: of the first, (heads, size).
        second: layer of the queries, or the one that reads the values.
        entries: rows of the queries, or columns of the reader, (heads, size).
        meet: whether they meet in a product: the second makes queries.
    """

    first: str
    rows: np.ndarray
    second: str
    entries: np.ndarray
    meet: bool


def heads_of(structure: Structure, layers: Sequence[Layer]) -> list[Heads]:
    """All heads whose basis is free: between one layer and one other, none of a shared weight."""
    users: dict[str, int] = {}
    for layer in layers:
        users[layer.weight.tensor] = users.get(layer.weight.tensor, 0) + 1
    own = {layer.name for layer in layers if users[layer.weight.tensor] == 1}
    groups = [group for group in structure.groups if group.inside]
    found = [heads for group in groups for heads in _heads(structure, group)]
    return [x for x in found if {x.first, x.second} <= own and x.rows.shape == x.entries.shape]


def _heads(structure: Structure, group: Group) -> Iterator[Heads]:
    def at(name: str, among: np.ndarray) -> np.ndarray:
        return _by_head(np.where(among, structure.dimensions(name), -1), group.units)

    keys = [(n, at(n, structure.keys[n])) for n in group.producers]
    queries = [(n, at(n, structure.queries[n])) for n in group.producers]
    keys, queries = ([x for x in side if x[1].size] for side in (keys, queries))
    if len(keys) == len(queries) == 1:
        yield Heads(*keys[0], *queries[0], meet=True)
    if len(group.consumers) == 1:
        (reader,) = group.consumers
        others = [(n, at(n, ~(structure.keys[n] | structure.queries[n]))) for n in group.producers]
        values = [x for x in others if x[1].size]
        if len(values) == 1:
            columns = structure.units_at(structure.columns[reader])[-1]
            yield Heads(*values[0], reader, _by_head(columns, group.units), meet=False)


def _by_head(units: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(heads, size): entries by their place among those of the same unit; empty if uneven."""
    places = [np.flatnonzero(units == unit) for unit in group]
    if len({len(x) for x in places}) != 1:
        return np.empty((0, len(group)), int)
    return np.stack(places, axis=1)


def turned(
    proto: onnx.ModelProto,
    heads: Sequence[Heads],
    layers: Sequence[Layer],
    grams: Mapping[str, Gram],
    base: Path | None = None,
) -> onnx.ModelProto:
    """A copy of a model that computes the same with its heads in balanced bases.

    Args:
        proto: the model.
        heads: that are turned.
        layers: of the model.
        grams: by layer name, of the inputs of keys, queries and readers.
        base: directory of its external data.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    by_name = {layer.name: layer for layer in layers}
    flat = {n: b for n, x in by_name.items() if (b := x.bias_values(model, base)) is not None}
    heads = [x for x in heads if {x.first, x.second} <= flat.keys()]
    names = {name for x in heads for name in (x.first, x.second)}
    weight = {n: _matrix(model, x, base) for n, x in by_name.items() if n in names}
    bias = {name: flat[name].copy() for name in names}
    for x in heads:
        for rows, entries in zip(x.rows, x.entries, strict=True):
            covariance, metric = _measures(x, rows, entries, weight, bias, grams)
            turn = balanced(covariance, metric)
            weight[x.first][rows] = turn @ weight[x.first][rows]
            bias[x.first][rows] = turn @ bias[x.first][rows]
            back = np.linalg.inv(turn)
            if x.meet:
                weight[x.second][entries] = back.T @ weight[x.second][entries]
                bias[x.second][entries] = back.T @ bias[x.second][entries]
            else:
                weight[x.second][:, entries] = weight[x.second][:, entries] @ back
    for name in sorted(names):
        stored = by_name[name].weight.unmatrix(weight[name])
        by_name[name].store(model, stored, bias[name] - flat[name], base)
    return model


def _matrix(model: onnx.ModelProto, layer: Layer, base: Path | None) -> np.ndarray:
    stored = edit.read(model, layer.weight.tensor, base)
    return layer.weight.matrix(stored).astype(np.float64)


def _measures(
    heads: Heads,
    rows: np.ndarray,
    entries: np.ndarray,
    weight: Mapping[str, np.ndarray],
    bias: Mapping[str, np.ndarray],
    grams: Mapping[str, Gram],
) -> tuple[np.ndarray, np.ndarray]:
    """C and M of one head, (size, size)."""
    seen = grams[heads.second]
    if not heads.meet:
        reader = weight[heads.second][:, entries]
        return seen.covariance[0][np.ix_(entries, entries)], reader.T @ reader
    key, query = weight[heads.first][rows], weight[heads.second][entries]
    mean = query @ seen.mean_now[0] + bias[heads.second][entries]
    metric = query @ seen.covariance[0] @ query.T + np.outer(mean, mean)
    return key @ grams[heads.first].covariance[0] @ key.T, metric


def balanced(covariance: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """R (size, size) with R C R^T = R^-T M R^-1 diagonal and descending.

    >>> np.abs(balanced(np.diag([1.0, 4.0]), np.diag([1.0, 4.0]))).round(3)
    array([[0., 1.],
           [1., 0.]])
    """
    c, m = (
        x + max(RIDGE * float(np.trace(x)) / len(x), np.finfo(np.float64).tiny) * np.eye(len(x))
        for x in (covariance, metric)
    )
    root = np.linalg.cholesky(c)
    squares, vectors = np.linalg.eigh(root.T @ m @ root)
    scale = np.maximum(squares[::-1], np.finfo(np.float64).tiny) ** 0.25
    return np.asarray(scale[:, None] * np.linalg.solve(root.T, vectors[:, ::-1]).T)
