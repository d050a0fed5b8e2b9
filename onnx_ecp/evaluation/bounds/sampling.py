"""Distribution-free bounds: what n held-out samples say about inputs that nobody has seen.

- Clopper-Pearson: the share of inputs for which something happens is, at the given confidence, at
  most the largest p for which P(Binomial(n, p) <= observed) >= 1 - confidence.
- Conformal: of n + 1 exchangeable gaps the new one is equally likely to have any rank, so it
  exceeds the (n + 1)(1 - alpha)-th smallest of the n others with probability at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.evaluation.bounds.units import PLAIN, Units
from onnx_ecp.evaluation.compare import check_same_shapes, check_same_signature, paired_outputs
from onnx_ecp.graph import Model

OWN_UNITS = (
    "the units, standard deviations of the columns over these same samples, are taken as known"
)
INDEPENDENT = "the samples were drawn independently, as future inputs will be"
UNUSED = "none of the samples was used to prune or to choose among pruned models"
EXCHANGEABLE = "the samples and the new input are exchangeable"


@dataclass(frozen=True)
class Share:
    """A share of inputs and its upper limit.

    Args:
        what: the event that is counted.
        eps: the gap that the event exceeds, where it is about gaps.
        count: how many of the samples have it.
        samples: number of samples.
        limit: the share among all inputs is at most this, at the confidence.
        confidence: probability, over the draw of the samples, that the limit holds.
        assumptions: what must be true for that.
    """

    what: str
    eps: float | None
    count: int
    samples: int
    limit: float
    confidence: float
    assumptions: tuple[str, ...] = (INDEPENDENT, UNUSED)


@dataclass(frozen=True)
class Conformal:
    """A bound on the gap at one new input.

    Args:
        alpha: probability of a larger gap, over the draw of samples and input.
        gap: over all elements of all floating-point outputs; infinite where the samples are too
            few.
        samples: number of samples.
        samples_needed: the least number with which the gap is finite.
        assumptions: what must be true for that.
    """

    alpha: float
    gap: float
    samples: int
    samples_needed: int
    assumptions: tuple[str, ...] = (EXCHANGEABLE, UNUSED)


@dataclass(frozen=True)
class Gaps:
    """Two models on the same samples.

    Args:
        gaps: (samples,), distances of all floating-point outputs; infinite where only one is
            finite.
        norms: (samples,), those of a network of constant outputs; infinite where an element is not
            finite.
        flips: (samples,) bool, whether the top class differs; empty where no output has classes.
    """

    gaps: np.ndarray
    norms: np.ndarray
    flips: np.ndarray


def conformal(gaps: np.ndarray, alpha: float) -> Conformal:
    """The order statistic that one new gap exceeds with probability at most alpha.

    Args:
        gaps: (samples,).
        alpha: in (0, 1).
    """
    n = len(gaps)
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    gap = float(np.partition(gaps, rank - 1)[rank - 1]) if rank <= n else math.inf
    return Conformal(alpha, gap, n, math.ceil(round(1 / alpha, 9)) - 1)


def share(what: str, happened: np.ndarray, confidence: float, eps: float | None = None) -> Share:
    """The Clopper-Pearson limit of the share of inputs for which something happens.

    Args:
        what: name of the event.
        happened: (samples,) bool.
        confidence: in (0, 1).
        eps: for the report.
    """
    count, n = int(np.count_nonzero(happened)), len(happened)
    return Share(what, eps, count, n, upper_limit(count, n, confidence), confidence)


def upper_limit(count: int, n: int, confidence: float) -> float:
    """One-sided Clopper-Pearson limit: the largest p with P(Binomial(n, p) <= count) >= 1 - c.

    >>> round(upper_limit(0, 100, 0.95), 6)  # 1 - 0.05 ** (1 / 100)
    0.029513
    """
    low, high = count / n, 1.0
    if count == n:
        return 1.0
    for _ in range(60):  # halves the interval beyond the last bit of p
        middle = (low + high) / 2
        if binomial_tail(count, n, middle) >= 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def binomial_tail(count: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= count), for 0 < p < 1, summed in logarithms."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(count + 1)
    terms = factorials[n] - factorials[k] - factorials[n - k]
    terms = terms + k * math.log(p) + (n - k) * math.log1p(-p)
    largest = terms.max()
    return float(min(math.exp(largest) * np.exp(terms - largest).sum(), 1.0))


def measure_gaps(
    a: Model,
    b: Model,
    data: Calibration,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int | None = None,
    units: Units = PLAIN,
) -> Gaps:
    """Run both models on all samples.

    Args:
        a: the original model.
        b: a model with the same inputs and outputs.
        data: samples.
        units: of the gaps.
        provider: execution provider.
        threads: threads within an operator.
        batch_size: samples a run.

    Raises:
        ModelError: inputs or outputs differ.
    """
    check_same_signature(a, b)
    gaps, norms, flips = [], [], []
    batches = data.batches(batch_size or 64)
    for batch, of_a, of_b in paired_outputs(a, b, batches, provider, threads):
        check_same_shapes(b, of_a, of_b)
        floats = [name for name, y in of_a.items() if y.dtype.kind == "f"]
        if any(of_a[n].shape[:1] != (batch.samples,) for n in floats) and batch.samples > 1:
            # The first axis does not count samples: one run per sample keeps them apart.
            return measure_gaps(
                a, b, data, provider=provider, threads=threads, batch_size=1, units=units
            )
        constant = {name: units.centre(name) for name in floats}
        gaps.append(_distances(of_a, of_b, floats, batch.samples, units))
        norms.append(_distances(constant, of_a, floats, batch.samples, units))
        scores = next((n for n in floats if of_a[n].ndim == 2 and of_a[n].shape[1] > 1), None)
        if scores is not None:
            flipped = of_a[scores].argmax(axis=1) != of_b[scores].argmax(axis=1)
            flips.append(flipped.reshape(batch.samples, -1).any(axis=1))
    all_flips = np.concatenate(flips or [np.zeros(0, np.bool_)])
    return Gaps(np.concatenate(gaps), np.concatenate(norms), all_flips)


def _distances(
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    names: Sequence[str],
    samples: int,
    units: Units,
) -> np.ndarray:
    """(samples,): distance over the elements of all these outputs together."""
    squares = [_square_gaps(a[name], b[name], samples, units.factor(name)) for name in names]
    return np.sqrt(sum(squares, np.zeros(samples)))


def _square_gaps(a: np.ndarray, b: np.ndarray, samples: int, factor: np.ndarray) -> np.ndarray:
    """(samples,): squared distance per sample; elements that are equal count 0, NaN or not."""
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.square((b.astype(np.float64) - a) * factor)
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (factor == 0)
    distance = np.where(same, 0.0, np.where(np.isfinite(distance), distance, np.inf))
    return np.asarray(distance.reshape(samples, -1).sum(axis=1))
