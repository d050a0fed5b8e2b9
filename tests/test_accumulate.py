"""Sums inside the observation graph are those that NumPy takes of the rows that come out of it."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from test_pipeline import NETS, TRAINED, inputs, original

import onnx_ecp
from onnx_ecp.api.options import Options
from onnx_ecp.api.preparation import choose_layers, gather, load, observe_network
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.errors import OnnxEcpError, UsageError
from onnx_ecp.graph import load as load_model
from onnx_ecp.layers import find_layers
from onnx_ecp.runtime.limits import deadline
from onnx_ecp.runtime.session import OutOfMemory, Session
from onnx_ecp.statistics.collection import measure, measure_activations, row_sensitivities
from onnx_ecp.statistics.observer import Observer, original_state

PARTS = ("centre", "bb", "wb", "ww", "gradient", "a", "aa")


def network(net, where, **choices):
    """The network under observation, as ``optimize`` sees it."""
    source = load(original(net))
    options = Options.of(statistics=where, **choices)
    data = gather(source, inputs(net), options)
    return observe_network(source, choose_layers(source, options)[0], data, options)[0]


def assert_same(found, expected):
    """Two results of ``measure``: the same but for rounding of float64."""
    assert list(found.moments) == list(expected.moments)
    assert list(found.weights) == list(expected.weights)
    for name, right in expected.moments.items():
        left = found.moments[name]
        assert (left.count, left.rows) == (right.count, right.rows)
        left = left.recentred(right.centre)
        for part in PARTS:
            x, y = getattr(left, part), getattr(right, part)
            if y is None:
                assert x is None
                continue
            assert x.shape == y.shape
            # Sums about the mean may be all rounding: these are bounds of theirs.
            bound = {
                "wb": right.bb[:, None] * np.sqrt(right.per_row(right.aa)) if len(right.bb) else y,
                "a": np.sqrt(right.rows * right.aa),
                "centre": np.sqrt(right.aa / right.rows) + abs(right.centre),
            }.get(part, y)
            assert np.linalg.norm(x - y) <= 1e-10 * np.linalg.norm(bound), (name, part)
    for name, rows in expected.weights.items():
        np.testing.assert_allclose(found.weights[name], rows, rtol=1e-10, atol=1e-10 * rows.max())


@pytest.mark.parametrize("net", [*NETS, *TRAINED])
def test_moments_in_the_graph_are_those_on_the_host(net):
    found, expected = (network(net, where, batch_size=7) for where in ("graph", "host"))
    for wanted in ({}, {"with_gradient": True}, {"with_squares": False}):
        assert_same(*(
            measure(n.observer, n.original, n.train, size=n.size, **wanted)
            for n in (found, expected)
        ))  # fmt: skip
    assert_same(*(
        measure_activations(n.observer, n.original, n.train, size=n.size) for n in (found, expected)
    ))  # fmt: skip
    left, right = (
        row_sensitivities(n.observer, n.original, n.validation, size=n.size)
        for n in (found, expected)
    )
    for name, rows in right.items():
        np.testing.assert_allclose(left[name], rows, rtol=1e-10, atol=1e-10 * rows.max())


CONVOLUTIONS = {
    "padded": ("4,7,7", "4,4,3,3", "pads = [1, 2, 0, 1]"),
    "strided, cells left over": ("4,8,7", "4,4,3,2", "strides = [2, 3]"),
    "dilated": ("4,9,8", "4,4,3,2", "dilations = [2, 3], pads = [0, 1, 2, 0]"),
    "grouped": ("4,6,6", "6,2,3,3", "group = 2, strides = [2, 1], pads = [1, 1, 1, 1]"),
    "depthwise": ("4,6,6", "4,1,3,3", "group = 4"),
    "same, odd zero behind": ("4,7,6", "4,4,2,4", 'auto_pad = "SAME_UPPER", strides = [2, 1]'),
    "same, odd zero in front": ("4,7,6", "4,4,2,4", 'auto_pad = "SAME_LOWER", strides = [2, 1]'),
    "valid": ("4,6,6", "4,4,3,3", 'auto_pad = "VALID"'),
    "one dimension": ("4,9", "4,4,3", "strides = [2], pads = [1, 0]"),
    "three dimensions": ("2,4,5,3", "2,2,2,3,2", "strides = [1, 2, 1], pads = [1,0,0,0,1,1]"),
}


TRANSPOSED = {
    "transposed": ("4,5,4", "4,4,3,2", "strides = [2, 3]"),
    "transposed, padded": ("4,5,4", "4,4,3,3", "strides = [2, 1], pads = [1, 2, 0, 1]"),
    "transposed, dilated": (
        "4,5,4",
        "4,4,2,3",
        "strides = [2, 1], dilations = [3, 2], output_padding = [1, 0]",
    ),
    "transposed, grouped": ("4,5,4", "4,3,3,3", "group = 2, strides = [2, 1]"),
    "transposed, depthwise": ("4,5,4", "4,1,2,2", "group = 4, strides = [2, 2]"),
    "transposed, same": ("4,5,4", "4,4,3,5", 'auto_pad = "SAME_UPPER", strides = [2, 2]'),
    "transposed, same, other": ("4,5,4", "4,4,3,5", 'auto_pad = "SAME_LOWER", strides = [2, 2]'),
    "transposed, one dimension": ("4,6", "4,4,3", "strides = [2], pads = [1, 0]"),
    "transposed, three": ("2,3,2,3", "2,2,2,3,2", "strides = [1, 2, 1], pads = [1,0,0,0,1,1]"),
}


@pytest.mark.parametrize(
    ("op", "image", "kernel", "attributes"),
    [
        *(("Conv", *case) for case in CONVOLUTIONS.values()),
        *(("ConvTranspose", *case) for case in TRANSPOSED.values()),
    ],
    ids=[*CONVOLUTIONS, *TRANSPOSED],
)
def test_patches_in_the_graph_are_those_on_the_host(op, image, kernel, attributes, rng):
    """With other sizes than those of the batch that the graph was built with."""
    sizes, shape = ([int(x) for x in text.split(",")] for text in (image, kernel))
    free = ",".join([str(sizes[0]), *(f"d{i}" for i in range(1, len(sizes)))])
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 18]>
        net (float[n,{free}] x) => (float[n,c] y) {{
            z = {op}<{attributes}>(x, W)  t = Tanh(z)
            m = GlobalAveragePool(t)  y = Flatten(m)
        }}""")
    weight = rng.standard_normal(shape).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    model, layers = load_model(proto), find_layers(proto).layers
    first, others = (
        Calibration({"x": rng.standard_normal((5, *s)).astype(np.float32)}, True, "", False, 0)
        for s in (sizes, [sizes[0], *(d + 2 for d in sizes[1:])])
    )
    state = original_state(model, layers)
    found, expected = (
        measure(
            Observer(model, layers, next(first.batches(2)), statistics=w), state, others, size=3
        )
        for w in ("graph", "host")
    )
    assert_same(found, expected)


