"""The QDQ model that onnxruntime.quantization writes, and the same with weights in floats.

Quantised are the inputs of the chosen layers and the outputs of the Conv among them, which the
kernels need; Gemm and MatMul give floats. Operators in between that read and make such tensors
only (``_CARRIERS``) are quantised too: that adds no rounding that is not there already.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_ecp.data.calibration import Batch
from onnx_ecp.errors import ModelError, ProviderError
from onnx_ecp.graph import printable
from onnx_ecp.layers import Layer
from onnx_ecp.quantising.candidates import node_of
from onnx_ecp.runtime.session import onnxruntime

# Of a quantised input these make an output with the same scale.
_SAME_SCALE = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
# These are folded into the scale of the Conv before them.
_FOLDED = ("Clip", "Relu")
# These have a scale of their own for their output.
_OWN_SCALE = ("Add", "Concat")
_SUFFIX = "_quantized"
# Their outputs are floats.
_FLOATS = ("Gemm", "MatMul")
_FLOAT = onnx.TensorProto.FLOAT

Ranges = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By tensor, scale and zero point."""


def _reader(batches: Iterable[Batch]) -> Any:
    """The samples, as onnxruntime.quantization asks for them."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    waiting = iter(batches)

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            batch = next(waiting, None)
            return None if batch is None else batch.feeds

    return Reader()


def written(
    proto: onnx.ModelProto,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    scales: Mapping[str, np.ndarray] | None = None,
    ranges: Ranges | None = None,
) -> onnx.ModelProto:
    """The model with these layers in int8, as Q/DQ nodes in the standard's operators.

    Args:
        proto: ``prepared``.
        layers: of it.
        batches: of samples that give the ranges of activations.
        scales: by stored tensor, (out,): of weights that lie on their grid; others get scales with
            which the largest weight of a row fits.
        ranges: ``ranges_of`` a model written before, which then stand for those of the samples.

    Raises:
        ModelError: onnxruntime.quantization cannot quantise the model.
        ProviderError: it is not installed.
    """
    onnxruntime()  # sets what must be set before its first import
    try:
        from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
        from onnxruntime.quantization.quantize import quantize_static
    except ImportError as error:
        raise ProviderError(
            f"--quantize needs onnxruntime.quantization: {error}.",
            hint="pip install onnxruntime, of a version that has it.",
        ) from error
    nodes = [node for x in layers if (node := node_of(proto, x)) is not None]
    chosen = [*nodes, *carriers(proto, nodes)]
    axes = {x.weight.tensor: unit_axis(proto, x) for x in layers}
    overrides = {name: _override(scale, axes[name]) for name, scale in (scales or {}).items()}
    for name, (scale, zero) in (ranges or {}).items():
        overrides[name] = [{"scale": scale, "zero_point": zero}]
    told = _with_types(proto, chosen)
    onnx.helper.set_model_props(told, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory(prefix="onnx-ecp-") as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(told, source)
        try:
            with _no_warnings():
                quantize_static(
                    source,
                    target,
                    _reader(batches),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=sorted({node.op_type for node in chosen}),
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_quantize=[node.name for node in chosen],
                    extra_options={
                        "ActivationSymmetric": False,
                        "WeightSymmetric": True,
                        "OpTypesToExcludeOutputQuantization": list(_FLOATS),
                        "TensorQuantOverrides": overrides,
                    },
                )
            made = onnx.load(target)
        except Exception as error:
            text = printable(str(error).strip().split("\n")[0] or type(error).__name__, 200)
            raise ModelError(
                f"onnxruntime.quantization cannot quantise the model: {text}",
                hint="Leave layers out with --exclude, or --quantize altogether.",
            ) from error
    _spare_others(made, {node.name for node in chosen})
    return _as_ours(made, proto)


def _with_types(proto: onnx.ModelProto, chosen: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """A copy that says the types of what is quantised: the writer leaves alone what has none.

    Operators of other domains hide them, from it too.
    """
    told = onnx.ModelProto()
    told.CopyFrom(proto)
    graph = told.graph
    stored = {tensor.name for tensor in graph.initializer}
    known = {info.name for info in (*graph.input, *graph.output, *graph.value_info)}
    for name in dict.fromkeys(n for node in chosen for n in _tensors(node)):
        if name and name not in stored | known:
            graph.value_info.append(onnx.helper.make_tensor_value_info(name, _FLOAT, None))
    declared = {entry.domain for entry in told.opset_import}
    for domain in sorted({node.domain for node in graph.node} - declared - {"", "ai.onnx"}):
        told.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return told


def _tensors(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors of a node that may be quantised."""
    yield from node.input if node.op_type in _OWN_SCALE else node.input[:1]
    yield node.output[0]


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep the writer from telling the root logger what our report tells."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _override(scale: np.ndarray, axis: int) -> list[dict[str, Any]]:
    from onnxruntime.quantization.quant_utils import QuantType

    return [
        {"axis": axis, "quant_type": QuantType.QInt8, "scale": np.float32(s), "zero_point": 0}
        for s in scale
    ]


def in_int8(made: onnx.ModelProto, layer: Layer) -> bool:
    """Whether a layer of a written model reads an input and a weight that are dequantised."""
    dequantised = {n.output[0] for n in made.graph.node if n.op_type == "DequantizeLinear"}
    weight = f"{layer.weight.tensor}{_SUFFIX}"
    behind = {
        n.output[0]
        for n in made.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] == weight
    }
    return any(
        node.input[1] in behind and node.input[0] in dequantised
        for node in made.graph.node
        if len(node.input) > 1 and node.name == layer.name
    )


