"""Methods that solve a layer or a network: each against a plain implementation of its paper."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.api import preparation
from onnx_ecp.api.options import Options
from onnx_ecp.api.sweep import sweep
from onnx_ecp.errors import CalibrationError, UsageError
from onnx_ecp.linalg import cholesky
from onnx_ecp.linalg.masked import damped
from onnx_ecp.methods import (
    METHODS,
    BlockProblem,
    LayerProblem,
    MaskProblem,
    View,
    cbs,
    obc,
    sparsegpt,
    woodfisher,
)
from onnx_ecp.pruning import loop as pruning
from onnx_ecp.statistics.curvature import Curvature, Full, Outer
from onnx_ecp.statistics.gram import Gram

ROWS, INPUTS, OUT, DAMPING = 200, 12, 5, 1e-2


@pytest.fixture(params=[1, 2], ids=["one group", "two groups"])
def layer(request, rng):
    """Input rows (groups, rows, in), dependent and with a mean; weights (groups * OUT, in)."""
    mixing = rng.normal(size=(INPUTS, INPUTS))
    a = rng.normal(size=(request.param, ROWS, INPUTS)) @ mixing + 0.5
    return a, rng.normal(size=(request.param * OUT, INPUTS))


def problem_of(a, weight, keep, **choices):
    gram = Gram.of(a, a, np.ones(a.shape[:2]), a.mean(axis=1))
    present = choices.pop("present", np.ones_like(keep))
    weight = np.where(present, weight, 0.0)
    given = {"may_reselect": True, "gram": gram, "damping": DAMPING} | choices
    return LayerProblem(weight=weight, original=weight, present=present, keep=keep, **given)


def mask(rng, shape, sparsity):
    return rng.random(shape) >= sparsity


def error(a, weight, other):
    """(out,): mean squared difference of the outputs, with the ridge, as H says it."""
    gap, groups = other - weight, len(a)
    found = []
    for x, d in zip(a, np.split(gap, groups), strict=True):
        h = damped(x.T @ x / len(x), DAMPING)
        found.append(((d @ h) * d).sum(axis=1))
    return np.concatenate(found)


# SparseGPT.


def plain_sparsegpt(x, weight, block, gone=None, zeros=None, pattern=None):
    """One column after the other, with an explicit inverse of what is left to the right."""
    weight, hessian = weight.copy(), damped(x.T @ x / len(x), DAMPING)
    removed = np.zeros(weight.shape, bool) if gone is None else gone.copy()
    for j in range(weight.shape[1]):
        # Cholesky's rows are those of the inverses of the trailing blocks.
        costs = [
            weight[:, k] ** 2 / np.linalg.inv(hessian[k:, k:])[0, 0]
            for k in range(j, weight.shape[1])
        ]
        costs = np.stack(costs, axis=1)
        if zeros is not None and j % block == 0:
            part = costs[:, :block]
            chosen = np.argsort(part.reshape(-1), kind="stable")[: zeros[j // block]]
            flags = np.zeros(part.size, bool)
            flags[chosen] = True
            removed[:, j : j + block] = flags.reshape(part.shape)
        if pattern is not None and j % pattern[1] == 0:
            n, m = pattern
            order = np.argsort(costs[:, :m], axis=1, kind="stable")[:, : m - n]
            removed[:, j : j + m] = False
            np.put_along_axis(removed[:, j : j + m], order, True, axis=1)
        inverse = np.linalg.inv(hessian[j:, j:])
        lost = np.where(removed[:, j], weight[:, j], 0.0)
        weight[:, j:] -= np.outer(lost / inverse[0, 0], inverse[0])
    return np.where(removed, 0.0, weight), ~removed


def test_sparsegpt_is_the_plain_sweep_with_blocks(layer, rng, monkeypatch):
    a, weight = layer
    monkeypatch.setattr(sparsegpt, "BLOCK", 4)
    keep = np.ones(weight.shape, bool)
    for rows in np.split(np.arange(len(weight)), len(a)):  # as many zeros in every group
        flat = np.ones(rows.size * INPUTS, bool)
        flat[rng.choice(flat.size, 30, replace=False)] = False
        keep[rows] = flat.reshape(-1, INPUTS)
    solved = sparsegpt.solve(problem_of(a, weight, keep))
    for x, rows in zip(a, np.split(np.arange(len(weight)), len(a)), strict=True):
        expected, kept = plain_sparsegpt(x, weight[rows], block=4, zeros=[10, 10, 10])
        np.testing.assert_array_equal(solved.keep[rows], kept)
        np.testing.assert_allclose(solved.weight[rows], expected, rtol=1e-8, atol=1e-10)


def test_sparsegpt_under_n_of_m_is_the_plain_sweep_run_by_run(layer):
    a, weight = layer
    keep = np.tile([True, True, False, False], (len(weight), INPUTS // 4))
    solved = sparsegpt.solve(problem_of(a, weight, keep, block=4))
    for x, rows in zip(a, np.split(np.arange(len(weight)), len(a)), strict=True):
        expected, kept = plain_sparsegpt(x, weight[rows], block=4, pattern=(2, 4))
        np.testing.assert_array_equal(solved.keep[rows], kept)
        np.testing.assert_allclose(solved.weight[rows], expected, rtol=1e-8, atol=1e-10)


def test_sparsegpt_with_a_given_mask_keeps_it(layer, rng):
    a, weight = layer
    keep = mask(rng, weight.shape, 0.5)
    solved = sparsegpt.solve(problem_of(a, weight, keep, may_reselect=False))
    for x, rows in zip(a, np.split(np.arange(len(weight)), len(a)), strict=True):
        expected, kept = plain_sparsegpt(x, weight[rows], block=4, gone=~keep[rows])
        np.testing.assert_array_equal(solved.keep[rows], kept)
        np.testing.assert_allclose(solved.weight[rows], expected, rtol=1e-8, atol=1e-10)


def test_sparsegpt_follows_the_order_of_n_of_m(layer, rng):
    a, weight = layer
    order = rng.permutation(INPUTS)
    keep = np.empty(weight.shape, bool)
    keep[:, order] = np.tile([True, True, False, False], (len(weight), INPUTS // 4))
    solved = sparsegpt.solve(problem_of(a, weight, keep, block=4, order=order))
    runs = solved.keep[:, order].reshape(len(weight), -1, 4)
    assert np.all(runs.sum(axis=2) == 2)
    straight = sparsegpt.solve(
        problem_of(a[:, :, order], weight[:, order], keep[:, order], block=4)
    )
    np.testing.assert_allclose(solved.weight[:, order], straight.weight, rtol=1e-9, atol=1e-12)


# Optimal Brain Compression.


def least_squares(weight, hessian, on):
    """The best weights of a row on a support, by the normal equations."""
    best = np.zeros_like(weight)
    best[on] = np.linalg.solve(hessian[np.ix_(on, on)], (hessian @ weight)[on])
    return best, float((best - weight) @ hessian @ (best - weight))


def plain_obc(x, weight, newly_removed, pattern):
    """All candidates of every step solved for anew; the cheapest step of any row is taken."""
    hessian = damped(x.T @ x / len(x), DAMPING)
    keep = np.ones(weight.shape, bool)

    def best_step(i):
        found = (np.inf, 0)
        _, now = least_squares(weight[i], hessian, keep[i])
        for p in np.flatnonzero(keep[i]):
            if pattern is not None:
                n, m = pattern
                if keep[i].reshape(-1, m)[p // m].sum() == n:
                    continue
            on = keep[i].copy()
            on[p] = False
            found = min(found, (least_squares(weight[i], hessian, on)[1] - now, p))
        return found

    if pattern is not None:
        for i in range(len(weight)):
            for _ in range((pattern[1] - pattern[0]) * INPUTS // pattern[1]):
                keep[i, best_step(i)[1]] = False
    for _ in range(newly_removed):
        steps = [best_step(i) for i in range(len(weight))]
        i = min(range(len(weight)), key=lambda i: steps[i][0])
        keep[i, steps[i][1]] = False
    rows = [least_squares(w, hessian, on)[0] for w, on in zip(weight, keep, strict=True)]
    return np.stack(rows), keep


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_obc_is_the_greedy_choice_among_all_that_could_go(layer, pattern):
    a, weight = layer
    if pattern is None:
        keep = np.ones(weight.shape, bool)
        keep[:, :6] = False
    else:
        keep = np.tile([True, True, False, False], (len(weight), INPUTS // 4))
    solved = obc.solve(problem_of(a, weight, keep, block=0 if pattern is None else 4))
    for x, rows in zip(a, np.split(np.arange(len(weight)), len(a)), strict=True):
        newly_removed = 6 * OUT if pattern is None else 0
        expected, kept = plain_obc(x, weight[rows], newly_removed, pattern)
        np.testing.assert_array_equal(solved.keep[rows], kept)
        np.testing.assert_allclose(solved.weight[rows], expected, rtol=1e-8, atol=1e-10)


def test_obc_with_a_given_mask_is_the_least_squares_solution(layer, rng):
    a, weight = layer
    keep = mask(rng, weight.shape, 0.5)
    solved = obc.solve(problem_of(a, weight, keep, may_reselect=False))
    for x, rows in zip(a, np.split(np.arange(len(weight)), len(a)), strict=True):
        hessian = damped(x.T @ x / len(x), DAMPING)
        expected = [
            least_squares(w, hessian, on)[0] for w, on in zip(weight[rows], keep[rows], strict=True)
        ]
        np.testing.assert_allclose(solved.weight[rows], expected, rtol=1e-8, atol=1e-10)


def test_obc_does_at_least_as_well_as_sparsegpt(layer):
    a, weight = layer
    keep = np.ones(weight.shape, bool)
    keep[:, ::2] = False
    problem = problem_of(a, weight, keep)
    exact, swept = obc.solve(problem).weight, sparsegpt.solve(problem).weight
    assert error(a, weight, exact).sum() < error(a, weight, swept).sum()


def test_obc_refuses_layers_that_would_take_hours(layer, monkeypatch):
    a, weight = layer
    monkeypatch.setattr(obc, "MOST", 1)
    with pytest.raises(UsageError, match="hours") as caught:
        obc.solve(problem_of(a, weight, np.ones(weight.shape, bool)))
    assert "sparsegpt" in caught.value.hint


# Laws of all that solve a layer.

SOLVERS = {"sparsegpt": sparsegpt.solve, "obc": obc.solve}
each_solver = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


@each_solver
@pytest.mark.parametrize("block", [0, 4])
def test_counts_are_kept_and_what_was_gone_stays_gone(layer, rng, solve, block):
    a, weight = layer
    present = mask(rng, weight.shape, 0.3)
    keep = present & mask(rng, weight.shape, 0.5)
    solved = solve(problem_of(a, weight, keep, present=present, block=block))
    assert not solved.keep[~present].any()
    assert not solved.weight[~solved.keep].any()
    if block:
        runs = (len(weight), -1, block)
        np.testing.assert_array_equal(
            solved.keep.reshape(runs).sum(axis=2), keep.reshape(runs).sum(axis=2)
        )
    for rows in np.split(np.arange(len(weight)), len(a)):
        assert np.count_nonzero(solved.keep[rows]) == np.count_nonzero(keep[rows])


@each_solver
def test_nothing_to_remove_changes_nothing(layer, solve):
    a, weight = layer
    solved = solve(problem_of(a, weight, np.ones(weight.shape, bool)))
    np.testing.assert_array_equal(solved.weight, weight)


@each_solver
def test_solutions_are_together_closer_than_zeros_alone(layer, rng, solve):
    a, weight = layer
    keep = mask(rng, weight.shape, 0.5)
    solved = solve(problem_of(a, weight, keep, may_reselect=False))
    masked = np.where(keep, weight, 0.0)
    assert error(a, weight, solved.weight).sum() < error(a, weight, masked).sum()


@each_solver
def test_an_input_that_is_always_zero_goes_first(layer, solve):
    a, weight = layer
    a = a.copy()
    a[:, :, 3] = 0
    keep = np.ones(weight.shape, bool)
    keep[:, 0] = False
    solved = solve(problem_of(a, weight, keep, damping=1e-9))
    assert not solved.keep[:, 3].any()
    np.testing.assert_allclose(np.delete(solved.weight, 3, 1), np.delete(weight, 3, 1), rtol=1e-9)


# The curvature of a network.


class Net:
    """Two small layers with rows of gradients: explicit matrices beside ``Curvature``."""

    shapes: ClassVar = {"U": (4, 6), "V": (3, 4)}

    def __init__(self, rng, rows=40, full=False, present=None):
        self.rng, self.samples = rng, rows
        parts = {
            n: Outer(rng.normal(size=(out, rows)), rng.normal(size=(width, rows)))
            for n, (out, width) in self.shapes.items()
        }
        if full:
            parts = {n: Full(p.g.T[:, :, None] * p.a.T[:, None, :]) for n, p in parts.items()}
        self.weight = {n: rng.normal(size=shape) for n, shape in self.shapes.items()}
        self.present = present or {n: rng.random(shape) > 0.2 for n, shape in self.shapes.items()}
        self.weight = {n: np.where(self.present[n], w, 0) for n, w in self.weight.items()}
        self.curvature = Curvature(parts, self.present, rows)
        on = self.flat(self.present)
        every = [np.indices(shape).reshape(2, -1) for shape in self.shapes.values()]
        g = np.concatenate([p.columns(*i) for p, i in zip(parts.values(), every, strict=True)])
        self.matrix = (g @ g.T / rows) * np.outer(on, on)

    def flat(self, by_tensor):
        return np.concatenate([by_tensor[n].reshape(-1) for n in self.shapes])

    def split(self, flat):
        u = int(np.prod(self.shapes["U"]))
        return {"U": flat[:u].reshape(self.shapes["U"]), "V": flat[u:].reshape(self.shapes["V"])}

    def start(self, zeros=12):
        """A mask: the smallest weights of those that are there go."""
        size = np.where(self.flat(self.present), np.abs(self.flat(self.weight)), np.inf)
        keep = self.flat(self.present).copy()
        keep[np.argsort(size)[:zeros]] = False
        return self.split(keep)

    def inverse(self, damping):
        """On what is there, 0 elsewhere."""
        on = np.flatnonzero(self.flat(self.present))
        whole = np.zeros_like(self.matrix)
        part = self.matrix[np.ix_(on, on)] + damping * np.eye(len(on))
        whole[np.ix_(on, on)] = np.linalg.inv(part)
        return whole

    def objective(self, keep):
        """w_P^T H w_P."""
        gone = np.where(self.flat(keep), 0.0, self.flat(self.weight))
        return float(gone @ self.matrix @ gone)

    def problem(self, **choices):
        given = {
            "weight": self.weight,
            "present": self.present,
            "start": self.start(),
            "blocks": (self.curvature,),
            "elsewhere": {},
            "error": self.objective,
            "rng": self.rng,
        }
        return MaskProblem(**(given | choices))


@pytest.fixture(params=["many rows", "few rows", "rows as they are"])
def net(request, rng):
    return Net(rng, 12 if request.param == "few rows" else 60, request.param == "rows as they are")


def test_products_with_the_rows_are_those_of_the_matrix(net):
    v = {n: net.rng.normal(size=shape) for n, shape in net.shapes.items()}
    image = net.curvature.back(net.curvature.times(v))
    expected = net.matrix @ net.flat(v) * net.samples
    np.testing.assert_allclose(net.flat(image), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(net.flat(net.curvature.diagonal()), np.diagonal(net.matrix))


def test_triangular_systems_are_solved_block_by_block(rng, monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 4)
    x = rng.normal(size=(10, 30))
    matrix = x @ x.T
    right = rng.normal(size=(10, 3))
    factor = cholesky.Cholesky(matrix.copy(), 0.5)
    matrix += 0.5 * np.eye(10)
    np.testing.assert_allclose(factor.solve(right), np.linalg.solve(matrix, right), rtol=1e-9)
    lower = np.linalg.cholesky(matrix)
    np.testing.assert_allclose(factor.half(right), np.linalg.solve(lower, right), rtol=1e-9)


def test_the_kernel_of_factors_is_that_of_their_products(rng):
    net = Net(rng, present={n: np.ones(shape, bool) for n, shape in Net.shapes.items()})
    rows = {n: Full(p.g.T[:, :, None] * p.a.T[:, None, :]) for n, p in net.curvature.rows.items()}
    expected = Curvature(rows, net.present, net.samples).kernel(net.present)
    np.testing.assert_allclose(net.curvature.kernel(net.present), expected, rtol=1e-9, atol=1e-9)


def test_woodburys_inverse_is_the_inverse(net):
    found = net.curvature.inverse(0.03)
    expected = net.inverse(0.03)
    np.testing.assert_allclose(net.flat(found.diagonal), np.diagonal(expected), rtol=1e-8)
    v = {n: net.rng.normal(size=shape) for n, shape in net.shapes.items()}
    np.testing.assert_allclose(
        net.flat(found.times(v)), expected @ net.flat(v), rtol=1e-7, atol=1e-9
    )


def test_woodfisher_is_the_sum_of_single_surgeries(net):
    expected, w, keep = net.inverse(0.03), net.flat(net.weight), net.flat(net.start())
    for name in net.shapes:
        view = View(
            net.weight[name], None, net.rng, None, 0.03, name, uses=2, curvature=net.curvature
        )
        scores = woodfisher.importance(view) * 2
        own = {n: np.zeros(shape) for n, shape in net.shapes.items()} | {name: scores}
        at = np.flatnonzero(net.flat({n: net.present[n] & (n == name) for n in net.shapes}))
        np.testing.assert_allclose(net.flat(own)[at], w[at] ** 2 / np.diagonal(expected)[at])
    updated = w.copy()
    for q in np.flatnonzero(net.flat(net.present) & ~keep):
        updated -= expected[:, q] * w[q] / expected[q, q]
    found = woodfisher.update(BlockProblem(net.weight, net.start(), net.curvature, 0.03))
    np.testing.assert_allclose(net.flat(found), np.where(keep, updated, 0), rtol=1e-7, atol=1e-9)


def test_cbs_updates_all_weights_together(net):
    keep, w = net.flat(net.start()), net.flat(net.weight)
    k, p = np.flatnonzero(keep), np.flatnonzero(net.flat(net.present) & ~keep)
    system = net.matrix[np.ix_(k, k)] + 0.03 * np.eye(len(k))
    expected = np.where(keep, w, 0.0)
    expected[k] += np.linalg.solve(system, net.matrix[np.ix_(k, p)] @ w[p])
    found = cbs.update(BlockProblem(net.weight, net.start(), net.curvature, 0.03))
    np.testing.assert_allclose(net.flat(found), expected, rtol=1e-7, atol=1e-9)
    # The same as the paper's d = -H^-1[:, P] (H^-1_PP)^-1 w_P.
    inverse = net.inverse(0.03)
    change = -inverse[:, p] @ np.linalg.solve(inverse[np.ix_(p, p)], w[p])
    np.testing.assert_allclose(net.flat(found), np.where(keep, w + change, 0), rtol=1e-6, atol=1e-8)


def test_cbs_swaps_lower_the_objective_and_know_it(net):
    problem = net.problem()
    keep, before = problem.start, net.objective(problem.start)
    for _ in range(5):
        swaps = cbs._Swaps(problem, keep)
        assert swaps.f == pytest.approx(before)
        for rank, i in enumerate(swaps.leaving):
            made = swaps.swap(int(i), swaps.candidates(rank, int(i)))
            now = net.objective(net.split(swaps.keep))
            assert swaps.f == pytest.approx(now)
            assert now <= before - cbs.EPSILON if made else now == pytest.approx(before)
            before = now
        keep = net.split(swaps.keep)
        if not swaps.made:
            break
    assert net.objective(keep) < net.objective(problem.start)
    assert np.count_nonzero(net.flat(keep)) == np.count_nonzero(net.flat(problem.start))
    assert not (net.flat(keep) & ~net.flat(net.present)).any()


def test_cbs_ends_near_the_best_mask_of_all(rng):
    present = {n: np.zeros(shape, bool) for n, shape in Net.shapes.items()}
    present["U"][:2, :5] = True
    net = Net(rng, present=present)
    found = cbs.search(net.problem(start=net.start(4)))
    on = np.flatnonzero(net.flat(net.present))
    every = []
    for gone in itertools.combinations(on, 4):
        keep = net.flat(net.present).copy()
        keep[list(gone)] = False
        every.append(net.objective(net.split(keep)))
    assert net.objective(found) <= sorted(every)[len(every) // 50]


def test_cbs_remembers_the_lowest_true_error_not_the_lowest_objective(net):
    start = net.start()

    def error(keep):
        return float(np.count_nonzero(net.flat(keep) != net.flat(start)))

    found = cbs.search(net.problem(error=error))
    assert all(np.array_equal(found[n], start[n]) for n in start)


def test_cbs_starts_keep_large_negative_weights(net):
    net.weight = {n: -np.abs(w) for n, w in net.weight.items()}
    net.weight["U"][net.present["U"]] *= 100
    largest = np.argsort(net.flat(net.weight))[:3]
    for _ in range(20):
        start = cbs.shuffled_start(net.problem(start=net.start(6)))
        keep = net.flat(start)
        assert np.count_nonzero(net.flat(net.present) & ~keep) == 6
        assert keep[largest].all()


@pytest.mark.parametrize("order", [None, np.array([5, 0, 3, 1, 4, 2])])
def test_cbs_swaps_within_runs(rng, order):
    net = Net(rng, present={n: np.ones(shape, bool) for n, shape in Net.shapes.items()})
    place = np.arange(6) if order is None else order
    start = np.zeros((4, 6), bool)
    start[:, place[::2]] = True
    problem = net.problem(
        weight={"U": net.weight["U"]}, present={"U": net.present["U"]}, start={"U": start},
        elsewhere={"V": np.zeros((3, 4))}, block=2, orders={"U": order},
        error=lambda keep: net.objective({"U": keep["U"], "V": net.present["V"]}),
    )  # fmt: skip
    found = cbs.search(problem)["U"]
    assert (found != start).any()
    assert np.all(found[:, place].reshape(4, 3, 2).sum(axis=2) == 1)
    assert problem.error({"U": found}) < problem.error({"U": start})


def test_blocks_leave_out_what_couples_tensors(net):
    blocks = net.curvature.blocks()
    size = [int(np.prod(shape)) for shape in net.shapes.values()]
    apart = net.matrix * np.kron(np.eye(2), 1)[np.repeat([0, 1], size)][:, np.repeat([0, 1], size)]
    v = {n: net.rng.normal(size=shape) for n, shape in net.shapes.items()}
    image = {n: i for b in blocks for n, i in b.back(b.times(v)).items()}
    expected = apart @ net.flat(v) * net.samples
    np.testing.assert_allclose(net.flat(image), expected, rtol=1e-9, atol=1e-9)
    swaps = cbs._Swaps(net.problem(blocks=blocks), net.start())
    for rank, i in enumerate(swaps.leaving):
        swaps.swap(int(i), swaps.candidates(rank, int(i)))
    gone = np.where(swaps.keep, 0.0, net.flat(net.weight))
    assert swaps.f == pytest.approx(gone @ apart @ gone)


# Documentation.


def test_every_method_has_its_page_and_nothing_else_has():
    folder = Path(__file__).parent.parent / "docs" / "methods"
    pages = {path.stem for path in folder.glob("*.md")} - {"README"}
    assert pages == set(METHODS)
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}]({name}.md)" in index for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_page_says_what_there_is_to_say(name):
    page = Path(__file__).parent.parent / "docs" / "methods" / f"{name}.md"
    text, method = page.read_text(encoding="utf-8"), METHODS[name]
    assert text.startswith(f"# {name}")
    for part in ("**Defaults.**", "**Source.**", "**Cost.**", "**When to use it.**"):
        assert part in text
    choices = ("none", "bias", "refit", "joint")
    own = method.compensation if method.compensation in choices else "its own"
    assert f"Compensation {own}" in text
    assert f"scope {method.scope}" in text


# Rows of gradients, from a network to methods.

HEADER = '<ir_version: 8, opset_import: ["": 17]> net '
CLASSES = """(double[n,5] x) => (double[n,3] y) {
    h = Gemm<transB=1>(x, U, b)  r = Tanh(h)  z = MatMul(r, V)  y = Softmax(z)
}"""
TIED = """(double[n,4] x) => (double[n,3] y) {
    h = MatMul(x, U)  r = Tanh(h)  g = MatMul(r, U)  t = Tanh(g)  y = MatMul(t, V)
}"""
TOKENS = """(double[n,6,5] x) => (double[n,1] y) {
    h = MatMul(x, U)  r = Tanh(h)  m = ReduceMean<axes=[1], keepdims=0>(r)  y = MatMul(m, V)
}"""
STORED = {
    CLASSES: {"U": (4, 5), "b": (4,), "V": (4, 3)},
    TIED: {"U": (4, 4), "V": (4, 3)},
    TOKENS: {"U": (5, 4), "V": (4, 1)},
}


def network_of(text, rng, tmp_path, samples=20, **choices):
    """A network under observation, its plan, and the labels of all samples."""
    model = onnx.parser.parse_model(HEADER + text)
    for name, shape in STORED[text].items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape), name))
    shape = (samples, 6, 5) if text == TOKENS else (samples, STORED[text]["U"][-1])
    x, labels = rng.normal(size=shape), rng.integers(0, 3, samples)
    np.save(tmp_path / "y.npy", labels)
    options = Options.of(method="cbs", **choices)
    source = preparation.load(model)
    layers, _ = preparation.choose_layers(source, options)
    data = preparation.gather(source, {"x": x}, options)
    network, _ = preparation.observe_network(source, layers, data, options)
    return network, preparation.make_plan(network.layers, options)


def matrices(network):
    """By stored tensor, W (out, in)."""
    layers = {layer.weight.tensor: layer.weight for layer in network.layers}
    return {n: w.matrix(network.original.weights[n]) for n, w in layers.items()}


def with_weight(network, name, unit, column, step):
    """The original state with one weight moved."""
    layer = next(x for x in network.layers if x.weight.tensor == name)
    moved = layer.weight.matrix(network.original.weights[name]).copy()
    moved[unit, column] += step
    stored = {**network.original.weights, name: layer.weight.unmatrix(moved)}
    return dataclasses.replace(network.original, weights=stored)


def test_rows_are_gradients_of_the_cross_entropy(rng, tmp_path):
    network, plan = network_of(CLASSES, rng, tmp_path, labels=tmp_path / "y.npy")
    assert network.observer.metric == "loss"
    (curvature,) = pruning.observe(network, plan, network.original).curvature
    batch = next(network.train.batches(100))
    probes = [("U", 0, 0), ("U", 3, 4), ("V", 2, 1), ("V", 0, 3)]
    for name, unit, column in probes:
        found = curvature.rows[name].columns(np.array([unit]), np.array([column]))[0]
        losses = []
        for step in (1e-5, -1e-5):
            state = with_weight(network, name, unit, column, step)
            y = network.observer.predict(state, batch)["y"]
            losses.append(-np.log(y[np.arange(len(y)), batch.labels]))
        np.testing.assert_allclose(found, (losses[0] - losses[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_the_loss_of_cbs_is_the_cross_entropy_of_the_labels(rng, tmp_path):
    network, _ = network_of(CLASSES, rng, tmp_path, labels=tmp_path / "y.npy")
    batch = next(network.train.batches(100))
    y = network.observer.predict(network.original, batch)["y"]
    expected = -np.log(y[np.arange(len(y)), batch.labels]).mean()
    found = network.objective.loss(network.original, network.train, 7)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("text", [TIED, TOKENS], ids=["tied", "tokens"])
def test_rows_of_shared_weights_and_positions_are_summed(rng, tmp_path, text):
    network, plan = network_of(text, rng, tmp_path, metric="l2-raw")
    (curvature,) = pruning.observe(network, plan, network.original).curvature
    rows = curvature.rows["U"].columns(np.array([0, 2]), np.array([1, 3]))
    for row, (unit, column) in zip(rows, [(0, 1), (2, 3)], strict=True):
        outputs = []
        for step in (1e-5, -1e-5):
            state = with_weight(network, "U", unit, column, step)
            parts = [network.observer.predict(state, b)["y"] for b in network.train.batches(100)]
            outputs.append(np.concatenate(parts))
        jacobian = (outputs[0] - outputs[1]) / 2e-5
        # A probe is a sum of rows of the Jacobian with signs: one of all such sums.
        signs = np.array(list(itertools.product([1, -1], repeat=jacobian.shape[1])))
        gap = np.abs(jacobian @ signs.T - row[:, None]).min(axis=1)
        np.testing.assert_allclose(gap, 0, atol=1e-8)


def test_without_labels_the_scale_of_the_outputs_does_not_matter(rng):
    model, x = stored_net(rng)
    del model.graph.node[-1:]  # the softmax
    model.graph.node[-1].output[0] = "y"
    large = onnx.ModelProto()
    large.CopyFrom(model)
    tensor = next(t for t in large.graph.initializer if t.name == "V")
    tensor.CopyFrom(numpy_helper.from_array(64 * numpy_helper.to_array(tensor), "V"))
    for method in ("woodfisher", "cbs"):
        small = onnx_ecp.optimize(model, x, method=method, exclude="y").masks
        found = onnx_ecp.optimize(large, x, method=method, exclude="y").masks
        np.testing.assert_array_equal(found["U"], small["U"])


def test_blocks_by_layer_have_a_matrix_each(rng, tmp_path):
    network, plan = network_of(CLASSES, rng, tmp_path, blocks="layer")
    blocks = pruning.observe(network, plan, network.original).curvature
    assert [list(block.rows) for block in blocks] == [["U"], ["V"]]


SWITCHES = {
    "nothing": ({"cbs_select": False, "cbs_update": False}, {"method": "magnitude"}),
    "no search": ({"cbs_select": False}, {"importance": "magnitude"}),
    "no update": ({"cbs_update": False}, {"compensation": "none"}),
}


@pytest.mark.parametrize(("switch", "same"), SWITCHES.values(), ids=SWITCHES)
def test_parts_of_cbs_can_be_switched_off(rng, switch, same):
    model, x = stored_net(rng)
    one = onnx_ecp.optimize(model, x, **{"method": "cbs"} | switch)
    other = onnx_ecp.optimize(model, x, **{"method": "cbs"} | same)
    assert one.model == other.model
    assert one.model != onnx_ecp.optimize(model, x, method="cbs").model


def stored_net(rng):
    """The network of classes, and inputs for it."""
    model = onnx.parser.parse_model(HEADER + CLASSES)
    for name, shape in STORED[CLASSES].items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape), name))
    return model, {"x": rng.normal(size=(30, 5))}


@pytest.mark.parametrize("method", ["cbs", "woodfisher", "obd"])
def test_a_sweep_takes_labels_of_the_calibration_beside_those_of_the_evaluation(
    rng, tmp_path, method
):
    model, x = stored_net(rng)
    np.save(tmp_path / "y.npy", rng.integers(0, 3, 30))
    np.save(tmp_path / "test.npy", rng.integers(0, 3, 12))
    test = {"x": rng.normal(size=(12, 5))}
    swept = sweep(
        model, x, methods=method, sparsities="0.5", evaluation=test,
        labels=tmp_path / "test.npy", calibration_labels=tmp_path / "y.npy",
    )  # fmt: skip
    alone = onnx_ecp.optimize(model, x, method=method, labels=tmp_path / "y.npy")
    expected = onnx_ecp.compare(model, alone.model, test, labels=tmp_path / "test.npy").gap
    assert swept.points[0].relative_error == expected.relative_error
    assert swept.points[0].accuracy == expected.scores[0].b
    looks_at_labels = onnx_ecp.optimize(model, x, method=method).model != alone.model
    assert looks_at_labels == (method != "obd")


def test_labels_of_the_calibration_are_the_labels_where_nothing_else_is_evaluated(rng, tmp_path):
    model, x = stored_net(rng)
    with pytest.raises(UsageError, match="`labels` are those of the calibration"):
        sweep(model, x, methods="cbs", calibration_labels=tmp_path / "y.npy")


REFUSED = {
    "switches of another method": (
        {"method": "ecp", "cbs_update": False},
        "`cbs_update=False` needs `method` cbs",
    ),
    "loss without labels": ({"metric": "loss"}, "needs `labels`"),
    "gradients and curvature": (
        {"method": "gradient-magnitude", "compensation": "cbs"},
        "does not go with ranking by gradients",
    ),
    "an unknown block": ({"method": "cbs", "blocks": "row"}, "unknown blocks"),
}


@pytest.mark.parametrize(("choices", "words"), REFUSED.values(), ids=REFUSED)
def test_choices_that_make_no_sense_are_usage_errors(choices, words):
    with pytest.raises(UsageError, match=words):
        Options.of(**choices)


def test_labels_that_are_no_classes_are_told(rng, tmp_path):
    model, x = stored_net(rng)
    for labels, words in ((np.full(30, 7), "none of the 3 classes"), (x["x"][:, 0], "one class")):
        np.save(tmp_path / "y.npy", labels)
        with pytest.raises(CalibrationError, match=words):
            onnx_ecp.optimize(model, x, method="cbs", labels=tmp_path / "y.npy")
