"""The weights that stay absorb what the removed ones did: a weighted least-squares fit per layer.

With the current network's input a', the original one's input a and W, and a weight s per row,

    min over w_i on its support, d_i of  E[ s (w_i a' + d_i - W_i a)^2 ] + ridge |w_i - W_i|^2

(docs/method.md, section 3). The shift d absorbs the weighted means, so the Gram matrix is the
weighted covariance of a'. One Gram matrix serves all rows of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from onnx_ecp.linalg.cholesky import diagonal_of_inverse
from onnx_ecp.runtime.limits import blas_threads, check_deadline, workers

# A batch of padded systems may take this much, in every thread.
CHUNK_BYTES = 32 * 2**20
# Conjugate gradients stop at this share of the residual that they began with, or after so many
# steps: less than 1e-3 of what the refit gains is then left to gain. benchmarks/refit_scale.py
# --direct compares the outcome with that of direct solutions.
CG_TOLERANCE = 3e-3
CG_STEPS = 40
# Multiplications with one large matrix take so much less time than those of many small systems; and
# so many of the latter take a few seconds.
FASTER, SECONDS = 5.0, 1e10
# The ridge where no input varies at all, as with one calibration sample.
LEAST_RIDGE = 1e-290


def ridge_of(covariance: np.ndarray, damping: float) -> float:
    """The ridge: a share of the mean diagonal, and never so small that its inverse overflows."""
    return max(damping * float(np.trace(covariance)) / len(covariance), LEAST_RIDGE)


def damped(covariance: np.ndarray, damping: float) -> np.ndarray:
    """The covariance (in, in) with the ridge on its diagonal."""
    system = covariance.copy()
    system.reshape(-1)[:: len(system) + 1] += ridge_of(covariance, damping)
    return system


def solve(
    system: np.ndarray,
    right: np.ndarray,
    keep: np.ndarray,
    start: np.ndarray,
    *,
    direct: bool = False,
) -> np.ndarray:
    """Solve ``x_S system_SS = right_S`` for every row, each on its own support S.

    Args:
        system: (in, in), symmetric positive definite.
        right: (rows, in).
        keep: (rows, in), the supports.
        start: (rows, in), where the iteration begins.
        direct: whether to solve directly however wide the supports are.

    Returns:
        (rows, in), zero outside the support.
    """
    if not direct and not _is_narrow(keep):
        return _conjugate_gradients(system, right, keep, start)

    def solved(part: _Part) -> np.ndarray:
        wanted = part.gathered(right)
        return np.linalg.solve(part.systems(system), wanted[:, :, None])[:, :, 0]

    return _by_support(solved, keep)


def inverse_diagonal(system: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """(rows, in): the diagonal of ``(system_SS)^-1`` for every row's own support S, 0 outside.

    Wide supports take the diagonal of the whole inverse instead, which is never smaller: a weight
    then counts as if removed ones could help to replace it.

    Args:
        system: (in, in), symmetric positive definite.
        keep: (rows, in), the supports.
    """
    if not _is_narrow(keep):
        return np.where(keep, diagonal_of_inverse(system), 0.0)

    return _by_support(lambda part: diagonal_of_inverse(part.systems(system)), keep)


def _is_narrow(keep: np.ndarray) -> bool:
    """Whether every row has its own system, instead of one for all rows.

    Own systems are exact and take k^3 / 3 multiplications per row. They are worth it while they are
    cheaper than CG_STEPS steps with the common system, in^2 per row and step, which go FASTER in
    one large matrix and float32; and where all of them are a matter of seconds, even if they are
    up to so much slower.
    """
    widest = int(keep.sum(axis=1).max(initial=0))
    own, common = widest**3 / 3, CG_STEPS * keep.shape[1] ** 2
    return bool(own <= common and (own <= common / FASTER or own * len(keep) <= SECONDS))


@dataclass(frozen=True)
class _Part:
    """Rows with about equally wide supports, padded to the widest.

    Args:
        rows: their indices.
        columns: (rows, width), kept columns first, then padding.
        real: (rows, width) bool, False where padding is.
    """

    rows: np.ndarray
    columns: np.ndarray
    real: np.ndarray

    def systems(self, system: np.ndarray) -> np.ndarray:
        """(rows, width, width): every row's own system, ones on the diagonal of the padding."""
        own = system[self.columns[:, :, None], self.columns[:, None, :]]
        both = self.real[:, :, None] & self.real[:, None, :]
        return np.where(both, own, np.eye(own.shape[1]))

    def gathered(self, values: np.ndarray) -> np.ndarray:
        """(rows, width) of the values (all rows, in), zero in the padding."""
        own = np.take_along_axis(values[self.rows], self.columns, axis=1)
        return np.where(self.real, own, 0.0)


