"""Sums of long float32 vectors."""

import numpy as np
import pytest

from onnx_ecp.linalg.sums import CHUNK, dot
from onnx_ecp.runtime.lazy import parse_size, size_text


@pytest.mark.parametrize("count", [0, 1, CHUNK, 3 * CHUNK + 7])
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_float32_vectors_are_summed_in_float64(rng, count, factors):
    vectors = [1 + rng.random(count).astype(np.float32) for _ in range(factors)]
    wanted = np.prod([x.astype(np.float64) for x in vectors], axis=0).sum()
    assert dot(*vectors) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("size", [1, 100, 1023, 1024, 1025, 2**20 - 1, 10**9, 8 * 2**30, 3 * 2**50])
def test_a_size_in_words_is_one_that_can_be_asked_for(size):
    assert size <= parse_size(size_text(size)) <= 1.1 * size
