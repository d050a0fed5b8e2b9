"""The refit solves the weighted ridge problem on every row's own support."""

import time

import numpy as np
import pytest

from onnx_ecp.errors import ProviderError
from onnx_ecp.linalg import cholesky
from onnx_ecp.linalg import masked as module
from onnx_ecp.linalg.masked import inverse_diagonal, solve
from onnx_ecp.methods.refit import refit
from onnx_ecp.runtime.limits import deadline
from onnx_ecp.statistics.gram import Gram, mean_shift, outputs, squared_errors

ROWS, INPUTS, OUT = 60, 7, 5


@pytest.fixture(params=[1, 3], ids=["one group", "three groups"])
def data(request, rng):
    groups = request.param
    now = rng.normal(size=(groups, ROWS, INPUTS)) + 2
    before = now + 0.3 * rng.normal(size=now.shape)
    s = rng.random((groups, ROWS))
    weight = rng.normal(size=(groups * OUT, INPUTS))
    keep = rng.random(weight.shape) > 0.4
    keep[0] = False
    return now, before, s, weight, keep


def gram_of(data, centre=0.0):
    now, before, s, *_ = data
    return Gram.of(now, before, s, np.full((len(now), INPUTS), centre))


@pytest.mark.parametrize("centre", [0.0, 2.0])
def test_refit_is_the_weighted_ridge_regression_on_the_support(data, centre):
    now, before, s, weight, keep = data
    damping = 0.05
    found, shift = refit(gram_of(data, centre), weight, keep, damping)
    for i in range(len(weight)):
        g = i // OUT
        w = s[g] / s[g].sum()
        x = now[g] - w @ now[g]
        target = before[g] @ weight[i]
        y = target - w @ target
        ridge = damping * np.trace((x * w[:, None]).T @ x) / INPUTS
        on = keep[i]
        lhs = (x[:, on] * w[:, None]).T @ x[:, on] + ridge * np.eye(on.sum())
        rhs = (x[:, on] * w[:, None]).T @ y + ridge * weight[i, on]
        np.testing.assert_allclose(found[i, on], np.linalg.solve(lhs, rhs), rtol=1e-8, atol=1e-9)
        assert np.all(found[i, ~on] == 0)
        np.testing.assert_allclose(shift[i], w @ (target - now[g] @ found[i]), rtol=1e-7, atol=1e-9)


