"""What the report says of int8."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Int8Row:
    """One layer of the result, and whether its products are taken in int8.

    Args:
        name: the layer's name.
        op: operator type.
        weights: elements of W in the result.
        int8: whether it is.
        error: how far its outputs are from those of the pruned layer on the validation samples,
            as a share of their root mean square, in the network whose layers before it are in int8
            too; None where that was not measured.
        note: why it stays in floating point, or what was done.
    """

    name: str
    op: str
    weights: int
    int8: bool
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Int8:
    """What int8 took away, and what it gave.

    Errors are relative errors of the outputs on the held-out samples, in units of the original's
    spread.

    Args:
        layers: in graph order.
        zeros: error of pruning alone: the pruned model against the original.
        rounding: error of int8 alone: the result against the pruned model.
        both: the result against the original.
        uncompensated: error of int8 alone where every value is rounded to the nearest.
        compensated: whether compensation was kept: on the validation samples it was better.
        bytes: size of the pruned model in floating point.
        compressed_bytes: its size after gzip.
    """

    layers: tuple[Int8Row, ...]
    zeros: float
    rounding: float
    both: float
    uncompensated: float
    compensated: bool
    bytes: int
    compressed_bytes: int
