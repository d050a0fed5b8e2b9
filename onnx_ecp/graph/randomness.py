"""Nodes that make the outputs of a model random, or depend on which samples come together.

Nothing can be measured through them: two runs of the same model differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx
from onnx import numpy_helper

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import Model, bodies, constants, subgraphs

_DRAWS = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
          "RandomUniformLike")  # fmt: skip
_TRAINED = "Export the model for inference (model.eval() in PyTorch, training=False in Keras)."
_DRAWN = "Export the model with the random numbers as an input, or without them."


def refuse_random(model: Model) -> None:
    """Refuse a model whose outputs are random, or depend on the other samples of a batch.

    Args:
        model: a valid one.

    Raises:
        ModelError: a node that any output depends on draws random numbers or is in training mode.
    """
    stored = constants(model.proto)
    for node in _that_matter(model.proto):
        reason = _REASONS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        why = reason(node, stored) if reason else ""
        if why:
            name = printable(node.name or next(iter(node.output), ""))
            hint = _DRAWN if node.op_type in _DRAWS else _TRAINED
            label = printable(model.path or "model")
            raise ModelError(f"{label}: {node.op_type} '{name}' {why}.", hint=hint)


def _that_matter(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes that outputs depend on, and all nodes of inner graphs and functions."""
    needed = {output.name for output in proto.graph.output}
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            for graph in subgraphs(node):
                needed.update(name for inner in graph.node for name in inner.input)
                needed.update(output.name for output in graph.output)
            yield node
    _, *inner_bodies = bodies(proto)
    for body in inner_bodies:
        yield from body.node


Stored = Mapping[str, onnx.TensorProto]


def _draws(node: onnx.NodeProto, stored: Stored) -> str:
    return "draws random numbers, so that the outputs differ from run to run"


def _drops_out(node: onnx.NodeProto, stored: Stored) -> str:
    """Dropout since opset 12 drops where its third input is true and the ratio is not 0."""
    if len(node.input) < 3 or node.input[2] not in stored:
        return ""
    ratio = node.input[1]
    if ratio in stored and not numpy_helper.to_array(stored[ratio]).any():
        return ""
    if not numpy_helper.to_array(stored[node.input[2]]).any():
        return ""
    return "is in training mode, so that the outputs differ from run to run"


def _normalises_batches(node: onnx.NodeProto, stored: Stored) -> str:
    """BatchNormalization with training_mode, since opset 14."""
    if not any(a.name == "training_mode" and a.i for a in node.attribute):
        return ""
    return "is in training mode, so that an output depends on the other samples of its batch"


_REASONS: dict[str, Callable[[onnx.NodeProto, Stored], str]] = {
    **dict.fromkeys(_DRAWS, _draws),
    "Dropout": _drops_out,
    "BatchNormalization": _normalises_batches,
}
