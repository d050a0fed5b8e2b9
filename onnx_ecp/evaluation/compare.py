"""Two models on the same inputs: how far apart their outputs are, how good both are, their sizes.

    relative error of column c    e_c = sqrt(E (b - a)_c^2 / Var a_c)
    relative error of output k    e_k = sqrt(mean_c e_c^2)
    relative error overall        e   = sqrt(mean_k e_k^2)

so that every column of every output counts alike, whatever its unit and offset; see
``statistics.columns``. Sums of batches add up; memory is bounded by one batch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_ecp.data import calibration
from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.data.ragged import Ragged, largest_bytes, shape_of
from onnx_ecp.errors import CalibrationError, ModelError, ProviderError
from onnx_ecp.evaluation.batching import as_taken
from onnx_ecp.evaluation.facts import ModelFacts, model_facts, model_of
from onnx_ecp.evaluation.latency import Latency, measure_latency
from onnx_ecp.evaluation.runtimes import InRuntime, check_runtime, in_runtime
from onnx_ecp.evaluation.work import Work, work
from onnx_ecp.graph import (
    Model,
    output_names,
    printable,
    signature,
)
from onnx_ecp.graph.columns import column_axes, counting_outputs
from onnx_ecp.graph.identity import identity
from onnx_ecp.graph.randomness import refuse_random
from onnx_ecp.graph.selected_rows import cut_hint, named, selecting_node
from onnx_ecp.runtime.cache import current, recalled
from onnx_ecp.runtime.outputs import arrays
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.runtime.session import OutOfMemory, Session
from onnx_ecp.statistics.by_sample import SampleSquares
from onnx_ecp.statistics.columns import Measure, Spread, by_column
from onnx_ecp.statistics.uncertainty import FEW, Certainty, certainty

# So many of the worst columns of an output are told, with a warning from this error on.
WORST, HURT = 8, 0.5
# Errors up to this are rounding: what carries them tells nothing.
ROUNDED = 5e-7
# What the inputs of a batch may take together, unless the user chooses the batch size.
BATCH_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ColumnError:
    """One column of an output.

    Args:
        column: its index along the axis of the columns.
        relative_error: e_c.
        spread: the standard deviation of a that the error is relative to.
    """

    column: int
    relative_error: float
    spread: float


@dataclass(frozen=True)
class Deviation:
    """How far one output of b is from the same output of a.

    Args:
        output: its name.
        relative_error: e_k; infinite when an element is not finite in one model only.
        raw_error: sqrt(sum ||b - a||^2 / sum ||a||^2), all columns in one unit.
        axis: of the columns; None where the output is a single one, or not floating-point.
        columns: number of columns.
        worst: columns with the largest errors, the worst first; empty where there is one column.
        left_out: columns that never vary in a, and count in no error.
        mean_squared_error: mean of (b - a)^2 over elements.
        largest: largest |b - a|; infinite when an element is not finite in one model only.
        largest_at: the sample where that is.
        agreement: percent of samples whose largest element is the same one, where the output is
            (samples, K >= 2), unless labels say that these are no class scores; percent of equal
            elements, where it is not floating-point.
        not_finite_a: elements of a that are NaN or infinite; those equal in b are left out above.
        not_finite_b: the same of b.
    """

    output: str
    relative_error: float
    mean_squared_error: float
    largest: float
    largest_at: int
    agreement: float | None
    not_finite_a: int
    not_finite_b: int
    raw_error: float = 0.0
    axis: int | None = None
    columns: int = 1
    worst: tuple[ColumnError, ...] = ()
    left_out: tuple[int, ...] = ()

    @property
    def hurt(self) -> tuple[ColumnError, ...]:
        """Of the worst columns those of which little is left."""
        return tuple(c for c in self.worst if c.relative_error > HURT)


@dataclass(frozen=True)
class Score:
    """How well both models do on labels.

    Args:
        metric: "accuracy" (top-1, percent), "r2" or "mse".
        output: the output that was scored.
        a: score of model a.
        b: score of model b.
    """

    metric: str
    output: str
    a: float
    b: float


@dataclass(frozen=True)
class Gap:
    """The outputs of model b against those of model a.

    Args:
        samples: number of samples.
        relative_error: overall; over the floating-point outputs, where there are any.
        outputs: one deviation per output.
        scores: on labels; empty without labels.
        centred: whether errors are in units of standard deviations; where no column of any output
            varies, root mean squares take their place.
        certainty: how well the overall error is known; None for a single sample, and where outputs
            do not tell one sample from another.
    """

    samples: int
    relative_error: float
    outputs: tuple[Deviation, ...]
    scores: tuple[Score, ...] = ()
    centred: bool = True
    certainty: Certainty | None = None

    @property
    def agreement(self) -> float | None:
        """Agreement in percent of the output that agrees least, of those that have one."""
        return min((d.agreement for d in self.outputs if d.agreement is not None), default=None)

    @property
    def largest(self) -> Deviation | None:
        """The output with the largest absolute deviation."""
        return max(self.outputs, key=lambda d: d.largest, default=None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for every output with values that are not finite, or with lost columns."""
        bad = map(_not_finite, self._with("not_finite_a", "not_finite_b"))
        return (*bad, *self._lost(), *self._uncertain())

    def _uncertain(self) -> Iterator[str]:
        known = self.certainty
        if known is None or not ROUNDED < self.relative_error < math.inf or not known.rests_on_few:
            return
        if known.samples < FEW:
            why = f"it was measured on {known.samples} samples"
        else:
            why = (
                f"of the {known.samples:,} samples it was measured on, as few as "
                f"{max(known.effective, 1):.0f} carry it ({100 * known.largest:.0f} % lies in "
                f"sample {known.largest_at})"
            )
        yield (
            f"the error {self.relative_error:.3g} rests on few samples: {why}. Others may tell "
            "another one: give more samples, best such that the model was not trained on."
        )

    def _with(self, *fields: str) -> list[Deviation]:
        return [d for d in self.outputs if any(getattr(d, field) for field in fields)]

    def _lost(self) -> Iterator[str]:
        if not self.centred:
            yield (
                "no column of any output varies on these samples: errors are relative to the "
                "outputs' size instead of their spread; give more samples."
            )
        for d in self._with("hurt"):
            named = ", ".join(f"{c.column} ({c.relative_error:.2g})" for c in d.hurt)
            more = " and more" if len(d.hurt) == WORST else ""
            yield (
                f"little is left of columns {named}{more} of output {printable(d.output)!r}: their "
                f"error is more than {HURT:g} of their own standard deviation; a constant in their "
                "place would have 1."
            )
        for d in self._with("left_out"):
            named = ", ".join(map(str, d.left_out[:WORST]))
            more = f" and {len(d.left_out) - WORST} more" if len(d.left_out) > WORST else ""
            yield (
                f"columns {named}{more} of output {printable(d.output)!r} never vary on these "
                "samples: no error counts them."
            )


