"""One Report of an optimization; ``text``, ``as_json`` and ``html`` only show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_ecp.errors import UsageError
from onnx_ecp.evaluation.bounds import Bounds
from onnx_ecp.evaluation.compare import ColumnError, Deviation, Gap
from onnx_ecp.evaluation.facts import ModelFacts
from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.evaluation.operator_times import OperatorTime
from onnx_ecp.evaluation.targets.target import Eligible
from onnx_ecp.evaluation.work import Work
from onnx_ecp.graph import check_output, write_whole
from onnx_ecp.layers.layer import Skip
from onnx_ecp.pruning.search import Point
from onnx_ecp.quantising.rows import Int8, Int8Row
from onnx_ecp.report.evidence import Evidence
from onnx_ecp.runtime.versions import Versions
from onnx_ecp.units.rows import MEET, Speedup, UnitRow

UNSTRUCTURED_SPEED = (
    "Scattered zeros make the compressed file smaller, not the inference faster: ONNX Runtime "
    "multiplies them like other numbers. --granularity unit removes whole units for that."
)
PATTERN_SPEED = (
    "N:M makes the compressed file smaller; ONNX Runtime multiplies its zeros like other numbers. "
    "Kernels for 2:4, such as those of TensorRT on NVIDIA's GPUs, can be faster; no other pattern "
    "has any there."
)
INT8_SPEED = (
    "int8 makes the file four times smaller, and faster where the processor has int8 products "
    "(AVX-512 VNNI, AVX-VNNI, ARM dot products); what it does here is measured above, unless "
    "--no-measure was said."
)
# What a reader needs to know to compare the points of a search with the error of the report.
CURVE_NOTE = (
    "Each point is the worse of two parts: the samples that judge refits, and those held out. The "
    "output error of this report is that of the held-out samples alone, so it may be lower. Limits "
    "are held against the error, not against the upper end of its interval."
)
SYNTHETIC_WARNING = (
    "calibrated on made-up inputs drawn from the model's signature: importances and errors say "
    "little about real data; give real inputs with --calibration."
)


# Title of the columns with the largest errors, every one in units of its own spread.
WORST_COLUMNS = "Worst columns"
# Title of the list of ``Report.staying``, and of the same in ``inspect``.
UNITS_STAY = "Units that stay"
# What the table of units in ``inspect`` needs besides.
UNIT_WORDS = (
    "width: how many rows of the layer make a unit: 1 of a neuron or channel; of a head its size; "
    f"of a dimension of every head, the number of heads. {MEET}: no layer reads these units, the "
    "products of attention do."
)
# Title of the list of ``Int8.layers``.
INT8 = "int8"
# Shifts below this are what is left of sums that cancel.
ROUNDING = 1e-12
# Words for the fields of ``Work``.
WORK = {"weights": "weights", "multiplications": "flops"}


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "layer"), counted(1_200, "sample")
    ('1 layer', '1,200 samples')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def column_of(deviation: Deviation, column: ColumnError) -> str:
    """Which column it is, of how many, and along which axis they lie."""
    return f"{column.column:,} of {deviation.columns:,} (axis {deviation.axis})"


def latency_rows(latency: Latency) -> Iterator[tuple[str, float, float]]:
    """Seconds of a run of both models, with what they are."""
    yield "latency, least", latency.seconds_a, latency.seconds_b
    if latency.median_a is not None and latency.median_b is not None:
        yield "latency, median", latency.median_a, latency.median_b


def int8_errors(int8: Int8) -> Iterator[tuple[str, float]]:
    """The errors of the outputs that zeros and rounding leave, with what they are."""
    yield "error of zeros alone", int8.zeros
    yield "error of rounding alone", int8.rounding
    if int8.compensated:
        yield "error of rounding alone, not compensated", int8.uncompensated
    yield "error of both", int8.both


def int8_layer(row: Int8Row) -> str:
    """Which type the products of a layer are taken in."""
    return "int8" if row.int8 else "float"


def fate(row: UnitRow) -> str:
    """What happened to the units of a row, in one word."""
    return "unchanged" if row.after == row.before else row.why


def curve_title(curve: Sequence[Point]) -> str:
    """Of the points of a search; a gate has one."""
    return "The way to the target" if len(curve) > 1 else "Held against the target"


@dataclass(frozen=True)
class Recipe:
    """What was done in the end, defaults resolved; what was asked for is ``Report.options``."""

    method: str
    importance: str
    compensation: str
    metric: str
    positions: str
    gradients: str
    stages: int
    metric_reason: str = ""
    damping: float | None = None
    support: str = "ranking"
    effort: str = ""
    budget: str = ""


@dataclass(frozen=True)
class ForTarget:
    """What a runtime makes of the result; see ``evaluation.targets``.

    Args:
        name: of the target, its row.
        title: its name for people.
        gains: what turns zeros into speed there.
        evidence: where that is from.
        layers: which of them gain, and why not the others.
        next_step: what to run next.
        changes: what else was changed so that the runtime takes the file; else empty.
    """

    name: str
    title: str
    gains: str
    evidence: str
    layers: tuple[Eligible, ...]
    next_step: str
    changes: str = ""

    @property
    def heading(self) -> str:
        """Title of the list of layers."""
        return f"What {self.title} gains from"

    @property
    def words(self) -> tuple[str, ...]:
        """What stands below the list: what it is about, what was changed, what to run next."""
        told = (f"{self.title}: {self.gains} ({self.evidence}).", self.changes)
        return (*filter(None, told), f"next: {self.next_step}")


@dataclass(frozen=True)
class CalibrationFacts:
    """Where the inputs came from.

    Args:
        source: path or description.
        samples: samples that importances were computed on.
        held_out: other samples, kept for the measured error.
        synthetic: whether the inputs are made up.
        rows: of the outputs per sample: 1, or the size of a fixed batch.
    """

    source: str
    samples: int
    held_out: int
    synthetic: bool
    rows: int = 1

    def __str__(self) -> str:
        """How many there are, for people."""
        batches = f" (each a fixed batch of {self.rows})" if self.rows > 1 else ""
        return f"{counted(self.samples, 'sample')}{batches}, {self.held_out:,} held out"


@dataclass(frozen=True)
class LayerRow:
    """One pruned layer.

    Args:
        name: the layer's name.
        op: operator type.
        tensor: the stored tensor behind W; layers that share one have the same zeros.
        shape: (out, in) of W.
        weights: elements of W.
        zeros_before: zeros of W in the given model.
        zeros_after: how many weights of W are zero in the result, or were taken out with a unit.
        importance_removed: sum of the importances of the removed weights, in the method's unit;
            None where the method has none.
        largest_shift: largest absolute change of an element of the bias.
        bias_created: whether the layer had no bias and has one now.
        ess: effective sample size behind its statistics; None where the method needs none.
        note: one remark for the user, or empty.
    """

    name: str
    op: str
    tensor: str
    shape: tuple[int, int]
    weights: int
    zeros_before: int
    zeros_after: int
    importance_removed: float | None = None
    largest_shift: float = 0.0
    bias_created: bool = False
    ess: float | None = None
    note: str = ""

    @property
    def sparsity(self) -> float:
        """Share of zeros in the result."""
        return self.zeros_after / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Report:
    """All that a reader needs to believe, or repeat, an optimization.

    Args:
        original: the given model.
        result: the model as written; without a path when nothing was written.
        versions: what computed it.
        recipe: what was done.
        options: what was asked for: option name to a JSON value.
        seed: seed of everything random.
        calibration: where the inputs came from.
        layers: the pruned layers, in graph order.
        skips: the candidates that were not pruned, and the layers whose units must stay.
        predicted_error: relative output error that the method expected, None if it does not say.
        gap: original against result on held-out data, None if it was not measured.
        learnt_error: relative output error on samples that the result was computed from.
        seconds: elapsed time.
        warnings: what the user must know, one sentence each.
        speed: what the result does for latency, one sentence.
        units: what every group of units lost; empty where only single weights went.
        work_before: what the layers took, None where it could not be told.
        work_after: what the layers of the result take.
        curve: the points that a search for a target visited, in order.
        bounds: on the gap, from the held-out samples; None where none were asked for.
        speedup: what was asked for and what was measured, where latency was the target.
        latency: of both models, where it was measured.
        operators: seconds by type of operator in both models, where a page is made of it.
        advice: what would be faster, where the result was measured and is not; else empty.
        int8: what int8 took away and gave; None where all layers stayed in floats.
        target: what the runtime that was named makes of it; with N:M, where none was, TensorRT.
        evidence: what pictures are drawn from, where an HTML report was asked for.
        command: what repeats it in a shell; empty where the model or its inputs were in memory.
    """

    original: ModelFacts
    result: ModelFacts
    versions: Versions
    recipe: Recipe
    options: Mapping[str, Any]
    seed: int
    calibration: CalibrationFacts
    layers: tuple[LayerRow, ...]
    skips: tuple[Skip, ...]
    predicted_error: float | None
    gap: Gap | None
    seconds: float
    warnings: tuple[str, ...] = field(default=())
    speed: str = UNSTRUCTURED_SPEED
    units: tuple[UnitRow, ...] = ()
    work_before: Work | None = None
    work_after: Work | None = None
    curve: tuple[Point, ...] = ()
    bounds: Bounds | None = None
    speedup: Speedup | None = None
    int8: Int8 | None = None
    target: ForTarget | None = None
    latency: Latency | None = None
    operators: tuple[OperatorTime, ...] = ()
    advice: str = ""
    learnt_error: float | None = None
    evidence: Evidence | None = None
    command: str = ""

    @property
    def errors(self) -> dict[str, str]:
        """What is known of the output error, in words by kind."""
        found = {}
        if self.predicted_error is not None:
            found["predicted"] = f"{self.predicted_error:.4g}"
        if self.gap is not None:
            known = self.gap.certainty
            interval = "" if known is None else f" ({known.told})"
            found["measured"] = f"{self.gap.relative_error:.4g}{interval}"
        if self.learnt_error is not None:
            found["on the samples it learnt from"] = f"{self.learnt_error:.4g}"
        return found

    @property
    def weights(self) -> int:
        """Weights of the prunable layers; shared ones count once."""
        return sum({row.tensor: row.weights for row in self.layers}.values())

    @property
    def searched(self) -> bool:
        """Whether the sparsity was found by a search for a target."""
        targets = (self.options.get("sparsity"), self.options.get("speedup"))
        return bool(self.curve) and targets == (None, None)

    @property
    def dense(self) -> tuple[Skip, ...]:
        """The candidates that were not pruned."""
        pruned = {row.name for row in self.layers}
        return tuple(skip for skip in self.skips if skip.name not in pruned)

    @property
    def staying(self) -> tuple[Skip, ...]:
        """The layers whose units must stay, whatever else happened to them."""
        pruned = {row.name for row in self.layers}
        return tuple(skip for skip in self.skips if skip.name in pruned)

    @property
    def gone(self) -> str:
        """What removed weights are: "zeros", or "removed" where some were taken out whole."""
        return "removed" if self.units else "zeros"

    @property
    def zeros_before(self) -> int:
        """Zeros among them in the given model."""
        return sum({row.tensor: row.zeros_before for row in self.layers}.values())

    @property
    def zeros_after(self) -> int:
        """Zeros among them in the result."""
        return sum({row.tensor: row.zeros_after for row in self.layers}.values())

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of the prunable layers of the result."""
        return self.zeros_after / self.weights if self.weights else 0.0

    @property
    def headline(self) -> str:
        """Latency, size and multiplications before and after, in one line."""
        from onnx_ecp.report.headline import headline

        return headline(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON values in a stable order; see ``as_json`` for the schema."""
        from onnx_ecp.report.as_json import report_to_dict

        return report_to_dict(self)

    def save(self, path: str | Path) -> None:
        """Write it as *.json, *.html or *.toml (settings), whole or not at all; see ``write``."""
        write(self, path)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Report:
        """The inverse of ``to_dict``.

        Raises:
            OnnxEcpError: another schema, or a field is missing or unknown.
        """
        from onnx_ecp.report.as_json import report_from_dict

        return report_from_dict(values)


def _json(report: Report) -> str:
    from onnx_ecp.report.as_json import dumps

    return dumps(report.to_dict())


def _html(report: Report) -> str:
    from onnx_ecp.report.html import page

    return page(report)


def _toml(report: Report) -> str:
    from onnx_ecp.report.as_toml import settings

    return settings(report)


WRITERS: dict[str, Callable[[Report], str]] = {".json": _json, ".html": _html, ".toml": _toml}


def check_target(path: str | Path, *, force: bool) -> None:
    """Find out before the long work whether a report can be written there.

    Args:
        path: of the report.
        force: whether a file that is there may be replaced.

    Raises:
        UsageError: the suffix names no format.
        OutputError: the file exists, the directory is missing or read-only, or the path is one.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise UsageError(
            f"{path}: no report format ends in {path.suffix!r}.",
            hint=f"Name the file *{' or *'.join(WRITERS)}.",
        )
    check_output(path, force=force, source=None)


def write(report: Report, path: str | Path) -> None:
    """Write a report in the format of the path's suffix, whole or not at all; it replaces a file.

    Raises:
        UsageError: the suffix names no format.
        OutputError: the file cannot be written.
    """
    check_target(path, force=True)
    write_whole(path, rendered(report, path))


def is_drawn(path: str | Path) -> bool:
    """Whether a report of this name has pictures."""
    return Path(path).suffix.lower() == ".html"


def rendered(report: Report, path: str | Path) -> bytes:
    """The content of a report in the format of a path's suffix."""
    return WRITERS[Path(path).suffix.lower()](report).encode()
