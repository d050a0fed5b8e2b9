"""From a network without some of its units to a smaller model, and the proof that both agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from onnx_ecp import graph as modelling
from onnx_ecp.errors import ModelError, ProviderError, TargetError
from onnx_ecp.evaluation.work import Work, work
from onnx_ecp.graph import Model
from onnx_ecp.graph.shapes import shapes_of_a_run
from onnx_ecp.layers import find_layers
from onnx_ecp.pruning.selection import NM
from onnx_ecp.runtime.lazy import LazyArrays
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.session import Session
from onnx_ecp.statistics.layerwise import Network
from onnx_ecp.statistics.sharding import plain_grams
from onnx_ecp.units.cleanup import at_least_one, clean_up, largest_difference, tolerance
from onnx_ecp.units.cutting import cut, rearranged, store
from onnx_ecp.units.groups import Group, Structure, find_structure
from onnx_ecp.units.head_rotation import heads_of, turned
from onnx_ecp.units.permutation import best_order
from onnx_ecp.units.rows import UnitRow, unit_rows
from onnx_ecp.units.stages import PrunedUnits, kept_weights

Settings = Mapping[str, object]

# Largest difference of outputs, as a share of their largest value, between the smaller model and
# the one with zeros: rounding of other summation orders, far below what a wrong cut would do.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Smaller:
    """A model that lost units.

    Args:
        model: the result.
        created: names of the layers that had no bias and have one now.
        rows: what every group lost.
        before: what the layers took.
        after: what they take now.
        warnings: what the user must know, one sentence each.
    """

    model: Model
    created: frozenset[str]
    rows: tuple[UnitRow, ...] = ()
    before: Work | None = None
    after: Work | None = None
    warnings: tuple[str, ...] = ()

    def speed(self, verdict: str | None = None) -> str:
        """What the result does for latency, one sentence; empty where nothing became smaller.

        Args:
            verdict: what a measurement says of the result, see ``Latency``; None where none was
                taken.
        """
        if self.before is None or self.after is None:
            return ""
        need = f"The layers need {self.after.flops / max(self.before.flops, 1):.3f} of the"
        if verdict in (None, "faster"):
            return (
                f"{need} multiplications: latency follows that wherever they take most of the time."
            )
        return (
            f"{need} multiplications, but by the clock the result is {verdict} here: on this "
            "machine they are not what takes the time."
        )


def units_of(
    source: Model, network: Network, frozen: Mapping[str, str], settings: Settings
) -> Structure:
    """The units of the layers that are observed.

    Args:
        source: the model.
        network: its layers under observation.
        frozen: by layer name, why a layer keeps its rows.
        settings: of the ``Session``.

    Raises:
        TargetError: no unit can be removed.
    """
    dense = replace(source, proto=modelling.decode_sparse(source.proto))
    feeds = next(network.train.as_given.batches(2)).feeds
    shapes, held = shapes_of_a_run(dense, feeds, **settings), dict(frozen)
    while True:
        structure = find_structure(dense.proto, network.layers, shapes, held)
        more = _not_to_be_cut(dense, structure, feeds, settings)
        if not more.keys() - held.keys():
            break
        held = more | held
    if not structure.units:
        layers = find_layers(dense.proto).layers  # those too that cannot be observed
        refusals = find_structure(dense.proto, layers, shapes, held).refusals
        known = {x.name for x in structure.refusals}
        refusals = (*(x for x in refusals if x.name not in known), *structure.refusals)
        reasons = "; ".join(f"{modelling.printable(x.name)} ({x.op}): {x.reason}" for x in refusals)
        raise TargetError(f"no unit can be removed: {reasons}.", hint="Use --granularity weight.")
    return structure


def biases_of(source: Model, network: Network, structure: Structure) -> dict[str, np.ndarray]:
    """By name of the layers whose units are summed, their bias (out,)."""
    dense, found = modelling.decode_sparse(source.proto), dict[str, np.ndarray]()
    for layer in network.layers:
        if structure.silent[layer.name].any():
            bias = layer.bias_values(dense, source.base)
            assert bias is not None, "only those that are the same everywhere may become zero"
            found[layer.name] = bias
    return found


def _not_to_be_cut(
    model: Model, structure: Structure, feeds: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, str]:
    """By name of the layers without whose units the model cannot be run, why; else empty."""

    def fault(keep: np.ndarray) -> str:
        def run() -> float:
            proto = cut(model.proto, structure, at_least_one(structure, keep), model.base)
            Session(proto, base=model.base, **settings).run(feeds)  # type: ignore[arg-type]
            return 0.0

        return _fault(run)

    half = np.arange(structure.units) % 2 == 0
    if not structure.units or not fault(half):
        return {}
    _, culprits = _all_but_culprits(structure, half, fault)
    return {
        name: f"without some of them ONNX Runtime does not run the model: {why}"
        for group, why in culprits
        for name in group.producers
    }


def _fault(gap: Callable[[], float], limit: float = 0.0) -> str:
    """What is wrong with a model: it cannot be run, or the gap is too large; empty if nothing."""
    try:
        found = gap()
    except (ModelError, ProviderError) as error:
        check_deadline()  # what ended the time limit ends all
        return error.message
    return "" if found <= limit else f"outputs differ by {found:.2g} of their largest value"


def _all_but_culprits(
    structure: Structure, keep: np.ndarray, fault: Callable[[np.ndarray], str]
) -> tuple[np.ndarray, list[tuple[Group, str]]]:
    """What stays (units,) bool where only groups lose units that can, and the others with why."""
    rest, culprits = np.ones_like(keep), list[tuple[Group, str]]()
    for group in structure.groups:
        trial = rest.copy()
        trial[group.units] = keep[group.units]
        why = "" if trial.all() else fault(trial)
        if why:
            culprits.append((group, why))
        else:
            rest = trial
    return rest, culprits


def smaller(
    source: Model,
    masked: Model,
    network: Network,
    structure: Structure,
    pruned: PrunedUnits,
    settings: Settings,
) -> Smaller:
    """Cut the units out of a model; those of groups that cannot be cut stay in it as zeros.

    Args:
        source: the model.
        masked: the same with zeros in the place of the units: what the result must agree with.
        network: its layers under observation.
        structure: its units.
        pruned: which of them stay, and the weights that made good for the others.
        settings: of the ``Session``.
    """
    dense = modelling.decode_sparse(source.proto)
    feeds = [batch.feeds for batch in network.validation.as_given.batches(network.size)]

    def without(keep: np.ndarray) -> tuple[Model, frozenset[str]]:
        proto = cut(dense, structure, keep, source.base)
        weights, shifts = kept_weights(network, structure, pruned.state, keep)
        created = store(proto, network.layers, weights, shifts, source.base)
        return Model(proto, None, source.base), created

    def fault(keep: np.ndarray) -> str:
        def gap() -> float:
            return largest_difference(masked, without(keep)[0], feeds, **settings)

        return _fault(gap, tolerance(masked, ROUNDING))

    keep, warnings = pruned.keep, tuple[str, ...]()
    if fault(keep):
        keep, culprits = _all_but_culprits(structure, keep, fault)
        warnings = tuple(
            f"units of {modelling.printable(group.name)} are zeros and stayed in the file: without "
            f"them {why}."
            for group, why in culprits
        )
    model, created = without(keep)
    made = Smaller(model, created, tuple(unit_rows(structure, keep)), warnings=warnings)
    return _measured(source, made, feeds[0], settings)


def cleaned(
    source: Model,
    pruned: Model,
    created: frozenset[str],
    network: Network,
    unread: str,
    settings: Settings,
) -> Smaller:
    """Take out of a pruned model what does nothing any longer; see ``cleanup``."""
    names = {layer.name for layer in network.layers}
    few = next(network.train.as_given.batches(2)).feeds
    judged = (batch.feeds for batch in network.validation.as_given.batches(network.size))
    with TemporaryDirectory(prefix="onnx-ecp-", ignore_cleanup_errors=True) as folder:
        whole = _written(pruned, Path(folder)) if pruned.late else pruned
        done = clean_up(whole, names, [few, *judged], unread, **settings)
        if done.refused:
            return Smaller(pruned, created, warnings=(f"nothing was cleaned up: {done.refused}.",))
        if not done.rows:
            return Smaller(pruned, created)
        made = _measured(source, Smaller(done.model, created, done.rows), few, settings)
        return replace(made, model=_restored(done.model, pruned)) if pruned.late else made


def _written(model: Model, folder: Path) -> Model:
    """A model whose new values are in files: ONNX Runtime maps them, none are in memory."""
    path = folder / "pruned.onnx"
    modelling.save(model.proto, path, base=model.base, late=model.late)
    proto = onnx.load(str(path), load_external_data=False)
    return Model(proto, None, folder)


def _restored(made: Model, given: Model) -> Model:
    """A model made of one that was written, with what was not changed where it was before."""
    before = {tensor.name: tensor for tensor in given.proto.graph.initializer}
    late = []
    for tensor in made.proto.graph.initializer:
        if modelling.is_external(tensor) and tensor.name in before:
            tensor.CopyFrom(before[tensor.name])
            late += [tensor.name] if tensor.name in given.late else []
    return Model(made.proto, None, given.base, LazyArrays(late, given.late.__getitem__))


def with_order(
    given: Model,
    network: Network,
    patterns: Mapping[str, NM],
    scores: Mapping[str, np.ndarray],
    settings: Settings,
) -> tuple[Model, dict[str, str]]:
    """A model with its units in an order that suits N:M patterns; see ``permutation``.

    Args:
        given: the model.
        network: its layers under observation.
        patterns: by layer name, for the layers that get one.
        scores: by layer name, importance (out, in).
        settings: of the ``Session``.

    Returns:
        A model that computes the same, and by layer name what the order gains.
    """
    dense = replace(given, proto=modelling.decode_sparse(given.proto))
    few = next(network.train.as_given.batches(2)).feeds
    shapes = shapes_of_a_run(dense, few, **settings)
    structure = find_structure(dense.proto, network.layers, shapes, inside=False)
    order, gains = best_order(structure, network.layers, scores, patterns)
    if not gains:
        return given, {}
    model = replace(dense, proto=rearranged(dense.proto, structure, order, given.base))
    feeds = [few, *(batch.feeds for batch in network.validation.as_given.batches(network.size))]
    gap = largest_difference(given, model, feeds, **settings)
    if not gap <= tolerance(given, ROUNDING):
        why = f"not reordered: outputs would differ by {gap:.2g} of their largest value"
        return given, dict.fromkeys(gains, why)
    return model, {
        name: f"inputs reordered: the pattern keeps {100 * x.after:.1f} % of the importance, "
        f"{100 * x.before:.1f} % in the order given"
        for name, x in gains.items()
    }


def with_turned_heads(
    source: Model, network: Network, structure: Structure, settings: Settings
) -> Model:
    """The model with its attention heads in bases of which the last dimensions carry least.

    Args:
        source: the model.
        network: its layers under observation.
        structure: its units.
        settings: of the ``Session``.

    Returns:
        A model that computes the same; the given one where there are no heads, or where turning
        them would change more than rounding does.
    """
    heads = heads_of(structure, network.layers)
    if not heads:
        return source
    dense = replace(source, proto=modelling.decode_sparse(source.proto))
    grams = plain_grams(network, {name for x in heads for name in (x.first, x.second)})
    model = replace(dense, proto=turned(dense.proto, heads, network.layers, grams, source.base))
    feeds = [batch.feeds for batch in network.validation.as_given.batches(network.size)]
    gap = largest_difference(source, model, feeds, **settings)
    return model if gap <= tolerance(source, ROUNDING) else source


def _measured(
    source: Model, made: Smaller, feeds: Mapping[str, np.ndarray], settings: Settings
) -> Smaller:
    before = work(source, feeds, settings)
    return replace(made, before=before, after=work(made.model, feeds, settings))
