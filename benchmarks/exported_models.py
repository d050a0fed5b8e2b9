"""Every affine weight of today's exports has a sensitivity, and it agrees with torch's autograd.

Ten architectures, both exporters of PyTorch, each file as exported and as ONNX Runtime (basic,
extended) and its transformers optimizer rewrite it. The module itself, in float64, says which
affine weights there are and what their squared gradients are: sums over samples and seeds of
(dy/dW)^2, which is `ww` of docs/method.md with `--positions reduce`. A row of a matrix in the file
is recognised by its direction, so merged projections and folded normalizations are followed.

    python -m pip install torch==2.13.0 onnxscript      # else it says what is missing, and ends

Usage: python benchmarks/exported_models.py [--fixtures] [ARCHITECTURE ...]
``--fixtures`` writes the files to tests/fixtures instead, without what exporters say of themselves.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from outcome import Claim, Row, finish, publish, table

from onnx_ecp.data.calibration import Batch
from onnx_ecp.graph import Model
from onnx_ecp.layers import find_layers
from onnx_ecp.statistics.moments import reduce_positions
from onnx_ecp.statistics.observer import Observer, State, original_state

try:
    import onnxscript  # noqa: F401  # what torch's newer exporter needs
    import torch
    from torch import Tensor, nn
    from torch_modules import ARCHITECTURES, HEADS, WIDTH, Conv1D, made
except ImportError as missing:
    print(f"skipped: {missing}; pip install torch==2.13.0 onnxscript")
    sys.exit(0)

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
SAMPLES, PROBES = 3, 4
# Two directions are the same if no entry differs by more.
SAME = 1e-5
# Largest difference from autograd in double precision, relative to a layer's largest value.
TOLERANCE = 1e-5
UNEXPLAINED = "unexplained"

Feeds = dict[str, np.ndarray]
Optimiser = Callable[[onnx.ModelProto, str], onnx.ModelProto]


def main() -> int:
    names = [a for a in sys.argv[1:] if not a.startswith("-")] or list(ARCHITECTURES)
    if "--fixtures" in sys.argv:
        write_fixtures(names)
        return 0
    rows = {name: list(compared(name)) for name in names}
    everything = [row for some in rows.values() for row in some]
    publish("exported_models", everything)
    publish("exported_models_summary", [summary(name, some) for name, some in rows.items()])
    print(table(everything))
    return finish(claim for name, some in rows.items() for claim in claims(name, some))


def summary(name: str, rows: list[Row]) -> Row:
    """One row for all files of an architecture."""
    return {
        "architecture": name,
        "files": len(rows),
        "affine weights": rows[0]["weights"],
        "least sensitivity %": min(row["sensitivity %"] for row in rows),
        "largest error": max(row["error"] for row in rows),
        "the rest": "; ".join(dict.fromkeys(row["the rest"] for row in rows if row["the rest"])),
    }


def claims(name: str, rows: list[Row]) -> Iterator[Claim]:
    whole = sum(row["sensitivity %"] == 100 for row in rows)
    reasons = " / ".join(dict.fromkeys(str(row["the rest"]) for row in rows if row["the rest"]))
    text = f"{name}: all affine weights of {whole} of {len(rows)} files have a sensitivity"
    named = UNEXPLAINED not in reasons
    yield Claim(f"{text}; of the rest: {reasons}" if reasons else text, named)
    worst = max(row["error"] for row in rows)
    yield Claim(f"{name}: largest error {worst:.1e}, at most {TOLERANCE:.0e}", worst <= TOLERANCE)


def compared(name: str) -> Iterator[Row]:
    """One row per exporter and optimiser."""
    module = made(name)
    torch.manual_seed(1)
    inputs = dict(ARCHITECTURES[name].inputs(SAMPLES))
    truth = Truth.of(module, inputs)
    for exporter, export in exporters(module).items():
        exported = export(module, inputs)
        for optimiser, optimise in OPTIMISERS.items():
            seen = observe(optimise(exported, name), truth)
            yield {"architecture": name, "exporter": exporter, "optimiser": optimiser} | seen


# What torch says.


@dataclass(frozen=True)
class Truth:
    """A module's affine weights and their squared gradients, in double precision.

    Args:
        weights: by name, (out, in).
        squares: by name, (out, in), the sum of (dy/dW)^2 over samples and seeds.
        feeds: the inputs.
        output: y.
        seeds: (P, *shape of y).
    """

    weights: dict[str, np.ndarray]
    squares: dict[str, np.ndarray]
    feeds: Feeds
    output: np.ndarray
    seeds: np.ndarray

    @staticmethod
    def of(module: nn.Module, inputs: Mapping[str, Tensor]) -> Truth:
        """By one reverse pass per sample and seed."""
        exact = untied(copy.deepcopy(module).double())
        doubled = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
        y = exact(*doubled.values())
        seeds = torch.randint(2, (PROBES, *y.shape)).double() * 2 - 1
        parameters = affine(exact)
        squares = {name: torch.zeros_like(matrix(w)) for name, (w, matrix) in parameters.items()}
        for n in range(SAMPLES):
            y = exact(*(x[n : n + 1] for x in doubled.values()))
            for v in seeds[:, n : n + 1]:
                wanted = [w for w, _ in parameters.values()]
                found = torch.autograd.grad(y, wanted, v, retain_graph=True)
                for (name, (_, matrix)), g in zip(parameters.items(), found, strict=True):
                    squares[name] += matrix(g) ** 2
        return Truth(
            {name: matrix(w).detach().numpy() for name, (w, matrix) in parameters.items()},
            {name: square.numpy() for name, square in squares.items()},
            {name: x.numpy() for name, x in inputs.items()},
            exact(*doubled.values()).detach().numpy(),
            seeds.numpy(),
        )


def untied(module: nn.Module) -> nn.Module:
    """The module with an output matrix of its own where it was the embedding: other gradients."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(part.weight.detach().clone())
    return module


