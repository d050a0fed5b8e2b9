"""What runs leave for later runs never changes a result, and saves the looking."""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnx_ecp
from onnx_ecp.api.sweep import sweep
from onnx_ecp.cli.commands import main
from onnx_ecp.errors import OutputError, UsageError
from onnx_ecp.methods import METHODS, Method
from onnx_ecp.runtime import cache as caches
from onnx_ecp.runtime.cache import Cache, caching, clear, contents, recalled
from onnx_ecp.runtime.digest import UnknownValueError, digest
from onnx_ecp.runtime.lazy import LazyArrays
from onnx_ecp.runtime.records import pack, unpack
from onnx_ecp.statistics.observer import Observer

ROOT = Path(__file__).parent.parent
TEXT = """<ir_version: 8, opset_import: ["": 18]> net (float[n,6] x) => (float[n,3] y) {
    h = Gemm(x, W, b)  a = Tanh(h)  g = Gemm(a, V)  c = Relu(g)  y = Gemm(c, U) }"""
SHAPES = {"W": (6, 10), "b": (10,), "V": (10, 8), "U": (8, 3)}
# Ways that keep different things: moments, rows, curvature, stages, refits, units, a search.
WAYS = {
    "ecp": {"method": "ecp", "sparsity": 0.6},
    "wanda": {"method": "wanda", "sparsity": 0.6},
    "gradients": {"method": "gradient-magnitude", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "woodfisher": {"method": "woodfisher", "sparsity": 0.6},
    "stages": {"sparsity": 0.7},
    "tuned": {"sparsity": 0.7, "effort": "fast", "finetune_steps": 10},
    "search": {"max_error": 0.3, "effort": "fast"},
    "units": {"granularity": "unit", "sparsity": 0.4, "stages": 2},
    "faster": {"speedup": 1.5, "stages": 2},
    "both": {"speedup": 1.3, "sparsity": 0.6, "units_and_zeros": True, "stages": 2},
    "pattern": {"sparsity": "2:4", "effort": "fast"},
}
each_way = pytest.mark.parametrize("choices", WAYS.values(), ids=WAYS)


@pytest.fixture
def model(rng):
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


@pytest.fixture
def data(rng):
    return {"x": rng.normal(0, 1, (60, 6)).astype(np.float32)}


def bytes_of(result) -> bytes:
    return result.model.SerializeToString(deterministic=True)


def pruned(model, data, **choices):
    return onnx_ecp.optimize(model, data, threads=1, measure=False, **choices)


def files(folder) -> list[Path]:
    return sorted(folder.glob("*.npz"))


def counting(real, name, seen):
    def counted(self, *given, **named):
        seen.append(name)
        return real(self, *given, **named)

    return counted


@contextmanager
def looks(monkeypatch):
    """Counts how often batches are observed, in whatever way."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("observe", "add", "activations", "rehearse", "spreads", "pull"):
            patch.setattr(Observer, name, counting(getattr(Observer, name), name, seen))
        yield seen


@each_way
def test_the_same_is_written_with_a_cache_and_without_and_the_second_run_observes_nothing(
    model, data, tmp_path, monkeypatch, choices
):
    plain = pruned(model, data, **choices)
    first = pruned(model, data, cache=tmp_path, **choices)
    with looks(monkeypatch) as seen:
        second = pruned(model, data, cache=tmp_path, **choices)
    assert bytes_of(first) == bytes_of(plain) == bytes_of(second)
    assert seen == []
    assert second.report.layers == plain.report.layers


@pytest.mark.parametrize(
    "method",
    # A guarded refit looks at what it has made, which no other sparsity has.
    [n for n, m in METHODS.items() if m.stages == 1 and not m.repair.guarded],
)
def test_another_sparsity_observes_nothing(model, data, tmp_path, monkeypatch, method):
    pruned(model, data, cache=tmp_path, method=method, sparsity=0.4)
    with looks(monkeypatch) as seen:
        found = pruned(model, data, cache=tmp_path, method=method, sparsity=0.7)
    assert seen == []
    assert bytes_of(found) == bytes_of(pruned(model, data, method=method, sparsity=0.7))


def test_staged_methods_look_at_the_original_once_whatever_the_sparsity(
    model, data, tmp_path, monkeypatch
):
    pruned(model, data, cache=tmp_path, sparsity=0.4)
    with looks(monkeypatch) as with_cache:
        found = pruned(model, data, cache=tmp_path, sparsity=0.7)
    with looks(monkeypatch) as without:
        expected = pruned(model, data, sparsity=0.7)
    assert len(with_cache) < len(without)
    assert "spreads" not in with_cache
    assert bytes_of(found) == bytes_of(expected)


def test_points_of_a_sweep_and_importances_come_from_the_same_look(
    model, data, tmp_path, monkeypatch
):
    choices = {"threads": 1, "cache": tmp_path}
    pruned(model, data, method="ecp", sparsity=0.4, cache=tmp_path)
    with looks(monkeypatch) as seen:
        points = sweep(model, data, methods="ecp", sparsities="0.5,0.9", **choices).points
        scores = onnx_ecp.importance(model, data, method="ecp", **choices)
    assert seen == []
    plain = sweep(model, data, methods="ecp", sparsities="0.5,0.9", threads=1).points
    assert [p.relative_error for p in points] == [p.relative_error for p in plain]
    for name, expected in onnx_ecp.importance(model, data, method="ecp", threads=1).items():
        np.testing.assert_array_equal(scores[name], expected)


def test_a_point_of_a_sweep_is_there_for_optimize(model, data, tmp_path, monkeypatch):
    choices = {"stages": 2, "threads": 1, "cache": tmp_path}
    sweep(model, data, methods="ecp-refit", sparsities="0.6,0.7", **choices)
    with looks(monkeypatch) as seen:
        found = pruned(model, data, sparsity=0.7, stages=2, cache=tmp_path)
    assert seen == []
    assert bytes_of(found) == bytes_of(pruned(model, data, sparsity=0.7, stages=2))


def test_methods_that_read_rows_beside_some_that_do_not_share_a_look(model, data, tmp_path):
    choices = {"sparsities": "0.6", "stages": 1, "threads": 1}
    for methods in ("ecp,ecp-refit", "ecp-refit,ecp"):
        plain = sweep(model, data, methods=methods, **choices).points
        for _ in range(2):
            found = sweep(model, data, methods=methods, cache=tmp_path, **choices).points
            assert [p.relative_error for p in found] == [p.relative_error for p in plain]


OTHERS = {
    "seed": {"seed": 1},
    "probes": {"probes": 2},
    "metric": {"metric": "l2-raw"},
    "samples": {"samples": 40},
    "batch size": {"batch_size": 7},
    "positions": {"positions": "reduce"},
    "threads": {"threads": 2},
    "weights of outputs": {"output_weights": {"y:0": 2.0}},
    "where sums are taken": {"statistics": "graph"},
    "layers": {"exclude": "g"},
    "gradients": {"gradients": "numeric"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_decides_a_look_is_in_its_key(model, data, tmp_path, monkeypatch, other):
    choices = {"method": "ecp", "sparsity": 0.5, "threads": 1, "measure": False}
    onnx_ecp.optimize(model, data, cache=tmp_path, **choices)
    with looks(monkeypatch) as seen:
        found = onnx_ecp.optimize(model, data, cache=tmp_path, **choices | other)
    assert seen
    assert bytes_of(found) == bytes_of(onnx_ecp.optimize(model, data, **choices | other))


@pytest.mark.parametrize("what", ["weight", "node", "sample", "installation"])
def test_another_model_other_data_and_another_installation_find_nothing(
    model, data, tmp_path, monkeypatch, what
):
    choices = {"method": "ecp", "sparsity": 0.5}
    pruned(model, data, cache=tmp_path, **choices)
    if what == "weight":
        tensor = model.graph.initializer[0]
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.5, "W"))
    elif what == "node":
        model.graph.node[1].op_type = "Sigmoid"
    elif what == "sample":
        data["x"][0, 0] += 1
    else:
        monkeypatch.setattr(caches, "of_this_installation", lambda: "another")
    with looks(monkeypatch) as seen:
        found = pruned(model, data, cache=tmp_path, **choices)
    assert seen
    assert bytes_of(found) == bytes_of(pruned(model, data, **choices))


def test_weights_in_another_file_are_part_of_the_key(model, data, tmp_path, monkeypatch):
    path, where = tmp_path / "m.onnx", tmp_path / "cache"
    options = {"save_as_external_data": True, "size_threshold": 0, "location": "m.data"}
    choices = {"method": "ecp", "sparsity": 0.5, "cache": where}
    onnx.save(onnx.ModelProto.FromString(model.SerializeToString()), path, **options)
    pruned(path, data, **choices)
    stored = bytearray((tmp_path / "m.data").read_bytes())
    stored[:4] = np.float32(9.0).tobytes()
    (tmp_path / "m.data").write_bytes(stored)
    with looks(monkeypatch) as seen:
        found = pruned(path, data, **choices)
    assert seen
    assert bytes_of(found) == bytes_of(pruned(path, data, **choices | {"cache": None}))


def test_a_model_with_weights_in_another_file_goes_on_with_them(model, data, tmp_path, monkeypatch):
    path, where = tmp_path / "m.onnx", tmp_path / "cache"
    options = {"save_as_external_data": True, "size_threshold": 0, "location": "m.data"}
    onnx.save(onnx.ModelProto.FromString(model.SerializeToString()), path, **options)
    made = []
    for number, cache in enumerate((None, where, where)):
        out = tmp_path / f"out{number}.onnx"
        with looks(monkeypatch) as seen:
            pruned(path, data, output=out, cache=cache, sparsity=0.6, stages=2)
        made.append(
            [onnx.numpy_helper.to_array(t).tobytes() for t in onnx.load(out).graph.initializer]
        )
    assert made[0] == made[1] == made[2]
    assert seen == []


def cut(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"")


def flipped(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def named(path: Path, key: str) -> None:
    """Give a file the name of an entry."""
    path.rename(path.with_name(f"{key}.{hashlib.sha256(path.read_bytes()).hexdigest()[:40]}.npz"))


def foreign(path: Path, rng: np.random.Generator) -> None:
    """Somebody else's arrays under our name, its digest included."""
    key = path.name.partition(".")[0]
    path.unlink()
    np.savez(path.with_name("x.npz"), a0=np.zeros(3))
    named(path.with_name("x.npz"), key)


def of_another_key(path: Path, rng: np.random.Generator) -> None:
    """An entry of ours under another name."""
    other = next(p for p in files(path.parent) if p != path)
    key, digest_of = path.name.partition(".")[0], other.name.split(".")[1]
    shutil.copy(other, path.with_name(f"{key}.{digest_of}.npz"))
    path.unlink()


def pickled(path: Path, rng: np.random.Generator) -> None:
    """An array that runs code when it is read by pickle."""

    class Harm:
        def __reduce__(self):
            return os.system, ("touch harmed",)

    key, made = path.name.partition(".")[0], path.with_name("x.npz")
    path.unlink()
    np.savez(made, record=np.array([Harm()], dtype=object))
    named(made, key)


HARM = [cut, emptied, flipped, foreign, of_another_key, pickled]


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_a_damaged_or_foreign_entry_is_ignored_with_a_warning(
    model, data, tmp_path, rng, monkeypatch, harm
):
    monkeypatch.chdir(tmp_path)
    choices = {"sparsity": 0.6, "stages": 2, "cache": tmp_path / "cache"}
    expected = pruned(model, data, **choices)
    for path in files(tmp_path / "cache"):
        harm(path, rng)
    found = pruned(model, data, **choices)
    assert bytes_of(found) == bytes_of(expected)
    assert any("ignored, and computed anew" in text for text in found.report.warnings)
    assert not (tmp_path / "harmed").exists()
    again = pruned(model, data, **choices)  # what was damaged has been replaced
    assert not any("ignored" in text for text in again.report.warnings)


def test_bits_flipped_anywhere_never_change_a_result(tmp_path, rng):
    value = {"a": rng.normal(size=(3, 4)), "b": 1.5, "c": "text"}
    cache = Cache(tmp_path)
    for _ in range(60):
        cache.put("0" * 40, "values", value)
        (path,) = files(tmp_path)
        flipped(path, rng)
        assert cache.get("0" * 40, ()) is None
    cache.put("0" * 40, "values", value)
    np.testing.assert_array_equal(cache.get("0" * 40, ())["a"], value["a"])


class Cut(Exception):
    """What ends a run."""


@pytest.mark.parametrize("stages", range(1, 4))
def test_an_interrupted_run_goes_on_to_the_same_bytes(model, data, tmp_path, monkeypatch, stages):
    choices = {"sparsity": 0.7, "stages": 4, "cache": tmp_path}

    def end(what: str, done: int, of: int) -> None:
        if (what, done) == ("stages", stages):
            raise Cut

    with pytest.raises(Cut):
        onnx_ecp.optimize(model, data, threads=1, measure=False, progress=end, **choices)
    with looks(monkeypatch) as rest:
        found = pruned(model, data, **choices)
    with looks(monkeypatch) as all_of_it:
        whole = pruned(model, data, **choices | {"cache": None})
    assert bytes_of(found) == bytes_of(whole)
    assert 0 < rest.count("observe") < all_of_it.count("observe")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_killed_process_goes_on_to_the_same_bytes(model, data, tmp_path):
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "m.npz", **data)
    where = tmp_path / "cache"
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, signal, onnx_ecp\n"
        "def end(what, done, of):\n"
        "    if (what, done) == ('stages', 2): os.kill(os.getpid(), signal.SIGKILL)\n"
        "choices = {'sparsity': 0.7, 'stages': 4, 'threads': 1, 'cache': 'cache'}\n"
        "onnx_ecp.optimize('m.onnx', progress=end, **choices)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert files(where)
    choices = {"sparsity": 0.7, "stages": 4}
    found = pruned(tmp_path / "m.onnx", None, cache=where, **choices)
    assert bytes_of(found) == bytes_of(pruned(tmp_path / "m.onnx", None, **choices))


