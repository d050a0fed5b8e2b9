"""ONNX Runtime's own int8 after pruning. Run from the top of a clone.

`onnx-ecp optimize --quantize int8` does both at once and compensates for the rounding too.
"""

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

import onnx_ecp


class Reader(CalibrationDataReader):
    """Hands out the calibration samples; onnx_ecp.optimize takes such readers too."""

    def __init__(self):
        images = np.load("models/digits.npz")["pixels"]
        self.feeds = ({"pixels": part} for part in np.array_split(images, 8))

    def get_next(self):
        """A batch, or None when there are no more."""
        return next(self.feeds, None)


onnx_ecp.optimize("models/digits.onnx", Reader(), sparsity=0.8, output="sparse.onnx")
quantize_static("sparse.onnx", "sparse-int8.onnx", Reader(), quant_format=QuantFormat.QDQ)
gap = onnx_ecp.compare("models/digits.onnx", "sparse-int8.onnx", "models/digits-test.npz")
print(f"output error {gap.gap.relative_error:.4f}")
