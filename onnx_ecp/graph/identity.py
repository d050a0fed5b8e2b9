"""What a model is, wherever it lies: a digest of its graph and of all its numbers."""

from __future__ import annotations

from onnx_ecp.graph.external import is_external
from onnx_ecp.graph.proto import Model, tensors
from onnx_ecp.graph.tensors import read_tensor
from onnx_ecp.runtime.digest import digest


def identity(model: Model) -> str:
    """A digest of a model with what it reads from other files; paths do not count.

    >>> import onnx
    >>> first, second = (Model(onnx.ModelProto(ir_version=8), None, None) for _ in range(2))
    >>> identity(first) == identity(second)
    True
    """
    outside = [read_tensor(model, t) for _, t in tensors(model.proto) if is_external(t)]
    return digest(model.proto, outside, model.late)
