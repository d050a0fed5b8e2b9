"""Which layers ONNX Runtime can compute in int8, and the copy of a model in which it can.

Kernels exist for Conv, Gemm and MatMul with a stored weight in float32, one scale per row of W.
What only stands in the way is put aside in a copy: names that nodes lack, weights and biases in
Constant nodes or listed as inputs, weights behind a Transpose, Gemm's alpha, an opset before 13. A
MatMul of matrices becomes a Gemm with the bias that follows: ONNX Runtime does the same before it
looks for what it can compute in int8, and then finds no bias that was rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.version_converter import convert_version

from onnx_ecp.data.calibration import Batch
from onnx_ecp.errors import ModelError
from onnx_ecp.graph import (
    LARGEST_FILE,
    Model,
    decode_sparse,
    output_names,
    printable,
    stored_size,
)
from onnx_ecp.graph.proto import constants, opset_of
from onnx_ecp.graph.shapes import Shapes, shapes_of_a_run
from onnx_ecp.layers import Layer, Skip, edit, find_layers
from onnx_ecp.layers.bias import BiasInput
from onnx_ecp.layers.conv import Conv
from onnx_ecp.layers.layer import Transpose
from onnx_ecp.runtime.outputs import arrays
from onnx_ecp.runtime.session import Session

# Scales along an axis are part of the standard from here on.
OPSET = 13
# The IR version that came with it.
IR_VERSION = 7
# Operators with int8 kernels.
_OPS = ("Conv", "Gemm", "MatMul")
# Outputs are the same that differ by no more than this share of the largest: float32 rounding.
ROUNDING = 1e-6


def prepared(model: Model, batch: Batch, session: dict) -> Model:
    """A copy that the writer takes: in memory, every node named, weights as they are multiplied.

    Args:
        model: as pruned.
        batch: on which a copy of a newer opset must compute the same.
        session: settings of ONNX Runtime.

    Raises:
        ModelError: the model is too large, or cannot be raised to the opset.
    """
    if stored_size(model.proto) > LARGEST_FILE:
        raise ModelError(
            "int8 needs the model in memory: its weights take more than 2 GB.",
            hint="Leave --quantize out, or quantise a part of the model on its own.",
        )
    proto = onnx.ModelProto()
    proto.CopyFrom(decode_sparse(model.proto))
    if model.base is not None:
        onnx.load_external_data_for_model(proto, str(model.base))
    for name, values in model.late.items():
        edit.write(proto, name, values, None)
    proto = _raised(proto, batch, session)
    _name_nodes(proto.graph)
    _store_as_initializers(proto)
    for layer in find_layers(proto).layers:
        _store_as_multiplied(proto, layer)
        _store_bias(proto, layer)
    shapes = shapes_of_a_run(Model(proto, None, None), batch.feeds, **session)
    for layer in find_layers(proto).layers:
        _as_gemm(proto, layer, shapes)
    edit.drop_unread_tensors(proto)  # ONNX Runtime warns of them on stderr
    return Model(proto, None, None)


def candidates(
    proto: onnx.ModelProto, left_alone: Callable[[str], str] = lambda name: ""
) -> tuple[list[Layer], list[Skip]]:
    """The layers that can be int8, and all others with the reason, in graph order each.

    Args:
        proto: ``prepared``.
        left_alone: why a layer of this name is to stay in floats; empty where it need not.
    """
    layers, skips = [], []
    for layer in find_layers(proto).layers:
        reason = left_alone(layer.name) or _refusal(proto, layer)
        if reason:
            skips.append(Skip(layer.name, layer.op, reason))
        else:
            layers.append(layer)
    return layers, skips


def node_of(proto: onnx.ModelProto, layer: Layer) -> onnx.NodeProto | None:
    """The node of the main graph that computes a layer's z; None where it lies elsewhere."""
    nodes = proto.graph.node
    by_output = (node for node in nodes if layer.output in node.output)
    # A fused operator gives what follows z: in a prepared model its name is its own.
    return next(by_output, next((node for node in nodes if node.name == layer.name), None))


def _refusal(proto: onnx.ModelProto, layer: Layer) -> str:
    """Why a layer stays in floating point; empty where it need not."""
    node = node_of(proto, layer)
    if node is None:
        return "it lies in a subgraph or function"
    if node.op_type not in _OPS or node.domain not in ("", "ai.onnx"):
        return f"there are int8 kernels of {', '.join(_OPS)}; this is {node.op_type}"
    if node.input[0] != layer.input:
        return "its weight is the first operand, whose units an int8 kernel cannot scale one by one"
    tensor = next((t for t in proto.graph.initializer if t.name == node.input[1]), None)
    if tensor is None or tensor.name != layer.weight.tensor:
        return "its weight is computed from what is stored"
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return "its weight is not float32"
    if layer.weight.scale != 1.0 or (len(tensor.dims) != 2 and not isinstance(layer, Conv)):
        return "its weight is not stored as the operator multiplies it"
    return ""


