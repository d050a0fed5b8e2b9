"""What a user may choose, checked before any work; the command line has the same names."""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from onnx_ecp.errors import UsageError, did_you_mean
from onnx_ecp.evaluation.targets import TARGETS
from onnx_ecp.gradients.cotangents import METRICS
from onnx_ecp.graph import ENCODINGS, printable
from onnx_ecp.methods import COMPENSATIONS, EFFORTS, METHODS, SUPPORTS, Method
from onnx_ecp.pruning.plan import BLOCKS
from onnx_ecp.pruning.search import Limit
from onnx_ecp.pruning.selection import NM, SCOPES, Sparsity, parse_sparsity
from onnx_ecp.runtime.lazy import parse_size
from onnx_ecp.runtime.limits import parse_duration
from onnx_ecp.statistics.moments import POSITIONS
from onnx_ecp.statistics.observer import ENGINES, STATISTICS
from onnx_ecp.units.choice import COSTS
from onnx_ecp.units.cleanup import UNREAD

# The method that the efforts are recipes of, and its effort unless told otherwise.
STAGED, EFFORT = "ecp-refit", "balanced"
# What is removed: single weights, or whole neurons, channels and heads.
GRANULARITIES = ("weight", "unit")
# What the numbers of the result may become.
QUANTIZE = ("int8",)
# Beside a larger ridge nothing that was measured is left in double precision.
MOST_DAMPING = 1 / float(np.finfo(np.float64).eps)
# No limit can be larger: percentage points of accuracy, and any number that is one.
MOST = {"max_error": float(np.finfo(np.float64).max), "max_accuracy_drop": 100.0}


