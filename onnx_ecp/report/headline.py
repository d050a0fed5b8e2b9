"""The first line of a report: what one gets."""

from __future__ import annotations

from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.report import Report

# What stands before ``Report.advice``.
ADVICE = "What would be faster:"


def headline(report: Report) -> str:
    """Latency before and after, sizes and multiplications as shares, in one line.

    ``latency 0.0345 -> 0.0302 ms (x0.84 to x0.91), faster; size x0.87, gzip x0.26; ...``
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
    """Medians, the range of their ratio, and whether that is a difference."""
    before, after = latency.median_a, latency.median_b
    if before is None or after is None:
        before, after = latency.seconds_a, latency.seconds_b
    times = f"latency {1e3 * before:.3g} -> {1e3 * after:.3g} ms"
    if latency.range is None:
        return f"{times}, {latency.verdict}: too few runs to tell"
    low, high = latency.range
    return f"{times} (x{low:.2f} to x{high:.2f}), {latency.verdict}"


def _share(before: int, after: int) -> str:
    return f"x{after / before:.3f}" if before else "x1"
