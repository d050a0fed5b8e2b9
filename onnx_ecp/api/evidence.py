"""What the pictures of a report are drawn from: measured while the network can still be run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np

from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.evaluation.compare import deviation_sums
from onnx_ecp.layers import Layer
from onnx_ecp.pruning.levels import LEVELS, Levels
from onnx_ecp.pruning.loop import Pruned
from onnx_ecp.pruning.plan import Plan
from onnx_ecp.pruning.search import Judge
from onnx_ecp.report.evidence import Evidence, Histogram, LayerEvidence, OutputEvidence
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.layerwise import Network
from onnx_ecp.statistics.observer import State

# Held-out samples that are looked at, and points of a scatter.
SAMPLES, POINTS = 128, 300
# Outputs with pictures, and the bars of their columns.
OUTPUTS, BARS = 4, 128
# Cells of all small masks together, the least and the most of one, and its longest side.
CELLS, FEWEST, MOST, SIDE = 80_000, 256, 3_072, 96
# Layers are measured one by one for a fifth of the time that pruning took, and so many seconds.
SHARE, SECONDS = 0.2, 2.0
DIGITS = "0123456789abcdef"


def gather_evidence(
    network: Network,
    plan: Plan,
    pruned: Pruned,
    test: Calibration,
    *,
    seconds: float,
    progress: Progress = silent,
) -> Evidence:
    """What there is to draw.

    Args:
        network: before pruning; its observer is open.
        plan: how it was pruned.
        pruned: where pruning ended.
        test: samples that nothing else has seen.
        seconds: that it all took so far.
        progress: called after every layer.
    """
    some = replace(test.take(np.arange(min(SAMPLES, len(test)))), labels=None)
    errors, unmeasured = errors_alone(network, pruned.state, some, seconds, progress)
    histograms = dict(histograms_of(network.layers, plan, pruned))
    cells = int(np.clip(CELLS // max(len(network.layers), 1), FEWEST, MOST))
    layers = (
        LayerEvidence(
            x.name,
            small_mask(pruned.state.keep[x.weight.tensor], cells),
            errors.get(x.name),
            histograms.get(x.name),
        )
        for x in network.layers
    )
    outputs = tuple(outputs_of(network, pruned.state, some))
    return Evidence(len(some), tuple(layers), outputs, unmeasured)


def errors_alone(
    network: Network, state: State, samples: Calibration, seconds: float, progress: Progress
) -> tuple[dict[str, float], str]:
    """By layer name, the output error where it alone is as in the result; why some are missing."""
    observer = network.observer
    if not observer.outputs:
        return {}, "no floating-point output depends on the layers"
    judge = Judge(observer, network.original, (samples,), network.size)
    found: dict[str, float] = {}
    ends = time.monotonic() + SECONDS + SHARE * seconds
    for k, layer in enumerate(network.layers):
        check_deadline()
        if time.monotonic() > ends:
            return found, "they would have taken more than a fifth of the time"
        found[layer.name] = judge.point(with_one(network.original, state, layer)).error
        progress("errors of layers", k + 1, len(network.layers))
    return found, ""


def with_one(original: State, result: State, layer: Layer) -> State:
    """The original with one layer as in the result."""
    tensor = layer.weight.tensor
    one = original.with_layer(layer, result.weights[tensor], result.shifts[layer.name])
    return replace(one, keep={**original.keep, tensor: result.keep[tensor]})


def histograms_of(
    layers: Sequence[Layer], plan: Plan, pruned: Pruned
) -> Iterator[tuple[str, Histogram]]:
    """(name, importances) of the layers whose weights were ranked one by one."""
    levels = pruned.levels
    if levels is None or levels.high <= 0.0:
        return
    edges, keep = levels.edges(), pruned.state.keep
    for group in plan.groups:
        ranked = [x for x in layers if x.weight.tensor in group.tensors]
        counts = {x.name: _counts(levels, x, keep) for x in ranked}
        cut = _cut(list(counts.values()), edges)
        for name, (kept, gone) in counts.items():
            yield (
                name,
                Histogram(
                    low=float(edges[0]),
                    high=float(edges[-1]),
                    kept=_halved(kept[1:]),
                    gone=_halved(gone[1:]),
                    nothing=int(kept[0] + gone[0]),
                    cut=cut,
                ),
            )


def _counts(
    levels: Levels, layer: Layer, keep: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(LEVELS + 1,) of the weights that stayed, and the same of those that went."""
    level, stays = levels.by_layer[layer.name], keep[layer.weight.tensor]
    kept, gone = (np.bincount(level[part], minlength=LEVELS + 1) for part in (stays, ~stays))
    return kept, gone


