"""Clean-up leaves channels in the numbers that kernels of convolutions take."""

import numpy as np
import onnx
import onnx.parser
import pytest

import onnx_ecp
from onnx_ecp.runtime.session import Session

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n,3,6,6] x) => (float[n,4] y)
{
  h = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (x, U, b)
  r = Relu(h)
  k = Conv <kernel_shape = [3,3]> (r, V)
  s = Relu(k)
  p = GlobalAveragePool(s)
  f = Flatten(p)
  y = MatMul(f, W)
}
"""


# A little more than is zero already, of every layer.
CHOICES = {"method": "magnitude", "measure": False, "scope": "layer"}


def network(channels, dead, rng):
    """Two convolutions, of whose channels in between the first ones are dead."""
    model = onnx.parser.parse_model(TEXT)
    shapes = {"U": (channels, 3, 3, 3), "b": (channels,), "V": (6, channels, 3, 3), "W": (6, 4)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name in ("U", "b"):
            values[:dead] = 0
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize(
    ("channels", "dead", "left"),
    [
        *((32, 5, 32), (32, 16, 16), (32, 17, 16)),
        *((24, 3, 24), (24, 9, 16)),
        *((12, 5, 7), (20, 1, 19)),
    ],
)
def test_blocks_stay_whole_where_they_were(channels, dead, left, rng):
    model = network(channels, dead, rng)
    x = rng.standard_normal((40, 3, 6, 6)).astype(np.float32)
    share = dead / channels + 0.3 / channels
    whole, cut = (
        onnx_ecp.optimize(model, x, sparsity=share, cleanup=cleanup, **CHOICES).model
        for cleanup in (False, True)
    )
    stored = {t.name: tuple(t.dims) for t in cut.graph.initializer}
    assert stored["U"][0] == stored["V"][1] == left
    before, after = (Session(m).run({"x": x})["y"] for m in (whole, cut))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_vectors_have_no_blocks(rng):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n,5] x) => (float[n,4] y) '
        "{ h = MatMul(x, U) r = Relu(h) y = MatMul(r, V) }"
    )
    for name, shape in {"U": (5, 32), "V": (32, 4)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "U":
            values[:, :5] = 0
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    x = rng.standard_normal((40, 5)).astype(np.float32)
    found = onnx_ecp.optimize(model, x, sparsity=5.3 / 32, **CHOICES)
    assert {t.name: tuple(t.dims) for t in found.model.graph.initializer}["U"] == (5, 27)
