"""Transformers as ONNX, with random weights: trained by one benchmark, timed by others.

Pre-norm blocks of self-attention and a GELU feed-forward; a linear embedding with learned positions
in front and a linear head behind, of an encoder on the mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer.

    Args:
        tokens: per sample.
        features: of a token at the input.
        width: of a token inside.
        heads: of the attention; divides width.
        hidden: of the feed-forward.
        blocks: number of them.
        classes: outputs.
    """

    tokens: int
    features: int
    width: int
    heads: int
    hidden: int
    blocks: int
    classes: int


def encoder(shape: Shape, seed: int = 0) -> onnx.ModelProto:
    """An encoder with input ``x`` (n, tokens, features) and output ``y`` (n, classes)."""
    build = Build(np.random.default_rng(seed))
    h = _blocks(build, shape)
    mean = build("ReduceMean", build.norm("norm", h, shape.width), build.ints(1), keepdims=0)
    build.linear("head", mean, shape.width, shape.classes, output="y")
    return build.model([shape.tokens, shape.features], [shape.classes])


def decoder(shape: Shape, seed: int = 0) -> onnx.ModelProto:
    """One whose tokens see those before them: ``y`` is (n, tokens, classes)."""
    build = Build(np.random.default_rng(seed))
    future = np.triu(np.full((shape.tokens, shape.tokens), -1e9), 1)
    h = _blocks(build, shape, build.store("future", future))
    build.linear("head", build.norm("norm", h, shape.width), shape.width, shape.classes, output="y")
    return build.model([shape.tokens, shape.features], [shape.tokens, shape.classes])


def _blocks(build: Build, shape: Shape, mask: str = "") -> str:
    position = build.store("position", build.rng.normal(0, 0.02, (shape.tokens, shape.width)))
    h = build("Add", build.linear("embed", "x", shape.features, shape.width), position)
    for i in range(shape.blocks):
        h = build("Add", h, _attention(build, f"block{i}/attention", h, shape, mask))
        h = build("Add", h, _feed_forward(build, f"block{i}/ffn", h, shape))
    return h


def _attention(build: Build, name: str, h: str, shape: Shape, mask: str) -> str:
    width, heads = shape.width, shape.heads
    normed = build.norm(f"{name}/norm", h, width)
    split = build.ints(0, 0, heads, width // heads)
    q, k, v = (
        build("Reshape", build.linear(f"{name}/{part}", normed, width, width), split)
        for part in ("q", "k", "v")
    )
    q, v = (build("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
    k = build("Transpose", k, perm=[0, 2, 3, 1])
    scale = build.store(f"{name}/scale", np.array((width // heads) ** -0.5))
    scores = build("Mul", build("MatMul", q, k), scale)
    if mask:
        scores = build("Add", scores, mask)
    seen = build("MatMul", build("Softmax", scores, axis=-1), v)
    mixed = build("Transpose", seen, perm=[0, 2, 1, 3])
    joined = build("Reshape", mixed, build.ints(0, 0, width))
    return build.linear(f"{name}/out", joined, width, width)


def _feed_forward(build: Build, name: str, h: str, shape: Shape) -> str:
    normed = build.norm(f"{name}/norm", h, shape.width)
    hidden = build("Gelu", build.linear(f"{name}/up", normed, shape.width, shape.hidden))
    return build.linear(f"{name}/down", hidden, shape.hidden, shape.width)


class Build:
    """Nodes and initializers of a graph under construction; a call adds a node."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: object) -> str:
        """Add a node; the name of its only output."""
        output = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def store(self, name: str, values: np.ndarray) -> str:
        """Add an initializer in float32; its name."""
        self.stored.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def ints(self, *values: int) -> str:
        """Add an initializer of int64; its name."""
        name = f"ints_{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def linear(self, name: str, x: str, inputs: int, outputs: int, output: str = "") -> str:
        """MatMul and Add of uniform weights as PyTorch draws them; the output."""
        bound = inputs**-0.5
        weight = self.store(f"{name}/weight", self.rng.uniform(-bound, bound, (inputs, outputs)))
        bias = self.store(f"{name}/bias", np.zeros(outputs))
        product = self("MatMul", x, weight, output=f"{name}/matmul")
        return self("Add", product, bias, output=output)

    def norm(self, name: str, x: str, width: int) -> str:
        """A LayerNormalization; the output."""
        scale, bias = (
            self.store(f"{name}/{part}", np.full(width, value))
            for part, value in (("scale", 1.0), ("bias", 0.0))
        )
        return self("LayerNormalization", x, scale, bias, axis=-1)

    def model(self, sample: list[int], result: list[int]) -> onnx.ModelProto:
        """From ``x`` to ``y``, of these shapes behind the batch axis."""
        ends = [[_value("x", ["n", *sample])], [_value("y", ["n", *result])]]
        graph = helper.make_graph(self.nodes, "network", *ends, self.stored)
        return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def _value(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
