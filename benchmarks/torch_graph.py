"""Run the ONNX graphs of the benchmarks in PyTorch, with its autograd: the opponent, and a trainer.

Node by node in eager mode, which is what a PyTorch module does as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor


def _gemm(a: Tensor, b: Tensor, c: Tensor, *, transB: int = 0, **at: float) -> Tensor:
    assert all(at.get(x, 1.0) == 1.0 for x in ("alpha", "beta")), "the benchmarks' have none"
    return F.linear(a, b, c) if transB else torch.addmm(c, a, b)


def _conv(x: Tensor, w: Tensor, b: Tensor | None = None, **at: Any) -> Tensor:
    pads = at.get("pads", [0, 0, 0, 0])
    assert pads[:2] == pads[2:], "the benchmarks' convolutions pad evenly"
    return F.conv2d(x, w, b, at.get("strides", 1), pads[:2], at.get("dilations", 1))


def _max_pool(x: Tensor, *, kernel_shape: list[int], **at: Any) -> Tensor:
    return F.max_pool2d(x, kernel_shape, at.get("strides", 1))


def _reshape(x: Tensor, shape: Tensor, **_: Any) -> Tensor:
    kept = [x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())]
    return x.reshape(kept)


def _layer_norm(x: Tensor, scale: Tensor, bias: Tensor, **_: Any) -> Tensor:
    return F.layer_norm(x, scale.shape, scale, bias)


OPS: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "Conv": _conv,
    "Flatten": lambda x, axis=1: x.flatten(axis),
    "Gelu": F.gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "LayerNormalization": _layer_norm,
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "Mul": torch.mul,
    "ReduceMean": lambda x, axes, keepdims=1: x.mean(axes.tolist(), keepdim=bool(keepdims)),
    "Relu": F.relu,
    "Reshape": _reshape,
    "Softmax": lambda x, axis=-1: x.softmax(axis),
    "Transpose": lambda x, perm: x.permute(perm),
}


def stored(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The initializers as tensors; they require no gradients."""
    return {
        t.name: torch.from_numpy(np.array(numpy_helper.to_array(t)))
        for t in model.graph.initializer
    }


def run(
    model: onnx.ModelProto,
    weights: Mapping[str, Tensor],
    feeds: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """All tensors of the graph by name."""
    values = {**weights, **feeds}
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        values[node.output[0]] = OPS[node.op_type](*(values[x] for x in node.input), **attributes)
    return values