def _store_as_multiplied(proto: onnx.ModelProto, layer: Layer) -> None:
    """Give a node the weight that it sees as a stored tensor of its own, where it has none."""
    node, weight = node_of(proto, layer), layer.weight
    if node is None or node.op_type not in _OPS or node.input[0] != layer.input:
        return
    direct = {tensor.name for tensor in proto.graph.initializer}
    if node.input[1] == weight.tensor and weight.tensor in direct and weight.scale == 1.0:
        return
    # A MatMul may see its weight as a stack of one matrix, which its output then is too.
    is_matrix = node.op_type != "MatMul" or all(isinstance(x, Transpose) for x in weight.steps)
    if weight.tensor not in constants(proto) or not is_matrix:
        return
    matrix = weight.matrix(edit.read(proto, weight.tensor, None))
    if node.op_type == "MatMul":
        matrix = matrix.T
    elif isinstance(layer, Conv):
        matrix = matrix.reshape(layer.shape[0], -1, *layer.window.kernel)
    else:
        kept = [a for a in node.attribute if a.name not in ("transB", "alpha")]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("transB", 1)])
    stem = f"{weight.tensor}/int8"
    matrix = np.ascontiguousarray(matrix)
    name = edit.add_constant(proto, stem, matrix, weight.dtype, before=node.output[0])
    edit.set_input(proto, node.output[0], 1, name)


def _as_gemm(proto: onnx.ModelProto, layer: Layer, shapes: Shapes) -> None:
    """Let a MatMul of matrices and the Add of a bias behind it be one Gemm."""
    node = node_of(proto, layer)
    if node is None or node.op_type != "MatMul" or _refusal(proto, layer):
        return
    if len(shapes.get(node.input[0], ())) != 2:
        return
    node.op_type = "Gemm"
    z, stored = node.output[0], {tensor.name: tensor for tensor in proto.graph.initializer}
    readers = [n for n in proto.graph.node if z in n.input]
    if len(readers) != 1 or readers[0].op_type != "Add" or z in output_names(proto):
        return
    other = next((name for name in readers[0].input if name != z), "")
    bias = stored.get(other)
    if bias is None or tuple(bias.dims) not in (layer.shape[:1], (1, layer.shape[0])):
        return
    name = other
    if len(bias.dims) == 2:
        values = numpy_helper.to_array(bias).reshape(-1)
        name = edit.add_constant(proto, f"{other}/int8", values, bias.data_type, before=z)
    add = readers[0]
    proto.graph.node.remove(add)
    node = proto.graph.node[edit.node_index(proto, z)]
    node.input.append(name)
    node.output[0] = add.output[0]


def _store_bias(proto: onnx.ModelProto, layer: Layer) -> None:
    """Give a node a bias that is a view of a stored tensor as a tensor of its own."""
    node, bias = node_of(proto, layer), getattr(layer, "bias", None)
    if node is None or node.op_type not in _OPS or not isinstance(bias, BiasInput):
        return
    if bias.constant is None or bias.constant.direct or bias.node != node.output[0]:
        return
    values = bias.constant.view(edit.read(proto, bias.constant.tensor, None))
    name = edit.add_constant(
        proto, f"{bias.constant.tensor}/int8", values, bias.dtype, before=bias.node
    )
    edit.set_input(proto, bias.node, bias.index, name)


def _store_as_initializers(proto: onnx.ModelProto) -> None:
    """Let weights and biases be initializers that no caller can replace."""
    read = {name for n in proto.graph.node if n.op_type in _OPS for name in n.input[1:]}
    found = {name: tensor for name, tensor in constants(proto).items() if name in read}
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    stored = {tensor.name for tensor in proto.graph.initializer}
    for name in sorted(found.keys() - stored):
        tensor = proto.graph.initializer.add()
        tensor.CopyFrom(found[name])
        tensor.name = name
    nodes = [n for n in proto.graph.node if n.op_type != "Constant" or n.output[0] not in found]
    inputs = [info for info in proto.graph.input if info.name not in found]
    for kept, field in ((nodes, proto.graph.node), (inputs, proto.graph.input)):
        if len(kept) < len(field):
            del field[:]
            field.extend(kept)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own: the writer knows nodes by it."""
    taken = Counter(node.name for node in graph.node)
    used = {name for name in taken if name}
    for node in graph.node:
        if node.name and taken[node.name] == 1:
            continue
        stem = next((name for name in node.output if name), node.op_type)
        name = stem
        while name in used:
            name += "_"
        used.add(name)
        node.name = name


def _raised(proto: onnx.ModelProto, batch: Batch, session: dict) -> onnx.ModelProto:
    """The model in an opset that has scales along an axis.

    Raises:
        ModelError: it cannot be converted, or computes something else then.
    """
    version = opset_of(proto)
    if version >= OPSET:
        return proto
    hint = f"Export the model for opset {OPSET} or later, or leave --quantize out."
    try:
        raised = convert_version(proto, OPSET)
        onnx.checker.check_model(raised)
    except Exception as error:
        text = printable(str(error).strip().split("\n")[0], 200)
        raise ModelError(
            f"int8 needs opset {OPSET}; the model has {version}, and cannot be raised: {text}",
            hint=hint,
        ) from error
    old, new = (arrays(Session(m, **session).run(batch.feeds)) for m in (proto, raised))
    if old.keys() != new.keys() or not all(_same(y, new[name]) for name, y in old.items()):
        raise ModelError(
            f"int8 needs opset {OPSET}; raised from {version}, the model computes something else.",
            hint=hint,
        )
    return raised


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether arrays are equal but for rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not np.issubdtype(a.dtype, np.floating):
        return bool(np.array_equal(a, b))
    finite = np.isfinite(a)
    most = float(np.abs(a[finite]).max(initial=0.0))
    return bool(np.allclose(a, b, rtol=0.0, atol=ROUNDING * most, equal_nan=True))