def _not_finite(d: Deviation) -> str:
    return (
        f"output {d.output!r} has values that are NaN or infinite: {d.not_finite_a} in the "
        f"original, {d.not_finite_b} in the result."
    )


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Args:
        a: the original.
        b: the other one.
        gap: their outputs.
        latency: of both, where it was measured.
        runtime: where it was measured, if a runtime was named.
        work_a: what the layers of a take; None where it was not counted.
        work_b: what those of b take.
    """

    a: ModelFacts
    b: ModelFacts
    gap: Gap
    latency: Latency | None = None
    runtime: InRuntime | None = None
    work_a: Work | None = None
    work_b: Work | None = None


@dataclass(frozen=True)
class DeviationSums:
    """What a batch says about one output; the sums of two batches add up.

    Args:
        elements: number of elements.
        errors: (columns,), sum of (b - a)^2.
        energy: sum of a^2.
        largest: largest |b - a|.
        largest_at: its sample.
        votes: comparisons that can agree: samples of class scores, or elements of an output that is
            not floating-point; 0 elsewhere.
        agreed: how many of them do.
        not_finite_a: elements of a that are NaN or infinite.
        not_finite_b: the same of b.
        floating: whether the output is floating-point.
        by_sample: the same errors, sample by sample.
    """

    elements: int
    errors: np.ndarray
    energy: float
    largest: float
    largest_at: int
    votes: int
    agreed: int
    not_finite_a: int
    not_finite_b: int
    floating: bool
    by_sample: SampleSquares

    def __add__(self, other: DeviationSums) -> DeviationSums:
        # The first of equals, so that the batch size changes nothing.
        top = self if self.largest >= other.largest else other
        return DeviationSums(
            self.elements + other.elements,
            _added(self.errors, other.errors),
            self.energy + other.energy,
            top.largest,
            top.largest_at,
            self.votes + other.votes,
            self.agreed + other.agreed,
            self.not_finite_a + other.not_finite_a,
            self.not_finite_b + other.not_finite_b,
            self.floating,
            self.by_sample + other.by_sample,
        )

    @property
    def raw_error(self) -> float:
        """sqrt(sum of errors / energy); 0 / 0 is 0."""
        error = float(self.errors.sum())
        if error == 0.0:
            return 0.0
        return math.sqrt(error / self.energy) if self.energy else math.inf

    @property
    def mean_squares(self) -> np.ndarray:
        """(columns,), mean squared error."""
        return np.asarray(self.errors * len(self.errors) / max(self.elements, 1))

    def deviation(self, output: str, measure: Measure) -> Deviation:
        """What the sums of all batches say about the output."""
        found = Deviation(
            output=output,
            relative_error=self.raw_error,
            mean_squared_error=float(self.errors.sum()) / self.elements if self.elements else 0.0,
            largest=self.largest,
            largest_at=self.largest_at,
            agreement=100.0 * self.agreed / self.votes if self.votes else None,
            not_finite_a=self.not_finite_a,
            not_finite_b=self.not_finite_b,
            raw_error=self.raw_error,
        )
        if not self.floating:
            return found
        squares = _like(self.mean_squares, measure, output)
        return replace(
            found,
            relative_error=measure.output(output, squares),
            axis=measure.spreads[output].axis,
            columns=len(squares),
            worst=_worst(measure, output, squares),
            left_out=measure.left_out(output),
        )


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """DeviationSums by column; of all columns where their numbers differ."""
    return a + b if len(a) == len(b) else np.array([a.sum() + b.sum()])


def _like(mean_squares: np.ndarray, measure: Measure, output: str) -> np.ndarray:
    """(columns,) as many as the measure has; where it has one, that of all."""
    if len(measure.spreads[output].count) == len(mean_squares):
        return mean_squares
    assert len(measure.spreads[output].count) == 1, "a batch of other columns pools all of them"
    return mean_squares.mean(keepdims=True)


def _worst(measure: Measure, output: str, mean_squares: np.ndarray) -> tuple[ColumnError, ...]:
    errors = measure.columns(output, mean_squares)
    if len(errors) < 2:
        return ()
    order = np.argsort(-np.nan_to_num(errors, nan=-1.0, posinf=np.inf), kind="stable")[:WORST]
    spread = np.sqrt(measure.unit(output))
    return tuple(
        ColumnError(int(c), float(errors[c]), float(spread[c]))
        for c in order
        if not np.isnan(errors[c])
    )


def overall(sums: Mapping[str, DeviationSums], measure: Measure) -> float:
    """The relative error over the outputs of a measure; over all where none is floating-point."""
    if not any(s.floating for s in sums.values()):
        return math.sqrt(statistics.fmean(s.raw_error**2 for s in sums.values()))
    return measure.overall({n: _like(sums[n].mean_squares, measure, n) for n in measure.spreads})


def how_certain(
    sums: Mapping[str, DeviationSums], measure: Measure, seed: int = 0
) -> Certainty | None:
    """How well ``overall`` is known; None where outputs do not tell one sample from another."""
    floating = {n: s for n, s in sums.items() if s.floating}
    if floating:
        parts = [(sums[n].by_sample, measure.per_element(n)) for n in measure.spreads]
    else:
        parts = [(s.by_sample, np.full(1, 1.0 / max(s.elements, 1))) for s in sums.values()]
    if not parts or not all(squares.known for squares, _ in parts):
        return None
    rows = [squares.weighted(factors) for squares, factors in parts]
    if len({len(row) for row in rows}) > 1:
        return None
    total, error = np.sum(rows, axis=0), overall(sums, measure)
    size = total.mean()
    with np.errstate(invalid="ignore"):
        scaled = total * (error**2 / size) if 0 < size < np.inf else total
    return certainty(scaled, seed=seed)


def deviation_sums(
    a: np.ndarray, b: np.ndarray, start: int, samples: int, axis: int | None = None
) -> DeviationSums:
    """The sums of one batch of one output.

    Elements that are not floating-point (class ids, strings) are equal or not: their distance is 0
    or 1 and their energy 1.

    Args:
        a: output of the original model, any shape and type.
        b: the same output of the other model, same shape.
        start: index of the first sample of the batch.
        samples: samples in the batch.
        axis: of the columns; None for one column.
    """
    floating = a.dtype.kind == "f"
    if floating:
        x, y = a.astype(np.float64), b.astype(np.float64)
        gap, energy = _distance(x, y), _square_sum(np.where(np.isfinite(x), x, 0.0))
        agree = _same_class(a, b)
        bad = (x.size - np.isfinite(x).sum(), y.size - np.isfinite(y).sum())
    else:
        agree, bad = np.asarray(a == b), (0, 0)
        gap, energy = np.where(agree, 0.0, 1.0), float(a.size)
    with np.errstate(over="ignore"):  # doubles beyond 1e154: infinite, and so is the error
        squares = np.square(gap)
    along = axis if floating else None
    return DeviationSums(
        elements=a.size,
        errors=by_column(squares, along).sum(axis=0),
        energy=energy,
        largest=float(gap.max(initial=0.0)),
        largest_at=start + _row_of_largest(gap, samples),
        votes=agree.size,
        agreed=int(agree.sum()),
        not_finite_a=int(bad[0]),
        not_finite_b=int(bad[1]),
        floating=floating,
        by_sample=SampleSquares.of(squares, along, samples),
    )


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|y - x| elementwise; 0 where both are the same NaN or infinity, inf where one is finite."""
    finite = np.isfinite(x) & np.isfinite(y)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    distance = np.abs(np.subtract(y, x, out=np.full(x.shape, np.inf), where=finite))
    return np.where(same, 0.0, distance)


