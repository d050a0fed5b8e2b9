"""Which numbers of channels this machine's convolutions are laid out for, measured once.

ONNX Runtime's kernels take blocks of 8 channels where vectors have 256 bits and of 16 where they
have 512 (``MlasNchwcGetBlockSize``); what fills no block takes as long as what does. Whichever it
is, 24 channels tell: three blocks of eight, or two of sixteen, as 32 are. That takes a fraction of
a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import onnx

from onnx_ecp.runtime.session import Session
from onnx_ecp.units.latency import BLOCK

# Channels of a convolution to the seconds of one run.
Clock = Callable[[int], float]

WIDE = 16
FEW, MORE = 24, 32
# With blocks of eight FEW channels take .69 of the time of MORE by multiplications, with blocks of
# sixteen all of it (AMD EPYC with AVX-512: .99).
BETWEEN = 0.85
TURNS = 30


@cache
def block_of_convolutions() -> int:
    """Channels of a block: 8 or 16; measured at the first call, on one thread."""
    return block_by(_runs())


def block_by(clock: Clock) -> int:
    """Channels of a block, by the least of several runs in turns.

    >>> block_by(lambda channels: -(-channels // 16)), block_by(lambda channels: channels)
    (16, 8)
    """
    least = dict.fromkeys((FEW, MORE), float("inf"))
    for _ in range(TURNS):
        for channels in least:
            least[channels] = min(least[channels], clock(channels))
    return WIDE if least[FEW] > BETWEEN * least[MORE] else BLOCK


def _runs() -> Clock:
    """Runs of two convolutions, one behind the other."""
    feeds: Mapping[str, np.ndarray] = {"x": np.ones((1, 32, 28, 28), np.float32)}
    sessions = {n: Session(_model(n), threads=1) for n in (FEW, MORE)}
    for session in sessions.values():
        session.seconds(feeds)  # the first one allocates
    return lambda channels: sessions[channels].seconds(feeds)


def _model(channels: int) -> onnx.ModelProto:
    values = {
        "first": np.full((channels, 32, 3, 3), 1e-3, np.float32),
        "second": np.full((channels, channels, 3, 3), 1e-3, np.float32),
    }
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "first"], ["h"], pads=[1] * 4),
            onnx.helper.make_node("Relu", ["h"], ["r"]),
            onnx.helper.make_node("Conv", ["r", "second"], ["y"], pads=[1] * 4),
        ],
        "convolutions",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 32, 28, 28])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, channels, 28, 28])],
        [onnx.numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
