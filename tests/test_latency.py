"""Time as a cost and as a target, by clocks that are made up: no test asserts how long it takes."""

import dataclasses
import json

import numpy as np
import pytest
from test_structure import NETWORKS, build, each_network, inputs, structure_of

import onnx_ecp
from onnx_ecp.api import outcome
from onnx_ecp.data.calibration import Batch
from onnx_ecp.errors import QualityError, TargetError, UsageError
from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.layers import find_layers
from onnx_ecp.report import text
from onnx_ecp.report.as_json import dumps
from onnx_ecp.runtime.session import Session
from onnx_ecp.units import cut, latency, shapes_of_a_run
from onnx_ecp.units.choice import Budget, choose
from onnx_ecp.units.groups import Group
from onnx_ecp.units.kernels import block_by, block_of_convolutions
from onnx_ecp.units.latency import Times, Watch, liked

CHAIN = (
    "float[N, 12] x",
    """h = Gemm<transB = 1>(x, W, b)
    a = Relu(h)
    k = Gemm(a, V, c)
    t = Tanh(k)
    y = Gemm(t, U)""",
    {"W": (64, 12), "b": (64,), "V": (64, 48), "c": (48,), "U": (48, 3)},
    [64, 48],
)


def watch_of(model, rng, clock, samples=3):
    """A Watch on random inputs, of which whole models get ``samples``."""
    one, two, batch = (Batch(0, inputs(model, rng, n), n) for n in (1, 2, samples))
    layers = find_layers(model.proto).layers
    structure = structure_of(model, two.feeds)
    return Watch(model, structure, layers, batch, (one, two), {"threads": 1}, clock)


def elements(proto):
    """Stored numbers: what a model takes here."""
    return sum(int(np.prod(t.dims)) for t in proto.graph.initializer)


@each_network
def test_a_layer_alone_reads_and_makes_what_it_does_in_the_model(network, rng):
    model, seen = build(network, rng), []

    def clock(single, feeds):
        session = Session(single)
        (y,) = session.run(feeds).values()
        seen.append((single.graph.node[0].op_type, feeds["x"].shape, y.shape))
        return float(len(seen))

    watch = watch_of(model, rng, clock)
    assert watch.times
    rest = np.ones(watch.structure.units, bool)
    for group in watch.structure.groups:
        rest[group.units[2:]] = False
    for keep in (np.ones_like(rest), rest):
        proto = cut(model.proto, watch.structure, keep)
        shapes = shapes_of_a_run(dataclasses.replace(model, proto=proto), watch.batch.feeds)
        for layer in watch.layers:
            if layer.name in watch.times:
                assert (layer.op, shapes[layer.input], shapes[layer.output]) in seen


def test_layers_of_one_shape_are_timed_once(rng):
    model, seen = build(NETWORKS["SwiGLU: two producers"], rng), []
    watch = watch_of(model, rng, lambda single, feeds: seen.append(single) or 1.0)
    sizes = [len(times.rows) * len(times.columns) for times in watch.times.values()]
    assert len(watch.times) == 3
    assert len(seen) == sum(sizes[1:])


def test_between_timed_sizes_time_is_interpolated_and_nothing_smaller_takes_longer():
    rows, columns = np.array([1, 8, 16]), np.array([4, 8])
    times = Times.of_table(rows, columns, np.array([[1.0, 2.0], [5.0, 6.0], [4.0, 8.0]]))
    assert times.of(16, 8) == 8
    assert times.of(16, 6) == 6
    assert times.of(8, 4) == times.of(16, 4) == 4
    assert times.of(12, 8) == 7


@pytest.mark.parametrize(
    ("number", "entries", "inside", "sizes"),
    [
        (3, 1, False, [1, 2, 3]),
        (20, 1, False, [1, 2, 4, 8, 16, 20]),
        (16, 1, False, [1, 2, 4, 8, 16]),
        (3, 8, False, [1, 2, 3]),
        (6, 4, False, [1, 2, 4, 6]),
        (3, 2, True, [1, 2, 3]),
    ],
)
def test_units_stop_where_kernels_like_it(number, entries, inside, sizes):
    group = Group((), (), np.arange(number), entries, entries, inside)
    assert liked(group).tolist() == sizes


