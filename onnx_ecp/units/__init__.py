"""Whole units: which rows and columns live and die together, and how a model loses them."""

from onnx_ecp.graph.shapes import inferred_shapes, shapes_of_a_run
from onnx_ecp.units.cutting import cut, rearranged, store
from onnx_ecp.units.groups import STAYS, Group, Structure, find_structure

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
