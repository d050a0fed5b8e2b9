"""Whoever looks at the parts of the data, and however often they die: the same bytes."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from operator import add
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_ecp
from onnx_ecp.api.sweep import sweep
from onnx_ecp.data.calibration import Calibration
from onnx_ecp.errors import CalibrationError, ProviderError, UsageError, named_as_options
from onnx_ecp.graph import load
from onnx_ecp.layers import find_layers
from onnx_ecp.runtime import workers
from onnx_ecp.runtime.workers import Crew, Held, Job, crew, working
from onnx_ecp.statistics import curvature, drawing, sharding
from onnx_ecp.statistics.linearised import samples_of
from onnx_ecp.statistics.objective import Objective, Parameters
from onnx_ecp.statistics.observer import Observer, original_state
from onnx_ecp.statistics.sharding import ShardedForward
from onnx_ecp.units import elimination

ROOT = Path(__file__).parent.parent
TEXT = """<ir_version: 8, opset_import: ["": 18]> net (float[n,2,6,6] x) => (float[n,3] y) {
    h = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, W, b)  a = Relu(h)  f = Flatten(a)
    g = Gemm(f, V)  c = Tanh(g)  y = Gemm(c, U) }"""
SHAPES = {"W": (4, 2, 3, 3), "b": (4,), "V": (36, 8), "U": (8, 3)}
# Ways that go through different walks: sums, activations, refits with a guard, stages, units.
WAYS = {
    "ecp": {"method": "ecp", "sparsity": 0.6},
    "wanda": {"method": "wanda", "sparsity": 0.6},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "obs": {"method": "obs", "sparsity": 0.5},
    "gradients": {"method": "gradient-magnitude", "sparsity": 0.5},
    "stages": {"sparsity": 0.7, "stages": 2},
    "little memory": {"sparsity": 0.7, "stages": 2, "max_memory": 1000, "compensation": "refit"},
    "in the graph": {"sparsity": 0.7, "effort": "fast", "statistics": "graph"},
    "units": {"granularity": "unit", "sparsity": 0.4, "stages": 2},
    "woodfisher": {"method": "woodfisher", "sparsity": 0.6},
}
each_way = pytest.mark.parametrize("choices", WAYS.values(), ids=WAYS)


class Here(Executor):
    """One worker that is this process; it counts its tasks."""

    def __init__(self) -> None:
        self.tasks = 0

    def submit(self, function, /, *given, **named):
        self.tasks += 1
        future: Future = Future()
        try:
            future.set_result(self.done(function, *given, **named))
        except Exception as error:
            future.set_exception(error)
        return future

    def done(self, function, *given, **named):
        # What goes to another process and comes back is pickled.
        function, given, named = pickle.loads(pickle.dumps((function, given, named)))
        return pickle.loads(pickle.dumps(function(*given, **named)))


class Dying(Here):
    """A worker that is lost at some of its tasks, with all that it holds."""

    def __init__(self, at) -> None:
        super().__init__()
        self.at = set(at)

    def done(self, function, *given, **named):
        if self.tasks in self.at:
            workers._STORE.values.clear()
            raise BrokenExecutor
        return super().done(function, *given, **named)


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    workers._STORE.values.clear()


@pytest.fixture
def model(rng):
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


@pytest.fixture
def data(rng):
    return {"x": rng.normal(0, 1, (60, 2, 6, 6)).astype(np.float32)}


def pruned(model, data, **choices):
    result = onnx_ecp.optimize(model, data, threads=1, measure=False, **choices)
    return result.model.SerializeToString(deterministic=True)


@each_way
def test_the_same_bytes_whoever_looks_at_the_parts(model, data, choices):
    here = Here()
    expected = pruned(model, data, executor=here, **choices)
    assert here.tasks > 0
    assert pruned(model, data, executor=[Here(), Here(), Here()], **choices) == expected
    with ThreadPoolExecutor(3) as pool:
        assert pruned(model, data, executor=pool, **choices) == expected


@each_way
def test_workers_that_die_are_replaced_and_change_nothing(model, data, choices):
    here = Here()
    expected = pruned(model, data, executor=here, **choices)
    steps = range(3, here.tasks, max(here.tasks // 4, 1))
    dying = Dying(steps)
    assert pruned(model, data, executor=dying, **choices) == expected
    assert dying.tasks > here.tasks


def test_rows_that_are_drawn_are_those_of_all_parts_together(model, data, monkeypatch):
    monkeypatch.setattr(drawing, "ROWS_PER_INPUT", 1)
    monkeypatch.setattr(drawing, "LEAST_ROWS", 4)  # so few that parts have none
    drawn = []
    real = sharding.drawn
    monkeypatch.setattr(sharding, "drawn", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    choices = {"sparsity": 0.6, "effort": "fast"}
    expected = pruned(model, data, executor=Here(), **choices)
    assert any(some.at is not None for some in drawn)
    assert pruned(model, data, executor=[Here(), Here()], **choices) == expected
    assert pruned(model, data, executor=Dying([40, 60]), **choices) == expected


@pytest.mark.parametrize("method", ["ecp", "wanda", "ecp-refit"])
def test_parts_are_summed_to_what_all_samples_give_but_for_rounding(model, data, method):
    choices = {"method": method, "sparsity": 0.5, "stages": 1, "compensation": "none"}
    if method == "ecp-refit":
        choices |= {"compensation": "refit", "support": "ranking"}
    plain, parts = (
        onnx_ecp.optimize(model, data, threads=1, measure=False, executor=executor, **choices)
        for executor in (None, Here())
    )
    for a, b in zip(plain.model.graph.initializer, parts.model.graph.initializer, strict=True):
        x, y = onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_the_joint_refit_is_given_by_workers_what_one_process_computes(model, data, rng):
    loaded = load(model)
    layers = find_layers(loaded.proto).layers
    samples = Calibration(data, True, "", False, 0)
    observer = Observer(loaded, layers, next(samples.batches(2)), threads=1)
    original = original_state(loaded, layers)
    observer.normalise_outputs(original, samples.batches(16))
    state = original
    for layer in layers:
        tensor = layer.weight.tensor
        state = state.with_layer(layer, 0.8 * state.weights[tensor], np.full(layer.shape[0], 0.1))
    objective = Objective(observer, original)
    theta = Parameters(layers, state.keep)
    moved = theta.state(state, theta.of(state) + 1e-3 * rng.standard_normal(theta.size))

    def told():
        found = samples_of(objective, samples, 8)
        around = found.around(state, theta, None)
        return found.loss(state), around.slope(), around.product(moved, 1e-3)

    alone = told()
    here = Here()
    with working(executor=here):
        parts = told()
    assert here.tasks > 0
    for a, b in zip(alone, parts, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-4 * np.abs(a).max())


@pytest.mark.parametrize("way", ["units", "woodfisher"])
def test_whoever_needs_every_row_gets_them_from_workers(model, data, monkeypatch, way):
    seen = []
    for kind in (curvature.CurvatureObserver, elimination.OutputMetric):
        monkeypatch.setattr(kind, "join", noting(kind.join, seen))
    pruned(model, data, executor=Here(), **WAYS[way])
    assert seen


def noting(real, seen):
    def noted(self, other):
        seen.append(other)
        real(self, other)

    return noted


def test_a_sweep_has_workers_too(model, data):
    choices = {"methods": "ecp,wanda", "sparsities": "0.5,0.8", "threads": 1}
    first, second = (sweep(model, data, executor=x, **choices) for x in (Here(), [Here(), Here()]))
    errors = [[p.relative_error for p in x.points] for x in (first, second)]
    assert errors[0] == errors[1]


def test_what_workers_gave_is_kept_apart_from_what_one_process_gave(model, data, tmp_path):
    choices = {"sparsity": 0.7, "stages": 2}
    alone = pruned(model, data, **choices)
    crowd = pruned(model, data, executor=Here(), **choices)
    for _ in range(2):
        assert pruned(model, data, cache=tmp_path, **choices) == alone
        here = Here()
        assert pruned(model, data, cache=tmp_path, executor=here, **choices) == crowd
    assert here.tasks == 0


def test_samples_of_several_shapes_have_workers_for_all_but_the_walk(rng):
    text = """<ir_version: 8, opset_import: ["": 18]> net (float[n,t,4] x) => (float[n,3] y) {
        h = MatMul(x, W)  a = Tanh(h)  m = ReduceMean<keepdims = 0>(a, axes)  y = MatMul(m, V) }"""
    proto = onnx.parser.parse_model(text)
    for name, values in {
        "W": rng.standard_normal((4, 6)).astype(np.float32),
        "V": rng.standard_normal((6, 3)).astype(np.float32),
        "axes": np.array([1]),
    }.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    samples = [rng.normal(0, 1, (1, 2 + i % 3, 4)).astype(np.float32) for i in range(40)]
    choices = {"sparsity": 0.5, "stages": 1, "metric": "l2"}
    first, second = Here(), [Here(), Here()]
    feeds = [{"x": sample} for sample in samples]
    assert pruned(proto, feeds, executor=first, **choices) == pruned(
        proto, feeds, executor=second, **choices
    )
    assert first.tasks


# Real processes.


def run_with(folder, words, *, wait=60):
    """The command in a process group of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from onnx_ecp.cli.commands import main\nif __name__ == '__main__': main()"
    )
    (folder / "run.py").write_text(code)
    return subprocess.Popen(
        [sys.executable, "run.py", *words], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def descendants(root: int) -> set[int]:
    """Processes below one, by /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    entry.joinpath("stat").read_text().rpartition(")")[2].split()[1]
                )
            except (OSError, IndexError):
                continue
    found, fresh = set(), {root}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def are_gone(processes, seconds=10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_processes_make_the_same_bytes_for_any_number(model, data, number):
    choices = {"sparsity": 0.7, "stages": 2}
    expected = pruned(model, data, executor=Here(), **choices)
    assert pruned(model, data, workers=number, timeout=120, **choices) == expected
    until = time.monotonic() + 10
    while active_children() and time.monotonic() < until:
        time.sleep(0.01)
    assert active_children() == []


def test_a_process_that_is_killed_is_replaced(model, data):
    choices = {"sparsity": 0.7, "stages": 2}
    expected = pruned(model, data, executor=Here(), **choices)
    killed = []

    def kill(what: str, done: int, of: int) -> None:
        if what == "sensitivities" and not killed:
            killed.append(active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    found = pruned(model, data, workers=2, timeout=120, progress=kill, **choices)
    assert killed
    assert found == expected


@pytest.mark.slow  # processes take a second to start
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("how", ["interrupt", "limit", "crash"])
def test_no_worker_outlives_a_command(model, tmp_path, rng, how):
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "m.npz", x=rng.normal(0, 1, (4000, 2, 6, 6)).astype(np.float32))
    words = ["optimize", "m.onnx", "o.onnx", "--workers", "2", "-q", "--effort", "best"]
    words += ["--finetune-steps", "100000"]
    words += ["--timeout", "4"] if how == "limit" else []
    process = run_with(tmp_path, words)
    try:
        until, seen = time.monotonic() + 30, set()
        while time.monotonic() < until and len(seen) < 4:  # the child, two workers, a tracker
            seen |= descendants(process.pid)
            time.sleep(0.05)
        assert len(seen) >= 4
        if how == "interrupt":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        elif how == "crash":
            child = next(p for p in seen if alive(p) and process.pid in parents_of(p))
            os.kill(child, signal.SIGSEGV)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == {"interrupt": 130, "limit": 6, "crash": 6}[how], told
    assert told.count("error:") == 1
    assert "Traceback" not in told
    assert "resource_tracker" not in told
    assert are_gone(seen)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.npz", "m.onnx", "run.py"]


def parents_of(process: int) -> set[int]:
    text = Path(f"/proc/{process}/stat").read_text()
    return {int(text.rpartition(")")[2].split()[1])}


# The parts.


def doubled(a, b, c):
    return a * b + c


def failing(*given):
    raise CalibrationError("--samples are none.", hint="See --help.")


def having_no_workers(*given):
    return crew()


def jobs(count=5):
    return [Job((Held(f"b{i}", i),), (1,)) for i in range(count)]


def test_results_come_in_the_order_of_the_jobs_and_what_is_held_is_sent_once():
    here = Here()
    found = Crew([here]).map(doubled, [Held("a", 3)], jobs())
    assert found == [1, 4, 7, 10, 13]
    again = here.tasks
    assert Crew([here]).map(doubled, [Held("a", 3)], jobs()) == found
    assert here.tasks - again == 5  # nothing was lacking


def listed(a, b):
    return [a, b]


def paired(a, b):
    return f"({a} {b})"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 16])
def test_sums_are_taken_in_an_order_that_the_number_of_parts_alone_decides(count):
    parts = [Job((Held(f"b{i}", i),)) for i in range(count)]
    found = set()
    for number in range(1, 18):
        places = [Here() for _ in range(number)]
        found.add(str(Crew(places).total(listed, [Held("a", "p")], parts, paired)))
        if number == 1 and count > 1:
            assert places[0].tasks == 2  # what was missing, then one sum of all
    assert len(found) == 1
    assert re.findall(r"\d+", found.pop()) == [str(i) for i in range(count)]


@pytest.mark.parametrize(("count", "places"), [(16, 1), (16, 2), (16, 4), (16, 16), (8, 2), (1, 1)])
def test_one_sum_comes_from_every_place(count, places):
    here = [Here() for _ in range(places)]
    parts = [Job((), (float(i),)) for i in range(count)]
    assert Crew(here).total(float, [], parts, add) == sum(range(count))
    assert [one.tasks for one in here] == [1] * places


def test_the_place_of_a_dead_worker_gets_another_one():
    made = []

    def renewed(place):
        made.append(place)
        return Here()

    class Dead(Here):
        def submit(self, function, /, *given, **named):
            raise BrokenExecutor

    assert Crew([Here(), Dead()], renewed).map(doubled, [Held("a", 3)], jobs()) == [1, 4, 7, 10, 13]
    assert made == [1]


def test_workers_that_always_die_are_an_error():
    with pytest.raises(ProviderError, match="died 4 times at the same part"):
        Crew([Dying(range(1000))]).map(doubled, [Held("a", 3)], jobs())


def test_workers_that_are_gone_are_waited_for_so_long_and_no_longer(monkeypatch):
    class Silent(Here):
        def submit(self, function, /, *given, **named):
            return Future()

    monkeypatch.setattr(workers, "PATIENCE", 1.5)
    crew_of_none = Crew([Silent()], None, 1, lambda: False)
    with pytest.raises(ProviderError, match=r"no worker has been there for 1\.5 seconds"):
        crew_of_none.map(doubled, [Held("a", 3)], jobs())


def test_a_worker_holds_so_much_and_lets_go_what_was_used_longest_ago(monkeypatch):
    monkeypatch.setattr(workers, "HELD_BYTES", 100)
    big = [Job((Held(f"x{i}", b"x" * 60),)) for i in range(4)]
    found = Crew([Here()]).map(len_of_both, [Held("y", b"y" * 60)], big)
    assert found == [120] * 4
    assert len(workers._STORE.values) == 2  # what the last job needed
    assert "y" in workers._STORE.values


def len_of_both(a, b):
    return len(a) + len(b)


def test_an_error_of_a_worker_names_options_as_they_are_named_here():
    with pytest.raises(CalibrationError, match=r"^`samples` are none") as raised:
        Crew([Here()]).map(failing, [], jobs(1))
    assert raised.value.hint
    with named_as_options(), pytest.raises(CalibrationError, match=r"^--samples are none"):
        Crew([Here()]).map(failing, [], jobs(1))


def test_a_worker_has_no_workers_of_its_own():
    with working(executor=Here()):
        own = crew()
        assert own is not None
        assert own.map(having_no_workers, [], jobs(2)) == [None, None]
    assert crew() is None


def test_another_version_on_a_worker_is_refused(monkeypatch):
    class Elsewhere(Here):
        def done(self, function, installation, *given):
            return super().done(function, "another", *given)

    with pytest.raises(ProviderError, match="a worker has another version"):
        Crew([Elsewhere()]).map(doubled, [Held("a", 3)], jobs())


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"workers": 2, "dask": "tcp://127.0.0.1:1"}, "exclude each other"),
        ({"workers": 0}, "must be at least 1"),
    ],
)
def test_slips_are_told(model, data, choices, told):
    with pytest.raises(UsageError, match=told):
        pruned(model, data, **choices)


def test_without_dask_the_hint_names_the_extra(model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ProviderError, match="needs the package distributed") as raised:
        pruned(model, data, dask="tcp://127.0.0.1:1")
    assert "onnx-ecp[distributed]" in raised.value.hint


# Dask.


@contextmanager
def cluster(**choices):
    distributed = pytest.importorskip(
        "distributed", reason="Dask is not installed; it is in the extra `distributed`"
    )
    usual = {"threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**usual, **choices) as found:
        yield found


@pytest.mark.slow  # a cluster takes seconds to start
@pytest.mark.filterwarnings("ignore")  # those of Dask
def test_dask_makes_the_same_bytes_also_where_a_worker_is_killed(model, data):
    choices = {"sparsity": 0.7, "stages": 2, "timeout": 120}
    expected = pruned(model, data, executor=Here(), **choices)
    killed = []

    with cluster(n_workers=2, processes=True) as found:
        address = found.scheduler_address

        def kill(what: str, done: int, of: int) -> None:
            if what == "sensitivities" and not killed:
                killed.append(next(iter(found.workers.values())).pid)
                os.kill(killed[0], signal.SIGKILL)

        assert pruned(model, data, dask=address, **choices) == expected
        assert pruned(model, data, dask=address, progress=kill, **choices) == expected
    assert killed


@pytest.mark.slow  # a scheduler that does not answer is waited for
@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_does_not_answer_is_an_error(model, data, monkeypatch):
    pytest.importorskip("distributed", reason="Dask is not installed; extra `distributed`")
    monkeypatch.setattr(workers, "PATIENCE", 1)
    with pytest.raises(ProviderError, match="no Dask scheduler answers"):
        pruned(model, data, dask="tcp://127.0.0.1:9")


def test_the_walk_is_one_of_workers_where_there_are_some(model, data, monkeypatch):
    made = []
    real = ShardedForward.__init__

    def noted(self, *given, **named):
        made.append(1)
        real(self, *given, **named)

    monkeypatch.setattr(ShardedForward, "__init__", noted)
    pruned(model, data, sparsity=0.6, effort="fast", executor=Here())
    assert made