def test_units_stop_at_whole_blocks_of_any_size():
    group = Group((), (), np.arange(40), 1)
    assert liked(group, 16).tolist() == [1, 2, 4, 8, 16, 32, 40]
    assert liked(dataclasses.replace(group, entries=4), 16).tolist() == [1, 2, *range(4, 41, 4)]


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_block_of_convolutions_is_told_by_the_least_of_many_runs(block, noise, rng):
    """Other work makes runs longer, now and then, and none shorter."""

    def clock(channels):
        return -(-channels // block) * block * (1 + noise * (rng.random() > 0.3))

    assert block_by(clock) == block


def test_the_block_of_this_machine_is_one_of_the_two():
    assert block_of_convolutions() in (8, 16)


def test_units_go_where_time_is_saved_and_whole_steps_at_a_time(rng):
    model = build(CHAIN, rng)

    def clock(single, feeds):
        (weight,) = (t.dims for t in single.graph.initializer if t.name == "w")
        return float(-(-max(weight) // 32))  # 33 to 64 take 2, 32 take 1

    watch = watch_of(model, rng, clock)
    costs, groups = Budget(watch.structure, watch.times, stepped=True), watch.structure.groups
    whole = np.ones(watch.structure.units, bool)
    scores = np.full(watch.structure.units, 1.0)
    most = costs.total(whole) - 1  # for which 32 units of the first group must go, or 16 others
    keep = choose(scores, whole, groups, costs, lambda x: costs.total(x) <= most, stops=liked)
    assert [int(keep[group.units].sum()) for group in groups] == [64, 32]


@pytest.fixture
def by_size(monkeypatch):
    """Clocks by which a model takes a tick per stored number, and ``idle`` that nothing lowers."""
    ticks = {"idle": 0, "final": 1.0, "measured": []}

    def whole(a, b, batch, *, turns=50, seconds=1.0, **settings):
        slow = ticks["final"] if turns != latency.TURNS else 1.0
        before, after = (ticks["idle"] + elements(model.proto) for model in (a, b))
        ticks["measured"].append(after)
        after = min(after * slow, before)
        return Latency(before, after, after / before, settings["threads"], batch.samples)

    monkeypatch.setattr(outcome, "measure_latency", whole)
    monkeypatch.setattr(latency, "measure_latency", whole)
    monkeypatch.setattr(latency, "_seconds", lambda model, feeds, settings: elements(model))
    return ticks


CHOICES = {"granularity": "unit", "cost": "latency", "threads": 1}


@pytest.mark.parametrize("method", ["flap", "ecp-refit"])
def test_a_model_becomes_as_fast_as_asked_for_and_no_faster_than_it_must(method, by_size, rng):
    model = build(CHAIN, rng)
    data = inputs(model, rng, 60)
    result = onnx_ecp.optimize(model.proto, data, method=method, speedup=2.0, **CHOICES)
    speedup, whole = result.report.speedup, elements(model.proto)
    assert speedup.asked == 2.0
    assert speedup.measured.ratio == elements(result.model) / whole <= 0.5
    assert speedup.predicted == pytest.approx(speedup.reached, rel=0.1)
    after = [row.after for row in result.report.units]
    assert all(size in (1, 2, 4) or size % 8 == 0 for size in after)
    (rows, columns), larger = after, []
    for size in ((rows + 8, columns), (rows, columns + 8)):
        larger.append(12 * size[0] + size[0] + (size[0] + 1) * size[1] + 3 * size[1])
    assert min(larger) > 0.98 * 0.5 * whole
    assert "2 times as fast was asked for" in result.report.speed
    assert f"speedup={speedup.reached:.3f}" in text.ok_line(result.report)
    written = json.loads(dumps(result.report.to_dict()))
    assert onnx_ecp.report.Report.from_dict(written) == result.report
    assert written["speedup"]["measured"]["threads"] == 1


def test_a_model_that_misses_its_target_in_the_end_is_pruned_further(by_size, rng):
    model = build(CHAIN, rng)
    data = inputs(model, rng, 60)
    by_size["final"] = 1.2  # the result takes longer than what was timed when units were chosen
    report = onnx_ecp.optimize(model.proto, data, method="flap", speedup=2.0, **CHOICES).report
    assert report.speedup.measured.ratio <= 0.5
    assert report.speedup.predicted > 2.2


def test_a_target_that_is_missed_again_and_again_is_an_error_with_the_closest(
    by_size, rng, monkeypatch
):
    model = build(CHAIN, rng)
    data = inputs(model, rng, 60)
    by_size["final"] = 1.9
    monkeypatch.setattr(outcome, "ATTEMPTS", 1)
    with pytest.raises(TargetError, match=r"cannot be 2 times as fast.*: 1\.\d+ times is the most"):
        onnx_ecp.optimize(model.proto, data, method="flap", speedup=2.0, **CHOICES)


def test_what_units_cannot_reach_is_said_before_anything_is_pruned(by_size, rng, tmp_path):
    model = build(CHAIN, rng)
    data = inputs(model, rng, 60)
    by_size["idle"] = elements(model.proto)
    path = tmp_path / "out.onnx"
    with pytest.raises(
        TargetError, match=r"cannot be 4 times as fast.*: 1\.9\d* times is the most"
    ):
        onnx_ecp.optimize(model.proto, data, output=path, speedup=4.0, **CHOICES)
    assert len(by_size["measured"]) == 1
    assert not path.exists()


def test_a_speedup_with_an_error_target_is_met_or_nothing_is_written(by_size, rng, tmp_path):
    model = build(CHAIN, rng)
    data = inputs(model, rng, 60)
    by_size["final"] = 1.2  # more must go after the stages: the gate looks at what stays then
    path = tmp_path / "out.onnx"
    choices = CHOICES | {"method": "flap", "speedup": 2.0, "output": path}
    with pytest.raises(QualityError, match="misses the target"):
        onnx_ecp.optimize(model.proto, data, max_error=0.01, **choices)
    assert not path.exists()
    report = onnx_ecp.optimize(model.proto, data, max_error=10.0, **choices).report
    assert report.speedup.reached >= 2
    (point,) = report.curve
    assert (point.within, report.searched) == (True, False)
    assert point.error >= report.gap.relative_error > 0.01


def test_a_speed_that_units_cannot_reach_is_an_error_with_an_error_target_too(by_size, rng):
    model = build(CHAIN, rng)
    data = inputs(model, rng, 60)
    by_size["idle"] = elements(model.proto)  # at most twice as fast
    choices = CHOICES | {"method": "flap", "speedup": 4.0, "max_error": 0.3}
    with pytest.raises(TargetError, match="cannot be 4 times as fast"):
        onnx_ecp.optimize(model.proto, data, **choices)


def test_time_ranks_units_for_other_targets(rng):
    model = build(CHAIN, rng)
    data = inputs(model, rng, 40)
    report = onnx_ecp.optimize(model.proto, data, method="flap", sparsity=0.4, **CHOICES).report
    assert report.work_after.weights <= 0.6 * report.work_before.weights
    assert report.speedup is None


@pytest.mark.parametrize("choices", [{"speedup": 1.0}, {"granularity": "weight"}])
def test_choices_that_make_no_sense_with_time_are_refused(choices, rng):
    model = build(CHAIN, rng)
    with pytest.raises(UsageError):
        onnx_ecp.optimize(model.proto, inputs(model, rng, 40), **CHOICES | choices)
