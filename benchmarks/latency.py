"""Units that are gone are time that is gone: latency against multiplications, on two runtimes.

    python benchmarks/latency.py

Three networks that are large enough for arithmetic to be what takes the time, with random weights
(latency does not ask for trained ones), lose units in multiples of 16 until 3/4, 1/2 or 1/4 of the
multiplications are left. Both models run in turns, one thread, batch 64; a ratio is the median over
neighbours in time. OpenVINO is timed where it is installed. The claim is that the ratio of
latencies is that of the multiplications of the layers, to 10 %.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
from encoders import Shape, encoder
from outcome import Claim, environment, finish, publish, table
from timing import in_turns, of_neighbours

import onnx_ecp

BATCH, THREADS, MULTIPLE = 64, 1, 16
SPEEDUPS = (4 / 3, 2.0, 4.0)
SECONDS, LEAST = 4.0, 20
WARM_UP = 5

Feeds = Mapping[str, np.ndarray]
Run = Callable[[Feeds], Any]


def mlp() -> onnx.ModelProto:
    """784-1024-1024-10."""
    body = """h = Gemm(x, W0, b0) a = Relu(h) k = Gemm(a, W1, b1) r = Relu(k) y = Gemm(r, W2, b2)"""
    sizes = (784, 1024, 1024, 10)
    shapes = {f"W{i}": sizes[i : i + 2] for i in range(3)} | {
        f"b{i}": (sizes[i + 1],) for i in range(3)
    }
    return written("float[N, 784] x", "float[N, 10] y", body, shapes)


def cnn() -> onnx.ModelProto:
    """Three 3 x 3 convolutions, 64 to 128 channels, on 28 x 28 pixels."""
    body = """
        h = Conv<pads = [1, 1, 1, 1]>(x, W0, b0) a = Relu(h)
        k = Conv<pads = [1, 1, 1, 1]>(a, W1, b1) r = Relu(k)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
        l = Conv<pads = [1, 1, 1, 1]>(p, W2, b2) t = Relu(l)
        g = GlobalAveragePool(t) f = Flatten(g) y = Gemm(f, W3, b3)"""
    channels = (1, 64, 64, 128)
    shapes: dict[str, tuple[int, ...]] = {f"b{i}": (channels[i + 1],) for i in range(3)}
    shapes |= {f"W{i}": (channels[i + 1], channels[i], 3, 3) for i in range(3)}
    return written(
        "float[N, 1, 28, 28] x", "float[N, 10] y", body, shapes | {"W3": (128, 10), "b3": (10,)}
    )


def transformer() -> onnx.ModelProto:
    """Two blocks of width 256, 16 heads, feed-forward 1024, 32 tokens."""
    return encoder(
        Shape(tokens=32, features=64, width=256, heads=16, hidden=1024, blocks=2, classes=10)
    )


NETWORKS = {"MLP": mlp, "CNN": cnn, "transformer": transformer}


def written(x: str, y: str, body: str, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A model of random weights that keep activations in range."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> net ({x}) => ({y}) {{ {body} }}'
    )
    for name, shape in shapes.items():
        wide = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        values = rng.standard_normal(shape) * np.sqrt(2 / wide) * (len(shape) > 1)
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(values.astype(np.float32), name)
        )
    return model


def on_onnxruntime(model: onnx.ModelProto) -> Run:
    """A session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return lambda feeds: session.run(None, dict(feeds))[0]


def on_openvino(model: onnx.ModelProto) -> Run:
    """A compiled model in float32 on one thread."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}
    core = openvino.Core()
    read = core.read_model(io.BytesIO(model.SerializeToString()))
    compiled = core.compile_model(read, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda feeds: request.infer(dict(feeds))[0]


def runtimes() -> dict[str, Callable[[onnx.ModelProto], Run]]:
    """Those that are installed."""
    try:
        import openvino
    except ImportError:
        print("OpenVINO is not installed: ONNX Runtime alone.")
        return {"ONNX Runtime": on_onnxruntime}
    print(f"OpenVINO {openvino.__version__}")
    return {"ONNX Runtime": on_onnxruntime, "OpenVINO": on_openvino}


def rows() -> Iterator[dict[str, Any]]:
    """One row per network, goal and runtime."""
    known = runtimes()
    for name, make in NETWORKS.items():
        model = make()
        shape = [d.dim_value or BATCH for d in model.graph.input[0].type.tensor_type.shape.dim]
        feeds = {"x": np.random.default_rng(1).random(shape, dtype=np.float32)}
        for speedup in SPEEDUPS:
            made = onnx_ecp.optimize(
                model,
                feeds,
                method="flap",
                granularity="unit",
                speedup=speedup,
                cost="flops",
                unit_multiple=MULTIPLE,
            )
            before, after = made.report.work_before, made.report.work_after
            assert before is not None, "units went"
            assert after is not None, "units went"
            for runtime, load in known.items():
                first, second = load(model), load(made.model)
                close = np.allclose(second(feeds), on_onnxruntime(made.model)(feeds), atol=1e-3)
                runs = [partial(run, feeds) for run in (first, second)]
                times = in_turns(runs, LEAST, WARM_UP, SECONDS)
                ms_before, ms_after = 1e3 * np.median(times, axis=0)
                row = {
                    "network": name,
                    "runtime": runtime,
                    "multiplications": after.flops / before.flops,
                    "latency": of_neighbours(times),
                    "latency / multiplications": of_neighbours(times) * before.flops / after.flops,
                    "ms before": float(ms_before),
                    "ms after": float(ms_after),
                    "agrees": close,
                }
                print(*row.values(), file=sys.stderr, flush=True)
                yield row


def claims(found: list[dict[str, Any]]) -> Iterator[Claim]:
    """Latency follows the multiplications."""
    for row in found:
        excess = row["latency / multiplications"]
        what = f"{row['network']} on {row['runtime']}, x{row['multiplications']:.3f} of the work"
        yield Claim(f"{what}: x{row['latency']:.3f}", row["agrees"] and abs(excess - 1) <= 0.1)


def main() -> int:
    """Measure, publish, judge."""
    found = list(rows())
    publish("latency", found)
    print(table(found))
    print(environment())
    return finish(claims(found))


if __name__ == "__main__":
    sys.exit(main())