PRODUCTS = {
    "a vector": ("n,4,5", "MatMul(x, W)", (5,)),
    "a vector on the left": ("n,4,5", "MatMul(W, x)", (4,)),
    "a matrix on the left": ("n,4,5", "MatMul(W, x)", (3, 4)),
    "a batch": ("n,2,4,5", "MatMul(x, W)", (2, 5, 3)),
    "a batch on one input": ("n,1,4,5", "MatMul(x, W)", (2, 5, 3)),
    "a batch on the left": ("n,3,2,4,5", "MatMul(W, x)", (2, 3, 4)),
}


@pytest.mark.parametrize(("given", "product", "shape"), PRODUCTS.values(), ids=PRODUCTS)
def test_rows_of_products_in_the_graph_are_those_on_the_host(given, product, shape, rng):
    sizes = [int(size) for size in given.split(",")[1:]]
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        net (float[{given}] x) => (float[n,m] y) {{
            z = {product}  t = Tanh(z)  y = Flatten(t)
        }}""")
    weight = rng.standard_normal(shape).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    model, layers = load_model(proto), find_layers(proto).layers
    values = rng.standard_normal((5, *sizes)).astype(np.float32)
    data = Calibration({"x": values}, True, "", False, 0)
    state = original_state(model, layers)
    found, expected = (
        measure(Observer(model, layers, next(data.batches(2)), statistics=w), state, data, size=3)
        for w in ("graph", "host")
    )
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "gradient-magnitude", "flap"])
@pytest.mark.parametrize("net", ["gemm", "attention", "convolution", "tied", "fixed batch"])
def test_optimize_makes_the_same_of_either(net, method):
    graph, host = (
        onnx_ecp.optimize(
            original(net), inputs(net), method=method, sparsity=0.6, statistics=where, cleanup=False
        )
        for where in ("graph", "host")
    )
    for name, keep in host.masks.items():
        np.testing.assert_array_equal(graph.masks[name], keep)
    left, right = graph.report, host.report
    np.testing.assert_allclose(
        [left.gap.relative_error, *(row.importance_removed for row in left.layers)],
        [right.gap.relative_error, *(row.importance_removed for row in right.layers)],
        rtol=1e-5,
    )


def test_groups_of_layers_and_halved_batches_add_up_to_the_same(monkeypatch):
    n = network("attention", "graph", batch_size=8)
    whole = measure(n.observer, n.original, n.train, size=8)
    run = Session.run_bound

    def starved(session, feeds, *rest):
        if len(feeds["x"]) > 3:
            raise OutOfMemory("Failed to allocate memory for requested buffer of size 9")
        return run(session, feeds, *rest)

    monkeypatch.setattr(Session, "run_bound", starved)
    assert_same(measure(n.observer, n.original, n.train, size=8, memory=1), whole)


@pytest.mark.parametrize(
    "choices",
    [
        {"gradients": "numeric"},
        {"granularity": "unit"},
        {"method": "woodfisher"},
        {"positions": "reduce", "batch_size": 4},
    ],
)
def test_what_needs_every_row_cannot_be_in_the_graph(choices):
    with pytest.raises(UsageError, match="`statistics` graph does not go with"):
        onnx_ecp.optimize(original("attention"), inputs("attention"), statistics="graph", **choices)


def test_the_time_limit_ends_a_run_with_bound_values():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        net (float[n] x) => (float[n] y) {
            trips = Constant<value = int64 {1000000000000}> ()
            y = Loop (trips, , x) <
                body = step (int64 i, bool going, float[n] before) => (bool on, float[n] after) {
                    on = Identity(going)  after = Sin(before)
                }
            >
        }""")
    session = Session(proto, threads=1)
    with deadline(0.2), pytest.raises(OnnxEcpError, match=r"time limit of 0\.2 s"):
        session.run_bound({"x": np.ones(3, np.float32)}, ["y"], {"y"})


