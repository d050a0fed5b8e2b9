"""XNNPACK in LiteRT (ARM, browsers): 1x1 convolutions between a stem and a mean.

From its README ("Sparse inference"): the part of a network that is computed sparsely starts with a
3x3 convolution of stride 2 over 3 channels and ends with a mean over the pixels or DepthToSpace; in
between are 1x1 convolutions, of whose weights two thirds are zero over all of them, depthwise
convolutions 3x3 or 5x5, bilinear resizing, sums, products and elementwise operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from onnx_ecp.evaluation.targets.target import STANDARD, Target, in_groups, other_operator
from onnx_ecp.graph import printable
from onnx_ecp.layers import Layer

# Operators that the sparse part may hold; those in the last row vanish when a file is converted.
_INSIDE = frozenset(
    ("Abs", "Add", "Ceil", "Clip", "Elu", "Floor", "HardSwish", "LeakyRelu", "Mul", "Neg", "Relu",
     "Round", "Sigmoid", "Resize",
     "BatchNormalization", "Identity", "Dropout")
)  # fmt: skip
_MEANS = frozenset(("GlobalAveragePool", "ReduceMean"))


def refusals(proto: onnx.ModelProto, layers: Sequence[Layer]) -> Mapping[str, str]:
    """Why no sparse kernel takes a layer; empty where one may."""
    wires = _Wires(proto.graph)
    return {layer.name: _kind(layer) or wires.fault(layer.output) for layer in layers}


def _kind(layer: Layer) -> str:
    """Why a layer is no 1x1 convolution."""
    if layer.op not in STANDARD:
        return other_operator(layer)
    if layer.op != "Conv":
        return f"op: {layer.op}, only 1x1 convolutions gain"
    if layer.groups > 1:
        return f"{in_groups(layer)}, only 1x1 convolutions gain"
    window = getattr(layer, "window", None)
    if window is None or window.kernel != (1, 1):
        kernel = "x".join(map(str, window.kernel)) if window else "unknown"
        return f"op: a {kernel} convolution, only 1x1 gain"
    if window.strides != (1, 1) or any(sum(pad) for pad in window.pads):
        return "op: a 1x1 convolution with a stride or padding"
    return ""


class _Wires:
    """Which nodes of a graph write and read a tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.results = {value.name for value in graph.output}
        self.writer = {y: node for node in graph.node for y in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            if node.op_type == "Constant":
                self.shapes[node.output[0]] = ()
            for x in node.input:
                self.readers.setdefault(x, []).append(node)

    def fault(self, tensor: str) -> str:
        """Why a tensor lies in no part that is computed sparsely; empty where it does."""
        started = ended = False
        seen, todo = set[str](), [tensor]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            writer = self.writer.get(name)
            if writer is None or name in self.results:
                end = "an output" if writer else "an input"
                return f"place: {printable(name)} is {end} of the model, the stem and mean aside"
            if self._starts(writer):
                started = True
            else:
                if why := self._foreign(writer):
                    return why
                todo += self._activations(writer)
            for reader in self.readers.get(name, []):
                if self._ends(reader):
                    ended = True
                elif why := self._foreign(reader):
                    return why
                else:
                    todo += [y for y in reader.output[:1] if y]
        if started and ended:
            return ""
        missing = "mean over the pixels behind it" if started else "3x3 stride-2 convolution before"
        return f"place: there is no {missing}"

    def _activations(self, node: onnx.NodeProto) -> Iterator[str]:
        """What a node reads that is computed."""
        return (x for x in node.input if x in self.writer and x not in self.shapes)

    def _starts(self, node: onnx.NodeProto) -> bool:
        shape = self.shapes.get(node.input[1], ()) if node.op_type == "Conv" else ()
        moves = _attribute(node, "strides", [1, 1]), _attribute(node, "dilations", [1, 1])
        pads, groups = _attribute(node, "pads", [0] * 4), _attribute(node, "group", 1)
        fits = (*moves, pads, groups) == ([2, 2], [1, 1], [1] * 4, 1)
        return shape[1:] == (3, 3, 3) and fits

    def _ends(self, node: onnx.NodeProto) -> bool:
        """A mean that nothing behind puts back into the sparse part, or DepthToSpace."""
        if node.op_type == "DepthToSpace":
            return True
        behind = [reader for y in node.output for reader in self.readers.get(y, [])]
        return node.op_type in _MEANS and (not behind or any(map(self._foreign, behind)))

    def _foreign(self, node: onnx.NodeProto) -> str:
        """Why a node cannot be in the sparse part; empty where it can."""
        name = printable(node.name or node.output[0])
        if node.op_type in _INSIDE | _MEANS:
            return ""
        if node.op_type != "Conv":
            return f"place: {node.op_type} ({name}) on the way from the stem to the mean"
        shape = self.shapes.get(node.input[1], ())
        if shape[2:] == (1, 1) and _attribute(node, "group", 1) == 1:
            return ""
        size = shape[2] if len(shape) == 4 and shape[1] == 1 and shape[2] == shape[3] else 0
        pads = _attribute(node, "pads", [0] * 4)
        if size in (3, 5) and pads == [size // 2] * 4:
            return ""
        return (
            f"place: Conv ({name}), neither 1x1 nor depthwise 3x3 or 5x5 with padding by half of "
            f"the kernel on each side (it has {pads})"
        )


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    found = (onnx.helper.get_attribute_value(x) for x in node.attribute if x.name == name)
    return next(found, default)


XNNPACK = Target(
    title="XNNPACK",
    gains="1x1 convolutions with at least two thirds zeros over all of them, between a 3x3 "
    "stride-2 convolution and the mean over the pixels",
    evidence="its README; there a MobileNetV2 on a Raspberry Pi 4: 310 ms to 164 ms; not run here",
    next_step="onnx2tf -i {model} -o saved_model, then tf.lite.TFLiteConverter with "
    "optimizations=[tf.lite.Optimize.EXPERIMENTAL_SPARSITY], which stores the zeros as it wants",
    refusals=refusals,
    sparsity="0.7",
    least=2 / 3,
    together=True,
)
