"""Named recipes of the default method, and the best one that fits into a time."""

from pathlib import Path

import numpy as np
import pytest

import onnx_ecp
from onnx_ecp.api import effort as budgeting
from onnx_ecp.api.options import Options
from onnx_ecp.errors import UsageError
from onnx_ecp.methods import EFFORTS, METHODS

DIGITS = Path(__file__).parent.parent / "models" / "digits.onnx"


@pytest.mark.parametrize("name", EFFORTS)
@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_an_effort_is_a_recipe_and_what_is_said_wins(name, granularity):
    recipe = Options.of(effort=name, granularity=granularity).recipe
    row = EFFORTS[name]
    assert recipe.stages == (row.unit_stages if granularity == "unit" else row.stages)
    assert recipe.compensation == row.compensation
    own = Options.of(effort=name, granularity=granularity, stages=3, compensation="bias").recipe
    assert (own.stages, own.compensation) == (3, "bias")


def test_balanced_is_the_default_and_the_rows_grow():
    assert Options().recipe == Options.of(effort="balanced").recipe
    assert METHODS["ecp-refit"].stages == EFFORTS["balanced"].stages
    stages = [(row.stages, row.unit_stages) for row in EFFORTS.values()]
    assert stages == sorted(stages)


REFUSED = {
    "another method": ({"method": "ecp", "effort": "fast"}, "is for ecp-refit"),
    "a budget of another method": ({"method": "obs", "time_budget": "10m"}, "is for ecp-refit"),
    "unknown": ({"effort": "fats"}, "unknown effort"),
    "both": ({"effort": "fast", "time_budget": 60}, "chooses the effort"),
    "no time": ({"time_budget": 0}, "above 0 seconds"),
    "no number": ({"time_budget": "soon"}, "such as 90s, 10m or 2h"),
    "a search": ({"time_budget": 60, "max_error": 0.1}, "not with a search"),
}


@pytest.mark.parametrize(("choices", "words"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(choices, words):
    with pytest.raises(UsageError, match=words):
        Options.of(**choices)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(80, 64)).astype(np.float32)


def test_a_budget_takes_the_best_effort_that_fits_and_says_what_is_left_out(x, monkeypatch):
    model = onnx_ecp.optimize(DIGITS, x, sparsity=0.0, method="magnitude").model
    estimates = {"balanced": 1.0, "best": 1e6}
    monkeypatch.setattr(budgeting, "_estimates", lambda *_: estimates)
    recipe = onnx_ecp.optimize(model, x, sparsity=0.5, time_budget="1h").report.recipe
    assert recipe.effort == "balanced"
    assert recipe.budget == ("of 3600 s the effort balanced fits; left out: best (about 1000000 s)")
    estimates["balanced"] = 1e5
    short = onnx_ecp.optimize(model, x, sparsity=0.5, time_budget="1h").report
    fast = onnx_ecp.optimize(model, x, sparsity=0.5, effort="fast").report
    assert short.recipe.effort == "fast"
    assert "balanced (about 100000 s), best" in short.recipe.budget
    assert short.gap == fast.gap  # the first stage is the result: nothing is done twice
    assert (short.recipe.stages, short.recipe.compensation) == (1, "refit")


def test_estimates_grow_with_the_effort():
    options = Options.of(time_budget=60)
    times = budgeting._estimates(options, 2.0, 0.5)
    assert list(times) == ["balanced", "best"]
    assert 4 * 2.0 < times["balanced"] < times["best"]
