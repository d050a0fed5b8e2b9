"""A scikit-learn pipeline, through skl2onnx. Needs: pip install skl2onnx scikit-learn."""

import numpy as np
from skl2onnx import to_onnx
from sklearn.datasets import load_wine
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import onnx_ecp

x, y = load_wine(return_X_y=True)
x = x.astype(np.float32)
model = make_pipeline(StandardScaler(), MLPClassifier((64, 32), max_iter=300, random_state=0))
model.fit(x, y)
# zipmap off: probabilities as one array, not as a dictionary for each sample.
proto = to_onnx(model, x[:1], options={"zipmap": False})

# A table of samples is calibration as it is: columns are the features.
np.savetxt("wine.csv", x, delimiter=",")
result = onnx_ecp.optimize(proto, "wine.csv", sparsity=0.7, output="wine-sparse.onnx")
print(f"{result.report.zeros_after} zeros, output error {result.report.gap.relative_error:.4f}")