def _square_sum(x: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(np.square(x).sum())


def _same_class(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(samples,) bool of class scores (samples, K >= 2); empty for anything else."""
    if a.ndim != 2 or a.shape[1] < 2:
        return np.zeros(0, dtype=np.bool_)
    return np.asarray(a.argmax(axis=-1) == b.argmax(axis=-1))


def _row_of_largest(gap: np.ndarray, samples: int) -> int:
    """The sample of the largest element; 0 where the first axis does not count samples."""
    if gap.size == 0 or gap.ndim == 0 or gap.shape[0] != samples:
        return 0
    return int(gap.reshape(samples, -1).max(axis=1).argmax())


def compare(
    a: str | Path | onnx.ModelProto | Model,
    b: str | Path | onnx.ModelProto | Model,
    data: Any,
    labels: str | Path | np.ndarray | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int | None = None,
    measure: bool = False,
    runtime: str | None = None,
    output_weights: Mapping[str, float] | None = None,
) -> Comparison:
    """Compare model b with model a: outputs, scores on labels, sizes and, if asked for, latency.

    Args:
        a: the original model.
        b: a model with the same inputs and outputs.
        data: a Calibration, or any source that ``calibration.load`` reads.
        labels: one per sample: class indices, or targets of a regression; a path or an array.
        provider: execution provider.
        threads: threads within an operator; None leaves it to ONNX Runtime.
        batch_size: samples a run; None takes what fits.
        measure: whether to measure latency.
        runtime: "onnxruntime", "openvino" or "deepsparse": measure it there.
        output_weights: see ``Measure.of``.

    Raises:
        ModelError: a model is unreadable, or inputs or outputs differ.
        CalibrationError: data or labels do not fit the models.
        ProviderError: ONNX Runtime cannot run a model.
    """
    if runtime is not None:
        check_runtime(runtime)
    first, second = model_of(a), model_of(b)
    for model in (first, second):
        refuse_random(model)
    samples = calibration.load(data, signature(first.proto))
    if isinstance(labels, str | Path):
        labels = calibration.load_labels(labels, expected_rows(samples))
    samples = as_taken(first, samples, provider=provider, threads=threads)
    gap = measure_gap(
        first,
        second,
        samples,
        labels,
        provider=provider,
        threads=threads,
        batch_size=batch_size,
        output_weights=output_weights,
    )
    latency, elsewhere = None, None
    size = batch_size or fitting(samples)
    if runtime is not None:
        elsewhere = in_runtime(runtime, first, second, next(samples.batches(size)), threads=threads)
        latency = elsewhere.latency
    elif measure:
        latency = measure_latency(
            first, second, next(samples.batches(size)), provider=provider, threads=threads
        )
    settings = {"provider": provider, "threads": threads}
    works = (_work(model, samples, settings) for model in (first, second))
    return Comparison(model_facts(first), model_facts(second), gap, latency, elsewhere, *works)


def _work(model: Model, samples: Calibration, settings: Mapping[str, Any]) -> Work | None:
    """What the layers take; None where the shapes of all tensors cannot be had in one run."""
    try:
        return work(model, next(samples.batches(2)).feeds, settings)
    except ProviderError:
        return None


def measure_gap(
    a: Model,
    b: Model,
    data: Calibration,
    labels: np.ndarray | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int | None = None,
    progress: Progress = silent,
    measure: Measure | None = None,
    output_weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Gap:
    """The outputs of b against those of a, streamed batch by batch.

    Args:
        a: the original model.
        b: a model with the same inputs and outputs.
        data: samples that fit both.
        labels: integer class indices or floating-point targets, one per row of an output.
        provider: execution provider.
        threads: threads within an operator.
        batch_size: samples a run; a batch that does not fit in memory is halved until it does.
        progress: called after every batch.
        measure: of the outputs of a that are to count; None takes all, as they vary over the data.
        output_weights: of that measure; see ``Measure.of``.
        seed: of the interval of the error.

    Raises:
        ModelError: inputs or outputs differ.
        CalibrationError: the labels fit no output, or are not as many as its rows.
        ProviderError: ONNX Runtime cannot run a model.
    """
    check_same_signature(a, b)
    size = batch_size or fitting(data)
    sums: dict[str, DeviationSums] = {}
    spreads: dict[str, Spread] = {}
    axes: dict[str, int | None] = {}
    target: Target | None = None
    predictions: list[tuple[np.ndarray, ...]] = []
    numbers = counting_outputs(a.proto)
    for batch, of_a, of_b in paired_outputs(a, b, data.batches(size), provider, threads):
        check_same_shapes(b, of_a, of_b)
        if not axes:
            axes = axes_of(a, batch, of_a)
            if measure is not None:  # its columns are these
                axes |= {name: spread.axis for name, spread in measure.spreads.items()}
        for name, y in of_a.items():
            y, other = (_as_numbers(name, values, numbers) for values in (y, of_b[name]))
            new = deviation_sums(y, other, batch.start, batch.samples, axes[name])
            sums[name] = sums[name] + new if name in sums else new
            if new.floating:
                spread = Spread.of(y, axes[name], batch.samples)
                spreads[name] = spreads[name] + spread if name in spreads else spread
        if labels is not None:
            target = target or target_of(of_a, labels)
            predictions.append((target.prediction(of_a), target.prediction(of_b)))
        progress("comparing", batch.start + batch.samples, len(data))
    scores: tuple[Score, ...] = ()
    if labels is not None and target is not None:
        if not target.classes:  # the largest of several numbers is no class
            sums[target.output] = replace(sums[target.output], votes=0, agreed=0)
        scores = target.scores(labels, *map(np.concatenate, zip(*predictions, strict=True)))
    own = Measure.of(spreads, output_weights)
    known = measure if measure is not None and measure.spreads else own
    return Gap(
        samples=len(data),
        relative_error=overall(sums, known),
        outputs=tuple(
            s.deviation(name, known if name in known.spreads else own) for name, s in sums.items()
        ),
        scores=scores,
        centred=known.centred or not known.spreads,
        certainty=how_certain(sums, known, seed),
    )


def _as_numbers(name: str, values: np.ndarray, numbers: Collection[str]) -> np.ndarray:
    """Integers that are numbers as floats: near ones are near, and their columns have a spread."""
    return values.astype(np.float64) if name in numbers else values


def axes_of(model: Model, batch: Batch, outputs: Outputs) -> dict[str, int | None]:
    """By output, the axis of its columns; see ``column_axes``."""
    rows = {x.shape[0] for x in batch.feeds.values() if x.ndim} | {batch.samples}
    return column_axes(model.proto, {name: y.shape for name, y in outputs.items()}, rows)


def expected_rows(data: Calibration) -> int:
    """Rows of outputs to expect: a sample of a fixed batch of B is B rows."""
    first = next(iter(data.arrays.values()))
    fixed = shape_of(first)
    varies = isinstance(first, Ragged) and len({part.shape[:1] for part in first}) > 1
    return len(data) if data.stacked or varies or len(fixed) < 2 else len(data) * fixed[0]


def fitting(data: Calibration) -> int:
    """A batch size whose inputs take at most BATCH_BYTES."""
    size = sum(map(largest_bytes, data.arrays.values()))
    return int(np.clip(BATCH_BYTES // max(size, 1), 1, min(256, len(data))))


Outputs = Mapping[str, np.ndarray]


def paired_outputs(
    a: Model, b: Model, batches: Iterable[Batch], provider: str, threads: int | None
) -> Iterator[tuple[Batch, Outputs, Outputs]]:
    """Outputs of both models by name; where there is a cache, those of the first are kept."""
    for batch, (of_a, of_b) in outputs_of((a, b), batches, provider, threads, kept=a):
        yield batch, of_a, of_b


def outputs_of(
    models: Sequence[Model],
    batches: Iterable[Batch],
    provider: str,
    threads: int | None,
    *,
    kept: Model | None = None,
) -> Iterator[tuple[Batch, tuple[Outputs, ...]]]:
    """Outputs of models by name; of halves where a batch does not fit in memory.

    Args:
        models: with the same inputs.
        batches: samples.
        provider: execution provider.
        threads: threads within an operator.
        kept: the model whose outputs are kept where there is a cache.
    """
    sessions = [Session(m.proto, provider=provider, threads=threads, base=m.base) for m in models]
    own = identity(kept) if kept is not None and current() is not None else None

    def outputs(model: Model, session: Session, feeds: Outputs) -> Outputs:
        def computed() -> Outputs:
            return arrays(session.run(feeds))

        if model is not kept:
            return computed()
        most = sum(x.nbytes for x in feeds.values())

        def is_small(found: Outputs) -> bool:  # what is larger is as soon computed as read
            texts = any(y.dtype.hasobject for y in found.values())
            return not texts and sum(y.nbytes for y in found.values()) <= most

        asked = ("outputs of the original", lambda: (own, feeds, provider, threads))
        return recalled(asked, computed, worth=is_small)

    waiting = [iter(batches)]
    while waiting:
        batch = next(waiting[-1], None)
        if batch is None:
            waiting.pop()
            continue
        try:
            found = tuple(
                outputs(model, session, batch.feeds)
                for model, session in zip(models, sessions, strict=True)
            )
        except (OutOfMemory, MemoryError):
            if batch.samples == 1:
                raise
            waiting.append(iter(batch.halves()))
        else:
            yield batch, found


_SAME_HINT = "Only models with the same inputs and outputs can be compared."


def check_same_signature(a: Model, b: Model) -> None:
    """ModelError unless both models have the same inputs and outputs."""
    for role, names in (("inputs", _inputs), ("outputs", output_names)):
        of_a, of_b = names(a.proto), names(b.proto)
        if sorted(of_a) != sorted(of_b):
            shown_a, shown_b = (", ".join(map(printable, found)) for found in (of_a, of_b))
            raise ModelError(
                f"{b.path or 'the second model'}: its {role} are {shown_b}; those of the first "
                f"model are {shown_a}.",
                hint=_SAME_HINT,
            )


def _inputs(proto: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(spec.name for spec in signature(proto))


def check_same_shapes(b: Model, of_a: Outputs, of_b: Outputs) -> None:
    """ModelError unless the outputs of both models have the same shapes."""
    for name, y in of_a.items():
        if y.shape != of_b[name].shape:
            node = selecting_node(b.proto, name)
            why = "" if node is None else f": {named(node)} selects as many rows as the data say"
            raise ModelError(
                f"output {printable(name)!r} has shape {y.shape} in the first model (the original) "
                f"and {of_b[name].shape} in the second (the result){why}.",
                hint=_SAME_HINT if node is None else cut_hint(b.proto, node),
            )


@dataclass(frozen=True)
class Target:
    """The output that labels are about.

    Args:
        output: its name.
        classes: whether the labels are classes; else they are numbers.
        by_score: whether the output holds a score for every class, in its last axis.
    """

    output: str
    classes: bool
    by_score: bool

    def prediction(self, outputs: Outputs) -> np.ndarray:
        """What the model says the labels are."""
        y = outputs[self.output]
        return np.asarray(y.argmax(axis=-1)) if self.by_score else y

    def scores(self, labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[Score, ...]:
        """Scores of the predictions of both models, (rows, ...) like the labels."""
        if len(labels) != len(a):
            raise CalibrationError(
                f"{len(labels)} labels for {len(a)} samples.", hint="Give one label per sample."
            )
        if self.classes:
            hits = [100.0 * float((y == labels).mean()) for y in (a, b)]
            return (Score("accuracy", self.output, *hits),)
        truth = labels.astype(np.float64)
        errors = [np.square(y.astype(np.float64).reshape(truth.shape) - truth) for y in (a, b)]
        spread = float(np.square(truth - truth.mean(axis=0)).sum())
        r2 = [1.0 - float(e.sum()) / spread if spread else math.nan for e in errors]
        mse = [float(e.mean()) for e in errors]
        return Score("r2", self.output, *r2), Score("mse", self.output, *mse)


def target_of(outputs: Outputs, labels: np.ndarray) -> Target:
    """The first output that the labels fit: as class scores, as class ids, or as numbers."""
    classes = labels.dtype.kind in "iu"
    for name, y in outputs.items():
        per_class = y.dtype.kind == "f" and y.ndim == labels.ndim + 1 and y.shape[-1] > 1
        if classes and per_class and y.shape[1:-1] == labels.shape[1:]:
            _check_classes(name, y.shape[-1], labels)
            return Target(name, classes=True, by_score=True)
    for name, y in outputs.items():
        if classes and y.dtype.kind in "iu" and y.shape[1:] == labels.shape[1:]:
            return Target(name, classes=True, by_score=False)
    for name, y in outputs.items():
        if y.dtype.kind == "f" and y.ndim and y[:1].size == labels[:1].size:
            return Target(name, classes=False, by_score=False)
    shapes = ", ".join(f"{printable(n)} {y.dtype} {y.shape}" for n, y in outputs.items())
    raise CalibrationError(
        f"labels {labels.dtype} {labels.shape} fit no output; the outputs of a batch are {shapes}.",
        hint="Give integer class indices, one per sample, or floating-point targets.",
    )


def _check_classes(output: str, classes: int, labels: np.ndarray) -> None:
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise CalibrationError(
            f"labels go from {labels.min()} to {labels.max()}, but output {printable(output)!r} "
            f"has {classes} classes.",
            hint="Class labels count from 0.",
        )
