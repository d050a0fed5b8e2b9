"""Model files: loaded and validated, read, written back whole, whatever their size."""

from onnx_ecp.graph.encodings import ENCODINGS
from onnx_ecp.graph.external import is_external
from onnx_ecp.graph.loading import compressed_size, data_files, digest, load
from onnx_ecp.graph.packed import packed_tensors
from onnx_ecp.graph.printable import printable
from onnx_ecp.graph.proto import (
    InputSpec,
    Model,
    constants,
    output_names,
    signature,
    sparse_tensors,
)
from onnx_ecp.graph.saving import (
    LARGEST_FILE,
    check_output,
    remove,
    save,
    stage,
    stale_data,
    stored_size,
    write_whole,
)
from onnx_ecp.graph.sparse import LARGEST_DENSE, decode_sparse
from onnx_ecp.graph.support import runtime_support
from onnx_ecp.graph.tensors import read_tensor, write_tensor

__all__ = [
    "ENCODINGS",
    "LARGEST_DENSE",
    "LARGEST_FILE",
    "InputSpec",
    "Model",
    "check_output",
    "compressed_size",
    "constants",
    "data_files",
    "decode_sparse",
    "digest",
    "is_external",
    "load",
    "output_names",
    "packed_tensors",
    "printable",
    "read_tensor",
    "remove",
    "runtime_support",
    "save",
    "signature",
    "sparse_tensors",
    "stage",
    "stale_data",
    "stored_size",
    "write_tensor",
    "write_whole",
]
