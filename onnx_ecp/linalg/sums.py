"""Sums of long float32 vectors in float64, without copies that are as long."""

from __future__ import annotations

import numpy as np

# So many elements are converted at a time: they stay in the cache, and OpenBLAS starts no threads.
CHUNK = 2**13


def dot(*factors: np.ndarray) -> float:
    """Sum over i of the product of all factors at i, products and sums in float64.

    Args:
        factors: (n,) each.

    >>> dot(np.full(3, 2.0), np.arange(3.0), np.ones(3))
    6.0
    """
    total = 0.0
    for first in range(0, len(factors[0]), CHUNK):
        product, *others = (x[first : first + CHUNK].astype(np.float64) for x in factors)
        for other in others[:-1]:
            product = product * other
        total += float(product @ others[-1]) if others else float(product.sum())
    return total
