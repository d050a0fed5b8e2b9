"""A mask as a small picture: the darker a place, the more weights stay."""

from __future__ import annotations

from onnx_ecp.report import LayerRow
from onnx_ecp.report.evidence import LayerEvidence
from onnx_ecp.report.pictures.png import data_uri, png

# In the middle between the light and the dark page's colour of what stays.
COLOUR = (74, 144, 226)


def mask(row: LayerRow, found: LayerEvidence) -> str:
    """The mask of a layer, outputs downwards, inputs to the right; nothing where there is none."""
    if not found.mask or not found.mask[0]:
        return ""
    out, inputs = row.shape
    words = f"Which of {out:,} x {inputs:,} weights stay: outputs downwards, inputs to the right"
    height, width = len(found.mask), len(found.mask[0])
    return (
        f'<figure class="mask"><img alt="{words}" width="{width}" height="{height}" '
        f'src="{data_uri(png(found.mask, COLOUR))}">'
        f"<figcaption>weights kept, {out:,} outputs x {inputs:,} inputs</figcaption></figure>"
    )
