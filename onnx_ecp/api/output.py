"""From a pruned state to a model, and from a model to files."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_ecp import graph as modelling
from onnx_ecp.api.options import Options
from onnx_ecp.api.output_paths import Named, check_output_paths, same_file
from onnx_ecp.api.preparation import Job
from onnx_ecp.data import calibration as calibrating
from onnx_ecp.errors import ModelError, OutputError
from onnx_ecp.graph import Model
from onnx_ecp.graph.loading import check_unchanged
from onnx_ecp.graph.staging import Staging
from onnx_ecp.graph.validation import passes_fully
from onnx_ecp.layers import Layer, find_layers
from onnx_ecp.pruning.loop import Pruned
from onnx_ecp.report import check_target
from onnx_ecp.runtime.lazy import LazyArrays
from onnx_ecp.statistics.layerwise import Network
from onnx_ecp.statistics.observer import State
from onnx_ecp.units.shrink import Smaller, cleaned, smaller
from onnx_ecp.units.stages import PrunedUnits


def check_outputs(
    source: Model,
    calibration: Any,
    output: str | Path | None,
    reports: Sequence[str | Path],
    options: Options,
) -> None:
    """Find out before the long work what cannot, or must not, be written in the end.

    Raises:
        UsageError: a file would replace another, or what is read; a report has no known format.
        OutputError: a file cannot be written.
    """
    named = (("OUTPUT", output), ("--masks", options.masks), *(("--report", x) for x in reports))
    results = [(what, path) for what, path in named if path is not None]
    check_output_paths(results, sources_of(source, calibration, output, options))
    for path in (output, options.masks):
        if path is not None and not options.dry_run:
            modelling.check_output(path, force=options.force, source=source.path)
    for path in reports:
        check_target(path, force=options.force)


def sources_of(
    source: Model, calibration: Any, output: str | Path | None, options: Options
) -> Iterator[Named]:
    """The files that are read; not the model where OUTPUT is to replace it, which --force allows.

    Masks and reports must not replace it, whatever is said, nor may anything its external data.
    """
    if source.path is not None:
        if output is None or not same_file(output, source.path):
            yield "the model", source.path
        for file in modelling.data_files(source.proto, source.path.parent):
            yield "external data of the model", file
        if calibration is None:
            calibration = calibrating.sidecar(source.path)
    if isinstance(calibration, str | Path):
        yield "the calibration data", calibrating.file_of(calibration)
    if isinstance(options.labels, str | Path):
        yield "the labels", options.labels
    if options.apply_masks is not None:
        yield "the masks to apply", options.apply_masks


def finished(ready: Job, pruned: Pruned, options: Options) -> Smaller:
    """The model that the pruned network makes: cut where units went, cleaned up where they died.

    Raises:
        TargetError: fewer units could go than were to.
    """
    source, network, step = ready.source, ready.network, ready.step
    large = modelling.stored_size(source.proto) > modelling.LARGEST_FILE
    cleans = step is None and options.cleans and _any_dead(network, pruned.state)
    late = step is None and options.format == "dense"
    masked, created = stored(source, network, pruned.state, late=late)
    if step is not None:
        assert isinstance(pruned, PrunedUnits), "a UnitStep gives them"
        step.check_reached(pruned.keep)
        return smaller(source, masked, network, step.structure, pruned, options.session)
    if cleans and large:
        why = ("units without weights were left in: the model takes more than 2 GB.",)
        return Smaller(masked, created, warnings=why)
    if not cleans:
        return Smaller(masked, created)
    return cleaned(source, masked, created, network, options.unread_inputs, options.session)


def _any_dead(network: Network, state: State) -> bool:
    """Whether pruning left any row or column of a layer without a weight."""
    return any(
        not np.array_equal(keep, network.original.keep[name])
        and not (keep.any(axis=0).all() and keep.any(axis=1).all())
        for name, keep in state.keep.items()
    )


def stored(
    source: Model, network: Network, state: State, *, late: bool = False
) -> tuple[Model, frozenset[str]]:
    """A copy of the model in which the new weights and biases stand, and who got a new bias.

    With ``late``, new values of external initializers do not enter the copy: see ``Model.late``.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(modelling.decode_sparse(source.proto))
    external = {t.name for t in proto.graph.initializer if late and modelling.is_external(t)}
    created, written, renewed = set(), set(), []
    for layer in network.layers:
        tensor = layer.weight.tensor
        changed = tensor not in written and not np.array_equal(
            state.weights[tensor], network.original.weights[tensor]
        )
        written.add(tensor)
        weight = state.weights[tensor] if changed and tensor not in external else None
        if changed and tensor in external:
            renewed.append(tensor)
        if layer.store(proto, weight, state.shifts[layer.name], source.base):
            created.add(layer.name)
    values = LazyArrays(renewed, state.weights.__getitem__)
    return Model(proto, None, source.base, values), frozenset(created)


def held(result: Model) -> Model:
    """A model whose values are all in memory: its files, if it has any, may go."""
    if result.path is None:
        return result
    proto = onnx.ModelProto()
    proto.CopyFrom(result.proto)
    onnx.load_external_data_for_model(proto, str(result.base))
    return replace(result, proto=proto, path=None, base=None)


def stored_masks(layers: Sequence[Layer], state: State) -> dict[str, np.ndarray]:
    """Keep masks by stored tensor, in its own layout."""
    by_tensor = {layer.weight.tensor: layer.weight for layer in layers}
    return {name: weight.layout(state.keep[name]) for name, weight in by_tensor.items()}


def staged(
    result: Model,
    source: Model,
    layers: Sequence[Layer],
    output: Path,
    options: Options,
    staging: Staging,
) -> Model:
    """Write the result beside its place, and read it back from there.

    Raises:
        OutputError: it cannot be written.
    """
    names = {layer.name for layer in layers}
    path, *_ = modelling.stage(
        result.proto,
        output,
        staging,
        base=source.base,
        late=result.late,
        encoding=options.format,
        # Not the tensors of the layers as they were: a cut may have given one a copy of its own.
        pruned={x.weight.tensor for x in find_layers(result.proto).layers if x.name in names},
    )
    try:
        written = modelling.load(path)
        check_as_given(source.proto, written.proto)
        check_unchanged(source)
        return written
    except ModelError as error:  # it names the file where it lies for now
        here, there = (modelling.printable(x, 200) for x in (path, output))
        raise ModelError(error.message.replace(here, there), hint=error.hint) from error


def check_as_given(given: onnx.ModelProto, result: onnx.ModelProto) -> None:
    """Refuse a result that the checker of its own opset refuses, where it took the given model.

    Raises:
        ModelError: it does.
    """
    # Shape inference does not know sparse initializers; what it takes them for is dense.
    dense = modelling.decode_sparse(result)
    if not passes_fully(dense) and passes_fully(modelling.decode_sparse(given)):
        raise ModelError(
            "the result does not pass the checker of its own opset, as the given model does.",
            hint="Report it with the model, please. --granularity weight and --no-cleanup leave "
            "the graph as it is.",
        )


def archived(masks: Mapping[str, np.ndarray]) -> bytes:
    """Keep masks as the content of a .npz file, whatever the names of the tensors are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, mask in masks.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, mask, allow_pickle=False)
    return buffer.getvalue()


def written(path: Path, content: bytes, staging: Staging) -> None:
    """Write a file beside its place.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        staging.write(path, [content])
    except OSError as error:
        raise OutputError(
            f"{modelling.printable(path, 200)}: {error.strerror or error}.",
            hint="Free some space or choose another directory; nothing was written.",
        ) from error
