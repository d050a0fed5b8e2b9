"""Which metric pruning works with where none is asked for.

Probabilities that are very sure say little of most samples: what moves them is lost in their tails.
So where the graph tells the logits of all outputs, behind a Softmax, LogSoftmax or Sigmoid, the KL
divergence at the logits is the metric, unless a trial of both says that the plain one leaves
smaller errors on the validation samples. Everywhere else it is the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from onnx_ecp.api.options import Options
from onnx_ecp.api.preparation import Data, make_plan, observe_network
from onnx_ecp.errors import UsageError
from onnx_ecp.graph import Model
from onnx_ecp.layers import Layer
from onnx_ecp.methods import FORWARD
from onnx_ecp.pruning.loop import prune
from onnx_ecp.pruning.standing import standing
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.observer import has_logits

# What a trial is: two stages with a refit, without the joint one, at this sparsity, on so many of
# the samples to train on. One stage tells the two apart less surely.
TRIAL = {"compensation": "refit", "stages": 2, "sparsity": 0.7}
TRIED = 256
# The options that a trial shares with the run: what computes, and on what.
SHARED = (
    "output_weights", "probes", "gradients", "positions", "samples", "batch_size", "max_memory",
    "statistics", "seed", "provider", "threads", "input_shapes",
)  # fmt: skip


@dataclass(frozen=True)
class Settled(Options):
    """Options whose metric was chosen.

    Args:
        why: the reason.
    """

    why: str = ""

    @property
    def metric_reason(self) -> str:
        """Why the metric is what it is, for reports."""
        return self.why


def settle_metric(
    source: Model,
    layers: Sequence[Layer],
    data: Data,
    options: Options,
    progress: Progress = silent,
) -> Options:
    """Choose the metric where it is left open, and say why.

    The choice depends on the model, the samples and the engine alone, not on the method or the
    sparsity: all points of a sweep have the same.

    Args:
        source: the model.
        layers: that may be pruned.
        data: the samples.
        options: what was asked for.
        progress: called while the metrics are tried.
    """
    if not _is_open(options) or not has_logits(source.proto):
        return options
    data = replace(data, train=data.train.limit(TRIED, options.seed))
    errors = {}
    for done, metric in enumerate(("kl", "l2")):
        progress("metrics", done, 2)
        trial = Options(
            metric=metric,
            **TRIAL,  # type: ignore[arg-type]
            **{name: getattr(options, name) for name in SHARED},
        )
        try:
            network, _ = observe_network(source, layers, data, trial)
        except UsageError:  # classes that do not lie on the last axis
            return options
        if metric == "kl" and not network.observer.knows_logits:
            network.observer.close()
            return options
        pruned = prune(network, make_plan(network.layers, trial))
        errors[metric] = standing(network, pruned.state).error
        network.observer.close()
    progress("metrics", 2, 2)
    best = "kl" if errors["kl"] <= errors["l2"] else "l2"
    told = f"in a trial of both the error on the validation samples was {errors['kl']:.3g} with kl"
    return _with_metric(options, best, f"{told} and {errors['l2']:.3g} with l2")


def settle_metrics(
    source: Model,
    layers: Sequence[Layer],
    data: Data,
    grid: Sequence[Options],
    progress: Progress = silent,
) -> list[Options]:
    """Choose the metric of many runs that differ in method and sparsity alone, by one trial."""
    first = next((options for options in grid if _is_open(options)), None)
    if first is None:
        return list(grid)
    found = settle_metric(source, layers, data, first, progress)
    if not isinstance(found, Settled):
        return list(grid)
    return [_with_metric(x, found.metric, found.why) if _is_open(x) else x for x in grid]


def _with_metric(options: Options, metric: str | None, why: str) -> Settled:
    values = {field.name: getattr(options, field.name) for field in fields(Options)}
    return Settled(**values | {"metric": metric}, why=why)


def _is_open(options: Options) -> bool:
    """Whether a metric matters and was not asked for."""
    if options.metric is not None or options.resolved_metric != "l2":
        return False
    measures = options.recipe.measures
    looks = measures not in FORWARD and measures != "curvature"
    return looks or options.finetune_steps > 0
