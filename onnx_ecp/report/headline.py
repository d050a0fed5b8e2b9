"""The first line of a report: what one gets."""

from __future__ import annotations

from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.report import Report

# What stands before ``Report.advice``.
ADVICE = "What would be faster:"


def headline(report: Report) -> str:
    """Latency before and after, sizes and multiplications as shares, in one line.

    ``latency 0.0345 -> 0.0302 ms ±4 %, faster; size x0.868, gzip x0.259; multiplications x0.867``
    """
    a, b = report.original, report.result
    parts = [
        "latency not measured" if report.latency is None else _latency(report.latency),
        f"size {_share(a.bytes, b.bytes)}, gzip {_share(a.compressed_bytes, b.compressed_bytes)}",
    ]
    if report.work_before is not None and report.work_after is not None:
        products = _share(report.work_before.flops, report.work_after.flops)
        parts.append(f"multiplications {products}")
    return "; ".join(parts)


def _latency(latency: Latency) -> str:
    """Medians, the half of the wider spread, and whether they are apart."""
    before, after = latency.median_a, latency.median_b
    if before is None or after is None:
        before, after = latency.seconds_a, latency.seconds_b
    times = f"latency {1e3 * before:.3g} -> {1e3 * after:.3g} ms"
    if latency.spread_a is None:
        return f"{times}, {latency.verdict}: too few runs to tell"
    return f"{times} ±{100 * latency.relative_spread:.2g} %, {latency.verdict}"


def _share(before: int, after: int) -> str:
    return f"x{after / before:.3f}" if before else "x1"
