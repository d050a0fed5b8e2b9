"""Bounds on the gap between an original and a pruned network, each with what it assumes.

The gap of one input is the distance of the pruned network's outputs from the original's, over all
elements of all floating-point outputs, every column in units of its own spread (`units`). A bound
is vacuous where it would hold for a network of constant outputs as well.

`sampling`: from held-out samples, for any two models. `telescoping`: deterministic, for given
inputs or a box of inputs. `planning`: before pruning, for random masks and random weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import onnx

from onnx_ecp.data import calibration
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.data.ragged import Ragged, shape_of
from onnx_ecp.errors import ModelError, UsageError, did_you_mean
from onnx_ecp.evaluation.batching import as_taken
from onnx_ecp.evaluation.bounds import planning, sampling
from onnx_ecp.evaluation.bounds.pair import Pair, pair
from onnx_ecp.evaluation.bounds.planning import Planning
from onnx_ecp.evaluation.bounds.sampling import Conformal, Share
from onnx_ecp.evaluation.bounds.telescoping import (
    EXACT,
    CannotFollow,
    Reach,
    check_known,
    telescope,
)
from onnx_ecp.evaluation.bounds.units import PLAIN, Units, units_over
from onnx_ecp.evaluation.facts import model_of
from onnx_ecp.graph import Model, constants, decode_sparse, read_tensor, signature
from onnx_ecp.graph.randomness import refuse_random
from onnx_ecp.layers import find_layers
from onnx_ecp.statistics.columns import Measure

# The deterministic bound per sample is computed for so many samples at most: it only shows how far
# theory is from measurement.
_SAMPLES = 256
# Samples a run, unless told otherwise.
BATCH = 64
# In what gaps are told: columns in units of their spread, or as they are.
METRICS = ("l2", "l2-raw")
Range = tuple[float, float]


class Settings(TypedDict):
    """How samples are run."""

    provider: str
    threads: int | None
    batch_size: int


@dataclass(frozen=True)
class Deterministic:
    """A bound that always holds.

    Args:
        inputs: for which inputs.
        gap: the output gap is at most this for all of them; None where there is no bound.
        ratio: largest bound over the largest measured gap; None where nothing was measured.
        refused: why there is no bound, or empty.
        assumptions: what must be true.
    """

    inputs: str
    gap: float | None
    ratio: float | None = None
    refused: str = ""
    assumptions: tuple[str, ...] = (EXACT,)


@dataclass(frozen=True)
class Bounds:
    """All that can be said about the gap between two models.

    Args:
        confidence: of the probabilistic bounds.
        samples: number of held-out samples; 0 without data.
        measured: largest output gap among them.
        conformal: for one new input.
        above: share of inputs with a gap above eps, where eps was given.
        flips: share of inputs whose top class differs, where the model has classes.
        per_sample: the deterministic bound for these samples.
        box: the deterministic bound for all inputs in the declared ranges.
        output_norm: largest gap of a network of constant outputs among the samples: the means over
            them; zeros with plain norms.
        vacuous: names of those fields whose bound would hold for such a network as well, shares of
            1 included.
        plain: whether gaps are L2 norms of the outputs as they are.
    """

    confidence: float
    samples: int
    measured: float | None
    conformal: Conformal | None
    above: Share | None
    flips: Share | None
    per_sample: Deterministic | None
    box: Deterministic | None
    output_norm: float | None = None
    vacuous: tuple[str, ...] = ()
    plain: bool = False


def bound(
    a: str | Path | onnx.ModelProto | Model,
    b: str | Path | onnx.ModelProto | Model,
    data: Any = None,
    *,
    confidence: float = 0.95,
    eps: float | None = None,
    input_range: Mapping[str, Range] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int | None = None,
    metric: str = "l2",
    output_weights: Mapping[str, float] | None = None,
    measure: Measure | None = None,
) -> Bounds:
    """Bound the distance of the outputs of b from those of a.

    Args:
        a: the original model.
        b: the pruned one.
        data: held-out samples, as for ``calibration.load``; None leaves the box alone.
        confidence: 1 - alpha, in (0, 1).
        eps: gap whose share of inputs is bounded.
        input_range: (low, high) by input name, "" for every other input.
        provider: execution provider.
        threads: threads within an operator.
        batch_size: samples a run.
        metric: "l2", every column in units of its spread, or "l2-raw", the L2 norm of outputs as
            they are, which is all there is without data.
        output_weights: what outputs and columns count; see ``Measure.of``.
        measure: gives the units; None takes them from the data.

    Raises:
        UsageError: neither data nor a range, or a value out of range.
        CalibrationError: the samples do not fit.
        ModelError: inputs or outputs differ.
    """
    check_confidence(confidence)
    if data is None and not input_range:
        raise UsageError(
            "a bound needs held-out samples or a range of inputs.",
            hint="Add --data FILE, or --input-range LOW,HIGH.",
        )
    if data is None and eps is not None:
        raise UsageError("--eps is about held-out samples.", hint="Add --data FILE.")
    if metric not in METRICS:
        raise UsageError(f"--metric: unknown value {metric!r}.", hint=did_you_mean(metric, METRICS))
    if output_weights and (data is None or metric == "l2-raw"):
        raise UsageError(
            "--output-weights are of columns in units of their spread.",
            hint="Add --data FILE, and leave out --metric l2-raw.",
        )
    first, second = model_of(a), model_of(b)
    for model in (first, second):
        refuse_random(model)
    result = Bounds(confidence, 0, None, None, None, None, None, None)
    samples, units = None, PLAIN
    if data is not None:
        samples = calibration.load(data, signature(first.proto))
        samples = as_taken(first, samples, provider=provider, threads=threads)
        settings: Settings = {
            "provider": provider,
            "threads": threads,
            "batch_size": batch_size or BATCH,
        }
        if measure is not None and metric != "l2-raw":
            units = Units.of(measure)
        elif metric != "l2-raw":
            units = units_over(first, samples, output_weights, **settings)
        gaps = sampling.measure_gaps(first, second, samples, units=units, **settings)
        result = from_gaps(gaps, confidence, eps)
        if units.measure is not None and measure is None:
            result = _with_own_units(result)
        followed = _per_sample(first, second, samples, gaps, units)
        result = replace(result, per_sample=followed)
    if input_range:
        result = replace(result, box=_box(first, second, input_range, samples, units))
    plain = units.measure is None
    return replace(result, vacuous=(*result.vacuous, *_vacuous(result)), plain=plain)


def _with_own_units(found: Bounds) -> Bounds:
    """The assumption that comes with units from the very samples."""

    def added(x: Any) -> Any:
        return replace(x, assumptions=(*x.assumptions, sampling.OWN_UNITS))

    above = None if found.above is None else added(found.above)
    return replace(found, conformal=added(found.conformal), above=above)


def from_gaps(gaps: sampling.Gaps, confidence: float, eps: float | None = None) -> Bounds:
    """The distribution-free bounds.

    What bounds no less than the gaps of a network of constant outputs is vacuous.
    """
    vacuous = []
    above = None
    if eps is not None:
        above, of_zero = (
            sampling.share("gap above eps", x > eps, confidence, eps)
            for x in (gaps.gaps, gaps.norms)
        )
        vacuous += ["above"] if above.limit >= of_zero.limit else []
    flips = None
    if gaps.flips.size:
        flips = sampling.share("top class differs", gaps.flips, confidence)
        vacuous += ["flips"] if flips.limit >= 1 else []
    alpha = float(f"{1 - confidence:.12g}")  # 1 - 0.95 is 0.05 here, not 0.050000000000000044
    conformal, zero = (sampling.conformal(x, alpha) for x in (gaps.gaps, gaps.norms))
    vacuous += ["conformal"] if conformal.gap >= zero.gap else []
    return Bounds(
        confidence,
        len(gaps.gaps),
        float(gaps.gaps.max()),
        conformal,
        above,
        flips,
        None,
        None,
        float(gaps.norms.max()),
        tuple(vacuous),
    )


def _vacuous(found: Bounds) -> Iterator[str]:
    """Names of the deterministic bounds that say nothing, where the outputs' norm is known."""
    most = math.inf if found.output_norm is None else found.output_norm
    for name, x in (("per_sample", found.per_sample), ("box", found.box)):
        if x is not None and x.gap is not None and x.gap >= most:
            yield name


