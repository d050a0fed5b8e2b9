"""What all tests share."""

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """The one source of random numbers in the tests."""
    return np.random.default_rng(0)
