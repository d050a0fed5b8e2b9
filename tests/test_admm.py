"""ADMM finds the weights that a refit can do most with."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from onnx import numpy_helper, parser

import onnx_ecp
from onnx_ecp.linalg.masked import damped, ridge_of, solve
from onnx_ecp.methods import SUPPORTS
from onnx_ecp.methods.admm import chosen
from onnx_ecp.methods.method import LayerProblem
from onnx_ecp.statistics.gram import Gram

ROWS, COLUMNS = 6, 8


def problem(rng, keep, *, mixing=1.0, groups=1, scale=1.0, **choices):
    """A layer with correlated inputs, of which as many weights stay as in a mask."""
    out, columns = keep.shape
    mixed = np.eye(columns) + mixing * rng.normal(size=(columns, columns))
    a = rng.normal(size=(groups, 400, columns)) @ mixed * scale
    gram = Gram.of(a, a, np.ones(a.shape[:2]), np.zeros((groups, columns)))
    weight = rng.normal(size=keep.shape) / scale
    given = {
        "weight": weight,
        "original": weight,
        "present": np.ones_like(keep),
        "keep": keep,
        "may_reselect": False,
        "gram": gram,
        "damping": 1e-2,
        "sensitivity": np.ones(out),
        "candidates": np.ones_like(keep),
    }
    return LayerProblem(**given | choices)


def left(given, keep):
    """What the best weights on a mask leave of the refit's quadratic, against all weights."""
    h, k = given.gram.covariance[0], given.gram.cross_covariance[0]
    system = damped(h, given.damping)
    right = given.original @ k + ridge_of(h, given.damping) * given.original
    best, found = (
        solve(system, right, mask, right, direct=True) for mask in (np.ones_like(keep), keep)
    )
    off = found - best
    return float(given.sensitivity @ np.einsum("ij,jk,ik->i", off, system, off))


