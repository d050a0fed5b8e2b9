"""What a report shows in pictures: values small enough for a page, and for JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """The importances of a layer's weights, in the original network, over bins of equal ratio.

    Args:
        low: where the first bin begins; what lies below is in it.
        high: where the last one ends.
        kept: weights that stayed, by bin.
        gone: weights that went, by bin.
        nothing: weights of importance 0.
        cut: the importance below which as many weights of the layers ranked together lie as went;
            None where nothing went.
    """

    low: float
    high: float
    kept: tuple[int, ...]
    gone: tuple[int, ...]
    nothing: int = 0
    cut: float | None = None


@dataclass(frozen=True)
class LayerEvidence:
    """One layer in pictures.

    Args:
        name: of the layer.
        mask: the keep mask made small, rows of outputs, columns of inputs: of every cell the share
            of weights that stay, as a digit from 0 (none) to f (all).
        error: relative output error where this layer alone is as in the result; None where it was
            not measured.
        histogram: of its importances; None where single weights were not ranked.
    """

    name: str
    mask: tuple[str, ...]
    error: float | None = None
    histogram: Histogram | None = None


@dataclass(frozen=True)
class OutputEvidence:
    """One output in pictures.

    Args:
        name: of the output.
        original: elements of it, evenly chosen from some held-out samples.
        result: the same elements of the result's output.
        columns: relative errors by column, or by as many columns as ``width`` the largest of them;
            None for those that never vary. Empty for a single column.
        width: columns that share a bar.
    """

    name: str
    original: tuple[float, ...]
    result: tuple[float, ...]
    columns: tuple[float | None, ...] = ()
    width: int = 1


@dataclass(frozen=True)
class Evidence:
    """What the pictures of a report are drawn from.

    Args:
        samples: held-out samples that errors and outputs are of.
        layers: in graph order.
        outputs: the first ones of the network.
        unmeasured: why layers have no error; empty where they have.
    """

    samples: int
    layers: tuple[LayerEvidence, ...]
    outputs: tuple[OutputEvidence, ...]
    unmeasured: str = ""
