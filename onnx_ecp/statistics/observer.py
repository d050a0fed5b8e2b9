"""The observation service: what the network sees and how sensitive its outputs are, batch by batch.

For every layer it yields the input rows ``a`` (groups, rows, in) and the adjoint rows
``g = v dy/dz`` (P, groups, rows, out per group). Two engines: ``vjp`` (the reverse graph) and
``numeric`` (central finite differences at the shift inputs: any operator, many runs).
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from onnx_ecp.data.calibration import Batch
from onnx_ecp.errors import CalibrationError, ModelError, UsageError, did_you_mean
from onnx_ecp.gradients.cotangents import SQUARED, SeedPlan, plan
from onnx_ecp.gradients.links import LINKS, Link
from onnx_ecp.gradients.numeric import numeric_adjoint, step_for
from onnx_ecp.gradients.prepare import MINIMUM_OPSET, add_reverse, facts_of, prepare
from onnx_ecp.gradients.reverse import NO_OUTPUT
from onnx_ecp.gradients.selections import Selection, parts_of_outputs, selections
from onnx_ecp.graph import Model, constants, is_external, printable, read_tensor
from onnx_ecp.graph.builder import Fact
from onnx_ecp.graph.columns import column_axes
from onnx_ecp.graph.identity import identity
from onnx_ecp.graph.operators import OPERATORS, Moves, moving
from onnx_ecp.graph.proto import opset_of
from onnx_ecp.layers import Layer
from onnx_ecp.runtime.digest import digest
from onnx_ecp.runtime.lazy import LazyArrays
from onnx_ecp.runtime.session import Session, Value
from onnx_ecp.statistics.columns import Measure, Spread
from onnx_ecp.statistics.in_graph import Accumulation, accumulation, moments
from onnx_ecp.statistics.moments import Moments

ENGINES = ("vjp", "numeric")
# Where statistics are summed: in the graph, by NumPy, or in the graph where it runs on a device.
STATISTICS = ("auto", "graph", "host")
# Relative difference that rewriting a graph may make: half precision rounds at 5e-4, which adds up.
SAME = 0.05
# Random probes of a first look: with two instead of ten exact seeds in all stages but the last, the
# networks of benchmarks/engine.py keep their errors within the spread of seeds of the split.
ROUGH = 2
# Operators that leave the elements of their first input as they are, and in their order; that
# pick some, or take another order; and whose values are no logits, where they are outputs.
MOVES = moving(Moves.IN_ORDER)
PICKS = moving(Moves.REORDERED, Moves.PICKED, Moves.REPEATED)
SQUASHES = {op for (_, op), row in OPERATORS.items() if row.image == (0.0, 1.0)}
# Element types that weights are observed in; half precision is widened.
_AS_THEY_ARE = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True)
class State:
    """All that pruning changes.

    Args:
        weights: by stored tensor, its values (float32 or float64) in the stored layout; those of
            external data are mapped, or masked, when they are asked for.
        shifts: by layer name, (out,) float64 to be added to the pre-activation.
        keep: by stored tensor, (out, in), True where the weight stays.
        held: by layer name, (out,) True where no refit may move the shift; all may where absent.
    """

    weights: LazyArrays
    shifts: dict[str, np.ndarray]
    keep: dict[str, np.ndarray] = field(default_factory=dict)
    held: dict[str, np.ndarray] = field(default_factory=dict)

    def with_layer(self, layer: Layer, weight: np.ndarray, shift: np.ndarray) -> State:
        """A state in which one layer's stored tensor and shift are new."""
        state = replace(self, weights=self.weights.replaced(layer.weight.tensor, weight))
        return state.with_shift(layer.name, shift)

    def with_shift(self, layer: str, shift: np.ndarray) -> State:
        """A state in which one layer's shift (out,) is new, where it is not held."""
        held = self.held.get(layer)
        if held is not None:
            shift = np.where(held, self.shifts[layer], shift)
        return replace(self, shifts={**self.shifts, layer: shift})


@dataclass(frozen=True)
class Observation:
    """One batch seen through one state.

    Args:
        samples: number of samples in the batch.
        layers: by name.
        tensors: by name, the inputs of the layers and their adjoints (P, *shape of z).
        carriers: by layer name, the tensor that is its adjoint.
    """

    samples: int
    layers: Mapping[str, Layer]
    tensors: Mapping[str, np.ndarray]
    carriers: Mapping[str, str]

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """By layer name, rows (groups, rows, in), cut out when they are asked for.

        The patches of a convolution take many times what its input takes.
        """
        return _input_rows(self.layers, self.tensors)

    @property
    def adjoints(self) -> Mapping[str, np.ndarray]:
        """By layer name, rows (P, groups, rows, out per group)."""
        return LazyArrays(
            self.layers, lambda n: self.layers[n].rows_out(self.tensors[self.carriers[n]])
        )


