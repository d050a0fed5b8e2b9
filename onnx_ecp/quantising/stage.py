"""The stage behind pruning: which layers become int8, compensated, and what it costs.

All layers that can be are quantised first. Where that moves the outputs further than is allowed on
the validation samples, those that cost most go back to floats, as few as do: each is tried in int8
alone, and how many must go back is found by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_ecp.data.calibration import Batch, Calibration
from onnx_ecp.errors import TargetError
from onnx_ecp.evaluation.compare import fitting, measure_gap
from onnx_ecp.graph import Model, printable
from onnx_ecp.layers import Layer, Skip, find_layers
from onnx_ecp.quantising.candidates import candidates, prepared
from onnx_ecp.quantising.compensation import Fitted, Settings, compensated, observed
from onnx_ecp.quantising.rows import Int8Row
from onnx_ecp.quantising.writing import in_int8, integers_of, ranges_of, with_float_weights, written
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.columns import Measure

# Why a layer that can be int8 is not.
COSTLY = "int8 moved the outputs too far on the validation samples, through this layer among most"
LEFT = "onnxruntime.quantization leaves its input or its weight in floats"
# What is said of a layer whose integers the writer has changed.
ROOM = "its weights were rounded once more, to make room for its bias"


@dataclass(frozen=True)
class Quantised:
    """A model in int8.

    Args:
        model: the result.
        pruned: what was quantised, in floats.
        plain: the same layers in int8, every value rounded to the nearest.
        compensated: whether ``model`` is the compensated one.
        rows: of all layers, in graph order.
    """

    model: Model
    pruned: Model
    plain: Model
    compensated: bool
    rows: tuple[Int8Row, ...]


@dataclass(frozen=True)
class Samples:
    """What the stage looks at.

    Args:
        train: ranges of activations and compensation come from them.
        validation: they judge both, and say which layers stay in floats.
        allowed: relative error that int8 may add on the validation samples.
        measure: how errors of outputs are told.
    """

    train: Calibration
    validation: Calibration
    allowed: float
    measure: Measure

    def batches(self) -> Iterator[Batch]:
        """The batches that give the ranges."""
        return self.train.batches(fitting(self.train))


@dataclass(frozen=True)
class _Tried:
    """Some layers in int8: rounded to the nearest, and compensated."""

    plain: Model
    made: Model
    fits: Mapping[str, Fitted]
    notes: Mapping[str, str]


def quantised(
    pruned: Model,
    samples: Samples,
    settings: Settings,
    left_alone: Callable[[str], str] = lambda name: "",
    progress: Progress = silent,
) -> Quantised:
    """Put the layers of a model into int8, all that are worth it.

    Args:
        pruned: the model.
        samples: to calibrate and to judge.
        settings: how the network is observed.
        left_alone: why a layer of this name is to stay in floats; empty where it need not.
        progress: called as work goes on.

    Raises:
        TargetError: no layer can be int8, or none without moving the outputs too far.
        ModelError: the model cannot be quantised at all.
    """
    model = prepared(pruned, next(samples.train.batches(2)), settings.session)
    layers, skips = candidates(model.proto, left_alone)
    once = written(model.proto, layers, samples.batches()) if layers else model.proto
    skips += [Skip(x.name, x.op, LEFT) for x in layers if not in_int8(once, x)]
    layers = [layer for layer in layers if in_int8(once, layer)]
    if not layers:
        listed = "; ".join(f"{printable(s.name)} ({s.op}): {s.reason}" for s in skips[:3])
        raise TargetError(
            f"no layer can be int8{f': {listed}' if listed else '.'}", hint="Leave --quantize out."
        )

    def error(result: Model) -> float:
        return error_of(model, result, samples, settings)

    tried = _tried(model, layers, once, samples, settings, progress)
    first, stays = tried.fits, list[Layer]()
    plain, made = error(tried.plain), error(tried.made)
    if min(plain, made) > samples.allowed:
        ranges = ranges_of(tried.plain.proto, model.proto)

        def cost(some: Sequence[Layer]) -> float:
            one = samples.train.batches(1)  # the ranges are known
            proto = written(model.proto, some, [next(one)], ranges=ranges)
            return error(Model(proto, None, None))

        ranked = _ranked(layers, cost, progress)
        stays = ranked[: _fewest(ranked, cost, samples.allowed)]
        names = {layer.name for layer in stays}
        rest = [layer for layer in layers if layer.name not in names]
        if not rest:
            raise TargetError(
                f"int8 moves the outputs by more than {samples.allowed:.3g} of their spread on the "
                "validation samples, whichever layers stay in floats.",
                hint="Leave --quantize out, or give more calibration data.",
            )
        once = written(model.proto, rest, samples.batches())
        tried = _tried(model, rest, once, samples, settings, progress)
        plain, made = error(tried.plain), error(tried.made)
    better = made <= plain
    rows = _rows(model.proto, skips, {x.name for x in stays}, first, tried, better)
    return Quantised(tried.made if better else tried.plain, model, tried.plain, better, tuple(rows))


def error_of(a: Model, b: Model, samples: Samples, settings: Settings) -> float:
    """Relative error of the outputs of b against those of a on the validation samples."""
    gap = measure_gap(
        a,
        b,
        samples.validation,
        measure=samples.measure,
        batch_size=settings.batch,
        **settings.session,
    )
    return gap.relative_error


def _ranked(
    layers: Sequence[Layer], cost: Callable[[Sequence[Layer]], float], progress: Progress
) -> list[Layer]:
    """The layers, the one that costs most when it alone is in int8 first."""
    costs = {}
    for done, layer in enumerate(layers, 1):
        check_deadline()
        costs[layer.name] = cost([layer])
        progress("int8 alone", done, len(layers))
    return sorted(layers, key=lambda layer: -costs[layer.name])


def _fewest(
    ranked: Sequence[Layer], cost: Callable[[Sequence[Layer]], float], allowed: float
) -> int:
    """How many of the layers, the costliest first, must stay in floats."""
    few, many = 0, len(ranked)
    while many - few > 1:
        middle = (few + many) // 2
        if cost(ranked[middle:]) > allowed:
            few = middle
        else:
            many = middle
    return many


def _tried(
    model: Model,
    layers: Sequence[Layer],
    plain: onnx.ModelProto,
    samples: Samples,
    settings: Settings,
    progress: Progress,
) -> _Tried:
    """These layers in int8, with the ranges of ``plain``, in which they are not compensated."""
    floats = Model(with_float_weights(plain, model.proto), None, None)
    wanted = {layer.name for layer in layers}
    behind = [layer for layer in find_layers(floats.proto).layers if layer.name in wanted]
    reached = {layer.name for layer in behind}
    layers = [layer for layer in layers if layer.name in reached]
    parts = samples.train, samples.validation
    before = observed(model, layers, *parts, settings, reverse=settings.reverse)
    after = observed(floats, behind, *parts, settings, reverse=False, rounds=True)
    room = {x.name: _scale(plain, x) for x in layers}
    fits = compensated(before, after, room, progress)
    before.observer.close()
    after.observer.close()
    grid = onnx.ModelProto()
    grid.CopyFrom(model.proto)
    done: set[str] = set()
    for layer in layers:
        fit, tensor = fits[layer.name], layer.weight.tensor
        layer.store(grid, None if tensor in done else fit.weight, fit.shift)
        done.add(tensor)
    stored = [layer for layer in find_layers(grid).layers if layer.name in wanted]
    scales = {x.weight.tensor: fits[x.name].scale for x in reversed(layers)}
    # Where a bias became an Add of its own, it reads a tensor whose range is not known yet.
    is_known = len(grid.graph.node) == len(model.proto.graph.node)
    batches = [next(samples.train.batches(1))] if is_known else samples.batches()
    made = written(grid, stored, batches, scales, ranges_of(plain, model.proto))
    notes = {x.name: ROOM for x in layers if not _is_exact(made, x, fits[x.name])}
    return _Tried(Model(plain, None, None), Model(made, None, None), fits, notes)


def _scale(made: onnx.ModelProto, layer: Layer) -> np.ndarray:
    """(out,): the scales that the writer has taken."""
    found = integers_of(made, layer.weight.tensor)
    assert found is not None, "the layer was to be quantised"
    return np.broadcast_to(found[1], layer.shape[:1])


def _is_exact(made: onnx.ModelProto, layer: Layer, fit: Fitted) -> bool:
    """Whether the writer's rounding of a weight on its grid was the identity."""
    found = integers_of(made, layer.weight.tensor)
    assert found is not None, "the layer was to be quantised"
    integers = layer.weight.matrix(found[0].astype(np.float32))
    scale = np.broadcast_to(found[1], layer.shape[:1])
    return np.array_equal(integers * scale[:, None], layer.weight.matrix(fit.weight))


def _rows(
    proto: onnx.ModelProto,
    skips: Sequence[Skip],
    stays: set[str],
    first: Mapping[str, Fitted],
    tried: _Tried,
    compensated: bool,
) -> Iterator[Int8Row]:
    """What became of every layer."""
    why = {skip.name: skip.reason for skip in skips} | dict.fromkeys(stays, COSTLY)
    for layer in find_layers(proto).layers:
        fit = (first if layer.name in stays else tried.fits).get(layer.name)
        note = why.get(layer.name, "")
        if not note and compensated:
            note = tried.notes.get(layer.name, "")
        yield Int8Row(
            layer.name,
            layer.op,
            int(np.prod(layer.shape)),
            layer.name not in why,
            None if fit is None else fit.error,
            note,
        )
