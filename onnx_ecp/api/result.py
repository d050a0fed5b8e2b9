"""From an outcome to the model that is written: int8, a target, files beside their places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx_ecp.api import quantise
from onnx_ecp.api.outcome import Outcome
from onnx_ecp.api.output import held, staged
from onnx_ecp.api.task import Task
from onnx_ecp.evaluation.targets import taken
from onnx_ecp.graph import Model, stale_data
from onnx_ecp.graph.staging import Staging
from onnx_ecp.pruning.loop import Pruned
from onnx_ecp.pruning.search import Point
from onnx_ecp.quantising.stage import Quantised
from onnx_ecp.units.shrink import Smaller


@dataclass(frozen=True)
class Written:
    """A result that is loaded from beside its place, or held in memory.

    Args:
        made: the model as it will be loaded, and what happened to its units.
        floats: the model before anything became int8.
        int8: what int8 took away and gave, where asked for.
        curve: points of a search, or of a gate, of the result.
        pruned: where pruning ended: masks and shifts; the weights are in the model.
        place: the file that it will be; None where nothing is written.
        stale: files of external data that the result no longer needs.
    """

    made: Smaller
    floats: Model
    int8: Quantised | None
    curve: tuple[Point, ...]
    pruned: Pruned
    place: Path | None
    stale: tuple[Path, ...]

    @property
    def model(self) -> Model:
        """The result."""
        return self.made.model

    @property
    def final(self) -> Model:
        """The result as it is once it stands in its place, or in memory."""
        if self.place is None:
            return held(self.model)
        return replace(self.model, path=self.place, base=self.place.parent)


@contextmanager
def written_beside(
    task: Task, outcome: Outcome, output: str | Path | None, staging: Staging
) -> Iterator[Written]:
    """Make the final form of the result, and write it beside its place.

    Raises:
        OutputError: it cannot be written.
        ModelError: what was written cannot be loaded.
    """
    options, ready, data = task.options, task.ready, task.data
    floats, curve, int8 = outcome.made.model, outcome.curve, None
    result = floats
    if options.quantize is not None:
        int8 = quantise.in_int8(task.given, floats, data, options, task.measure, task.progress)
        result = int8.model
        curve = tuple(
            quantise.gate(task.given, result, point, data, options, task.measure) for point in curve
        )
    result = taken(result, options.target)
    place = None if output is None or options.dry_run else Path(output)
    stale: list[Path] = []
    with ExitStack() as aside:
        if place is not None:
            stale = stale_data(place, result.proto, ready.source.base, ready.source.path)
            result = staged(result, ready.source, task.network.layers, place, options, staging)
        elif result.late:  # its weights are too many for memory
            folder = aside.enter_context(TemporaryDirectory(prefix="onnx-ecp-"))
            passing, here = aside.enter_context(Staging()), Path(folder, "r.onnx")
            result = staged(result, ready.source, task.network.layers, here, options, passing)
        state = replace(outcome.pruned.state, weights=task.network.original.weights)
        yield Written(
            made=replace(outcome.made, model=result),
            floats=floats,
            int8=int8,
            curve=curve,
            pruned=replace(outcome.pruned, state=state),
            place=place,
            stale=tuple(stale),
        )