def affine(module: nn.Module) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """By name: the parameters that map inputs to units, and how each is a matrix (out, in)."""
    found: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            found[name] = (part.weight, lambda w: w)
        elif isinstance(part, nn.Conv2d):
            found[name] = (part.weight, lambda w: w.flatten(1))
        elif isinstance(part, Conv1D):
            found[name] = (part.weight, lambda w: w.T)
        elif isinstance(part, nn.MultiheadAttention):
            found[f"{name}.in_proj"] = (part.in_proj_weight, lambda w: w)
        elif isinstance(part, nn.LSTM):
            inner = {k: w for k, w in part.named_parameters() if k.startswith("weight")}
            found |= {f"{name}.{k}": (w, lambda w: w) for k, w in inner.items()}
    return found


# What the file says.


def observe(model: onnx.ModelProto, truth: Truth) -> Row:
    """How much of the truth is seen in a file, and how exactly."""
    found = find_layers(model)
    batch = Batch(0, truth.feeds, SAMPLES)
    observer = Observer(Model(model, None, None), found.layers, batch)
    state = original_state(Model(model, None, None), found.layers)
    (y,) = observer.heads(state, batch).values()
    error, matched = _relative(y, truth.output), 0
    squares = squared_gradients(observer, state, truth)
    for layer in found.layers:
        if layer.name in observer.blocked:
            continue
        weight = layer.weight.matrix(state.weights[layer.weight.tensor])
        expected = recognised(weight, truth)
        known = ~np.isnan(expected).any(axis=1)
        matched += int(known.sum()) * layer.shape[1]
        if known.any():
            error = max(error, _relative(squares[layer.name][known], expected[known]))
    total = sum(w.size for w in truth.weights.values())
    reasons = [f"{s.op}: {s.reason}" for s in found.skips]
    reasons += [f"blocked: {reason}" for reason in observer.blocked.values()]
    return {
        "operators": len({(n.domain, n.op_type) for n in model.graph.node}),
        "affine nodes": len(found.layers) + len(found.skips),
        "weights": total,
        "sensitivity %": 100 * matched / total,
        "error": error,
        "the rest": "" if matched == total else "; ".join(summed_up(reasons)) or UNEXPLAINED,
    }


def squared_gradients(observer: Observer, state: State, truth: Truth) -> Feeds:
    """By layer name, (out, in): the sum of (dy/dW)^2 over samples and seeds."""
    found: Feeds = {}
    for n in range(SAMPLES):  # one by one: where the axis of samples is, differs between files
        batch = Batch(n, {name: x[n : n + 1] for name, x in truth.feeds.items()}, 1)
        (head,) = observer.heads(state, batch)
        seeds = truth.seeds[:, n : n + 1].astype(np.float32)
        seen = observer.pull(state, batch, {head: seeds})
        for name, a in seen.inputs.items():
            ww = reduce_positions(a, seen.adjoints[name], np.zeros((len(a), a.shape[2])), 1).ww
            found[name] = found.get(name, 0) + ww
    return found


def summed_up(reasons: list[str]) -> list[str]:
    return [f"{n} x {text}" for text, n in Counter(reasons).items()]


