"""onnxsim and onnxslim, before and after. Needs: pip install onnxsim onnxslim.

Both leave the zeros alone; after removal of units they find nothing more to do.
"""

import numpy as np
import onnx
import onnxsim
import onnxslim

import onnx_ecp

before, checked = onnxsim.simplify("models/digits.onnx")
assert checked
result = onnx_ecp.optimize(before, "models/digits.npz", sparsity=0.8)
for name, simplified in {
    "onnxsim": onnxsim.simplify(result.model)[0],
    "onnxslim": onnxslim.slim(result.model),
}.items():
    onnx.save(simplified, f"digits-{name}.onnx")
    gap = onnx_ecp.compare(result.model, simplified, "models/digits-test.npz")
    zeros = sum(
        int((onnx.numpy_helper.to_array(tensor) == 0).sum())
        for tensor in simplified.graph.initializer
    )
    assert np.isclose(gap.gap.relative_error, 0, atol=1e-5), name
    print(f"{name}: {zeros} zeros, {len(simplified.graph.node)} nodes, the same outputs")
