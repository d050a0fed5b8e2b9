"""Selection: counts are exact, zeros stay zeros, the order of scores is respected."""

import numpy as np
import pytest

from onnx_ecp.errors import UsageError
from onnx_ecp.pruning import selection
from onnx_ecp.pruning.selection import NM, RankingGroup, parse_sparsity, select, zeros_wanted

SHAPES = {"first": (6, 8), "second": (4, 12)}
SIZE = 6 * 8 + 4 * 12


@pytest.fixture
def scores(rng):
    return {n: rng.random(shape) for n, shape in SHAPES.items()}


@pytest.fixture
def keep():
    return {n: np.ones(shape, bool) for n, shape in SHAPES.items()}


def zeros(masks):
    return sum(int((~m).sum()) for m in masks.values())


def group(sparsity):
    return RankingGroup(tuple(SHAPES), sparsity, dict.fromkeys(SHAPES))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.333, 0.98, 1.0])
def test_counts_are_exact(scores, keep, sparsity):
    masks = select(group(sparsity), scores, keep, keep)
    assert zeros(masks) == zeros_wanted(sparsity, SIZE)


def test_ties_do_not_change_the_count(keep):
    scores = {n: np.zeros(shape) for n, shape in SHAPES.items()}
    assert zeros(select(group(0.37), scores, keep, keep)) == zeros_wanted(0.37, SIZE)


def by_size(scores, sizes, there):
    """All names, indices by rising score, of equal ones by size."""
    score, size, on = (np.concatenate([x[n].reshape(-1) for n in SHAPES]) for x in
                       (scores, sizes, there))  # fmt: skip
    return [i for i in np.lexsort((size, score)) if on[i]]


@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("levels", [1, 3])
def test_of_equal_scores_the_smaller_sizes_go(rng, keep, levels, floor):
    scores = {n: 1.0 * rng.integers(0, levels, shape) for n, shape in SHAPES.items()}
    sizes = {n: rng.random(shape) for n, shape in SHAPES.items()}
    there = {n: rng.random(shape) > 0.1 for n, shape in SHAPES.items()}
    masks = select(group(0.5), scores, there, there, sizes=sizes, floor=floor)
    expected = np.concatenate([there[n].reshape(-1) for n in SHAPES])
    order = by_size(scores, sizes, there)
    expected[order[: zeros_wanted(0.5, SIZE) - zeros(there)]] = False
    assert np.array_equal(np.concatenate([masks[n].reshape(-1) for n in SHAPES]), expected)


def test_a_floor_protects_the_larger_of_equal_scores(rng, keep):
    scores = {"first": np.ones(SHAPES["first"]), "second": np.zeros(SHAPES["second"])}
    sizes = {n: rng.random(shape) for n, shape in SHAPES.items()}
    second = select(group(0.5), scores, keep, keep, sizes=sizes, floor=0.2)["second"]
    assert second.any()
    assert sizes["second"][second].min() > sizes["second"][~second].max()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_n_of_m_takes_the_smaller_of_equal_scores(rng, keep, share):
    scores = {n: np.zeros(shape) for n, shape in SHAPES.items()}
    sizes = {n: rng.random(shape) for n, shape in SHAPES.items()}
    by_scores = select(group(NM(2, 4)), sizes, keep, keep, share=share)
    by_sizes = select(group(NM(2, 4)), scores, keep, keep, share=share, sizes=sizes)
    assert all(np.array_equal(by_scores[n], by_sizes[n]) for n in SHAPES)


def test_what_goes_is_less_important_than_what_stays(scores, keep):
    masks = select(group(0.6), scores, keep, keep)
    gone = np.concatenate([scores[n][~masks[n]] for n in SHAPES])
    stays = np.concatenate([scores[n][masks[n]] for n in SHAPES])
    assert gone.max() < stays.min()


def test_zeros_that_are_there_count_and_stay(scores, keep, rng):
    there = {n: rng.random(shape) > 0.3 for n, shape in SHAPES.items()}
    masks = select(group(0.5), scores, there, there)
    assert zeros(masks) == zeros_wanted(0.5, SIZE)
    for name, mask in masks.items():
        assert not np.any(mask & ~there[name])
    again = select(group(0.5), scores, masks, masks)
    assert all(np.array_equal(again[n], masks[n]) for n in SHAPES)


