"""Moments add up; importance and compensation solve the problem that they stand for."""

import numpy as np
import onnx
import onnx.parser
import pytest

import onnx_ecp
from onnx_ecp.methods import METHODS, View, bias_shift
from onnx_ecp.statistics.gram import Gram
from onnx_ecp.statistics.moments import expand, reduce_positions, total

GROUPS, ROWS, INPUTS, OUT, PROBES = 2, 24, 5, 3, 4


@pytest.fixture
def rows(rng):
    a = rng.normal(size=(GROUPS, ROWS, INPUTS)) + 3
    g = rng.normal(size=(PROBES, GROUPS, ROWS, OUT))
    return a, g, a.mean(axis=1)


def gradients(a, g):
    """dy/dW (P, rows, all out, in) and dy/db (P, rows, all out), one sample per row."""
    by_weight = np.einsum("pgro,gri->prgoi", g, a).reshape(PROBES, ROWS, -1, INPUTS)
    return by_weight, np.moveaxis(g, 2, 1).reshape(PROBES, ROWS, -1)


def fields_close(one, other, rtol=1e-12):
    for name in ("count", "bb", "wb", "ww", "rows", "a", "aa"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), rtol=rtol, atol=1e-9, err_msg=name
        )


def test_moments_of_parts_add_up_to_the_moments_of_the_whole(rows):
    a, g, centre = rows
    parts = [expand(a[:, i : i + 7], g[:, :, i : i + 7], centre) for i in range(0, ROWS, 7)]
    fields_close(total(parts), expand(a, g, centre))


def test_parts_with_different_centres_add_up_too(rows):
    a, g, centre = rows
    first = expand(a[:, :10], g[:, :, :10], centre)
    second = expand(a[:, 10:], g[:, :, 10:], centre + 1)
    fields_close(first + second, expand(a, g, centre))


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3])
def test_importance_does_not_feel_a_constant_shift_of_activations(rows, offset):
    a, g, centre = rows
    plain = expand(a, g, centre)
    shifted = expand(a + offset, g, centre + offset)
    np.testing.assert_allclose(shifted.variance, plain.variance, rtol=1e-9)


def test_importance_is_what_the_best_shift_leaves(rows, rng):
    """I_ij = min_d E sum_k (W dy/dW - d dy/db)^2 by explicit least squares (ECP, vector form)."""
    a, g, centre = rows
    weight = rng.normal(size=(GROUPS * OUT, INPUTS))
    moments = expand(a, g, centre)
    score = METHODS["ecp"].importance(View(weight, moments, rng))
    by_weight, by_bias = gradients(a, g)
    for i, j in np.ndindex(*weight.shape):
        x = weight[i, j] * by_weight[:, :, i, j].reshape(-1)
        b = by_bias[:, :, i].reshape(-1)
        d = (x @ b) / (b @ b)
        np.testing.assert_allclose(score[i, j], np.square(x - d * b).sum() / ROWS, rtol=1e-10)
        one = np.ones_like(weight, dtype=bool)
        one[i, j] = False
        np.testing.assert_allclose(bias_shift(weight, moments, one)[i], d, rtol=1e-10)


def test_the_shifts_of_a_row_add_up_to_the_joint_optimum(rows, rng):
    a, g, centre = rows
    weight = rng.normal(size=(GROUPS * OUT, INPUTS))
    keep = rng.random(weight.shape) > 0.5
    shift = bias_shift(weight, expand(a, g, centre), keep)
    by_weight, by_bias = gradients(a, g)
    for i in range(len(weight)):
        change = (np.where(keep[i], 0, weight[i]) * by_weight[:, :, i]).sum(axis=-1).reshape(-1)
        b = by_bias[:, :, i].reshape(-1)
        np.testing.assert_allclose(shift[i], (change @ b) / (b @ b), rtol=1e-10)


def test_a_constant_input_costs_nothing(rows, rng):
    a, g, _ = rows
    a[:, :, 1] = 7.0
    moments = expand(a, g, a.mean(axis=1))
    assert np.all(moments.variance[:, 1] <= 1e-20)
    assert np.all(moments.variance >= 0)


def test_a_unit_that_nobody_feels_gets_no_shift(rows, rng):
    a, g, centre = rows
    g[:, :, :, 0] = 0
    moments = expand(a, g, centre)
    assert np.all(moments.gain[::OUT] == 0)
    assert np.all(moments.variance[::OUT] == 0)


def test_positions_that_cancel_in_the_bias_do_not_blow_up(rng):
    """Attention keys: the softmax does not feel a shift, so bb is rounding noise ."""
    a = rng.normal(size=(1, 8, 3)).astype(np.float32)
    g = rng.normal(size=(1, 1, 8, 2)).astype(np.float32)
    g = g.reshape(1, 1, 4, 2, 2)
    g[:, :, :, 1] = -g[:, :, :, 0]
    moments = reduce_positions(a, g.reshape(1, 1, 8, 2), np.zeros((1, 3)), samples=4)
    assert np.all(moments.gain == 0)
    assert np.all(moments.variance > 0)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