@dataclass(frozen=True)
class GraphSums:
    """What the graph has added up so far; see ``Observer.add``.

    Args:
        layers: whose moments it adds up.
        session: of the graph.
        graph: names of its inputs and outputs.
        values: of the accumulators, by input; they lie in the session's memory.
        common: whether random probes are the same for all samples; see ``SeedPlan.seeds``.
        samples: how many were taken in.
    """

    layers: tuple[Layer, ...]
    session: Session
    graph: Accumulation
    values: Mapping[str, Value]
    common: bool
    samples: int = 0

    def moments(self) -> dict[str, Moments]:
        """By layer name, float64 on the host."""
        values = {name: value.numpy() for name, value in self.values.items()}
        return {layer.name: moments(layer, values, self.samples) for layer in self.layers}


def original_state(model: Model, layers: Sequence[Layer]) -> State:
    """The state before anything is pruned: stored values, half precision widened to float32."""
    stored = constants(model.proto)
    names = dict.fromkeys(layer.weight.tensor for layer in layers)
    mapped = {n for n in names if is_external(stored[n]) and stored[n].data_type in _AS_THEY_ARE}
    weights = LazyArrays(
        names,
        lambda name: read_tensor(model, stored[name]),
        {n: _widened(read_tensor(model, stored[n])) for n in names if n not in mapped},
    )
    shifts = {layer.name: np.zeros(layer.shape[0]) for layer in layers}
    keep = {x.weight.tensor: x.weight.matrix(weights[x.weight.tensor]) != 0 for x in layers}
    return State(weights, shifts, keep)


