"""Makes up inputs that are legal for a model, from its signature and from where its inputs go.

Floats are standard normal. Integers are ids below the size of the table that they index, ones for
masks, zeros for segments, 0, 1, 2, ... for positions; booleans are true. Free axes get a size by
their name; the first one is the batch, one per sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_ecp.data.untrusted import memory_budget
from onnx_ecp.errors import CalibrationError, UsageError, did_you_mean
from onnx_ecp.graph import InputSpec
from onnx_ecp.graph.operators import Moves, moving

# By part of the name of a free axis; what is none of these has DEFAULT_SIZE.
SIZES = {"seq": 16, "len": 16, "time": 16, "token": 16, "height": 64, "width": 64}
DEFAULT_SIZE = 8
# Operators behind which an index is still the same index.
_PASSES_IDS = moving(*Moves) - {"Gather", "GatherElements", "GatherND"}
# Operators whose result has the shape of their first input.
_SAME_SHAPE = {"Identity", "Cast", "DequantizeLinear"}
# (position of the table, position of the index) among the inputs, for every look-up of an operator.
_LOOKUPS = {
    "Gather": ((0, 1),),
    "GatherElements": ((0, 1),),
    "EmbedLayerNormalization": ((2, 0), (4, 1), (3, 8)),
}


def draw(
    proto: onnx.ModelProto,
    inputs: Sequence[InputSpec],
    *,
    samples: int,
    seed: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Made-up arrays for ``inputs``.

    Returns:
        By input name: (samples, ...) in the model's rank where the batch axis of the input is
        free, (samples, *shape of the input) otherwise.

    Raises:
        UsageError: when ``shapes`` names no input or contradicts the model.
        CalibrationError: when an input is no tensor of numbers, or memory would not suffice.
    """
    sized = _sizes(inputs, shapes)
    _check_budget(samples * sum(math.prod(own.shape) for own in sized.values()))
    flow = _flow(proto.graph)
    rows = {spec.name: _table_rows(flow, spec.name) for spec in inputs}
    id_shapes = {sized[name].shape for name, count in rows.items() if count is not None}
    rng = np.random.default_rng(seed)
    arrays = {}
    for spec in inputs:
        own = sized[spec.name]
        use = _Use(rows[spec.name], own.shape in id_shapes)
        arrays[spec.name] = _values(spec, use, (samples, *own.stacked_shape), rng)
    return arrays


def _check_budget(values: int) -> None:
    """Before anything is allocated: nothing vouches for the sizes that a model declares."""
    if values * np.dtype(np.float64).itemsize > memory_budget():
        raise CalibrationError(
            f"made-up inputs of {values} values do not fit into half of the free memory.",
            hint="Lower --samples, or choose the free axes with --input-shapes.",
        )


@dataclass(frozen=True)
class _Sized:
    """Shape of one sample of an input; ``free``: its first axis is a free batch axis."""

    shape: tuple[int, ...]
    free: bool

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.free and self.shape[0] == 1 else self.shape


def _sizes(inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Sized]:
    """A size for every axis; axes of one name have one size."""
    check_shapes(inputs, shapes)
    by_name = {spec.name: spec for spec in inputs}
    named: dict[str, int] = {}
    for name, given in shapes.items():
        axes = by_name[name].shape or given
        named |= {a: size for a, size in zip(axes, given, strict=True) if isinstance(a, str)}
    batch = {a: 1 for a in (spec.shape[0] for spec in inputs if spec.shape) if _is_batch(a)}
    named = {a: size for a, size in batch.items() if isinstance(a, str)} | named
    return {spec.name: _sized(spec, shapes.get(spec.name), named) for spec in inputs}


