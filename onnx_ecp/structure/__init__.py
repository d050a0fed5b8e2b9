"""Whole units: which rows and columns live and die together, and how a model loses them."""

from onnx_ecp.structure.groups import STAYS, Group, Structure, find_structure
from onnx_ecp.structure.removal import cut, rearranged, store
from onnx_ecp.structure.shapes import inferred_shapes, shapes_of_a_run

__all__ = [
    "STAYS",
    "Group",
    "Structure",
    "cut",
    "find_structure",
    "inferred_shapes",
    "rearranged",
    "shapes_of_a_run",
    "store",
]
