"""The table: a new runtime is a file with a ``Target``, and a row here."""

from onnx_ecp.evaluation.targets.coreml import COREML
from onnx_ecp.evaluation.targets.deepsparse import DEEPSPARSE
from onnx_ecp.evaluation.targets.onnxruntime import ONNXRUNTIME
from onnx_ecp.evaluation.targets.openvino import OPENVINO
from onnx_ecp.evaluation.targets.target import Target
from onnx_ecp.evaluation.targets.tensorrt import TENSORRT
from onnx_ecp.evaluation.targets.xnnpack import XNNPACK

TARGETS: dict[str, Target] = {
    "onnxruntime": ONNXRUNTIME,
    "deepsparse": DEEPSPARSE,
    "openvino": OPENVINO,
    "tensorrt": TENSORRT,
    "xnnpack": XNNPACK,
    "coreml": COREML,
}
