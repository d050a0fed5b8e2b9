"""Which axis of an output holds its columns: the quantities that have a unit of their own.

Of (samples, K) it is the last one. Of more axes the graph decides where it can, followed backward
through what works element by element: a product of matrices has its columns last, a convolution on
axis 1, a softmax where it sums. Else shapes do: the shorter of two axes, (84, 8400) and (8400, 84)
alike, and axis 1 of images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx

LAST = frozenset(
    (
        "Attention", "FusedMatMul", "GRU", "Gemm", "LSTM", "LayerNormalization", "MatMul",
        "MatMulInteger", "MatMulNBits", "MultiHeadAttention", "RMSNormalization", "RNN",
        "SimplifiedLayerNormalization", "SkipLayerNormalization",
    )
)  # fmt: skip
CHANNELS = frozenset(
    (
        "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "DepthToSpace",
        "GlobalAveragePool", "GlobalMaxPool", "GroupNormalization", "InstanceNormalization", "LRN",
        "MaxPool", "QLinearConv", "Resize", "SpaceToDepth", "Upsample",
    )
)  # fmt: skip
SUMMING = frozenset(("LogSoftmax", "Softmax"))
ELEMENTWISE = frozenset(
    (
        "Abs", "Add", "Cast", "Celu", "Clip", "DequantizeLinear", "Div", "Dropout", "Elu", "Erf",
        "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min",
        "Mish", "Mul", "Neg", "PRelu", "Pow", "QuantizeLinear", "Relu", "Selu", "Sigmoid",
        "Softplus", "Softsign", "Sqrt", "Sub", "Tanh",
    )
)  # fmt: skip

INTEGERS = frozenset(
    getattr(onnx.TensorProto, sign + size)
    for sign in ("INT", "UINT")
    for size in ("8", "16", "32", "64")
)
# What gives indices, classes or masks, whatever type they are cast to afterwards.
NAMING = frozenset(
    (
        "And", "ArgMax", "ArgMin", "Bernoulli", "Equal", "Greater", "GreaterOrEqual", "Hardmax",
        "IsInf", "IsNaN", "Less", "LessOrEqual", "Multinomial", "NonMaxSuppression", "NonZero",
        "Not", "OneHot", "Or", "Shape", "Size", "StringConcat", "TopK", "Unique", "Xor",
    )
)  # fmt: skip
# Of a stored table what an index names is no number, whatever it is.
LOOKING_UP = frozenset(("Gather", "GatherElements", "GatherND"))
# Numbers stay numbers, and names names.
MOVING = frozenset(
    (
        "CastLike", "Ceil", "Concat", "Expand", "Flatten", "Floor", "Mod", "Pad", "ReduceMax",
        "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Round", "Slice", "Split", "Squeeze",
        "Sum", "Tile", "Transpose", "Unsqueeze", "Where",
    )
)  # fmt: skip
_INTEGER_LAYERS = frozenset(("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"))


def column_axes(
    proto: onnx.ModelProto,
    shapes: Mapping[str, tuple[int, ...]],
    rows: Collection[int],
    varying: Mapping[str, Collection[int]] | None = None,
) -> dict[str, int | None]:
    """By output, the axis of its columns; None where the whole output is one column.

    Args:
        proto: the model.
        shapes: by name, of the outputs for one batch.
        rows: sizes that the first axis of a batch has, that of its inputs.
        varying: by output, axes that differ between batches: positions, no columns.
    """
    graph = proto.graph
    producers = {y: node for node in graph.node for y in node.output if y}
    stored = {x.name for x in graph.initializer} | {x.values.name for x in graph.sparse_initializer}
    stored |= {y for node in graph.node if node.op_type == "Constant" for y in node.output}
    declared = {y.name: _symbols(y) for y in graph.output}
    # What an input has as many of (tokens, pixels, frames) are positions.
    positions = {s for x in graph.input for s in _symbols(x)[1:] if s}
    found = {}
    for name, shape in shapes.items():
        free = {i for i, symbol in enumerate(declared.get(name, ())) if symbol in positions}
        free |= set((varying or {}).get(name, ()))
        traced = _traced(name, producers, stored, len(shape))
        found[name] = column_axis(shape, rows, traced, free)
    return found


def counting_outputs(proto: onnx.ModelProto) -> frozenset[str]:
    """The integer outputs that are numbers, such as pixels or scaled measurements, and no names.

    Followed backward through what works element by element or moves elements, such a one was made
    an integer by a Cast or by quantising what a layer or a function computed; class ids, indices
    and masks come from an operator that names or compares.
    """
    producers = {y: node for node in proto.graph.node for y in node.output if y}
    stored = {x.name for x in proto.graph.initializer}
    stored |= {y for node in proto.graph.node if node.op_type == "Constant" for y in node.output}
    integers = (y.name for y in proto.graph.output if y.type.tensor_type.elem_type in INTEGERS)
    return frozenset(name for name in integers if _counts(name, producers, stored))


def _counts(name: str, producers: Mapping[str, onnx.NodeProto], stored: Collection[str]) -> bool:
    made_whole = False
    while name in producers:
        node = producers[name]
        if node.domain or node.op_type in NAMING:
            return False
        if node.op_type in LOOKING_UP and node.input[0] in stored:
            return False  # a name for an index
        made_whole = made_whole or node.op_type in ("Cast", "CastLike", "QuantizeLinear")
        computed = [x for x in node.input if x and x not in stored]
        if not computed or node.op_type in _INTEGER_LAYERS:
            return bool(computed)
        if node.op_type not in ELEMENTWISE | MOVING:
            return made_whole
        name = computed[node.op_type == "Where" and len(computed) > 1]
    return made_whole


def column_axis(
    shape: tuple[int, ...], rows: Collection[int], traced: int | None, free: Collection[int]
) -> int | None:
    """The axis of the columns of one output.

    Args:
        shape: of a batch.
        rows: sizes that the first axis of a batch has.
        traced: what the graph says, if anything.
        free: axes that cannot be it.
    """
    if len(shape) == 1:
        return None if shape[0] in rows else 0
    if traced is not None and 0 < traced < len(shape) and traced not in free:
        return traced
    wide = [i for i in range(1, len(shape)) if shape[i] > 1 and i not in free]
    if len(shape) > 3 or not wide:
        return wide[0] if wide else None
    return min(wide, key=lambda i: (shape[i], -i))


def _symbols(value: onnx.ValueInfoProto) -> list[str]:
    """Names of the free axes, empty for others."""
    return [d.dim_param for d in value.type.tensor_type.shape.dim]


def _traced(
    name: str, producers: Mapping[str, onnx.NodeProto], stored: Collection[str], rank: int
) -> int | None:
    """The axis that the operator behind an output tells."""
    turns = []
    axis = None
    while axis is None and name in producers:
        node = producers[name]
        computed = [x for x in node.input if x and x not in stored]
        if node.op_type in LAST:
            axis = rank - 1
        elif node.op_type in CHANNELS:
            axis = 1
        elif node.op_type in SUMMING:
            axis = next((int(a.i) for a in node.attribute if a.name == "axis"), -1) % max(rank, 1)
        elif not computed:
            return None
        elif node.op_type == "Transpose":
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            turns.append(perm or list(range(rank))[::-1])
            name = computed[0]
        elif node.op_type in ELEMENTWISE:
            name = computed[0]
        else:
            return None
    for perm in reversed(turns):
        axis = perm.index(axis) if axis in perm else None
    return axis
