"""The runtimes that a model may be for; a new one is a file with a row in ``rows``."""

from onnx_ecp.evaluation.targets.rows import TARGETS
from onnx_ecp.evaluation.targets.taken import check_taken, taken
from onnx_ecp.evaluation.targets.target import Eligible, Target, eligible, storage

__all__ = ["TARGETS", "Eligible", "Target", "check_taken", "eligible", "storage", "taken"]
