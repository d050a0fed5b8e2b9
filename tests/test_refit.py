"""The refit solves the weighted ridge problem on every row's own support."""

import numpy as np
import pytest

from onnx_ecp import refit as module
from onnx_ecp.refit import Gram, excess, inverse_diagonal, mean_shift, refit, solve

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


def test_excess_differs_from_the_true_error_by_a_constant(data, rng):
    now, before, s, weight, _ = data
    gram = gram_of(data)

    def true(candidate, shift):
        out = np.einsum("gri,goi->gro", now, candidate.reshape(-1, OUT, INPUTS))
        out += shift.reshape(-1, 1, OUT)
        target = np.einsum("gri,goi->gro", before, weight.reshape(-1, OUT, INPUTS))
        weights = s / s.sum(axis=1, keepdims=True)
        return np.einsum("gr,gro->go", weights, (out - target) ** 2).reshape(-1)

    one, two = rng.normal(size=(2, *weight.shape))
    d1, d2 = rng.normal(size=(2, len(weight)))
    np.testing.assert_allclose(
        excess(gram, weight, one, d1) - excess(gram, weight, two, d2),
        true(one, d1) - true(two, d2),
        rtol=1e-8,
    )


def test_no_support_can_beat_the_refit(data, rng):
    gram, weight, keep = gram_of(data), data[3], data[4]
    found, shift = refit(gram, weight, keep, 1e-9)
    best = excess(gram, weight, found, shift)
    for _ in range(5):
        other = np.where(keep, found + 0.1 * rng.normal(size=found.shape), 0)
        assert np.all(excess(gram, weight, other, mean_shift(gram, weight, other)) >= best - 1e-12)


def test_sums_of_parts_are_the_sums_of_the_whole(data):
    now, before, s, *_ = data
    centre = np.ones((len(now), INPUTS))
    parts = [Gram.of(now[:, i], before[:, i], s[:, i], centre) for i in (slice(9), slice(9, None))]
    both, whole = parts[0] + parts[1], Gram.of(now, before, s, centre)
    np.testing.assert_allclose(both.covariance, whole.covariance, rtol=1e-12)
    np.testing.assert_allclose(both.cross_covariance, whole.cross_covariance, rtol=1e-12)


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
    whole = inverse_diagonal(system, keep)
    np.testing.assert_allclose(whole, np.where(keep, np.diagonal(np.linalg.inv(system)), 0))
    assert np.all(whole >= own - 1e-12)