def test_nothing_removed_and_nothing_changed_upstream_is_the_identity(data):
    now, _, s, weight, _ = data
    gram = Gram.of(now, now, s, np.zeros((len(now), INPUTS)))
    found, shift = refit(gram, weight, np.ones(weight.shape, bool), 1e-2)
    np.testing.assert_allclose(found, weight, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(shift, 0, atol=1e-9)


def error_of(data, candidate, shifts):
    """(k,): what is left of the outputs with a candidate and k shifts."""
    now, before, s, weight, _ = data
    return squared_errors(outputs(now, candidate) - outputs(before, weight), s, shifts)


def test_squared_errors_are_those_of_the_outputs_row_by_row(data, rng):
    now, before, s, weight, _ = data
    candidate, shifts = rng.normal(size=weight.shape), rng.normal(size=(2, len(weight)))
    expected = np.zeros(2)
    for g in range(len(now)):
        units = slice(g * OUT, (g + 1) * OUT)
        for row in range(ROWS):
            off = candidate[units] @ now[g, row] - weight[units] @ before[g, row]
            expected += s[g, row] * ((off + shifts[:, units]) ** 2).sum(axis=1)
    np.testing.assert_allclose(error_of(data, candidate, shifts), expected, rtol=1e-10)


def test_no_support_can_beat_the_refit(data, rng):
    gram, weight, keep = gram_of(data), data[3], data[4]
    found, shift = refit(gram, weight, keep, 1e-9)
    best = error_of(data, found, shift[None])[0]
    for _ in range(5):
        other = np.where(keep, found + 0.1 * rng.normal(size=found.shape), 0)
        assert error_of(data, other, mean_shift(gram, weight, other)[None])[0] > best


def test_sums_of_parts_are_the_sums_of_the_whole(data):
    now, before, s, *_ = data
    centre = np.ones((len(now), INPUTS))
    parts = [Gram.of(now[:, i], before[:, i], s[:, i], centre) for i in (slice(9), slice(9, None))]
    both, whole = parts[0] + parts[1], Gram.of(now, before, s, centre)
    np.testing.assert_allclose(both.covariance, whole.covariance, rtol=1e-12)
    np.testing.assert_allclose(both.cross_covariance, whole.cross_covariance, rtol=1e-12)


def test_sums_about_different_constants_add_up_too(data, rng):
    now, before, s, *_ = data
    centres = rng.normal(size=(2, len(now), INPUTS))
    parts = [
        Gram.of(now[:, i], before[:, i], s[:, i], centre)
        for i, centre in zip((slice(9), slice(9, None)), centres, strict=True)
    ]
    both, whole = parts[0] + parts[1], Gram.of(now, before, s, parts[0].centre)
    for name in ("weight", "now", "before", "gram", "cross", "centre"):
        np.testing.assert_allclose(
            getattr(both, name), getattr(whole, name), rtol=1e-10, atol=1e-10
        )


def test_an_input_that_is_always_zero_keeps_its_weight(data):
    now, before, s, weight, _ = data
    now, before = now.copy(), before.copy()
    now[:, :, 0] = before[:, :, 0] = 0
    gram = Gram.of(now, before, s, np.zeros((len(now), INPUTS)))
    found, _ = refit(gram, weight, np.ones(weight.shape, bool), 1e-2)
    np.testing.assert_allclose(found[:, 0], weight[:, 0])


def test_direct_and_iterative_solutions_agree(rng, monkeypatch):
    x = rng.normal(size=(200, 40))
    system = x.T @ x / 200 + 0.05 * np.eye(40)
    right = rng.normal(size=(30, 40))
    keep = rng.random((30, 40)) > rng.random((30, 1))
    direct = solve(system, right, keep, start=np.zeros_like(right))
    monkeypatch.setattr(module, "CG_TOLERANCE", 1e-12)
    iterative = module._conjugate_gradients(system, right, keep, np.zeros_like(right))
    np.testing.assert_allclose(direct, iterative, rtol=1e-6, atol=1e-8)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    np.testing.assert_allclose(
        solve(system, right, keep, start=np.zeros_like(right)), direct, rtol=1e-12
    )


def test_inverse_diagonal_is_that_of_every_rows_own_system(rng):
    x = rng.normal(size=(200, 30))
    system = x.T @ x / 200 + 0.05 * np.eye(30)
    keep = rng.random((20, 30)) > rng.random((20, 1))
    found = inverse_diagonal(system, keep)
    for row, on in zip(found, keep, strict=True):
        own = np.diagonal(np.linalg.inv(system[np.ix_(on, on)]))
        np.testing.assert_allclose(row[on], own, rtol=1e-9)
        assert np.all(row[~on] == 0)


def test_wide_supports_take_the_whole_inverse(rng, monkeypatch):
    x = rng.normal(size=(200, 30))
    system = x.T @ x / 200 + 0.05 * np.eye(30)
    keep = rng.random((20, 30)) > 0.3
    own = inverse_diagonal(system, keep)
    monkeypatch.setattr(module, "CG_STEPS", 0)
    monkeypatch.setattr(cholesky, "SMALL", 8)
    whole = inverse_diagonal(system, keep)
    np.testing.assert_allclose(whole, np.where(keep, np.diagonal(np.linalg.inv(system)), 0))
    assert np.all(whole >= own - 1e-12)


def test_a_system_that_rounding_made_indefinite_has_an_inverse_all_the_same(monkeypatch):
    monkeypatch.setattr(module, "CG_STEPS", 0)
    system = np.diag([1.0, -1e-18])
    found = inverse_diagonal(system, np.ones((2, 2), bool))
    np.testing.assert_allclose(found, [[1, -1e18]] * 2)


def test_few_rows_have_their_own_systems_where_many_share_one(rng, monkeypatch):
    """A layer of 40 inputs: its supports of 30 cost no more than steps, a fifth of it is 20."""
    keep = np.zeros((8, 40), bool)
    keep[:, :30] = True
    assert module._is_narrow(keep)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "CG_STEPS", 10)
    assert not module._is_narrow(keep)
    assert module._is_narrow(keep & (np.arange(40) < 20))


@pytest.mark.parametrize("size", [1, 7, 33, 70])
def test_diagonals_of_inverses_are_had_for_many_matrices_at_once(size, rng):
    x = rng.normal(size=(3, size, 2 * size))
    matrices = x @ x.swapaxes(1, 2) + 0.1 * np.eye(size)
    expected = np.diagonal(np.linalg.inv(matrices), axis1=1, axis2=2)
    np.testing.assert_allclose(cholesky.diagonal_of_inverse(matrices), expected, rtol=1e-9)


def test_the_time_limit_ends_the_solution_of_many_small_systems(rng, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # every row is a part
    done = []

    def slow(part):
        time.sleep(0.02)
        done.append(part)
        return np.zeros(part.columns.shape)

    keep = rng.random((200, 5)) > 0.2
    with deadline(0.1), pytest.raises(ProviderError, match="time limit"):
        module._by_support(slow, keep)
    assert len(done) < 100
