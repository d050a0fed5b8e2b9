"""Units in another order: the same network, and patterns of N:M that lose less."""

import numpy as np
import onnx
import pytest
from test_structure import NETWORKS, build, each_network, inputs, run, structure_of

import onnx_ecp
from onnx_ecp.errors import UsageError
from onnx_ecp.graph import load
from onnx_ecp.layers import find_layers
from onnx_ecp.pruning.selection import NM
from onnx_ecp.units import rearranged
from onnx_ecp.units.permutation import exchanged, interchangeable, kept_by


@each_network
def test_another_order_of_the_units_is_the_same_network(network, rng):
    model = build(network, rng)
    feeds = inputs(model, rng)
    structure = structure_of(model, feeds, inside=False)
    order = np.arange(structure.units)
    free = interchangeable(structure)
    assert free
    for units in free:
        order[units] = np.roll(units, 1)
    moved = rearranged(model.proto, structure, order)
    onnx.checker.check_model(moved, full_check=True)
    assert moved != model.proto
    wanted = run(model.proto, feeds)
    np.testing.assert_allclose(run(moved, feeds), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    again = structure_of(load(moved), feeds, inside=False)
    back = rearranged(moved, again, np.argsort(order))
    for layer in find_layers(model.proto).layers:
        twin = next(x for x in find_layers(back).layers if x.name == layer.name)
        np.testing.assert_array_equal(matrix(back, twin), matrix(model.proto, layer))


def matrix(proto, layer):
    tensor = next(t for t in proto.graph.initializer if t.name == layer.weight.tensor)
    return layer.weight.matrix(onnx.numpy_helper.to_array(tensor))


def test_units_on_different_ways_are_not_exchanged(rng):
    """h passes a Relu, k does not; both are read by one layer."""
    model = build(NETWORKS["Concat of two producers and an input"], rng)
    structure = structure_of(model, inputs(model, rng), inside=False)
    groups = [set(units.tolist()) for units in interchangeable(structure)]
    assert groups == [{0, 1, 2, 3}, {4, 5, 6}]
    halves = ("float[N, 5] x", """h = Gemm(x, W, b)
        p, q = Split<axis = 1>(h)
        r = Relu(p)
        c = Concat<axis = 1>(r, q)
        y = Gemm(c, U)""", {"W": (5, 8), "b": (8,), "U": (8, 2)}, [8])  # fmt: skip
    model = build(halves, rng)
    structure = structure_of(model, inputs(model, rng), inside=False)
    groups = [set(units.tolist()) for units in interchangeable(structure)]
    assert groups == [{0, 1, 2, 3}, {4, 5, 6, 7}]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)])
def test_exchanges_keep_more_and_keep_every_column(pattern, rng):
    values = rng.random((6, 48)) ** 4
    seats = exchanged(values, pattern)
    np.testing.assert_array_equal(np.sort(seats), np.arange(48))
    assert kept_by(values[:, seats], pattern).sum() > 1.02 * kept_by(values, pattern).sum()


def test_two_columns_too_many_in_one_run_find_their_place():
    values = np.array([[9.0, 9, 9, 9, 1, 1, 1, 1]])
    seats = exchanged(values, NM(2, 4))
    assert kept_by(values[:, seats], NM(2, 4)).sum() == 36


PERMUTED = {
    "Gemm": ("float[N, 8] x", "h = Gemm<transB = 1>(x, W, b)\n a = Relu(h)\n y = Gemm(a, V)",
        {"W": (32, 8), "b": (32,), "V": (32, 6)}),
    "Conv": ("float[N, 4, 6, 6] x", "h = Conv(x, W, b)\n a = Relu(h)\n k = Conv(a, V)\n"
        "y = GlobalAveragePool(k)", {"W": (16, 4, 3, 3), "b": (16,), "V": (6, 16, 3, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PERMUTED)
def test_a_pattern_loses_less_after_permuting_and_the_report_says_so(name, rng):
    signature, body, shapes = PERMUTED[name]
    model = build((signature, body, shapes, []), rng)
    stored = next(t for t in model.proto.graph.initializer if t.name == "V")
    heavy = onnx.numpy_helper.to_array(stored).copy()
    units = 0 if name == "Gemm" else 1  # every other run of four is heavy: half of it is lost
    heavy *= (
        np.where(np.arange(heavy.shape[units]) % 8 < 4, 5, 0.5)
        .astype(np.float32)
        .reshape([-1 if axis == units else 1 for axis in range(heavy.ndim)])
    )
    stored.CopyFrom(onnx.numpy_helper.from_array(heavy, "V"))
    data = inputs(model, rng, 100)
    choices = {"method": "magnitude", "sparsity": "2:4"}
    plain = onnx_ecp.optimize(model.proto, data, **choices)
    moved = onnx_ecp.optimize(model.proto, data, permute=True, **choices)
    assert moved.report.gap.relative_error < 0.9 * plain.report.gap.relative_error
    assert moved.report.zeros_after == plain.report.zeros_after
    notes = [row.note for row in moved.report.layers]
    assert "inputs reordered" in notes[1]
    assert notes[0] == ""
    onnx.checker.check_model(moved.model, full_check=True)


@pytest.mark.parametrize(
    "choices",
    [{"sparsity": 0.5}, {"sparsity": "2:4", "masks": "m.npz"}, {"granularity": "unit"}],
)
def test_choices_that_permuting_contradicts_are_refused(choices, rng):
    model = build(NETWORKS["Gemm chain"], rng)
    with pytest.raises(UsageError):
        onnx_ecp.optimize(model.proto, inputs(model, rng, 40), permute=True, **choices)
