"""OpenVINO runs the result. Needs: pip install openvino; run from the top of a clone."""

import numpy as np
import openvino

import onnx_ecp

result = onnx_ecp.optimize("models/digits.onnx", "models/digits.npz", speedup=2, output="half.onnx")
images = np.load("models/digits-test.npz")["pixels"]
original, pruned = (
    openvino.compile_model(path, "CPU")(images)[0] for path in ("models/digits.onnx", "half.onnx")
)
agreement = (original.argmax(axis=1) == pruned.argmax(axis=1)).mean()
print(f"{agreement:.2%} of {len(images)} predictions agree in OpenVINO {openvino.__version__}")