def _by_support(compute: Callable[[_Part], np.ndarray], keep: np.ndarray) -> np.ndarray:
    """(rows, in): what ``compute`` gives (rows, width) for each part, back in its place.

    The parts are many and their systems small, so each core takes a part and no product is split.
    """
    result = np.zeros(keep.shape)
    parts = list(_parts(keep))
    with blas_threads(1), ThreadPoolExecutor(workers()) as pool:
        try:
            for part, found in zip(parts, pool.map(compute, parts), strict=True):
                check_deadline()
                block = np.zeros((len(part.rows), keep.shape[1]))
                np.put_along_axis(block, part.columns, np.where(part.real, found, 0.0), axis=1)
                result[part.rows] = block
        except BaseException:  # whoever interrupts does not wait for the parts that are left
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return result


def _parts(keep: np.ndarray) -> Iterator[_Part]:
    """Rows in ascending order of width, in parts whose padded systems stay small."""
    widths = keep.sum(axis=1)
    order = np.argsort(widths, kind="stable")
    for rows in _chunks(order, widths):
        width = int(widths[rows[-1]])
        if width:
            # argsort puts the kept columns first; the rest of the row is padding.
            columns = np.argsort(~keep[rows], axis=1, kind="stable")[:, :width]
            yield _Part(rows, columns, np.arange(width) < widths[rows][:, None])


def _chunks(order: np.ndarray, widths: np.ndarray) -> Iterator[np.ndarray]:
    """Split rows in ascending order of width so that the padded systems of a chunk stay small."""
    first = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - first) * int(widths[order[end]]) ** 2 * 8 > CHUNK_BYTES:
            yield order[first:end]
            first = end


def _conjugate_gradients(
    system: np.ndarray, right: np.ndarray, keep: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """All rows at once: one product with the system per step, preconditioned by its diagonal.

    Steps are taken in float32, in units in which the diagonal is one and every row's residual has
    length one; the residual is then taken anew in float64, and so on until it is small enough.
    """
    unit = 1 / np.sqrt(np.diagonal(system))
    scaled = (system * unit * unit[:, None]).astype(np.float32)
    x, left, limit = np.where(keep, start, 0.0), CG_STEPS, 0.0
    while left > 0:
        residual = np.where(keep, right - x @ system, 0.0) * unit
        lengths = np.linalg.norm(residual, axis=1)
        limit = limit or CG_TOLERANCE * float(np.linalg.norm(lengths))
        if np.linalg.norm(lengths) <= limit:
            break
        direction = np.divide(
            residual, lengths[:, None], out=np.zeros_like(residual), where=lengths[:, None] > 0
        )
        step, taken = _steps(scaled, direction.astype(np.float32), keep, lengths, limit, left)
        x += step * lengths[:, None] * unit
        left -= taken
    return x


def _steps(
    system: np.ndarray,
    residual: np.ndarray,
    keep: np.ndarray,
    lengths: np.ndarray,
    limit: float,
    most: int,
) -> tuple[np.ndarray, int]:
    """Conjugate gradients from zero, in the type of the system.

    Args:
        system: (in, in), ones on its diagonal.
        residual: (rows, in), zero outside the supports; overwritten.
        keep: (rows, in), the supports.
        lengths: (rows,), what a row's residual counts.
        limit: of the length of all residuals together, at which the steps end.
        most: steps.

    Returns:
        What solves the system but for the rest, and the number of steps.
    """
    x, direction = np.zeros_like(residual), residual.copy()
    product, taken = _dots(residual, residual), 0
    while taken < most:
        taken += 1
        image = direction @ system
        image *= keep
        length = _ratio(product, _dots(direction, image))
        x += length * direction
        image *= length
        residual -= image
        previous, product = product, _dots(residual, residual)
        if np.sqrt(np.square(lengths) @ product[:, 0].astype(np.float64)) <= limit:
            break
        direction *= _ratio(product, previous)
        direction += residual
    return x, taken


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(rows, 1): the product of every row of a with that of b."""
    return np.asarray(np.einsum("ij,ij->i", a, b)[:, None])


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The quotient, zero where b is not positive: that row is solved."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
