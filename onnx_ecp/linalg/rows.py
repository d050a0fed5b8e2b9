"""Values of groups of rows, repeated for every row."""

from __future__ import annotations

import numpy as np


def per_row(x: np.ndarray, rows: int) -> np.ndarray:
    """(groups, in) values repeated for the rows of W: (rows, in)."""
    return np.repeat(x, rows // len(x), axis=0)
