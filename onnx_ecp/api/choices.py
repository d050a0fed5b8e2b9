"""The keyword arguments of the public calls, with the types that type checkers hold callers to.

``Choices`` are those of ``optimize``, ``importance`` and whoever prunes once; ``CommonChoices`` are
the ones that hold for all points of a sweep. ``options.Options`` checks the values, and gives the
defaults. A test compares the names here, there, and on the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypedDict

import numpy as np

from onnx_ecp.pruning.selection import NM

SparsityLike: TypeAlias = float | str | NM
"""A share of zeros such as 0.8, or a pattern such as "2:4"."""
PathLike: TypeAlias = str | Path
LabelsLike: TypeAlias = str | Path | np.ndarray | Sequence[int] | Sequence[float]


class CommonChoices(TypedDict, total=False):
    """How a network is pruned and what computes it; None leaves the default.

    Keys:
        compensation: name in ``COMPENSATIONS``; None: the method's own.
        effort: "fast", "balanced" or "best": a recipe of ``ecp-refit``; None: balanced.
        support: "ranking" or "admm", which weights of a layer stay, of as many as the ranking says.
        stages: how often observe, score, select, compensate are repeated, at least 1.
        damping: ridge, as a share of the mean variance of a layer's inputs; > 0.
        blocks: "network" or "layer", what the curvature of woodfisher and cbs couples.
        finetune_steps: batches of label-free fine-tuning at the end.
        metric: distance of outputs: "l2", "l2-raw", "kl" or "loss".
        output_weights: how often outputs count, by name, or columns, by "NAME:COLUMN"; else 1.
        probes: random output directions per sample, at least 1; None: exact for few outputs.
        gradients: "vjp" (reverse-mode graph) or "numeric" (finite differences).
        positions: "expand" (tokens and patches as samples) or "reduce" (summed).
        scope: "global" (one ranking) or "layer".
        include: regular expressions; only layers that match one are pruned.
        exclude: regular expressions; layers that match one are left alone.
        layer_sparsity: sparsities by regular expression.
        samples: most calibration samples that are used.
        batch_size: samples per run.
        max_memory: bytes, or a text such as "8G", for statistics and activations.
        cache: folder in which statistics and stages are kept for later runs.
        cache_limit: bytes, or a text such as "8G", that it may take; the oldest go first.
        statistics: "auto", "graph" or "host", where statistics are summed.
        seed: of everything random, >= 0.
        provider: execution provider, by a part of its name.
        threads: of ONNX Runtime and NumPy.
        timeout: seconds, > 0.
        input_shapes: shapes of inputs with free dimensions, by name.
    """

    compensation: str | None
    effort: str | None
    support: str | None
    stages: int | None
    damping: float | None
    blocks: str
    finetune_steps: int
    metric: str | None
    output_weights: Mapping[str, float]
    probes: int | None
    gradients: str
    positions: str
    scope: str | None
    include: str | Iterable[str]
    exclude: str | Iterable[str]
    layer_sparsity: Mapping[str, SparsityLike]
    samples: int | None
    batch_size: int | None
    max_memory: int | str | None
    cache: str | Path | None
    cache_limit: int | str | None
    statistics: str
    seed: int
    provider: str
    threads: int | None
    timeout: float | None
    input_shapes: Mapping[str, Sequence[int]]


class Choices(CommonChoices, total=False):
    """All of ``CommonChoices``, and what one result is to be; None leaves the default.

    Keys:
        method: name in ``METHODS``.
        sparsity: share of zeros over all prunable layers, in [0, 1], or N:M.
        max_error: largest relative output error on held-out samples; the target, or a gate.
        max_accuracy_drop: largest loss of top-1 accuracy in percentage points, with ``labels``.
        time_budget: seconds, or a text such as "10m": the best effort that fits.
        importance: name of the method that ranks weights instead.
        granularity: "weight" or "unit" (whole neurons, channels, heads); None: "unit" where a
            speedup is asked for.
        speedup: with units, 1/speedup of the multiplications (or of the time) stay; >= 1.
        cost: what a unit's importance is divided by: "params", "flops" or "latency".
        unit_multiple: keep units in multiples of it; None: with a speedup, in those that kernels
            like, else in any number.
        units_and_zeros: whole units until speedup is met, then single weights until sparsity is.
        cleanup: whether units without weights are cut out; None: unless N:M or masks are given.
        unread_inputs: "faster" or "smaller", when clean-up drops unread inputs.
        target: name in ``TARGETS`` of the runtime that the result is for: it sets defaults.
        permute: with N:M, reorder inputs so that the pattern loses less.
        cbs_select: with cbs, whether masks are searched.
        cbs_update: with cbs, whether the weights that remain are updated.
        quantize: "int8", or None: what the layers of the result compute in.
        format: "dense", "sparse" or "packed".
        labels: one per calibration sample, a path or an array.
        bound: whether the report bounds the output gap.
        measure: whether latency is measured; None: briefly, True: for a second.
        masks: .npz file to write the keep masks to (True = stays).
        apply_masks: .npz file of masks that say which weights are removed.
        force: whether files may be overwritten.
        dry_run: whether everything is done but writing.
    """

    method: str
    sparsity: SparsityLike | None
    max_error: float | None
    max_accuracy_drop: float | None
    time_budget: float | str | None
    importance: str | None
    granularity: str | None
    speedup: float | None
    cost: str
    unit_multiple: int | None
    units_and_zeros: bool
    cleanup: bool | None
    unread_inputs: str
    target: str | None
    permute: bool
    cbs_select: bool
    cbs_update: bool
    quantize: str | None
    format: str
    labels: LabelsLike | None
    bound: bool
    measure: bool | None
    masks: PathLike | None
    apply_masks: PathLike | None
    force: bool
    dry_run: bool