def test_more_zeros_than_wanted_are_left_as_they_are(scores, rng):
    there = {n: rng.random(shape) > 0.8 for n, shape in SHAPES.items()}
    masks = select(group(0.5), scores, there, there)
    assert all(np.array_equal(masks[n], there[n]) for n in SHAPES)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_way_starts_at_the_zeros_that_were_there(scores, rng, share):
    there = {n: rng.random(shape) > 0.2 for n, shape in SHAPES.items()}
    wanted = round(zeros(there) + share * (zeros_wanted(0.7, SIZE) - zeros(there)))
    assert zeros(select(group(0.7), scores, there, there, share=share)) == wanted


def test_a_floor_keeps_a_layer_that_ranks_low_alive(scores, keep):
    scores["second"] *= 1e-6
    without = select(group(0.5), scores, keep, keep)
    assert not without["second"].any()
    masks = select(group(0.5), scores, keep, keep, floor=0.2)
    assert masks["second"].mean() >= 0.2 * 0.5
    assert zeros(masks) == zeros(without)


def test_a_floor_counts_what_is_still_there(rng):
    # Random scores of weights that are gone already must not take the places of those that stay.
    scores = {"low": rng.random((10, 10)), "high": 2 + rng.random((10, 10))}
    keep = {"low": np.zeros((10, 10), np.bool_), "high": np.ones((10, 10), np.bool_)}
    keep["low"][:3] = True
    group = RankingGroup(("low", "high"), 0.8, {"low": None, "high": None})
    whole = {name: np.ones_like(k) for name, k in keep.items()}
    found = select(group, scores, keep, whole, floor=0.5)
    assert np.count_nonzero(found["low"]) == 10
    assert np.count_nonzero(found["low"]) + np.count_nonzero(found["high"]) == 40


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2)])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_n_of_m_holds_in_every_group_at_the_end_and_nothing_else_goes_before(
    scores, keep, pattern, share
):
    last = select(group(pattern), scores, keep, keep)
    for mask in last.values():
        assert np.all(mask.reshape(len(mask), -1, pattern.m).sum(axis=2) == pattern.n)
    way = select(group(pattern), scores, keep, keep, share=share)
    assert zeros(way) == round(share * zeros(last))
    assert all(not np.any(last[n] & ~way[n]) for n in SHAPES)


def test_n_of_m_follows_the_order_it_is_given(rng):
    order = rng.permutation(8)
    scores, keep = {"w": rng.random((3, 8))}, {"w": np.ones((3, 8), bool)}
    masks = select(RankingGroup(("w",), NM(2, 4), {"w": order}), scores, keep, keep)
    assert np.all(masks["w"][:, order].reshape(3, 2, 4).sum(axis=2) == 2)


@pytest.mark.parametrize("text", ["2:2", "0:4", "1.5", "-0.1", "half", "4:2", "nan"])
def test_a_sparsity_that_makes_no_sense_is_refused(text):
    with pytest.raises(UsageError, match=text):
        parse_sparsity(text)


@pytest.mark.parametrize("most_sorted", [0, 3, 2**22])
def test_counting_bits_finds_what_sorting_all_scores_finds(rng, keep, monkeypatch, most_sorted):
    monkeypatch.setattr(selection, "MOST_SORTED", most_sorted)
    there = {n: rng.random(shape) > 0.2 for n, shape in SHAPES.items()}
    for scores in (
        {n: np.exp(200 * rng.normal(size=shape)) for n, shape in SHAPES.items()},
        {n: rng.integers(0, 4, shape) * 0.25 for n, shape in SHAPES.items()},
        {n: np.where(rng.random(shape) > 0.5, np.inf, -0.0) for n, shape in SHAPES.items()},
    ):
        flat = np.concatenate([np.where(there[n], scores[n], -1).reshape(-1) for n in SHAPES])
        order = np.argsort(flat, kind="stable")
        for number in (sum((~there[n]).sum() for n in SHAPES), 40, 41, 55, SIZE):
            masks = selection.lowest(scores, there, int(number))
            wanted = np.ones(SIZE, bool)
            wanted[order[:number]] = False
            found = np.concatenate([masks[n].reshape(-1) for n in SHAPES])
            assert np.array_equal(found, wanted)