def test_runs_side_by_side_leave_whole_entries(tmp_path, rng):
    values = {"a": rng.normal(size=1000)}
    first, second = Cache(tmp_path), Cache(tmp_path)
    real = os.replace

    def replaced(a, b):  # another run writes the same meanwhile
        if not busy:
            busy.append(True)
            second.put("1" * 40, "values", values)
        return real(a, b)

    busy: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        first.put("1" * 40, "values", values)
    assert [entry.state for entry in contents(tmp_path).entries] == ["whole"]
    np.testing.assert_array_equal(first.get("1" * 40, ())["a"], values["a"])


def test_the_oldest_entries_go_first(tmp_path):
    values = {str(i): {"a": np.full(1000, float(i))} for i in range(4)}
    cache = Cache(tmp_path)
    cache.put("0" * 40, "values", values["0"])
    size = files(tmp_path)[0].stat().st_size
    cache = Cache(tmp_path, limit=3 * size)
    for i in range(1, 3):
        cache.put(str(i) * 40, "values", values[str(i)])
    for i, path in enumerate(files(tmp_path)):
        os.utime(path, (1000 + i, 1000 + i))
    assert cache.get("0" * 40, ()) is not None  # it was used last
    cache.put("3" * 40, "values", values["3"])
    assert [p.name[0] for p in files(tmp_path)] == ["0", "2", "3"]
    cache = Cache(tmp_path, limit=size - 1)
    cache.put("4" * 40, "values", values["0"])
    assert [p.name[0] for p in files(tmp_path)] == ["0", "2", "3"]
    assert "more than the limit of the cache" in cache.warnings[0]