def plan(
    model: str | Path | onnx.ModelProto | Model,
    method: str,
    sparsity: float,
    *,
    confidence: float = 0.95,
    eps: float | None = None,
) -> Planning:
    """What pruning a network with "random" or "magnitude" costs at most, before doing it.

    Args:
        model: the original model.
        method: "random" or "magnitude".
        sparsity: share of zeros over all prunable layers.
        confidence: of the bound.
        eps: relative gap that is allowed.

    Raises:
        UsageError: another method, or a value out of range.
        CannotFollow: between the layers is an operator without a Lipschitz constant.
    """
    check_confidence(confidence)
    if not 0 <= sparsity <= 1:
        raise UsageError(f"sparsity {sparsity} is not in [0, 1].")
    source = model_of(model)
    dense = replace(source, proto=decode_sparse(source.proto))
    check_known(dense.proto)
    stored = constants(dense.proto)
    matrices = {
        layer.name: layer.weight.matrix(read_tensor(dense, stored[layer.weight.tensor]))
        for layer in find_layers(dense.proto).layers
    }
    if not matrices:
        raise ModelError(
            "the model has no layer that can be pruned.",
            hint="See `onnx-ecp inspect MODEL` for the reasons.",
        )
    return planning.plan(matrices, method, sparsity, confidence, eps)