@dataclass(frozen=True)
class Options:
    """Choices of ``optimize``; see ``onnx-ecp optimize --help`` for what each does.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """

    method: str = "ecp-refit"
    sparsity: Sparsity | None = None
    max_error: float | None = None
    max_accuracy_drop: float | None = None
    importance: str | None = None
    compensation: str | None = None
    support: str | None = None
    effort: str | None = None
    time_budget: float | None = None
    stages: int | None = None
    metric: str | None = None
    output_weights: Mapping[str, float] = field(default_factory=dict)
    probes: int | None = None
    gradients: str = "vjp"
    positions: str = "expand"
    scope: str | None = None
    granularity: str | None = None
    speedup: float | None = None
    cost: str = "params"
    unit_multiple: int | None = None
    units_and_zeros: bool = False
    cleanup: bool | None = None
    unread_inputs: str = "faster"
    target: str | None = None
    permute: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layer_sparsity: Mapping[str, Sparsity] = field(default_factory=dict)
    damping: float | None = None
    blocks: str = "network"
    cbs_select: bool = True
    cbs_update: bool = True
    finetune_steps: int = 0
    quantize: str | None = None
    format: str = "dense"
    samples: int | None = None
    batch_size: int | None = None
    max_memory: int | None = None
    cache: str | Path | None = None
    cache_limit: int | None = None
    workers: int | None = None
    dask: str | None = None
    statistics: str = "auto"
    seed: int = 0
    provider: str = "cpu"
    threads: int | None = None
    timeout: float | None = None
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: str | Path | np.ndarray | None = None
    bound: bool = False
    measure: bool | None = None
    masks: str | Path | None = None
    apply_masks: str | Path | None = None
    force: bool = False
    dry_run: bool = False

    @staticmethod
    def of(**choices: Any) -> Options:
        """Options from loosely typed values: NumPy's numbers, text for numbers, lists for tuples.

        Raises:
            UsageError: an unknown name, or a value of another type.
        """
        kinds = get_type_hints(Options)
        for name in choices:
            if name not in kinds:
                raise UsageError(f"unknown option {name!r}.", hint=did_you_mean(name, kinds))
        typed = {name: _typed(name, kinds[name], v) for name, v in choices.items()}
        return Options(**with_defaults_of_target(typed))

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("importance", self.importance or self.method, METHODS)
        one_of("compensation", self.compensation or "none", COMPENSATIONS)
        one_of("support", self.support or "ranking", SUPPORTS)
        self._check_effort()
        if self.support == "admm" and not self.recipe.repair.weighted:
            raise UsageError(
                f"--support admm does not go with --compensation {self.recipe.compensation}: it "
                "looks for the weights that a refit can do most with.",
                hint="It goes with refit and joint.",
            )
        one_of("metric", self.resolved_metric, METRICS)
        if self.metric == "loss" and self.labels is None:
            raise UsageError("--metric loss needs --labels.")
        for name, weight in self.output_weights.items():
            if not 0 <= weight < math.inf:
                raise UsageError(
                    f"--output-weights {name}={weight}: a weight must be 0 or more, and finite."
                )
        one_of("gradients", self.gradients, ENGINES)
        one_of("positions", self.positions, POSITIONS)
        one_of("statistics", self.statistics, STATISTICS)
        if self.recipe.needs == "gradients" and self.recipe.repair.needs == "curvature":
            raise UsageError(
                f"--compensation {self.recipe.compensation} does not go with ranking by gradients: "
                "one wants random directions of its own for every sample, the other the same.",
                hint="Rank by another method, such as magnitude.",
            )
        one_of("blocks", self.blocks, BLOCKS)
        one_of("scope", self.resolved_scope, SCOPES)
        one_of("granularity", self.resolved_granularity, GRANULARITIES)
        one_of("cost", self.cost, COSTS)
        one_of("unread-inputs", self.unread_inputs, UNREAD)
        one_of("format", self.format, ENCODINGS)
        self._check_target()
        self._check_int8()
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        for pattern in (*self.include, *self.exclude, *self.layer_sparsity):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"{printable(pattern, 100)!r} is no regular expression: {error}.",
                    hint="Write it as Python's re module wants it; names as inspect shows them.",
                ) from error
            except (RecursionError, OverflowError) as error:
                raise UsageError(
                    f"{printable(pattern, 100)!r} is too complicated a regular expression.",
                    hint="Nest fewer groups, or give the option several times.",
                ) from error
        if not 0 <= self.seed < 2**128:
            raise UsageError(f"--seed is {self.seed}; it must be from 0 to 2^128 - 1.")
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(f"--timeout is {self.timeout}; it must be greater than 0.")
        if self.finetune_steps < 0:
            raise UsageError(f"--finetune-steps is {self.finetune_steps}; it cannot be negative.")
        self._check_own()
        self._check_masks()
        self._check_limits()
        self._check_units()
        if self.damping is not None and not 0 < self.damping <= MOST_DAMPING:
            raise UsageError(
                f"--damping is {self.damping}; it must be greater than 0, and {MOST_DAMPING:.1g} "
                "at most."
            )
        if self.blocks != "network" and self.recipe.measures != "curvature":
            raise UsageError(
                "--blocks says what the curvature couples; "
                f"--method {self.method} does not look at it.",
                hint="It goes with woodfisher and cbs.",
            )

    def _check_target(self) -> None:
        """Refuse what the runtime does not take."""
        if self.target is None:
            return
        one_of("target", self.target, TARGETS)
        formats = TARGETS[self.target].formats
        if self.format not in formats:
            raise UsageError(
                f"--target {self.target} does not go with --format {self.format}.",
                hint=f"It takes {' or '.join(formats)}.",
            )

    def _check_own(self) -> None:
        """Refuse the options of other methods."""
        for name, method in METHODS.items():
            for option in method.options if name != self.method else ():
                if not getattr(self, option):
                    flag = option.replace("_", "-")
                    raise UsageError(
                        f"--no-{flag} needs --method {name}.",
                        hint=f"--method {self.method} has no such switch.",
                    )

    def _check_masks(self) -> None:
        if self.masks is not None and Path(self.masks).suffix != ".npz":
            raise UsageError(
                f"--masks {self.masks}: masks are written as .npz.", hint="Name the file *.npz."
            )
        if self.apply_masks is None:
            return
        ignored = {
            "--sparsity": self.sparsity is not None,
            "--layer-sparsity": bool(self.layer_sparsity),
            "--importance": self.importance is not None,
        }
        for name, given in ignored.items():
            if given:
                raise UsageError(
                    f"--apply-masks leaves nothing for {name} to choose.",
                    hint="The masks say which weights go: give one of the two.",
                )

    def _check_limits(self) -> None:
        if self.bound and self.limit is not None:
            raise UsageError(
                "--bound needs samples that chose nothing; a target uses the held-out ones.",
                hint="Bound the result on other inputs: onnx-ecp bound MODEL OUTPUT -d FILE.",
            )
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                wanted = "0 or more, and finite" if name == "max_error" else f"from 0 to {most:g}"
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}.")
        if self.max_accuracy_drop is not None and self.labels is None:
            raise UsageError(
                "--max-accuracy-drop needs labels.",
                hint="Name them with --labels, or use --max-error.",
            )
        if not self.searches:
            return
        if self.apply_masks is not None:
            raise UsageError("--apply-masks leaves nothing for a target to choose.")
        pattern = next((v for v in self.layer_sparsity.values() if isinstance(v, NM)), None)
        if pattern is not None:
            raise UsageError(
                f"a search ends where the target is met, not where every group is {pattern}.",
                hint="Give --sparsity too: the target is then a gate.",
            )

    def _check_int8(self) -> None:
        if self.quantize is None:
            return
        one_of("quantize", self.quantize, QUANTIZE)
        refused = {
            f"--format {self.format}, which stores floats": self.format != "dense",
            "--cost latency, whose target is one of floats": self.cost == "latency",
            "--bound, which compares layers in floats": self.bound,
        }
        for what, given in refused.items():
            if given:
                raise UsageError(f"--quantize does not go with {what}.")
        if self.target in TARGETS and TARGETS[self.target].refuses_int8:
            raise UsageError(
                f"--quantize does not go with --target {self.target}.",
                hint=f"{TARGETS[self.target].title}: {TARGETS[self.target].refuses_int8}.",
            )
        if self.searches:
            raise UsageError(
                "--quantize does not go with a search: zeros alone would use up the limit.",
                hint="Give --sparsity too: the limit is then a gate for zeros and int8 together.",
            )

    def _check_effort(self) -> None:
        one_of("effort", self.effort or EFFORT, EFFORTS)
        for name in ("effort", "time_budget"):
            if getattr(self, name) is not None and self.method != STAGED:
                raise UsageError(
                    f"--{name.replace('_', '-')} is for {STAGED}; {self.method} has one way.",
                    hint="Leave it out, or say --stages and --compensation.",
                )
        if self.time_budget is None:
            return
        if not 0 < self.time_budget < math.inf:
            raise UsageError(f"--time-budget is {self.time_budget:g}; it must be above 0 seconds.")
        if self.effort is not None or self.stages is not None:
            raise UsageError("--time-budget chooses the effort: leave --effort and --stages out.")
        if self.searches or self.cost == "latency":
            raise UsageError("--time-budget goes with a sparsity, not with a search for a target.")

    def _check_units(self) -> None:
        if self.unread_inputs != "faster" and not self.cleans:
            raise UsageError(
                "--unread-inputs says what clean-up drops, and there is none.",
                hint="It goes with single weights, without --no-cleanup, N:M and --apply-masks.",
            )
        if self.cleanup and self.patterns:
            raise UsageError("--cleanup does not go with N:M: it would break the pattern.")
        if self.permute and not self.patterns:
            raise UsageError("--permute needs an N:M sparsity.")
        if self.permute and (self.masks is not None or self.apply_masks is not None):
            raise UsageError("--permute does not go with masks, which are of the order given.")
        if not self.by_units:
            of_units = {"speedup": None, "cost": "params", "unit_multiple": None}
            for name, default in (of_units | {"units_and_zeros": False}).items():
                if getattr(self, name) != default:
                    raise UsageError(f"--{name.replace('_', '-')} needs --granularity unit.")
            return
        refused = {
            "N:M sparsity": isinstance(self.sparsity, NM),
            "--layer-sparsity": bool(self.layer_sparsity),
            "--scope layer": self.scope == "layer",
            "--apply-masks": self.apply_masks is not None,
        }
        for what, given in refused.items():
            if given:
                raise UsageError(f"--granularity unit does not go with {what}.")
        if self.speedup is not None and not 1 <= self.speedup < math.inf:
            raise UsageError(f"--speedup is {self.speedup}; it must be at least 1, and finite.")
        if self.speedup == 1 and self.cost == "latency":
            raise UsageError("--speedup is 1: with --cost latency it must be greater.")
        both = self.speedup is not None and self.sparsity is not None
        if both and not self.units_and_zeros:
            raise UsageError(
                "--speedup and --sparsity are two targets; give one of them.",
                hint="With --units-and-zeros both hold: units for the speed, then zeros in what "
                "stays.",
            )
        if self.units_and_zeros and not both:
            raise UsageError(
                "--units-and-zeros needs two targets.",
                hint="Give --speedup for whole units and --sparsity for all weights that go.",
            )

    @property
    def resolved_granularity(self) -> str:
        """The granularity given, else the one that the targets ask for."""
        return self.granularity or ("weight" if self.speedup is None else "unit")

    @property
    def by_units(self) -> bool:
        """Whether whole units are removed."""
        return self.resolved_granularity == "unit"

    @property
    def is_controlled(self) -> bool:
        """Whether magnitude pruning is a control: of the default, to a given sparsity."""
        own = self.method == "ecp-refit" and self.importance is None
        to_sparsity = not self.searches and self.apply_masks is None and self.cost != "latency"
        return own and to_sparsity and self.resolved_metric != "loss"

    @property
    def session(self) -> dict[str, Any]:
        """The settings of every ONNX Runtime session."""
        return {"provider": self.provider, "threads": self.threads}

    @property
    def patterns(self) -> bool:
        """Whether some layer is to get N:M."""
        return any(isinstance(x, NM) for x in (self.sparsity, *self.layer_sparsity.values()))

    @property
    def cleans(self) -> bool:
        """Whether dead units leave the model: a pattern or given masks are what a file is for."""
        if self.by_units:
            return False  # dead units are the first to go as it is
        default = not self.patterns and self.apply_masks is None
        return default if self.cleanup is None else self.cleanup

    @property
    def limit(self) -> Limit | None:
        """What the result must not exceed: the target of a search, or a gate."""
        if self.max_error is None and self.max_accuracy_drop is None:
            return None
        return Limit(self.max_error, self.max_accuracy_drop)

    @property
    def searches(self) -> bool:
        """Whether the limit is the target; beside a sparsity or a speedup it is a gate."""
        return self.limit is not None and self.sparsity is None and self.speedup is None

    @property
    def end(self) -> Sparsity:
        """The sparsity to prune to; a search may go all the way."""
        if self.sparsity is not None:
            return self.sparsity
        return 1.0 if self.searches else 0.5

    @property
    def resolved_metric(self) -> str:
        """The metric asked for, or the default.

        l2 wants nothing of the outputs, whatever their units; kl takes them as logits, which no
        file tells. Over the networks of docs/benchmarks it was l2 that never lost much. The
        methods that work with the curvature, or with mean gradients, are defined by the loss where
        there are labels.
        """
        of_loss = self.recipe.measures in ("curvature", "gradients") and self.labels is not None
        return self.metric or ("loss" if of_loss else "l2")

    @property
    def metric_reason(self) -> str:
        """Why that metric, for the report."""
        if self.metric:
            return "asked for"
        if self.resolved_metric == "loss":
            return "the method's own where there are labels"
        return "the default: every output column in units of its own spread"

    @property
    def resolved_probes(self) -> int | None:
        """The number of probes asked for; one where a row is stored for each."""
        return self.probes or (1 if self.recipe.measures == "curvature" else None)

    @property
    def resolved_scope(self) -> str:
        """The scope asked for, or the method's own."""
        return self.scope or METHODS[self.method].scope

    @property
    def ranking(self) -> str | None:
        """The method that ranks weights instead of the own one."""
        return self.importance or (None if self.cbs_select else "magnitude")

    @property
    def recipe(self) -> Method:
        """The method with the importance and compensation that replace its own."""
        compensation = self.compensation or (None if self.cbs_update else "none")
        stages = self.stages
        if self.resolved_effort:
            effort = EFFORTS[self.resolved_effort]
            stages = stages or (effort.unit_stages if self.by_units else effort.stages)
            compensation = compensation or effort.compensation
        return METHODS[self.method].with_parts(
            METHODS[self.ranking] if self.ranking else None, compensation, stages, self.support
        )

    @property
    def resolved_effort(self) -> str:
        """The effort asked for, or the default; empty for methods that have none."""
        return (self.effort or EFFORT) if self.method == STAGED else ""

    def as_json(self) -> dict[str, Any]:
        """JSON values by name, for the report."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _typed(name: str, kind: Any, value: Any) -> Any:
    """A value of an option in the type that it is declared with."""
    if name in _OWN:
        convert, wanted = _OWN[name]
        if value is None:  # the command line's word for nothing said
            return None if name in _MAY_BE_LEFT_OUT else convert(())
    else:
        allowed = get_args(kind) or (kind,)
        if value is None and type(None) in allowed:
            return None
        convert, wanted = next(row for kind, row in _BY_TYPE.items() if kind in allowed)
    try:
        return convert(value)
    except (TypeError, ValueError):
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"{flag} is {reprlib.repr(value)}; it must be {wanted}.") from None


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return int(value) if isinstance(value, str) else operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _path(value: Any) -> str | Path:
    if not isinstance(value, str | os.PathLike):
        raise TypeError
    return value if isinstance(value, str) else Path(value)


def _labels(value: Any) -> str | Path | np.ndarray:
    return _path(value) if isinstance(value, str | os.PathLike) else _array(value)


def _array(value: Any) -> np.ndarray:
    if not (hasattr(value, "__array__") or isinstance(value, Sequence)):
        raise TypeError
    return np.asarray(value)


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(_text(item) for item in value)


def _sparsities(value: Any) -> dict[str, Sparsity]:
    return {_text(name): parse_sparsity(item) for name, item in dict(value).items()}


def _weights(value: Any) -> dict[str, float]:
    return {_text(name): _number(weight) for name, weight in dict(value).items()}


def _shapes(value: Any) -> dict[str, tuple[int, ...]]:
    return {_text(k): tuple(_integer(size) for size in v) for k, v in dict(value).items()}


# Numbers that must be 1 or more.
_COUNTS = ("samples", "batch_size", "threads", "stages", "probes", "unit_multiple", "workers")
_MAY_BE_LEFT_OUT = ("sparsity", "time_budget", "max_memory", "cache_limit", "labels")
Convert = tuple[Callable[[Any], Any], str]

# How a value becomes that of an option, and what to say where it cannot: by the option's type, ...
_BY_TYPE: dict[type, Convert] = {
    bool: (_flag, "true or false"),
    int: (_integer, "a whole number"),
    float: (_number, "a number"),
    Path: (_path, "a path"),
    str: (_text, "text"),
}
# ... and those with types of their own.
_OWN: dict[str, Convert] = {
    "sparsity": (parse_sparsity, ""),
    "include": (_texts, "one or several regular expressions"),
    "exclude": (_texts, "one or several regular expressions"),
    "layer_sparsity": (_sparsities, "sparsities by regular expression"),
    "output_weights": (_weights, "numbers by the name of an output, or OUTPUT:COLUMN"),
    "time_budget": (parse_duration, "a time such as 90s, 10m or 2h"),
    "max_memory": (parse_size, "a size such as 500M or 8G"),
    "cache_limit": (parse_size, "a size such as 500M or 8G"),
    "labels": (_labels, "a path or an array"),
    "input_shapes": (_shapes, "shapes by the name of the input"),
}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {value.shape}"
    return str(value) if isinstance(value, NM | Path) else value


def with_defaults_of_target(choices: dict[str, Any]) -> dict[str, Any]:
    """The choices with the defaults of the target that they name, where nothing else was said."""
    row = TARGETS.get(choices.get("target") or "")
    if row is None:
        return choices

    def said(*names: str) -> bool:
        return any(choices.get(name) not in (None, "", {}) for name in names)

    limits = ("max_error", "max_accuracy_drop")
    units = said("speedup") or choices.get("granularity") == "unit"
    other = said("apply_masks") or (units and not choices.get("units_and_zeros"))
    if row.granularity == "unit":
        kept = isinstance(choices.get("sparsity"), NM) or choices.get("scope") == "layer"
        if not kept and not said("granularity", "apply_masks", "layer_sparsity"):
            return choices | {"granularity": "unit"}
    if row.sparsity is None or other:
        return choices
    if row.scope is not None and not units and not said("scope"):
        choices = choices | {"scope": row.scope}
    wanted = parse_sparsity(row.sparsity)
    pattern = isinstance(wanted, NM)
    if said("sparsity") or (pattern and units) or (said(*limits) and not pattern):
        return choices  # a limit says how far to go, but not in which pattern
    return choices | {"sparsity": wanted}


def one_of(what: str, name: str, known: Any) -> None:
    """UsageError with "did you mean" unless the name is known."""
    if name not in known:
        raise UsageError(f"unknown {what} {name!r}.", hint=did_you_mean(name, known))