def _halved(counts: np.ndarray) -> tuple[int, ...]:
    """Two bins as one."""
    return tuple(int(n) for n in counts.reshape(-1, 2).sum(axis=1))


def _cut(counts: Sequence[tuple[np.ndarray, np.ndarray]], edges: np.ndarray) -> float | None:
    """Where as many weights lie below as went, to the width of a level."""
    kept, gone = (np.sum(parts, axis=0) for parts in zip(*counts, strict=True))
    if not gone.sum():
        return None
    below = np.cumsum(kept + gone)
    level = int(np.searchsorted(below, gone.sum()))
    return float(edges[level])


def small_mask(keep: np.ndarray, cells: int) -> tuple[str, ...]:
    """A mask (out, in) of at most so many cells: see ``LayerEvidence``."""
    rows, columns = small_shape(keep.shape[0], keep.shape[1], cells)
    starts = [np.arange(n) * size // n for n, size in zip((rows, columns), keep.shape, strict=True)]
    kept = np.add.reduceat(keep.astype(np.float32), starts[0], axis=0)
    kept = np.add.reduceat(kept, starts[1], axis=1)
    sizes = [np.diff(s, append=n) for s, n in zip(starts, keep.shape, strict=True)]
    share = kept / np.outer(*sizes)
    return tuple("".join(DIGITS[d] for d in row) for row in np.rint(15 * share).astype(int))


def small_shape(rows: int, columns: int, cells: int) -> tuple[int, int]:
    """A shape of about the same proportions with at most so many cells, no side above SIDE.

    >>> small_shape(4, 16, 1000), small_shape(1000, 1000, 900), small_shape(8, 4000, 800)
    ((4, 16), (30, 30), (8, 96))
    """
    factor = min(1.0, (cells / (rows * columns)) ** 0.5)
    rows = min(max(int(rows * factor), min(rows, 8)), SIDE)
    columns = min(max(int(columns * factor), min(columns, 8)), SIDE, max(cells // rows, 1))
    return rows, columns


def outputs_of(network: Network, state: State, samples: Calibration) -> Iterator[OutputEvidence]:
    """Outputs of the original and of the result on the same samples, whatever their shapes are."""
    observer = network.observer
    if not observer.outputs:
        return
    batches = list(samples.batches(network.size))
    a, b = ([observer.predict(s, x) for x in batches] for s in (network.original, state))
    for name in observer.outputs[:OUTPUTS]:
        both = zip(a, b, strict=True)
        pairs = [(np.atleast_1d(x[name]), np.atleast_1d(y[name])) for x, y in both]
        columns, width = _by_column(network, name, batches, pairs)
        x, y = (np.concatenate([part[k].reshape(-1) for part in pairs]) for k in (0, 1))
        points = np.linspace(0, x.size - 1, min(POINTS, x.size)).astype(int)
        original, result = (tuple(map(_short, values[points])) for values in (x, y))
        yield OutputEvidence(name, original, result, columns, width)


def _short(value: float) -> float:
    """Five digits."""
    return float(f"{float(value):.5g}")


def _by_column(
    network: Network,
    name: str,
    batches: Sequence[Batch],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[tuple[float | None, ...], int]:
    """Relative errors by column, and how many columns share one."""
    measure = network.observer.measure
    if name not in measure.spreads:
        return (), 1
    axis = measure.spreads[name].axis
    both = zip(batches, pairs, strict=True)
    sums = reduce(add, (deviation_sums(x, y, 0, batch.samples, axis) for batch, (x, y) in both))
    squares = sums.mean_squares
    if len(squares) < 2 or len(squares) != len(measure.spreads[name].count):
        return (), 1
    errors = measure.columns(name, squares)
    width = -(-len(errors) // BARS)
    parts = [errors[k : k + width] for k in range(0, len(errors), width)]
    largest = (float(np.nanmax(p)) if not np.isnan(p).all() else None for p in parts)
    return tuple(None if v is None else _short(v) for v in largest), width