def parse_range(text: str) -> tuple[str, Range]:
    """(input name, (low, high)) of "LOW,HIGH" (every input, name "") or "NAME:LOW,HIGH".

    >>> parse_range("x:-1,1")
    ('x', (-1.0, 1.0))

    Raises:
        UsageError: it cannot be read.
    """
    name, _, ends = text.rpartition(":")
    try:
        low, high = (float(end) for end in ends.split(","))
    except ValueError:
        raise UsageError(
            f"--input-range: cannot read {text!r}.", hint="Write it like 0,1 or x:-1,1."
        ) from None
    return name, (low, high)


def check_confidence(confidence: float) -> None:
    """UsageError unless it is in (0, 1)."""
    if not 0 < confidence < 1:
        raise UsageError(
            f"confidence {confidence} is not between 0 and 1.", hint="Example: --confidence 0.95."
        )


def _per_sample(
    a: Model, b: Model, data: Calibration, gaps: sampling.Gaps, units: Units
) -> Deterministic:
    chosen = data.take(np.arange(min(len(data), _SAMPLES)))
    what = f"each of {len(chosen)} samples"
    try:
        both = pair(a, b)
        parts = [_of_batch(both, batch, units) for batch in chosen.batches(BATCH)]
    except (CannotFollow, ModelError) as error:
        return Deterministic(what, None, refused=error.message)
    found = np.concatenate(parts)
    largest, measured = float(found.max()), float(gaps.gaps[: len(found)].max())
    return Deterministic(what, largest, largest / measured if measured else None)


def _of_batch(both: Pair, batch: calibration.Batch, units: Units) -> np.ndarray:
    """(samples,): a sample of a fixed batch is several rows, which count together."""
    points = {name: _input(name, x, np.zeros_like(x)) for name, x in batch.feeds.items()}
    found = telescope(both, points, units.factors)
    return np.asarray(np.sqrt(np.square(found).reshape(batch.samples, -1).sum(axis=1)))


def _input(name: str, centre: np.ndarray, radius: np.ndarray) -> Reach:
    """CannotFollow for a scalar, which is the same for all samples."""
    if centre.ndim == 0:
        raise CannotFollow(
            f"the bound cannot follow input {name!r}: it has no axis that counts samples.",
            hint="The other bounds hold for any model.",
        )
    return Reach.of(centre, radius)


def _box(
    a: Model, b: Model, ranges: Mapping[str, Range], samples: Calibration | None, units: Units
) -> Deterministic:
    names = [spec.name for spec in signature(a.proto)]
    for name in ranges:
        if name and name not in names:
            raise UsageError(f"--input-range: no input {name!r}.", hint=did_you_mean(name, names))
    ends = {}
    for spec in signature(a.proto):
        shape = _shape(spec.name, spec.shape, samples)
        if spec.name not in ranges and "" not in ranges:
            raise UsageError(f"--input-range: no range for input {spec.name!r}.")
        low, high = ranges.get(spec.name, ranges.get("", (0.0, 0.0)))
        if not low <= high:
            raise UsageError(f"--input-range {low},{high}: the first is larger.")
        dtype = spec.dtype or np.dtype(np.float32)
        middle, half = (np.full(shape, x, dtype) for x in ((low + high) / 2, (high - low) / 2))
        ends[spec.name] = middle, half
    what = ", ".join(
        f"{name or 'every input'} in [{lo:g}, {hi:g}]" for name, (lo, hi) in ranges.items()
    )
    try:
        inputs = {name: _input(name, *both) for name, both in ends.items()}
        found = telescope(pair(a, b), inputs, units.factors)
    except (CannotFollow, ModelError) as error:
        return Deterministic(what, None, refused=error.message)
    return Deterministic(what, float(np.sqrt(np.square(found).sum())))


def _shape(
    name: str, shape: Sequence[int | str | None] | None, samples: Calibration | None
) -> tuple[int, ...]:
    """Of one sample; free axes behind the first one are as in the data."""
    if samples is not None:
        array = samples.arrays[name]
        if isinstance(array, Ragged):
            raise UsageError(
                f"--input-range: the samples of input {name!r} differ in shape.",
                hint="Bound the inputs of one shape at a time: give samples of that shape.",
            )
        return (1, *shape_of(array)) if samples.stacked else shape_of(array)
    if shape is None or any(not isinstance(size, int) for size in shape[1:]):
        raise UsageError(
            f"--input-range: the shape of input {name!r} is not known.",
            hint="Give samples with --data, too.",
        )
    sizes = [size if isinstance(size, int) else 1 for size in shape]
    return tuple(sizes)


__all__ = [
    "Bounds",
    "CannotFollow",
    "Conformal",
    "Deterministic",
    "Planning",
    "Share",
    "bound",
    "check_confidence",
    "from_gaps",
    "parse_range",
    "plan",
]
