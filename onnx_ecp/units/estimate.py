"""What removing whole units could save, before anything is removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_ecp.evaluation.work import multiplications
from onnx_ecp.layers import Layer
from onnx_ecp.units.groups import Structure


def half_of_the_units(
    structure: Structure, layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, int]:
    """Multiplications of a run: of all layers, and without every second unit of every group.

    Args:
        structure: the units.
        layers: all layers of the model.
        shapes: of all tensors of a run.
    """
    keep = np.ones(structure.units, np.bool_)
    for group in structure.groups:
        keep[group.units[1::2]] = False
    whole = multiplications(layers, shapes)
    left = (products * _share(structure, name, keep) for name, products in whole.items())
    return sum(whole.values()), round(sum(left))


def _share(structure: Structure, layer: str, keep: np.ndarray) -> float:
    """Of a layer's multiplications, what is left with the units ``keep`` (units,) bool."""
    if layer not in structure.rows:
        return 1.0
    kept = structure.rows_kept(layer, keep), structure.columns_kept(layer, keep)
    return float(kept[0].mean() * kept[1].mean())