def test_compensation_does_not_feel_the_unit_of_the_inputs(rows, unit, reduce):
    """A table's columns come as they are: in dollars, in seconds since 1970."""

    def moments(a, centre):
        return reduce_positions(a, g, centre, ROWS // 3) if reduce else expand(a, g, centre)

    a, g, centre = rows
    plain, scaled = moments(a, centre), moments(a * unit, centre * unit)
    assert np.all(plain.gain != 0)
    np.testing.assert_allclose(scaled.gain, plain.gain * unit, rtol=1e-9)
    np.testing.assert_allclose(scaled.variance, plain.variance * unit**2, rtol=1e-9)


def test_without_squares_everything_else_is_the_same(rows):
    a, g, centre = rows
    whole = expand(a, g, centre).shrunk(0.3)
    parts = [
        expand(a[:, i], g[:, :, i], c, with_squares=False)
        for i, c in ((slice(9), centre), (slice(9, None), centre + 1))
    ]
    found = total(parts).shrunk(0.3)
    assert found.ww is None
    for name in ("bb", "wb", "gain", "a", "aa"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(whole, name), rtol=1e-10, atol=1e-9
        )


def test_reduce_squares_after_summing_positions(rows):
    a, g, centre = rows
    moments = reduce_positions(a, g, centre, samples=ROWS // 3)
    by_weight, by_bias = gradients(a - centre[:, None, :], g)
    by_weight = by_weight.reshape(PROBES, ROWS // 3, 3, -1, INPUTS).sum(axis=2)
    by_bias = by_bias.reshape(PROBES, ROWS // 3, 3, -1).sum(axis=2)
    np.testing.assert_allclose(moments.ww, np.square(by_weight).sum(axis=(0, 1)), rtol=1e-10)
    np.testing.assert_allclose(moments.bb, np.square(by_bias).sum(axis=(0, 1)), rtol=1e-10)
    np.testing.assert_allclose(
        moments.wb, (by_weight * by_bias[..., None]).sum(axis=(0, 1)), rtol=1e-9, atol=1e-9
    )


def test_one_position_per_sample_is_the_same_either_way(rows):
    a, g, centre = rows
    fields_close(reduce_positions(a, g, centre, samples=ROWS), expand(a, g, centre), rtol=1e-9)


def test_shrinking_is_what_shrunk_sensitivities_give(rows):
    a, g, centre = rows
    q = 0.3
    s = np.square(g).sum(axis=0)
    s = (1 - q) * s + q * s.mean(axis=1, keepdims=True)
    fields_close(expand(a, g, centre).shrunk(q), expand(a, np.sqrt(s)[None], centre), rtol=1e-9)


def test_norms_are_those_of_the_activations(rows):
    a, g, centre = rows
    np.testing.assert_allclose(expand(a, g, centre).norms, np.linalg.norm(a, axis=1), rtol=1e-12)


def test_a_weight_costs_at_every_position_where_it_is_used(rows):
    a, g, centre = rows
    per_row = expand(a, g, centre)
    per_sample = expand(a, g, centre, samples=ROWS // 3)
    np.testing.assert_allclose(per_sample.variance, 3 * per_row.variance)
    np.testing.assert_allclose(per_sample.gain, per_row.gain)


@pytest.mark.parametrize("value", [0.0, 1e-3, 7.3, 1e4])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_inputs_that_never_vary_but_for_rounding_have_no_variance(value, kind, rng):
    """Sums in single precision leave a little of either sign, which no inverse could bear."""
    x = rng.standard_normal((1, 5000, 4)).astype(kind)
    x[..., 1] = value
    s = rng.pareto(3, (1, 5000))
    centre = x[:, :100].mean(axis=1, dtype=np.float64) * (1 + 1e-6)
    gram = Gram.of(x, x, s, centre)
    covariance, cross = gram.covariance[0], gram.cross_covariance[0]
    assert not covariance[1].any()
    assert not covariance[:, 1].any()
    assert not cross[:, 1].any()
    rest = [0, 2, 3]
    wanted = np.cov(x[0][:, rest].T, aweights=s[0], ddof=0)
    np.testing.assert_allclose(covariance[np.ix_(rest, rest)], wanted, rtol=1e-4, atol=1e-4)
    assert np.linalg.eigvalsh(covariance)[0] > -1e-12


@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("method", ["ecp-refit", "obs", "sparsegpt"])
def test_channels_that_never_vary_but_for_rounding_are_pruned(method, damping, rng):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n,4,6,6] x) => (float[n,3] y) '
        "{ k = Conv <kernel_shape = [3,3], group = 4> (x, U, b) r = Relu(k) "
        "p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, V) }"
    )
    shapes = {"U": (4, 1, 3, 3), "b": (4,), "V": (4, 3)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    x = rng.standard_normal((60, 4, 6, 6)).astype(np.float32)
    x[:, 1] = 7.3 * (1 + 1e-7 * x[:, 1])
    x[:, 2] = 0.0
    found = onnx_ecp.optimize(model, x, method=method, damping=damping, sparsity=0.5, measure=False)
    assert np.isfinite(found.report.gap.relative_error)
    assert found.report.sparsity >= 0.5
