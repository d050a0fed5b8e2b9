"""Sums inside the ONNX graph are those of NumPy, and keep activations and adjoints where they are.

The same observation, summed by NumPy (``--statistics host``) and in the graph (``graph``), side by
side: the sums must agree; seconds of the fastest of some interleaved rounds; and how much crosses
between the host and the device, in both directions. On the CPU, where nothing has to cross, what
crosses is counted as if it had to, and seconds are CPU seconds of one thread.

    python benchmarks/statistics_in_graph.py [PROVIDER]     # default: cuda where it works, else cpu
"""

from __future__ import annotations

import os
import sys

if os.environ.get("OMP_NUM_THREADS") != "1":  # read once, when NumPy is loaded
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_NUM_THREADS": "1"})

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from observation_speed import BATCH, Case, cases, disagreement
from observation_speed import GraphSums as SumsByLayer
from outcome import Claim, finish, publish, table

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.errors import ProviderError
from onnx_ecp.graph import decode_sparse, load
from onnx_ecp.layers import find_layers
from onnx_ecp.runtime.session import Session
from onnx_ecp.statistics.collection import measure
from onnx_ecp.statistics.observer import GraphSums, Observer, original_state

ROUNDS = 5
WAYS = ("host", "graph")
# Relative, in the Frobenius norm: both are float64 sums of the same float32 numbers.
AGREEMENT = 1e-10


def main() -> int:
    provider = sys.argv[1] if len(sys.argv) > 1 else _provider()
    rows, claims = [], []
    for name, case in cases():
        row = {"network": name, "provider": provider} | compared(case, provider)
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
        claims.append(
            Claim(
                f"{name}: the sums agree to {AGREEMENT}: {row['disagreement']:.1e}",
                row["disagreement"] <= AGREEMENT,
            )
        )
    publish("statistics_in_graph", rows)
    print(table(rows))
    return finish(claims)


def compared(case: Case, provider: str) -> dict[str, Any]:
    """One row."""
    model = load(case.model)
    layers = find_layers(decode_sparse(case.model)).layers
    data = Calibration(case.feeds, True, "", False, 0)
    state = original_state(model, layers)
    ways = {way: _way(model, layers, data, state, case.probes, provider, way) for way in WAYS}
    clock = time.process_time if provider == "cpu" else time.perf_counter
    seconds = dict.fromkeys(WAYS, float("inf"))
    for _ in range(ROUNDS + 1):  # the first warms up, and may as well count
        for way, run in ways.items():
            began = clock()
            run()
            seconds[way] = min(seconds[way], clock() - began)
    crossing = {way: megabytes_crossing(run) for way, run in ways.items()}
    return {
        "samples": len(data),
        **{f"{way} s": seconds[way] for way in WAYS},
        "graph / host": seconds["graph"] / seconds["host"],
        **{f"{way} MB across": crossing[way] for way in WAYS},
        "disagreement": disagreement(ways["graph"](), ways["host"]()),
    }


def _way(
    model: Any, layers: Any, data: Any, state: Any, probes: int | None, provider: str, way: str
) -> Callable[[], SumsByLayer]:
    first = next(data.batches(2))
    observer = Observer(
        model, layers, first, probes=probes, threads=1, provider=provider, statistics=way
    )

    def run() -> SumsByLayer:
        # Another object for the same weights: a device must not have them from the last round.
        moments = measure(observer, replace(state), data, size=BATCH).moments
        return {name: (m.bb, m.wb, m.ww) for name, m in moments.items()}

    return run


def megabytes_crossing(run: Callable[[], Any]) -> float:
    """What sessions take from NumPy and give to it in a run, 10^6 bytes."""
    crossed = 0

    def count(arrays: Mapping[str, Any]) -> None:
        nonlocal crossed
        crossed += sum(x.nbytes for x in arrays.values() if isinstance(x, np.ndarray))

    bound, plain, placed, fetched = (
        Session.run_bound,
        Session.run,
        Session.placed,
        GraphSums.moments,
    )

    def run_bound(session: Session, feeds: Any, *rest: Any) -> Any:
        found = bound(session, feeds, *rest)
        count(feeds)
        count(found)
        return found

    def run_plain(session: Session, feeds: Any, outputs: Any = None) -> Any:
        found = plain(session, feeds, outputs)
        if all(isinstance(x, np.ndarray) for x in feeds.values()):  # else it was run_bound's
            count(feeds)
            count(found)
        return found

    def place(session: Session, arrays: Any) -> Any:
        count(dict(arrays))
        return placed(session, arrays)

    def fetch(sums: GraphSums) -> Any:
        found = fetched(sums)
        for moments in found.values():
            count(vars(moments))
        return found

    patched = {"run_bound": run_bound, "run": run_plain, "placed": place, "remote": True}
    with mock.patch.multiple(Session, **patched), mock.patch.object(GraphSums, "moments", fetch):
        run()
    return crossed / 1e6


def _provider() -> str:
    """The device if there is one."""
    import onnx

    tiny = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 13]> tiny (float[2] x) => (float[2] y) '
        "{ y = Identity(x) }"
    )
    try:
        Session(tiny, provider="cuda")
    except ProviderError:
        return "cpu"
    return "cuda"


if __name__ == "__main__":
    sys.exit(main())