def recognised(weight: np.ndarray, truth: Truth) -> np.ndarray:
    """(out, in): the squared gradients of a stored matrix, NaN in rows that the module lacks.

    A row that is c times one of the module's has 1 / c^2 of its squared gradients.
    """
    expected = np.full(weight.shape, np.nan)
    for name, w in truth.weights.items():
        if w.shape[1] != weight.shape[1]:
            continue
        ours, theirs = np.linalg.norm(weight, axis=1), np.linalg.norm(w, axis=1)
        directions = (weight / ours[:, None])[:, None] - (w / theirs[:, None])[None]
        same = np.abs(directions).max(axis=2) < SAME
        for i, k in np.argwhere(same):
            expected[i] = truth.squares[name][k] * (theirs[k] / ours[i]) ** 2
    return expected


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# Exporters and optimisers.


def exported(module: nn.Module, inputs: Mapping[str, Tensor], **how: object) -> onnx.ModelProto:
    """What torch.onnx.export writes, with a free batch axis."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        names = {"input_names": list(inputs), "output_names": ["y"]}
        torch.onnx.export(module, tuple(inputs.values()), str(path), **names, **how)
        return onnx.load(path)


def by_tracing(module: nn.Module, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    axes = {name: {0: "n"} for name in [*inputs, "y"]}
    return exported(module, inputs, dynamo=False, dynamic_axes=axes)


def by_dynamo(module: nn.Module, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    shapes = tuple({0: torch.export.Dim("n")} for _ in inputs)
    return exported(module, inputs, dynamo=True, external_data=False, dynamic_shapes=shapes)


def with_norms(module: nn.Module, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Both exporters fold BatchNormalization into convolutions, but for this choice."""
    axes = {name: {0: "n"} for name in [*inputs, "y"]}
    preserve = torch.onnx.TrainingMode.PRESERVE
    return exported(module, inputs, dynamo=False, dynamic_axes=axes, training=preserve)


Exporter = Callable[[nn.Module, Mapping[str, Tensor]], onnx.ModelProto]


def exporters(module: nn.Module) -> dict[str, Exporter]:
    """By name, the ways in which a module is exported."""
    ways: dict[str, Exporter] = {"torchscript": by_tracing, "dynamo": by_dynamo}
    if any(isinstance(part, nn.BatchNorm2d) for part in module.modules()):
        ways["norms"] = with_norms
    return ways


def by_onnxruntime(level: onnxruntime.GraphOptimizationLevel) -> Optimiser:
    def optimise(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
        with tempfile.TemporaryDirectory() as folder:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = level
            options.optimized_model_filepath = str(Path(folder) / "model.onnx")
            options.log_severity_level = 4
            source = model.SerializeToString()
            onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            return onnx.load(options.optimized_model_filepath)

    return optimise


def by_transformers(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """onnxruntime.transformers.optimizer, told what the model is."""
    from onnxruntime.transformers.optimizer import optimize_model

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        kind = ARCHITECTURES[name].fusion
        made = optimize_model(str(path), kind, num_heads=HEADS, hidden_size=WIDTH, opt_level=0)
        return made.model


LEVELS = onnxruntime.GraphOptimizationLevel
OPTIMISERS: dict[str, Optimiser] = {
    "none": lambda model, name: model,
    "ORT basic": by_onnxruntime(LEVELS.ORT_ENABLE_BASIC),
    "ORT extended": by_onnxruntime(LEVELS.ORT_ENABLE_EXTENDED),
    "transformers": by_transformers,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk; what they say is not about us."""
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# Fixtures.


def write_fixtures(names: list[str]) -> None:
    """Files of a few kB, so that tests need no torch.

    The exports, and what optimisers make of them if there is an operator that no earlier file has.
    """
    FIXTURES.mkdir(exist_ok=True)
    for name in names:
        module, seen = made(name), set[tuple[str, str]]()
        torch.manual_seed(1)
        inputs = dict(ARCHITECTURES[name].inputs(SAMPLES))
        for optimiser, optimise in OPTIMISERS.items():
            for exporter, export in exporters(module).items():
                model = stripped(optimise(export(module, inputs), name))
                operators = {(node.domain, node.op_type) for node in model.graph.node}
                if operators - seen or optimiser == "none":
                    way = "" if optimiser == "none" else "-" + optimiser.lower().replace(" ", "-")
                    onnx.save(model, FIXTURES / f"{name}-{exporter}{way}.onnx")
                seen |= operators


def stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without remarks of exporters: where in whose files a node comes from, and shapes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.value_info[:], copy.metadata_props[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    return copy


if __name__ == "__main__":
    sys.exit(main())