def ranges_of(made: onnx.ModelProto, proto: onnx.ModelProto) -> Ranges:
    """Scale and zero point of the tensors that are quantised, by the name that they had before.

    Args:
        made: what ``written`` gave.
        proto: what it was given.
    """
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    known = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    return {
        node.input[0]: (stored[node.input[1]], stored[node.input[2]])
        for node in made.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in known
    }


def unit_axis(proto: onnx.ModelProto, layer: Layer) -> int:
    """The axis of a layer's stored tensor along which its units lie."""
    node = node_of(proto, layer)
    assert node is not None, "a candidate has a node"
    if node.op_type == "Conv":
        return 0
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if turned else 1


def carriers(proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes between int8 layers that can be int8 too without any further rounding."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    readers: dict[str, int] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    ends = {x.name for x in proto.graph.output}
    convolved = {n.output[0] for n in nodes if n.op_type == "Conv"}
    quantised = {node.input[0] for node in nodes} | convolved
    found, names = [], {node.name for node in nodes}
    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx") or node.name in names or not node.input:
            continue
        first = node.input[0]
        if node.op_type in _FOLDED:
            fits = first in convolved and readers[first] == 1 and first not in ends
        elif node.op_type in _SAME_SCALE:
            fits = first in quantised
        elif node.op_type in _OWN_SCALE:
            fits = {*node.input, node.output[0]} <= quantised and not stored & set(node.input)
        else:
            continue
        if fits:
            found.append(node)
            quantised.add(node.output[0])
    return found


def _spare_others(made: onnx.ModelProto, chosen: set[str]) -> None:
    """Let nodes that are not int8 read tensors as they were before they were rounded.

    But for the outputs of a Conv in int8 and of what follows it, which only exist rounded.
    """
    graph = made.graph
    producers = {y: node for node in graph.node for y in node.output if y}
    whole: dict[str, str] = {}
    for node in graph.node:
        before = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if before is not None and before.op_type == "QuantizeLinear":
            maker = producers.get(before.input[0])
            if maker is None or maker.name not in chosen or maker.op_type in _FLOATS:
                whole[node.output[0]] = before.input[0]
    for node in graph.node:
        if node.name not in chosen:
            for index, name in enumerate(node.input):
                node.input[index] = whole.get(name, name)
    for op in ("DequantizeLinear", "QuantizeLinear"):  # nobody reads some any longer
        read = {name for node in graph.node for name in node.input}
        read |= {info.name for info in graph.output}
        kept = [n for n in graph.node if n.op_type != op or n.output[0] in read]
        if len(kept) < len(graph.node):
            del graph.node[:]
            graph.node.extend(kept)


def _as_ours(made: onnx.ModelProto, proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without what the writer says of itself."""
    for field in ("producer_name", "producer_version", "doc_string"):
        setattr(made, field, getattr(proto, field))
    del made.metadata_props[:]
    made.metadata_props.extend(proto.metadata_props)
    known = {info.name for info in proto.graph.value_info}
    read = {name for node in made.graph.node for name in (*node.input, *node.output)}
    kept = [i for i in made.graph.value_info if i.name in known and i.name in read]
    del made.graph.value_info[:]
    made.graph.value_info.extend(kept)
    return made


def with_float_weights(made: onnx.ModelProto, proto: onnx.ModelProto) -> onnx.ModelProto:
    """A quantised model in which weights and biases are floats again, and activations stay rounded.

    Args:
        made: what ``written`` gave.
        proto: what it was given.
    """
    result = onnx.ModelProto()
    result.CopyFrom(made)
    stored = {t.name: t for t in made.graph.initializer}
    floats = {t.name: t for t in proto.graph.initializer}
    kept = []
    for node in made.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            kept.append(node)
            continue
        tensor = onnx.TensorProto()
        origin = node.input[0].removesuffix(_SUFFIX)
        if origin in floats:
            tensor.CopyFrom(floats[origin])
        else:
            tensor.CopyFrom(numpy_helper.from_array(_dequantised(node, stored)))
        tensor.name = node.output[0]
        result.graph.initializer.append(tensor)
    del result.graph.node[:]
    result.graph.node.extend(kept)
    read = {name for node in kept for name in node.input} | {x.name for x in made.graph.output}
    used = [t for t in result.graph.initializer if t.name in read]
    del result.graph.initializer[:]
    result.graph.initializer.extend(used)
    return result


def integers_of(made: onnx.ModelProto, tensor: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The integers of a stored tensor in its own layout, and its scales; None where it has none."""
    stored = {t.name: t for t in made.graph.initializer}
    for node in made.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] == f"{tensor}{_SUFFIX}":
            scale = numpy_helper.to_array(stored[node.input[1]])
            return numpy_helper.to_array(stored[node.input[0]]), scale
    return None


def _dequantised(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> np.ndarray:
    q, scale = (numpy_helper.to_array(stored[name]) for name in node.input[:2])
    zero: np.ndarray | int = 0
    if len(node.input) > 2 and node.input[2] in stored:
        zero = numpy_helper.to_array(stored[node.input[2]]).astype(np.int64)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if scale.ndim == 1 and scale.size > 1:
        shape = [-1 if i == axis % q.ndim else 1 for i in range(q.ndim)]
        scale = scale.reshape(shape)
        zero = zero.reshape(shape) if isinstance(zero, np.ndarray) else zero
    return np.asarray((q.astype(np.int64) - zero) * scale, dtype=scale.dtype)