@pytest.fixture
def device(monkeypatch):
    """The CPU as if its memory were not the host's; the arrays that were placed there, in order."""
    placed, place = [], Session.placed

    def counted(session, arrays):
        placed.extend(arrays)
        return place(session, arrays)

    monkeypatch.setattr(Session, "remote", True)
    monkeypatch.setattr(Session, "placed", counted)
    return placed


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        {"method": "ecp-refit", "stages": 2},
        {"method": "ecp", "metric": "kl"},
        {"method": "flap"},
        {"method": "woodfisher"},
        {"method": "ecp", "gradients": "numeric"},
        {"method": "magnitude", "finetune_steps": 3},
        {"method": "ecp-refit", "stages": 2, "granularity": "unit"},
    ],
)
@pytest.mark.parametrize("net", ["gemm", "attention"])
def test_on_a_device_the_result_is_the_same(net, choices, request):
    options = {"sparsity": 0.3, "cleanup": False, **choices}
    host = onnx_ecp.optimize(original(net), inputs(net), **options)
    request.getfixturevalue("device")
    there = onnx_ecp.optimize(original(net), inputs(net), **options)
    assert (host.masks is None) == (there.masks is None)  # there are none of turned heads
    for name, keep in (host.masks or {}).items():
        np.testing.assert_array_equal(there.masks[name], keep)
    assert there.report.gap.relative_error == pytest.approx(
        host.report.gap.relative_error, rel=1e-4
    )


def test_a_device_takes_the_weights_once_for_each_state(device):
    n = network("gemm", "auto", batch_size=4)
    device.clear()
    for _ in range(2):
        measure(n.observer, n.original, n.train, size=4)
    assert n.observer.sums_in_graph
    # They are there since the batch size was tried; what is new are accumulators.
    assert not set(device) & {"W", "W2"}
    changed = n.original.with_layer(n.layers[0], n.original.weights["W"] * 2, np.zeros(16))
    measure(n.observer, changed, n.train, size=4)
    assert sorted(set(device) & {"W", "W2"}) == ["W", "W2"]
    assert device.count("W") == device.count("W2") == 1
