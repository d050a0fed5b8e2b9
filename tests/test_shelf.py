"""A shelf gives back what was put on it, wherever it lies."""

import errno

import numpy as np
import pytest

from onnx_ecp.errors import ProviderError
from onnx_ecp.runtime.lazy import LazyArrays, Spill


@pytest.mark.parametrize("limit", [0, 100, None])
def test_what_was_put_on_a_shelf_comes_back(rng, limit):
    shelf, kept = Spill(limit), {}
    for turn in range(60):
        key = int(rng.integers(0, 12))
        if turn % 3 == 2 and key in kept:
            del shelf[key], kept[key]
        else:
            dtype = (np.float32, np.float64, np.bool_)[key % 3]
            # Transposed: not every array is contiguous.
            kept[key] = rng.normal(size=(key % 4, 3)).astype(dtype).T
            shelf[key] = kept[key]
        assert len(shelf) == len(kept)
        assert set(shelf) == set(kept)
        for name, array in kept.items():
            assert shelf[name].dtype == array.dtype
            np.testing.assert_array_equal(shelf[name], array)


def test_the_file_is_as_large_as_what_it_holds_at_once():
    shelf = Spill(8 * 10)
    for turn in range(50):
        shelf[turn] = np.zeros(10)
        shelf.pop(turn - 2, None)
    assert shelf.spilled <= 2 * 8 * 10


def test_a_full_disk_is_told(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ProviderError, match="No space left") as caught:
        Spill(0)["x"] = np.zeros(3)
    assert "TMPDIR" in caught.value.hint


def test_computed_arrays_are_computed_on_demand_unless_they_are_known():
    asked = []

    def compute(name):
        asked.append(name)
        return np.full(2, len(name))

    arrays = LazyArrays(["a", "bb"], compute).replaced("a", np.zeros(2))
    assert list(arrays) == ["a", "bb"]
    assert arrays["a"].sum() == 0
    assert arrays["bb"].sum() == 4
    assert asked == ["bb"]
    with pytest.raises(KeyError):
        arrays["c"]