def check_shapes(inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UsageError where a chosen shape is of no input, or contradicts the model."""
    by_name = {spec.name: spec for spec in inputs}
    for name, given in shapes.items():
        if name not in by_name:
            raise UsageError(
                f"--input-shapes: {name!r} is no input of the model.",
                hint=did_you_mean(name, by_name),
            )
        axes = by_name[name].shape or given
        if not _agree(axes, given):
            raise UsageError(
                f"--input-shapes: {_listed(given)} for input {name!r} contradicts the model's "
                f"{_listed(axes)}.",
                hint="Give a size for every axis; only free axes can be chosen.",
            )


def _listed(axes: Sequence[int | str | None]) -> str:
    return ",".join("?" if axis is None else str(axis) for axis in axes)


def _sized(spec: InputSpec, given: tuple[int, ...] | None, named: Mapping[str, int]) -> _Sized:
    axes = spec.shape if spec.shape is not None else given or (None,)
    sizes = [_size(axis, i, named) for i, axis in enumerate(axes)]
    free = spec.shape is None or (len(axes) > 0 and not is_fixed(axes[0]))
    return _Sized(tuple(given or sizes), free)


def _size(axis: int | str | None, position: int, named: Mapping[str, int]) -> int:
    if isinstance(axis, int) and is_fixed(axis):
        return axis
    if isinstance(axis, str) and axis in named:
        return named[axis]
    if position == 0 and _is_batch(axis):
        return 1
    return next((size for part, size in SIZES.items() if part in str(axis).lower()), DEFAULT_SIZE)


def _is_batch(first: int | str | None) -> bool:
    """Whether the first axis is free and not named like something else."""
    return not is_fixed(first) and not any(part in str(first).lower() for part in SIZES)


def is_fixed(axis: int | str | None) -> bool:
    """Whether the model fixes the size of an axis; some exporters write 0 or -1 for a free one."""
    return isinstance(axis, int) and axis > 0


def _agree(axes: Sequence[int | str | None], given: Sequence[int]) -> bool:
    return len(axes) == len(given) and all(
        size > 0 and (not is_fixed(axis) or axis == size)
        for axis, size in zip(axes, given, strict=True)
    )


# Values.


@dataclass(frozen=True)
class _Use:
    """What the model does with an integer input.

    Args:
        rows: of the smallest table that it indexes, or None.
        beside_ids: an input of the same shape carries ids; what indexes nothing is then a mask.
    """

    rows: int | None
    beside_ids: bool


def _values(
    spec: InputSpec, use: _Use, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Legal values for an input, of any shape."""
    dtype, name = spec.dtype, spec.name.lower()
    if dtype is None or dtype.kind == "O":
        raise CalibrationError(
            f"input {spec.name!r} is no tensor of numbers: its values cannot be made up.",
            hint="Only inputs that are tensors of numbers can be calibrated.",
        )
    if dtype.kind == "b" or "mask" in name:
        # Ones keep everything under a factor, and change nothing where added to all scores.
        return np.ones(shape, dtype)
    if dtype.kind not in "iu":
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    if "token_type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if "position" in name:
        return _positions(shape, use.rows, dtype)
    if use.rows is None and use.beside_ids:
        return np.ones(shape, dtype)
    # Bytes that index nothing are pixels; of other integers only 0 and 1 are safe.
    top = use.rows or (256 if dtype == np.uint8 else 2)
    return rng.integers(0, min(top, np.iinfo(dtype).max + 1), shape, dtype)


def _positions(shape: tuple[int, ...], rows: int | None, dtype: np.dtype) -> np.ndarray:
    """0, 1, 2, ... along the last axis of a sample."""
    length = shape[-1] if len(shape) > 1 else 1
    row = np.arange(length) % (rows or length)
    return np.broadcast_to(row, shape).astype(dtype)


# Where an input goes.


@dataclass(frozen=True)
class _Flow:
    """Who reads a tensor, and the shapes of the constants."""

    readers: Mapping[str, Sequence[onnx.NodeProto]]
    constants: Mapping[str, tuple[int, ...]]


def _flow(graph: onnx.GraphProto) -> _Flow:
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants |= {t.values.name: tuple(t.dims) for t in graph.sparse_initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for tensor in set(node.input):
            readers.setdefault(tensor, []).append(node)
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), onnx.TensorProto())
            constants[node.output[0]] = tuple(value.dims)
        elif node.op_type in _SAME_SHAPE and node.input and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    return _Flow(readers, constants)


def _table_rows(flow: _Flow, name: str) -> int | None:
    """Rows of the smallest constant table that a graph input indexes; None: it indexes none."""
    rows: list[int] = []
    seen, waiting = {name}, [name]
    while waiting:
        tensor = waiting.pop()
        for node in flow.readers.get(tensor, ()):
            rows += _indexed_rows(flow, node, tensor)
            if node.op_type in _PASSES_IDS:
                waiting += [output for output in node.output if output not in seen]
                seen.update(node.output)
    return min(rows, default=None)


def _indexed_rows(flow: _Flow, node: onnx.NodeProto, tensor: str) -> Iterator[int]:
    """Sizes of the tables that ``node`` looks ``tensor`` up in."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    for table, index in _LOOKUPS.get(node.op_type, ()):
        if max(table, index) < len(node.input) and node.input[index] == tensor:
            shape = flow.constants.get(node.input[table], ())
            if -len(shape) <= axis < len(shape):
                yield shape[axis]
