"""Stored tensors: their size checked in Python integers, read from any storage, written once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnx_ecp.errors import ModelError
from onnx_ecp.graph.external import extent, is_external, map_bytes
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import Model, known_type

# NumPy before version 2 knows 32 axes; measuring adds one for output directions, one for groups.
MOST_AXES = 30
_DAMAGED = "The model is damaged: export or download it again."
_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}
_ALL_FIELDS = sorted({*_FIELDS.values(), "int32_data"})


def _bits(data_type: int) -> int:
    """Bits of one element in packed form; 0 for strings, which have no size."""
    name = TensorProto.DataType.Name(data_type)
    for narrow, bits in (("INT2", 2), ("INT4", 4), ("FLOAT4", 4), ("FLOAT6", 6)):
        if name.removeprefix("U").startswith(narrow):
            return bits
    if data_type == TensorProto.STRING:
        return 0
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def byte_size(tensor: TensorProto) -> int:
    """Bytes that shape and element type take; no value is looked at.

    Raises:
        ModelError: a negative size, an unknown element type, or more than can be addressed.
    """
    label = printable(tensor.name)
    if not known_type(tensor.data_type):
        raise ModelError(
            f"tensor '{label}' has the unknown element type {tensor.data_type}.", hint=_DAMAGED
        )
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"tensor '{label}' has a negative size.", hint=_DAMAGED)
    bits = _bits(tensor.data_type)
    # Axes of size zero hide the others from the product, but not from NumPy.
    check_rank(tensor.name, len(tensor.dims))
    if math.prod(size or 1 for size in tensor.dims) * max(bits, 8) >= 2**63:
        raise ModelError(f"tensor '{label}' is too large for any memory.", hint=_DAMAGED)
    return -(-math.prod(map(int, tensor.dims)) * bits // 8)


def check_rank(name: str, rank: int) -> None:
    """Refuse a tensor of more axes than arrays may have; ModelError."""
    if rank > MOST_AXES:
        raise ModelError(
            f"tensor '{printable(name)}' has {rank} axes.",
            hint=f"At most {MOST_AXES} are supported: export the model with fewer.",
        )


def check_tensor(tensor: TensorProto, base: Path | None) -> None:
    """Refuse a tensor whose values are not exactly what its shape and element type take.

    Raises:
        ModelError: they are missing, too few, too many, given twice or in the wrong field, or
            the external file is not what ``extent`` accepts.
    """
    label, size = printable(tensor.name), byte_size(tensor)
    fields = [field for field in _ALL_FIELDS if getattr(tensor, field)]
    fields += ["raw_data"] * tensor.HasField("raw_data")
    if is_external(tensor):
        if fields or tensor.data_type == TensorProto.STRING:
            raise ModelError(f"tensor '{label}' is stored inside and outside.", hint=_DAMAGED)
        extent(tensor, size, base)
        return
    if len(fields) > 1 or tensor.HasField("segment"):
        raise ModelError(f"tensor '{label}' has its values in several fields.", hint=_DAMAGED)
    field = fields[0] if fields else _field(tensor)
    raw_allowed = tensor.data_type != TensorProto.STRING
    if field != _field(tensor) and not (raw_allowed and field == "raw_data"):
        raise ModelError(
            f"tensor '{label}' has its values in {field}, a wrong field.", hint=_DAMAGED
        )
    found, wanted = len(getattr(tensor, field)), _entries(tensor, field)
    if found != wanted:
        unit = "bytes" if field == "raw_data" else "values"
        raise ModelError(
            f"tensor '{label}' of shape {list(tensor.dims)} needs {wanted} {unit}, "
            f"but {found} are stored.",
            hint=_DAMAGED,
        )


def _field(tensor: TensorProto) -> str:
    return _FIELDS.get(tensor.data_type, "int32_data")


def _entries(tensor: TensorProto, field: str) -> int:
    """How many bytes or list entries the field must have."""
    count = math.prod(map(int, tensor.dims))
    if field == "raw_data":
        return byte_size(tensor)
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return 2 * count
    # Two or four elements of 4 or 2 bits share an entry; those of 6 bits have one each.
    return byte_size(tensor) if _bits(tensor.data_type) in (2, 4) else count


def has_bytes(tensor: TensorProto) -> bool:
    """Whether the values have raw bytes: strings, and narrow types in a typed field, have none."""
    return tensor.HasField("raw_data") or is_external(tensor) or _bits(tensor.data_type) >= 8


def stored_bytes(tensor: TensorProto, base: Path | None) -> np.ndarray:
    """The raw little-endian bytes as uint8, of a tensor that has some; mapped when external."""
    if is_external(tensor):
        return map_bytes(extent(tensor, byte_size(tensor), base))
    raw = tensor.raw_data
    if not tensor.HasField("raw_data"):
        raw = numpy_helper.to_array(tensor).tobytes()
    return np.frombuffer(raw, np.uint8)


def values(tensor: TensorProto, base: Path | None) -> np.ndarray:
    """The values of a tensor of a validated model; external ones are mapped read-only.

    Raises:
        ModelError: the external file is not what ``extent`` accepts (any more).
    """
    if not is_external(tensor):
        return numpy_helper.to_array(tensor)
    raw = map_bytes(extent(tensor, byte_size(tensor), base))
    if _bits(tensor.data_type) < 8:
        inline = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes())
        return numpy_helper.to_array(inline)
    return raw.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tensor.dims)


def read_tensor(model: Model, tensor: TensorProto) -> np.ndarray:
    """The values of a tensor of ``model``, in its own dtype (bfloat16 through ml_dtypes).

    They may be read-only; external ones are a memory map, read from the file on use.
    """
    return values(tensor, model.base)


def write_tensor(tensor: TensorProto, array: np.ndarray) -> None:
    """Replace the values of a stored tensor of our own copy of a model.

    Name, element type and doc string stay; ``dims`` follow the array; the values become raw data
    inside the model. Values of higher precision are rounded once, to nearest.

    Raises:
        ModelError: a finite value is beyond the range of the element type.
    """
    rounded = _rounded(tensor, np.asarray(array))
    raw = numpy_helper.from_array(rounded).raw_data
    clear_values(tensor)
    tensor.dims[:] = rounded.shape
    tensor.raw_data = raw


def renewed(tensor: TensorProto, array: np.ndarray, base: Path | None) -> np.ndarray:
    """New values of a stored tensor in its own type; those that are equal keep their bits.

    So -0.0 stays -0.0. Values of higher precision are rounded once, to nearest.

    Args:
        tensor: what is there now; it is not changed.
        array: of the same shape.
        base: directory of its external data.

    Raises:
        ModelError: a finite value is beyond the range of the element type.
    """
    old = values(tensor, base)
    new = _rounded(tensor, array)
    return np.where((new == old) | ((new != new) & (old != old)), old, new)  # NaN equals NaN


def clear_values(tensor: TensorProto) -> None:
    """Take all values, and the reference to external ones, out of a tensor."""
    for field in (*_ALL_FIELDS, "raw_data", "external_data", "data_location"):
        tensor.ClearField(field)


def _rounded(tensor: TensorProto, array: np.ndarray) -> np.ndarray:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if array.dtype == dtype:
        return array
    rounded = _round_once(array, dtype)
    if not np.isfinite(rounded[np.isfinite(array)].astype(np.float64)).all():
        name, bias = tensor.name.removesuffix("/ecp_bias"), "/ecp_bias" in tensor.name
        wider = "Convert the model to float32 first, or u" if dtype.itemsize < 4 else "U"
        raise ModelError(
            f"new values of {'a bias of ' if bias else ''}'{printable(name)}' are beyond the "
            f"range of {dtype}.",
            hint=f"{wider}se a method that keeps the weights that stay, such as --method ecp "
            "--compensation none.",
        )
    return rounded


def _round_once(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round to nearest, ties to even, in one step."""
    with np.errstate(over="ignore", under="ignore"):
        if array.dtype == np.float64 and dtype.kind == "V":
            # ml_dtypes goes through float32 and so rounds twice: x = 1 + 2^-8 + 2^-40 becomes 1 in
            # bfloat16. Rounding to odd in between keeps the second rounding right (Boldo and
            # Melquiond 2008: the intermediate format has at least two more bits).
            array = _round_to_odd(array)
        return array.astype(dtype)


def _round_to_odd(array: np.ndarray) -> np.ndarray:
    """Float64 to float32: toward zero, then the last bit set where anything was lost."""
    near = array.astype(np.float32)
    bits = near.view(np.uint32) - (np.abs(near) > np.abs(array)).astype(np.uint32)
    lost = (near != array) & np.isfinite(array)
    return np.asarray(bits | lost.astype(np.uint32)).view(np.float32)