def half(rng, shape=(ROWS, COLUMNS)):
    keep = np.zeros(shape, bool)
    keep.flat[rng.choice(keep.size, keep.size // 2, replace=False)] = True
    return keep


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_mask_is_near_the_best_of_all_masks(seed):
    rng = np.random.default_rng(seed)
    keep = half(rng, (2, 6))
    given = problem(rng, keep)
    masks = []
    for there in combinations(range(keep.size), int(keep.sum())):
        masks.append(np.isin(np.arange(keep.size), there).reshape(keep.shape))
    errors = np.array([left(given, mask) for mask in masks])
    found = left(given, chosen(given))
    assert np.mean(errors < found * (1 - 1e-9)) < 0.02  # it is among the best of 924


def test_without_correlations_the_largest_parts_of_the_output_stay(rng):
    keep, sensitivity = half(rng), rng.random(ROWS) + 0.1
    scale = rng.random(COLUMNS) + 0.1
    nothing = np.zeros((1, COLUMNS))
    diagonal = np.diag(scale)[None]
    given = problem(
        rng,
        keep,
        sensitivity=sensitivity,
        gram=Gram(np.ones(1), nothing, nothing, diagonal, diagonal, nothing),
        damping=1e-12,
    )
    size = given.original**2 * scale * sensitivity[:, None]
    limit = np.sort(size.ravel())[-int(keep.sum())]
    assert left(given, chosen(given)) <= 1.02 * left(given, size >= limit)


@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_group_keeps_its_number_of_candidates(groups, brief, rng):
    keep, candidates = half(rng), rng.random((ROWS, COLUMNS)) > 0.2
    given = problem(rng, keep & candidates, groups=groups, candidates=candidates)
    found = chosen(given, brief=brief)
    assert not np.any(found & ~candidates)
    per_group = (x.reshape(groups, -1).sum(axis=1) for x in (found, keep & candidates))
    np.testing.assert_array_equal(*per_group)


@pytest.mark.parametrize("ordered", [False, True])
def test_every_run_keeps_its_number(ordered, rng):
    order = rng.permutation(COLUMNS) if ordered else np.arange(COLUMNS)
    keep = np.zeros((ROWS, COLUMNS), bool)
    for row in keep:
        for run in order.reshape(-1, 4):
            row[rng.choice(run, rng.integers(1, 3), replace=False)] = True
    given = problem(rng, keep, block=4, order=order if ordered else None)
    found = chosen(given)
    numbers = (x[:, order].reshape(ROWS, -1, 4).sum(axis=2) for x in (found, keep))
    np.testing.assert_array_equal(*numbers)
    assert left(given, found) < left(given, keep)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_units_of_inputs_and_outputs_change_nothing(scale):
    masks = []
    for unit in (1.0, scale):
        rng = np.random.default_rng(0)
        keep = half(rng)
        masks.append(chosen(problem(rng, keep, scale=unit, sensitivity=np.full(ROWS, unit))))
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("brief", [False, True])
def test_it_leaves_less_than_the_largest_weights_do(brief):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        given = problem(rng, half(rng, (20, 30)))
        size = np.abs(given.original)
        largest = size >= np.sort(size.ravel())[-int(given.keep.sum())]
        assert left(given, chosen(given, brief=brief)) < 0.8 * left(given, largest)


@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize("keep", [np.zeros((ROWS, COLUMNS), bool), np.ones((ROWS, COLUMNS), bool)])
def test_none_and_all_are_none_and_all(keep, brief, rng):
    np.testing.assert_array_equal(chosen(problem(rng, keep), brief=brief), keep)


@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize("dead", [1, 5])
def test_weights_of_inputs_that_never_vary_go_first(dead, brief, rng):
    """However large they are; where too few others are left, some of them stay."""
    given = problem(rng, half(rng))
    varies = np.arange(COLUMNS) >= dead
    gram = replace(
        given.gram,
        gram=given.gram.gram * varies * varies[:, None],
        cross=given.gram.cross * varies * varies[:, None],
        now=given.gram.now * varies,
        before=given.gram.before * varies,
    )
    large = np.where(varies, given.original, 100.0)
    found = chosen(replace(given, gram=gram, original=large, weight=large), brief=brief)
    assert np.count_nonzero(found) == np.count_nonzero(given.keep)
    assert found[:, ~varies].any() == (dead == 5)


def test_rows_that_nothing_depends_on_give_their_weights_to_others(rng):
    keep = half(rng)
    found = chosen(problem(rng, keep, sensitivity=np.arange(ROWS) % 2.0))
    assert not found[::2].any()  # half of the weights are enough for half of the rows


@pytest.fixture
def correlated(rng):
    """A network, inputs that are few mixed sources, and the seed that made them."""
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 16] x) => (float[n, 4] y) {
            h = Gemm<transB = 1>(x, w0, b0)
            a = Relu(h)
            y = Gemm<transB = 1>(a, w1, b1)
        }
    """)
    for name, shape in {"w0": (12, 16), "b0": (12,), "w1": (4, 12), "b1": (4,)}.items():
        value = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 16)) + 0.1 * rng.normal(size=(200, 16))
    return model, {"x": x.astype(np.float32)}


@pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4"])
@pytest.mark.parametrize("stages", [1, 3])
def test_counts_are_those_of_the_ranking(correlated, sparsity, stages):
    model, data = correlated
    choices = {"sparsity": sparsity, "stages": stages, "compensation": "refit"}
    for support in SUPPORTS:
        result = onnx_ecp.optimize(model, data, support=support, **choices)
        assert result.report.recipe.support == support
        zeros = sum(int((~mask).sum()) for mask in result.masks.values())
        total = sum(mask.size for mask in result.masks.values())
        assert zeros == (total // 2 if sparsity == "2:4" else round(sparsity * total))
        if sparsity == "2:4":
            for mask in result.masks.values():
                assert np.all(mask.reshape(len(mask), -1, 4).sum(axis=2) == 2)


def test_it_comes_closer_to_the_original_in_one_stage(correlated):
    model, data = correlated
    errors = {
        support: onnx_ecp.optimize(
            model, data, support=support, sparsity=0.6, stages=1, compensation="refit"
        ).report.gap.relative_error
        for support in SUPPORTS
    }
    assert errors["admm"] < errors["ranking"]


def test_given_masks_stay_as_they_are(correlated, tmp_path):
    model, data = correlated
    path = tmp_path / "masks.npz"
    masks = onnx_ecp.optimize(model, data, method="magnitude", masks=path).masks
    found = onnx_ecp.optimize(model, data, apply_masks=path, support="admm", stages=2)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found.masks[name], mask)


def test_it_needs_a_refit(correlated):
    model, data = correlated
    with pytest.raises(onnx_ecp.errors.UsageError, match="does not go with"):
        onnx_ecp.optimize(model, data, support="admm", compensation="bias")
