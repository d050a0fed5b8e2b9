"""Where the time of two models goes: seconds by type of operator, from a profile of their runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onnx_ecp.data.calibration import Batch
from onnx_ecp.graph import Model
from onnx_ecp.runtime.session import Session

# The first run allocates; of the others the mean is taken.
RUNS = 6


@dataclass(frozen=True)
class OperatorTime:
    """What all nodes of one type take in a run.

    Args:
        op: the type, as ONNX Runtime runs it: it fuses some nodes into others.
        seconds_a: of the original model.
        seconds_b: of the result.
    """

    op: str
    seconds_a: float
    seconds_b: float


def operator_times(
    a: Model, b: Model, batch: Batch, *, provider: str = "cpu", threads: int | None = None
) -> tuple[OperatorTime, ...]:
    """Seconds by type of operator in runs of both models, those that take most first.

    Args:
        a: the original model.
        b: a model with the same inputs.
        batch: what both are fed.
        provider: execution provider.
        threads: threads within an operator; None leaves it to ONNX Runtime.

    Raises:
        ProviderError: a model cannot be run.
    """
    x, y = (_seconds(model, batch, provider, threads) for model in (a, b))
    rows = [OperatorTime(op, x[op], y[op]) for op in x | y]
    return tuple(sorted(rows, key=lambda row: (-max(row.seconds_a, row.seconds_b), row.op)))


def _seconds(model: Model, batch: Batch, provider: str, threads: int | None) -> Counter[str]:
    with TemporaryDirectory(prefix="onnx-ecp-") as folder:
        session = Session(
            model.proto,
            provider=provider,
            threads=threads,
            base=model.base,
            packed=True,
            profile=Path(folder),
        )
        for _ in range(RUNS):
            session.run(batch.feeds)
        events = json.loads(session.end_profiling().read_bytes())
    return seconds_by_operator(events)


def seconds_by_operator(events: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Mean seconds of all runs but the first, by type of operator.

    Args:
        events: of a profile of ONNX Runtime, in the order of time, with durations in microseconds.

    >>> run = {"cat": "Session", "name": "model_run", "dur": 9}
    >>> node = {"cat": "Node", "name": "h_kernel_time", "dur": 4, "args": {"op_name": "Gemm"}}
    >>> seconds_by_operator([{**node, "dur": 7}, run, node, node, run])
    Counter({'Gemm': 8e-06})
    """
    found: Counter[str] = Counter()
    runs = 0
    for event in events:
        if event.get("name") == "model_run":
            runs += 1
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and runs:
            found[event["args"]["op_name"]] += event["dur"]
    each = 1e6 * max(runs - 1, 1)
    return Counter({op: total / each for op, total in found.items()})