class Observer:
    """Holds the sessions of the observation graph: built once, fed with one state after another.

    It can be pickled: another process builds its sessions anew, from the model and these arguments.

    Args:
        model: its sparse initializers must be decoded.
        layers: the layers to observe; those in ``blocked`` have no sensitivity.
        first: a batch of calibration samples (two or more where the batch axis is free).
        engine: "vjp" or "numeric".
        metric: a name in ``seeds.METRICS``; "loss" needs batches with labels.
        probes: Rademacher probes per sample; None chooses (see ``seeds.plan``).
        seed: of the probes.
        provider: execution provider.
        threads: threads of ONNX Runtime.
        reverse: whether sensitivities will be asked for.
        statistics: where they are summed, a name in STATISTICS.
        proves: whether the observation graph must compute what the model computes. One that rounds
            activations to integers may round one of them the other way.
        other: a batch of another shape, where not all samples have that of the first.

    Attributes:
        blocked: by layer name, why the layer has no sensitivity.
        numeric: by layer name, an operator without a rule that the reverse graph differentiates by
            differences.
        outputs: names of the float outputs that depend on a layer.
        selections: tensors that are observed as if they were outputs, since layers act through
            selections alone; see ``gradients.selections``.
        metric: a name in ``seeds.METRICS``.
        logits: but under l2, the outputs whose metric is taken at the logits of their softmax.
        probabilities: but under l2, the heads whose values look like probabilities instead of
            logits.
        measure: how errors of the outputs are told; nothing before ``normalise_outputs``.
        statistics: as given.
        summable: whether sums can be taken in the graph.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[Layer],
        first: Batch,
        *,
        engine: str = "vjp",
        metric: str = "l2",
        probes: int | None = None,
        seed: int = 0,
        provider: str = "cpu",
        threads: int | None = None,
        reverse: bool = True,
        statistics: str = "auto",
        proves: bool = True,
        other: Batch | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise UsageError(f"unknown gradients {engine!r}.", hint=did_you_mean(engine, ENGINES))
        self._built = (model, tuple(layers), first)
        self._choices: dict[str, Any] = {
            "engine": engine,
            "metric": metric,
            "probes": probes,
            "seed": seed,
            "provider": provider,
            "threads": threads,
            "reverse": reverse,
            "statistics": statistics,
            "other": other,
        }
        state = original_state(model, layers)
        fed = {name: _widened(x) for name, x in first.feeds.items()}
        self._prepared = prepare(
            model.proto,
            model.base,
            layers,
            fed | dict(state.weights),
            threads,
            reverse=reverse and engine == "vjp",
        )
        self._options: dict[str, Any] = {
            "provider": provider,
            "threads": threads,
            "base": model.base,
        }
        self._dtypes = _float_inputs(self._prepared.proto)
        self._held: list[tuple[weakref.ref[State], dict[str, Value]]] = []
        self._adding: dict[
            tuple[tuple[str, ...], bool, bool, bool], tuple[Session, Accumulation]
        ] = {}
        feeds = self.input_feeds(first.feeds) | self.state_feeds(state)
        self.facts: dict[str, Fact] = facts_of(self.proto, model.base, feeds, threads)
        producers = {y: node for node in self.proto.graph.node for y in node.output if y}
        self._heads = _heads(producers, self._prepared.outputs, self.facts, metric)
        self.outputs = tuple(self._heads)
        parts, self.selections = _further_heads(self.proto, self.facts, layers, self._heads, metric)
        further = dict.fromkeys((*parts, *(selection.tensor for selection in self.selections)))
        self._heads = _heads(producers, (*self.outputs, *further), self.facts, metric)
        self.logits = tuple(name for name, head in self._heads.items() if head != name)
        links = {
            head: LINKS[node.op_type]
            for name, head in self._heads.items()
            if head != name and (node := _link_behind(name, producers, self.facts)) is not None
        }
        # A softmax and its logits may both be outputs: but under l2 they have one head.
        self._seeded = list(dict.fromkeys(self._heads.values()))
        if metric not in SQUARED:
            scores = [x for x in self._seeded if links.get(x) is not LINKS["Sigmoid"]]
            _check_scores(metric, scores, self.facts, first.samples)
        if metric == "loss":
            _check_labels(self._seeded, self.facts, first)
        names = [layer.name for layer in layers]
        tensors = [*self._heads, *self._seeded, *(layer.input for layer in layers)]
        if engine == "numeric":
            tensors += [layer.output for layer in layers]
        self._forward = self._with_outputs(tensors)
        self.layers: tuple[Layer, ...] = tuple(layers)
        # Without a float output there is nothing to differentiate, in either way.
        nothing = reverse and not self._seeded
        self.blocked: dict[str, str] = dict.fromkeys(names, NO_OUTPUT) if nothing else {}
        self.numeric: dict[str, str] = {}
        self._adjoints: dict[str, str] = {}
        self._reverse_proto: onnx.ModelProto | None = None
        if reverse and engine == "vjp":
            self._reverse_proto, self._adjoints, self.blocked, self.numeric = add_reverse(
                self._prepared, self.facts, self._seeded
            )
        if self._prepared.rewritten and proves:
            _check_same(Session(model.proto, **self._options), first.feeds, self._forward, feeds)
        y = self._forward.run(feeds, self._seeded)
        if reverse and first.samples > 1:
            half = first.halves()[0]
            _check_apart(y, first.samples, self.heads(state, half), half.samples)
        self._even = other is None
        varying = {} if other is None else _varying_axes(y, self.heads(state, other))
        if any(varying.values()) and probes is None:
            probes = 1  # a probe per element would be another number for every shape
        seeds = plan(y, first.samples, metric=metric, probes=probes, seed=seed)
        self._plan = replace(seeds, links=links)
        self._asked = probes is not None
        self.probabilities = tuple(
            name
            for name, v in y.items()
            if metric not in SQUARED
            and (_are_probabilities(v) or (name in self._heads and _is_squashed(name, producers)))
        )
        self._first = first.samples
        self.metric = metric
        self.measure = Measure.of({})
        shapes = {name: self.facts[name].shape for name in self._heads}
        rows = {x.shape[0] for x in first.feeds.values() if x.ndim} | {first.samples}
        self._axes = column_axes(model.proto, shapes, rows, varying)
        self.statistics = statistics
        new_enough = (opset_of(self.proto) or MINIMUM_OPSET) >= MINIMUM_OPSET
        self.summable = self._even and new_enough and (engine == "vjp" or not reverse)
        self._batched = all(v.ndim and v.shape[0] == first.samples for v in y.values())

    @cached_property
    def _origin(self) -> str:
        """A digest of what it was built from; the layers follow from the model and their names."""
        model, layers, first = self._built
        names = [(layer.name, layer.weight.tensor) for layer in layers]
        return digest(identity(model), names, first, self._choices)

    @property
    def identity(self) -> str:
        """A digest of all that decides what is observed of a state and of samples."""
        plan = replace(self._plan, links={})  # which the graph says
        return digest(self._origin, plan, self._even, self.statistics, self.measure)

    def with_threads(self, threads: int) -> Observer:
        """One that is pickled to use so many threads in another process."""
        other = self.__copy__()
        other.__dict__.pop("_origin", None)
        other._choices = {**self._choices, "threads": threads}
        return other

    def __copy__(self) -> Observer:
        """One with the same sessions: a copy is of this process, what is pickled is for others."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process needs; that both graphs compute the same has been seen here."""
        choices = {**self._choices, "statistics": self.statistics, "proves": False}
        return _rebuilt, (*self._built, choices, replace(self._plan, links={}), self.measure)

    def observe(self, state: State, batch: Batch, *, common: bool = False) -> Observation:
        """Run one batch in one state; every layer that is not blocked is in the result.

        Args:
            state: weights and shifts.
            batch: samples.
            common: whether random probes are the same for all samples; see ``SeedPlan.seeds``.
        """
        feeds = self._feeds(state, batch.feeds)
        return self._pulled(feeds, self._seeds(feeds, batch, common), batch.samples)

    @cached_property
    def rough(self) -> Observer:
        """One that does with ROUGH random probes where seeds are exact and more; for first looks.

        Its sessions are those of this one.
        """
        if self._asked or self._plan.probes or self.probes <= ROUGH or self.metric == "loss":
            return self
        if self._reverse_proto is not None:
            _ = self._reverse  # made here, it is shared
        other = Observer.__new__(Observer)  # a copy would be built anew, as one for a process is
        other.__dict__.update(self.__dict__)
        other._plan = replace(self._plan, probes=ROUGH)
        return other

    def close(self) -> None:
        """Give back the memory of the sessions; nothing can be observed any more."""
        del self._forward
        self.__dict__.pop("_reverse", None)
        self.__dict__.pop("rough", None)
        self._adding, self._held = {}, []

    def nothing_summed(
        self,
        names: Collection[str],
        *,
        backward: bool = True,
        with_squares: bool = True,
        with_gradient: bool = False,
    ) -> GraphSums:
        """The beginning of sums over batches.

        Args:
            names: of the layers whose moments are wanted.
            backward: whether there is more to sum than activations.
            with_squares: whether to sum (dy/dW)^2.
            with_gradient: also sum dy/dW per probe; random probes are then common to all samples.
        """
        key = (tuple(names), backward, with_squares, with_gradient)
        if key not in self._adding:
            # Two alternate: sums and, on other samples, sensitivities alone. More would take the
            # memory that groups of layers are there to save.
            while len(self._adding) > 1:
                del self._adding[next(iter(self._adding))]
            self._adding[key] = self._accumulating(*key)
        session, graph = self._adding[key]
        layers = tuple(layer for layer in self.layers if layer.name in names)
        return GraphSums(layers, session, graph, graph.start, common=with_gradient)

    def _accumulating(
        self, names: Collection[str], backward: bool, with_squares: bool, with_gradient: bool
    ) -> tuple[Session, Accumulation]:
        proto = self._reverse_proto if backward else self.proto
        assert proto is not None, "who asks for sensitivities has a reverse graph"
        proto, graph = accumulation(
            proto,
            self.layers,
            self._adjoints if backward else {},
            names,
            self.facts,
            with_squares=with_squares,
            with_gradient=with_gradient,
        )
        return self.session(proto), graph

    def add(
        self, sums: GraphSums, state: State, batch: Batch
    ) -> tuple[GraphSums, dict[str, np.ndarray]]:
        """Take one more batch into the sums; ``sums`` itself stays as it is.

        Args:
            sums: of the batches before, in the same state.
            state: weights and shifts.
            batch: samples.

        Returns:
            The new sums; by layer name, the sensitivity of every row (groups, rows).
        """
        feeds: dict[str, Value] = self._feeds(state, batch.feeds)
        graph = sums.graph
        if graph.weights:
            feeds = feeds | _seed_feeds(self._seeds(feeds, batch, sums.common))
        outputs = [*graph.weights.values(), *graph.new.values()]
        stay = frozenset(graph.new.values())
        found = sums.session.run_bound({**feeds, **sums.values}, outputs, stay)
        weights = {layer: found[name][0] for layer, name in graph.weights.items()}
        values = {name: found[new] for name, new in graph.new.items()}
        return replace(sums, values=values, samples=sums.samples + batch.samples), weights

    def heads(self, state: State, batch: Batch) -> dict[str, np.ndarray]:
        """The tensors that seeds meet, by name: the float outputs, but under l2 their logits."""
        return self._forward.run(self._feeds(state, batch.feeds), self._seeded)

    def predict(self, state: State, batch: Batch) -> dict[str, np.ndarray]:
        """The float outputs of the model, by name."""
        return self._forward.run(self._feeds(state, batch.feeds), self.outputs)

    def pull(self, state: State, batch: Batch, seeds: Mapping[str, np.ndarray]) -> Observation:
        """Like ``observe`` with seeds of the caller, such as the gradient of a loss.

        Args:
            state: weights and shifts.
            batch: samples.
            seeds: (P, *shape of the head) for every name that ``heads`` gives.
        """
        return self._pulled(self._feeds(state, batch.feeds), seeds, batch.samples)

    def _pulled(
        self, feeds: dict[str, Value], seeds: Mapping[str, np.ndarray], samples: int
    ) -> Observation:
        layers = {x.name: x for x in self.layers if x.name not in self.blocked}
        inputs = [x.input for x in layers.values()]
        if self._reverse_proto is None:
            carriers = {name: f"ecp/adjoint/{name}" for name in layers}
            values = self._read(self._forward, feeds, inputs)
            for name, x in layers.items():
                values[carriers[name]] = self._differences(x, feeds, seeds, samples)
        else:
            carriers = {name: self._adjoints[name] for name in layers}
            feeds = feeds | _seed_feeds(seeds)
            values = self._read(self._reverse, feeds, [*carriers.values(), *inputs])
            for name, layer in layers.items():
                _check_rows(layer, values[layer.input], values[carriers[name]])
        return Observation(samples, layers, values, carriers)

    def rehearse(self, state: State, batch: Batch) -> None:
        """Run a batch for its need of memory alone, backward where there is a reverse graph."""
        if self._reverse_proto is None:
            self.heads(state, batch)
        elif self.sums_in_graph:
            self.add(self.nothing_summed(()), state, batch)
        else:
            self.observe(state, batch)

    @property
    def sums_in_graph(self) -> bool:
        """Whether sums are to be taken in the graph, where that is possible."""
        return self.statistics == "graph" or (self.statistics == "auto" and self._forward.remote)

    def normalise_outputs(
        self,
        state: State,
        batches: Iterable[Batch],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Set ``measure`` from the outputs of the original; see ``normalise_by``.

        Args:
            state: the original.
            batches: samples.
            weights: of outputs and columns; see ``Measure.of``.
        """
        self.normalise_by(self.spreads(state, batches), weights)

    def spreads(self, state: State, batches: Iterable[Batch]) -> dict[str, Spread]:
        """By name, what the outputs do over samples, and whatever is observed beside them."""
        spreads: dict[str, Spread] = {}
        for batch in batches:
            seen = self._forward.run(self._feeds(state, batch.feeds), list(self._heads))
            for name, y in seen.items():
                part = Spread.of(y, self._axes[name], batch.samples)
                spreads[name] = spreads[name] + part if name in spreads else part
        return spreads

    def normalise_by(
        self, spreads: Mapping[str, Spread], weights: Mapping[str, float] | None = None
    ) -> None:
        """Set ``measure``, and under l2 the unit and the share in which every column counts.

        Under l2-raw each of several outputs is divided by its own root mean square over samples.

        Args:
            spreads: of the original.
            weights: of outputs and columns; see ``Measure.of``.
        """
        # What is observed beside the outputs has a unit too, and counts in no error that is told.
        told = {name: spread for name, spread in spreads.items() if name in self.outputs}
        self.measure = Measure.of(told, weights)
        self.__dict__.pop("rough", None)
        if self.metric == "l2":
            scales = Measure.of(spreads, weights).factors()
            self._plan = replace(self._plan, scales=scales)
        elif self.metric == "l2-raw" and len(spreads) > 1:
            energies = {name: _energy(spread) for name, spread in spreads.items()}
            scales = {name: np.array(1 / np.sqrt(e)) for name, e in energies.items() if e > 0}
            self._plan = replace(self._plan, scales=scales)

    @property
    def output_energy(self) -> float:
        """Mean over samples of what a metric in SQUARED makes of the outputs themselves.

        Under l2 about their means, which is what every error is relative to.
        """
        if self.metric == "l2":
            return float(sum(share.sum() for share in self.measure.shares.values()))
        spreads = self.measure.spreads.items()
        return sum(float(self.scales[name] ** 2) * _energy(spread) for name, spread in spreads)

    def activations(self, state: State, batch: Batch) -> Mapping[str, np.ndarray]:
        """Input rows (groups, rows, in) of every layer, forward only."""
        feeds = self._feeds(state, batch.feeds)
        layers = {layer.name: layer for layer in self.layers}
        return _input_rows(layers, self._read(self._forward, feeds, (x.input for x in self.layers)))

    @property
    def scales(self) -> dict[str, np.ndarray]:
        """By head, the factors of its elements in the metric; they broadcast with it."""
        one = np.array(1.0)
        return {name: self._plan.scales.get(name, one) for name in self._seeded}

    def link(self, head: str) -> Link:
        """What makes probabilities of the logits of a head, but under l2."""
        return self._plan.links.get(head, LINKS["Softmax"])

    @property
    def knows_logits(self) -> bool:
        """Whether the graph tells the logits of every head; never under l2."""
        return bool(self._seeded) and all(name in self._plan.links for name in self._seeded)

    @property
    def probes(self) -> int:
        """How many adjoints of a layer a sample has: one for each probe or output element."""
        elements = sum(_size(self.facts[h]) for h in self._seeded) // self._first
        return self._plan.probes or elements

    @property
    def bytes_per_sample(self) -> int:
        """What ``observe`` gives for one sample, in bytes, with the rows of one layer cut out."""
        rows = max((self._rows(layer) for layer in self.layers), default=0)
        return self.tensor_bytes_per_sample + 4 * rows // self._first

    @property
    def tensor_bytes_per_sample(self) -> int:
        """What the tensors of an observation take for one sample, in bytes."""
        values = sum(_size(self.facts[n]) for n in {layer.input for layer in self.layers})
        adjoints = {layer.output for layer in self.layers}
        values += self.probes * sum(_size(self.facts[n]) for n in adjoints)
        return 4 * values // self._first

    def _rows(self, layer: Layer) -> int:
        """Elements of a layer's input rows, where they are not those of the input itself."""
        positions = _size(self.facts[layer.output]) // layer.shape[0]
        elements = layer.groups * positions * layer.shape[1]
        return elements if elements > _size(self.facts[layer.input]) else 0

    @property
    def reverses(self) -> bool:
        """Whether there is a reverse graph: ``pull`` then costs one run."""
        return self._reverse_proto is not None

    @property
    def one_position(self) -> bool:
        """Whether every layer sees one position per sample, so that rows are samples."""
        shapes = (self.facts[layer.output].shape for layer in self.layers)
        return all(shape[0] == self._first and len(shape) == 2 for shape in shapes)

    @staticmethod
    def _read(
        session: Session, feeds: Mapping[str, Value], names: Iterable[str]
    ) -> dict[str, np.ndarray]:
        """Tensors by name, whether a session computes them or they are fed."""
        wanted = dict.fromkeys(names)
        found = {name: feeds[name] for name in wanted if name in feeds}
        return found | session.run(feeds, [name for name in wanted if name not in found])

    def _differences(
        self, layer: Layer, feeds: dict[str, Value], seeds: Mapping[str, np.ndarray], n: int
    ) -> np.ndarray:
        step = step_for(self._prepared.proto.graph.node)
        shift = self._prepared.shifts[layer.name]
        return numeric_adjoint(
            self._forward, feeds, shift, layer.output, seeds, samples=n, step=step
        )

    def _seeds(self, feeds: dict[str, Value], batch: Batch, common: bool) -> dict[str, np.ndarray]:
        """Seeds need the values of y; under l2 only its shape, which a batch axis tells."""
        if self._batched and self._even and self._plan.metric in SQUARED:
            facts = {name: self.facts[name] for name in self._seeded}
            y = {n: np.zeros((batch.samples, *f.shape[1:]), f.dtype) for n, f in facts.items()}
        else:
            y = self._forward.run(feeds, self._seeded)
        return self._plan.seeds(y, batch.in_whole, batch.labels, common=common)

    def input_feeds(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's own inputs in the dtypes of the observation graph."""
        return {n: x.astype(self._dtypes.get(n, x.dtype), copy=False) for n, x in feeds.items()}

    def state_feeds(
        self, state: State, names: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The inputs that carry a state: stored tensors and shifts; None: all of them."""
        feeds = {n: state.weights[n] for n in state.weights if names is None or n in names}
        for layer in self._prepared.layers:
            name = self._prepared.shifts[layer.name]
            if names is not None and name not in names:
                continue
            shift = state.shifts[layer.name].astype(self._dtypes[name])
            feeds[name] = shift.reshape(layer.shift_shape)
        return feeds

    def session(self, proto: onnx.ModelProto) -> Session:
        """A session of a part of the observation graph, with this observer's settings."""
        return Session(proto, **self._options)

    @property
    def proto(self) -> onnx.ModelProto:
        """The forward observation graph."""
        return self._prepared.proto

    def _feeds(self, state: State, feeds: Mapping[str, np.ndarray]) -> dict[str, Value]:
        """Inputs and state; a device takes the stored tensors once for all batches of a state."""
        if not self._forward.remote:
            return self.input_feeds(feeds) | self.state_feeds(state)
        shifts = self.state_feeds(state, frozenset(self._prepared.shifts.values()))
        return self.input_feeds(feeds) | shifts | self._placed(state)

    def _placed(self, state: State) -> dict[str, Value]:
        """Its stored tensors on the device, where those of the two states used last stay."""
        there = [values for ref, values in self._held if ref() is state]
        others = [held for held in self._held if held[0]() is not state]
        self._held = others[-1:]  # what is not needed goes before more is placed
        values = there[0] if there else self._forward.placed(state.weights)
        self._held.append((weakref.ref(state), values))
        return values

    @cached_property
    def _reverse(self) -> Session:
        """The reverse graph with rows and adjoints as outputs; for sums in the graph not needed."""
        assert self._reverse_proto is not None, "the caller has looked"
        return self.session(self._reverse_proto)

    def _with_outputs(self, tensors: Sequence[str]) -> Session:
        """A forward session with these tensors (and nothing else) as outputs."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._prepared.proto)
        del proto.graph.output[:]
        fed = {x.name for x in proto.graph.input}
        wanted = [name for name in dict.fromkeys(tensors) if name not in fed]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        return self.session(proto)


def _rebuilt(
    model: Model,
    layers: Sequence[Layer],
    first: Batch,
    choices: dict[str, Any],
    plan: SeedPlan,
    measure: Measure,
) -> Observer:
    """An observer as it was when it was pickled."""
    observer = Observer(model, layers, first, **choices)
    observer._plan = replace(plan, links=observer._plan.links)
    observer.measure = measure
    return observer


def _seed_feeds(seeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By name of the input."""
    return {f"ecp/seed/{name}": seed for name, seed in seeds.items()}


def _widened(x: np.ndarray) -> np.ndarray:
    """Half precision as float32, everything else as it is."""
    return x.astype(np.float32) if str(x.dtype) in ("float16", "bfloat16") else x


def _check_same(
    model: Session,
    feeds: Mapping[str, np.ndarray],
    observed: Session,
    observed_feeds: Mapping[str, np.ndarray],
) -> None:
    """The observation graph must compute what the model computes, or its sensitivities are lies.

    Raises:
        ModelError: it does not; some operator was lowered in a way that this model does not bear.
    """
    names = [name for name in model.outputs if name in observed.outputs]
    expected, found = model.run(feeds, names), observed.run(observed_feeds, names)
    for name in names:
        y, z = expected[name].astype(np.float64), found[name].astype(np.float64)
        finite = np.isfinite(y)  # where the model itself gives none there is nothing to compare
        y, z = y[finite], z[finite]
        if not np.linalg.norm(z - y) <= SAME * np.linalg.norm(y) + np.finfo(np.float32).tiny:
            raise ModelError(
                f"the network under observation does not compute output {printable(name)!r} of "
                "the model: its fused or old operators are not understood.",
                hint="Export the model anew with standard operators of a newer opset.",
            )


def _check_rows(layer: Layer, a: np.ndarray, g: np.ndarray) -> None:
    """Which axes broadcasting repeats is read off the first batch; another may do otherwise.

    Raises:
        ModelError: the adjoint (P, *shape of z) has other rows than the layer's input.
    """
    if not layer.fits(a.shape, g.shape[1:]):
        raise ModelError(
            f"the adjoint of layer {printable(layer.name)!r} has shape {g.shape[1:]} where its "
            f"input has {a.shape}: in this batch sizes are broadcast that were not in the first.",
            hint="Use --gradients numeric, or --method magnitude.",
        )


def _check_apart(
    whole: Mapping[str, np.ndarray], samples: int, part: Mapping[str, np.ndarray], fewer: int
) -> None:
    """Sensitivities are per sample, so every output must have its share of each.

    Raises:
        ModelError: an output does not grow with the batch: it mixes samples.
    """
    for name, y in whole.items():
        if y.size * fewer != part[name].size * samples:
            raise ModelError(
                f"output {printable(name)!r} has shape {y.shape} for {samples} samples and "
                f"{part[name].shape} for {fewer}: it mixes samples, so no sample has an error.",
                hint="Export the model with a fixed batch, or use --method magnitude.",
            )


def _check_labels(heads: Sequence[str], facts: Mapping[str, Fact], first: Batch) -> None:
    """The metric loss needs one output of class scores, and one class index per sample.

    Raises:
        UsageError: there is another number of outputs, or they are not one row per sample.
        CalibrationError: the labels are none.
    """
    shapes = [facts[name].shape for name in heads]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != first.samples:
        listed = ", ".join(map(str, shapes))
        raise UsageError(
            f"--metric loss needs one output with one row of class scores per sample; for "
            f"{first.samples} samples the outputs are {listed}.",
            hint="Use --metric l2, which suits outputs of any kind and needs no labels.",
        )
    if first.labels is None or first.labels.dtype.kind not in "iu":
        raise CalibrationError(
            "--metric loss needs one class index per sample as --labels.",
            hint="Use --metric l2, which needs no labels.",
        )


def _check_scores(
    metric: str, heads: Iterable[str], facts: Mapping[str, Fact], samples: int
) -> None:
    """The metrics kl and loss need logits on the last axis of every output.

    Raises:
        UsageError: an output has none.
    """
    for name in heads:
        shape = facts[name].shape
        if not shape or shape[-1] < 2 or (samples > 1 and len(shape) < 2):
            raise UsageError(
                f"--metric {metric} needs the scores of two or more classes on the last axis; "
                f"output {printable(name)!r} has shape {shape} for {samples} samples.",
                hint="Use --metric l2, which suits outputs of any kind.",
            )


def _are_probabilities(y: np.ndarray) -> bool:
    """Whether the last axis holds numbers from 0 to 1 whose sum is 1."""
    return bool((y >= 0).all() and np.allclose(y.sum(axis=-1, dtype=np.float64), 1, atol=1e-3))


def _input_rows(layers: Mapping[str, Layer], values: Mapping[str, np.ndarray]) -> LazyArrays:
    """Rows (groups, rows, in) by layer name, cut out of the layers' inputs when asked for."""
    return LazyArrays(layers, lambda name: layers[name].rows_in(values[layers[name].input]))


def _energy(spread: Spread) -> float:
    """Mean over samples of the sum of squares of an output."""
    return float(spread.mean_square @ spread.positions)


def _varying_axes(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> dict[str, frozenset[int]]:
    """By head, the axes behind the first that differ between batches of two shapes."""
    return {
        name: frozenset(i for i in range(1, y.ndim) if y.shape[i] != b[name].shape[i])
        for name, y in a.items()
    }


def _size(fact: Fact) -> int:
    return int(np.prod(fact.shape))


def _float_inputs(proto: onnx.ModelProto) -> dict[str, np.dtype]:
    """Dtypes of the float inputs of the observation graph."""
    found = {}
    for value in proto.graph.input:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if np.issubdtype(dtype, np.floating):
            found[value.name] = dtype
    return found


def _heads(
    producers: Mapping[str, onnx.NodeProto],
    outputs: Iterable[str],
    facts: Mapping[str, Fact],
    metric: str,
) -> dict[str, str]:
    """By name of a float output, the tensor to seed: but under l2 the logits of its probabilities.

    Raises:
        UsageError: but under l2 a softmax that is an output runs over another axis than the last.
    """
    heads = {}
    for name in outputs:
        if name not in facts or not np.issubdtype(facts[name].dtype, np.floating):
            continue
        heads[name] = name
        node = None if metric in SQUARED else _link_behind(name, producers, facts)
        if node is None or (node.op_type == "Sigmoid" and metric != "kl"):
            continue
        last = len(facts[node.output[0]].shape) - 1
        if node.op_type == "Sigmoid" or _axis(node) in (-1, last):
            heads[name] = node.input[0]
        elif node.output[0] == name:
            raise UsageError(
                f"--metric {metric} takes classes on the last axis; the {node.op_type} of output "
                f"{printable(name)!r} runs over axis {_axis(node)}.",
                hint="Use --metric l2, which suits outputs of any kind.",
            )
    return heads


def has_logits(proto: onnx.ModelProto) -> bool:
    """Whether every output of numbers ends in probabilities whose logits the graph tells."""
    producers = {y: node for node in proto.graph.node for y in node.output if y}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    ends = []
    for output in proto.graph.output:
        name = output.name
        if output.type.tensor_type.elem_type not in floats:
            continue
        while name in producers and producers[name].op_type in (*MOVES, "Log"):
            name = producers[name].input[0]
        ends.append(name in producers and producers[name].op_type in LINKS)
    return bool(ends) and all(ends)


def _further_heads(
    proto: onnx.ModelProto,
    facts: Mapping[str, Fact],
    layers: Iterable[Layer],
    heads: Mapping[str, str],
    metric: str,
) -> tuple[tuple[str, ...], tuple[Selection, ...]]:
    """What is observed beside the float outputs: parts of other outputs, and what selects.

    Scores of classes are wanted but under l2: a tensor that decides and is none is left out.
    """
    targets = [layer.output for layer in layers]
    parts = parts_of_outputs(proto.graph, facts, targets)
    found = selections(proto.graph, facts, targets, (*heads, *parts))
    if metric not in SQUARED:
        found = tuple(s for s in found if len(shape := facts[s.tensor].shape) > 1 < shape[-1])
    return parts, found


def _link_behind(
    name: str, producers: Mapping[str, onnx.NodeProto], facts: Mapping[str, Fact]
) -> onnx.NodeProto | None:
    """The node in ``LINKS`` whose values, or their logarithms, a tensor holds in their order.

    Whatever shape they have there, its logits say all of them.
    """
    logarithm = False
    while name in producers and name in facts and np.issubdtype(facts[name].dtype, np.floating):
        node = producers[name]
        if node.op_type in LINKS and not (logarithm and node.op_type == "LogSoftmax"):
            return node
        if node.op_type not in MOVES and (node.op_type != "Log" or logarithm):
            return None
        logarithm = logarithm or node.op_type == "Log"
        name = node.input[0]
    return None


def _is_squashed(name: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a tensor holds values of a sigmoid or a softmax, all or some of them."""
    while name in producers and producers[name].op_type in MOVES | PICKS:
        name = producers[name].input[0]
    return name in producers and producers[name].op_type in SQUASHES


def _axis(node: onnx.NodeProto) -> int:
    """Of a Softmax since opset 13."""
    return next((int(a.i) for a in node.attribute if a.name == "axis"), -1)
