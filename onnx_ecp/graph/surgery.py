"""Models into onnx-graphsurgeon's graphs and back: in silence, and whatever types they declare.

graphsurgeon prints its warnings on stdout, where nothing but results belongs, and it has no words
for types that are no tensors: to it such a value is one without a type, which ONNX Runtime infers.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.proto import bodies


def import_graph(proto: onnx.ModelProto) -> gs.Graph:
    """The main graph of a model, which is not changed.

    Raises:
        ModelError: an attribute is not text.
    """
    with gs.logger.G_LOGGER.suppress():
        try:
            return gs.import_onnx(_of_tensors(proto))
        except UnicodeDecodeError as error:
            raise ModelError(
                "an attribute of a node is no UTF-8 text.",
                hint="The model is damaged: export or download it again.",
            ) from error


def export_graph(graph: gs.Graph) -> onnx.ModelProto:
    """The model of a graph; types are written as far as they are known."""
    with gs.logger.G_LOGGER.suppress():
        return gs.export_onnx(graph, do_type_check=False)


def _of_tensors(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself, or a copy without the types of what is no tensor."""
    if all(map(_is_tensor, _declared(proto))):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for value in _declared(copy):
        if not _is_tensor(value):
            value.ClearField("type")
    return copy


def _declared(proto: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    for body in bodies(proto):
        if isinstance(body, onnx.GraphProto):
            yield from (*body.input, *body.output, *body.value_info)


def _is_tensor(value: onnx.ValueInfoProto) -> bool:
    """Whether it is declared to be a dense tensor, or not declared to be anything."""
    return value.type.WhichOneof("value") in (None, "tensor_type")
