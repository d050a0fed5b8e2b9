"""A card for every layer: its mask and its importances."""

from __future__ import annotations

from onnx_ecp.report import LayerRow, Report
from onnx_ecp.report.evidence import LayerEvidence
from onnx_ecp.report.names import told_apart
from onnx_ecp.report.pictures.histogram import histogram
from onnx_ecp.report.pictures.layers import NAME, largest
from onnx_ecp.report.pictures.mask import mask
from onnx_ecp.report.pictures.text import shown

# A card takes up to 8 kB.
CARDS = 24


def cards(report: Report) -> str:
    """The cards of the layers with most weights."""
    if report.evidence is None:
        return ""
    known = {x.name: x for x in report.evidence.layers}
    rows = [row for row in report.layers if row.name in known]
    chosen = largest(rows, CARDS)
    named = zip(chosen, told_apart((row.name for row in chosen), NAME), strict=True)
    drawn = "\n".join(_card(row, name, known[row.name]) for row, name in named)
    if not drawn:
        return ""
    few = f"<p>The {CARDS} layers with most weights.</p>\n" if len(rows) > CARDS else ""
    return f'<h2>Weights kept in each layer</h2>\n{few}<div class="cards">\n{drawn}\n</div>'


def _card(row: LayerRow, name: str, found: LayerEvidence) -> str:
    return (
        f'<section class="card"><h3 title="{shown(row.name, 200)}">{shown(name)}</h3>'
        f"<p>{shown(row.op, 30)}, {100 * row.sparsity:.1f} % of {row.weights:,} weights removed</p>"
        f"{mask(row, found)}{histogram(found.histogram)}</section>"
    )