def test_a_result_does_not_depend_on_what_the_limit_leaves(model, data, tmp_path):
    expected = pruned(model, data, sparsity=0.6, stages=2)
    for limit in ("1", "3K", "20K"):
        for _ in range(2):
            found = pruned(
                model, data, sparsity=0.6, stages=2, cache=tmp_path / limit, cache_limit=limit
            )
            assert bytes_of(found) == bytes_of(expected)
        assert sum(p.stat().st_size for p in files(tmp_path / limit)) <= 20 * 1024


def test_where_nothing_can_be_written_the_run_goes_on_and_says_so(
    model, data, tmp_path, monkeypatch
):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    expected = pruned(model, data, sparsity=0.6, stages=2)
    monkeypatch.setattr(caches, "_write", full)
    found = pruned(model, data, sparsity=0.6, stages=2, cache=tmp_path)
    assert bytes_of(found) == bytes_of(expected)
    (told,) = [text for text in found.report.warnings if "cache" in text]
    assert "cannot be written (No space left on device)" in told
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_an_error(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        pruned(model, data, cache=tmp_path / "file")


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_the_folder_is_its_owners_and_one_open_to_others_is_told(model, data, tmp_path):
    quiet = pruned(model, data, method="ecp", cache=tmp_path / "a" / "cache")
    assert stat.S_IMODE((tmp_path / "a" / "cache").stat().st_mode) & 0o077 == 0
    assert not any("cache" in text for text in quiet.report.warnings)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    loud = pruned(model, data, method="ecp", cache=tmp_path / "open")
    assert any("others may write into this cache" in text for text in loud.report.warnings)


def test_nothing_is_kept_of_methods_whose_code_nobody_knows(model, data, tmp_path, monkeypatch):
    def own(view):
        return np.abs(view.weight) * factor

    factor = 1.0
    monkeypatch.setitem(METHODS, "own", Method(own))
    pruned(model, data, method="own", sparsity=0.5, cache=tmp_path)
    assert not any("stage" in entry.what for entry in contents(tmp_path).entries)


def test_the_command_lists_and_clears(model, data, tmp_path, rng):
    where = tmp_path / "cache"
    pruned(model, data, method="ecp", sparsity=0.5, cache=where)
    (where / "mine.txt").write_text("mine")
    (where / ".onnx-ecp-x1.part").write_text("half")
    flipped(min(files(where), key=lambda path: path.stat().st_size), rng)

    def run(*words):
        result = CliRunner().invoke(main, ["cache", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(run("list", str(where), "--json"))
    states = [entry["state"] for entry in found["entries"]]
    assert sorted(set(states)) == ["damaged", "foreign", "unfinished", "whole"]
    assert found["bytes"] == sum(p.stat().st_size for p in where.iterdir())
    table = run("list", str(where))
    assert "sensitivities of" in table
    assert all(len(line) <= 80 for line in table.splitlines()[:-1])
    assert table.splitlines()[-1].startswith(f"OK {len(states)} files of ")
    gone = json.loads(run("clear", str(where), "--json"))
    assert len(gone["entries"]) == len(states) - 1
    assert [p.name for p in where.iterdir()] == ["mine.txt"]
    assert run("clear", str(where)).startswith("OK 0 files of 0 removed from")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list", "missing"], "missing: no such folder."),
        (["lst", "."], "cache cannot 'lst'."),
    ],
)
def test_a_slip_at_the_command_is_told(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["cache", *words])
    assert result.exit_code == UsageError.exit_code
    assert f"error: {told}" in result.stderr


# The parts.


@dataclass(frozen=True)
class Point:
    x: np.ndarray
    names: dict
    _note: int = 0


def test_values_come_back_as_they_were(tmp_path):
    arrays = LazyArrays("ab", lambda name: np.full(2, ord(name)), {"a": np.float32([1, 2])})
    value = Point(np.float64([np.nan, np.inf]), {"a": 0.1, "b": (1, None, True), "c": arrays})
    cache = Cache(tmp_path)
    cache.put("2" * 40, "a point", value)
    found = cache.get("2" * 40, [Point])
    np.testing.assert_array_equal(found.x, value.x)
    assert (found.names["a"], found.names["b"]) == (0.1, (1, None, True))
    back = found.names["c"]
    assert (back.knows("a"), back.knows("b"), list(back)) == (True, False, ["a", "b"])
    np.testing.assert_array_equal(back["b"], [98, 98])
    assert cache.get("2" * 40, []) is None  # a kind that the reader does not name
    assert len(cache.warnings) == 1


@pytest.mark.parametrize("value", [{1: 2}, {1, 2}, object(), b"x", np.zeros(2, object)])
def test_what_cannot_be_read_back_is_not_kept(value, tmp_path):
    with pytest.raises((TypeError, ValueError)):
        Cache(tmp_path).put("3" * 40, "something", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [{"what": 1}, {"kind": "Point"}, {"array": 3}, {"dict": []}, {"kind": "X", "fields": {}}],
)
def test_json_that_pack_does_not_make_is_refused(value):
    with pytest.raises((ValueError, KeyError)):
        unpack(value, [Point], lambda name: np.zeros(1))


def test_packing_keeps_arrays_apart():
    kept: list[np.ndarray] = []

    def keep(array):
        kept.append(array)
        return str(len(kept) - 1)

    packed = pack({"a": np.arange(2), "b": [np.float32(3), "x"]}, keep)
    assert json.loads(json.dumps(packed)) == packed
    found = unpack(packed, [], lambda name: kept[int(name)])
    assert found["a"].tolist() == [0, 1]
    assert (found["b"][0], found["b"][1]) == (3, "x")


DIFFERENT = [
    None, False, 0, 0.0, "0", b"0", (), ("",), {}, {"a": 1}, {"a": 1.0}, {"b": 1}, [1, 2], [2, 1],
    [[1], 2], np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.array([0.0, -0.0]),
    np.dtype("f4"), Path("a"), "a", {1, 2}, Point(np.zeros(1), {}), Point(np.ones(1), {}),
]  # fmt: skip


def test_different_values_have_different_digests_and_equal_ones_the_same():
    assert len({digest(value) for value in DIFFERENT}) == len(DIFFERENT)
    assert digest(Point(np.zeros(1), {}, 1)) == digest(Point(np.zeros(1), {}, 2))
    assert digest({1, 2, "a"}) == digest({"a", 2, 1})
    assert digest(METHODS["wanda"]) != digest(METHODS["magnitude"])
    with pytest.raises(UnknownValueError):
        digest(lambda: 0)


def test_digests_are_the_same_in_every_process():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from onnx_ecp.methods import METHODS\nfrom onnx_ecp.runtime.digest import digest\n"
        "print(digest(METHODS['wanda'], {'a', 'b', 'c'}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in "12"
    }  # fmt: skip
    assert found == {digest(METHODS["wanda"], {"a", "b", "c"})}


def test_what_does_not_fit_is_computed_anew(tmp_path):
    with caching(tmp_path):
        asked = ("numbers", lambda: (1,))
        assert recalled(asked, lambda: (1, 2)) == (1, 2)
        assert recalled(asked, lambda: (3,)) == (1, 2)
        assert recalled(asked, lambda: (3,), fits=lambda found: len(found) == 1) == (3,)
        assert recalled(asked, lambda: (4,)) == (3,)
    assert recalled(asked, lambda: (5,)) == (5,)
    assert [entry.state for entry in clear(tmp_path).entries] == ["whole"]


def test_an_entry_tells_when_it_was_used(tmp_path):
    Cache(tmp_path).put("5" * 40, "numbers", 1)
    (entry,) = contents(tmp_path).entries
    assert abs(entry.used - time.time()) < 60
    ages = {30: "30 s", 90: "1 min", 7200: "2 h", 200_000: "2 d"}
    assert {s: caches.age_text(entry, entry.used + s) for s in ages} == ages
