"""Importance of units whose readers are refitted: against least squares, and in turn."""

import numpy as np

from onnx_ecp.units.elimination import eliminated


def test_eliminated_units_cost_what_the_best_refit_leaves(rng):
    """Against plain least squares, for widths of one and of three columns, step by step."""
    a = rng.standard_normal((500, 12)) @ rng.standard_normal((12, 12))
    a -= a.mean(axis=0)
    v = rng.standard_normal((4, 12))
    covariance = a.T @ a / len(a)
    for blocks in (np.arange(12).reshape(12, 1), np.arange(12).reshape(4, 3)):
        inverse = np.linalg.inv(covariance)
        costs = eliminated(v, inverse, list(blocks), len(blocks))
        kept, current, order = set(range(12)), v.copy(), np.argsort(costs, kind="stable")
        for place in order[:-1]:
            left = sorted(kept - set(blocks[place].tolist()))
            wanted = a @ current.T
            fit = np.linalg.lstsq(a[:, left], wanted, rcond=None)[0]
            gap = np.square(a[:, left] @ fit - wanted).sum() / len(a)
            assert gap <= costs[place] * (1 + 1e-9)
            current = np.zeros_like(v)
            current[:, left] = fit.T
            kept = set(left)
        np.testing.assert_allclose(eliminated(v, inverse, list(blocks), 0).min(), costs.min())


def test_units_that_stand_in_for_each_other_do_not_all_go(rng):
    """Two copies of a unit cost nothing each, but together all that one does."""
    a = rng.standard_normal((400, 3))
    a = np.concatenate([a, a[:, :1] + 1e-4 * rng.standard_normal((400, 1))], axis=1)
    inverse = np.linalg.inv(a.T @ a / len(a))
    blocks = [np.array([i]) for i in range(4)]
    v = np.array([[1.0, 0.1, 0.1, 1.0]])
    at_once, in_turn = (eliminated(v, inverse, blocks, steps) for steps in (0, 4))
    assert set(np.argsort(at_once)[:2]) == {0, 3}
    assert set(np.argsort(in_turn)[:3]) == {1, 2, min((0, 3), key=in_turn.__getitem__)}
