"""Outputs of both models: element by element, and column by column."""

from __future__ import annotations

from onnx_ecp.report import Report
from onnx_ecp.report.evidence import OutputEvidence
from onnx_ecp.report.pictures.columns import columns
from onnx_ecp.report.pictures.scatter import scatter
from onnx_ecp.report.pictures.text import shown


def outputs(report: Report) -> str:
    """The pictures of every output that there are values of."""
    if report.evidence is None:
        return ""
    parts = [part for found in report.evidence.outputs if (part := _output(found))]
    if not parts:
        return ""
    title = f"Outputs on {report.evidence.samples:,} held-out samples"
    floats = "<p>Of the pruned model in floats, before int8.</p>\n" if report.int8 else ""
    return f"<h2>{title}</h2>\n{floats}" + "\n".join(parts)


def _output(found: OutputEvidence) -> str:
    drawn = scatter(found) + columns(found)
    return f'<h3>{shown(found.name)}</h3>\n<div class="pair">{drawn}</div>' if drawn else ""
