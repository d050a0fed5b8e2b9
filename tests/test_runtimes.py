"""Latency in another runtime: measured in a process of its own, outputs checked, errors told."""

import importlib.util
import json
import stat
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnx_ecp
from onnx_ecp.cli.commands import main
from onnx_ecp.errors import ModelError, ProviderError, UsageError
from onnx_ecp.evaluation import runtimes, worker
from onnx_ecp.evaluation.targets import TARGETS

DOCS = Path(__file__).parent.parent / "docs"
MLP = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 12] x) => (float[N, 4] y) {
    h = Gemm<transB = 1>(x, W1, b1)
    r = Relu(h)
    y = Gemm<transB = 1>(r, W2, b2)
}"""
each_runtime = pytest.mark.parametrize("name", worker.RUNTIMES)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(runtimes, "SECONDS", 0.0)
    monkeypatch.setattr(runtimes, "TURNS", 5)
    monkeypatch.delenv(runtimes.PYTHON, raising=False)


@pytest.fixture
def pair(rng, tmp_path):
    """Two files of which the second lacks most weights, and what both are fed."""
    first = onnx.parser.parse_model(MLP)
    for name, shape in {"W1": (16, 12), "b1": (16,), "W2": (4, 16), "b2": (4,)}.items():
        values = rng.normal(size=shape).astype(np.float32)
        first.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    data = {"x": rng.normal(size=(40, 12)).astype(np.float32)}
    second = onnx_ecp.optimize(
        first, data, sparsity=0.5, method="magnitude", measure=False, cleanup=False
    ).model
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(first, paths[0])
    onnx.save(second, paths[1])
    np.savez(tmp_path / "d.npz", **data)
    return *paths, tmp_path / "d.npz"


def python_that(tmp_path, body):
    """A program in the place of Python, which gets the worker and its folder as arguments."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\nimport sys, os, json\nworker, folder = sys.argv[1:]\n{body}"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


AS_USUAL = """
import runpy
main = runpy.run_path(worker)["main"]
"""


@each_runtime
def test_a_runtime_has_a_row_an_install_command_and_a_line_in_the_docs(name):
    assert name in TARGETS
    assert name in runtimes.INSTALL
    page = (DOCS / "targets.md").read_text().partition("## Timing in another runtime")[2]
    assert f"`{name}`" in page
    assert runtimes.PYTHON in page
    shown = " ".join(CliRunner().invoke(main, ["compare", "--help"]).output.split())
    assert name in shown


@each_runtime
def test_both_models_are_timed_where_the_runtime_is_installed(name, pair):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    found = onnx_ecp.compare(*pair, runtime=name, threads=1, batch_size=8)
    assert (found.runtime.name, found.latency) == (name, found.runtime.latency)
    assert found.runtime.version
    assert found.latency.conditions == "batch 8, 1 thread"
    assert found.latency.median_a > 0
    assert max(found.runtime.difference_a, found.runtime.difference_b) < 1e-5


def test_the_command_shows_where_it_was_measured(pair):
    arguments = ["compare", *map(str, pair[:2]), "-d", str(pair[2]), "--runtime", "onnxruntime"]
    shown = " ".join(CliRunner().invoke(main, arguments).stdout.split())
    assert "in onnxruntime " in shown
    assert "differs from ONNX" in shown
    assert "B is" in shown
    written = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert written["runtime"]["name"] == "onnxruntime"


WRONG = {
    "missing": (f"sys.exit({worker.MISSING})", "is not installed in the environment of"),
    "failing": ("sys.exit('it broke.')", r"failed: it broke\.$"),
    "dying": ("os.kill(os.getpid(), 11)", "died of signal 11"),
    "silent": ("sys.exit(1)", "failed: it says nothing"),
}


@pytest.mark.parametrize(("body", "message"), WRONG.values(), ids=WRONG)
@each_runtime
def test_whatever_goes_wrong_there_is_told(name, body, message, pair, tmp_path, monkeypatch):
    monkeypatch.setenv(runtimes.PYTHON, python_that(tmp_path, body))
    with pytest.raises(ProviderError, match=message) as error:
        onnx_ecp.compare(*pair, runtime=name)
    assert error.value.exit_code == 6
    assert error.value.hint
    if "installed" in message:
        assert runtimes.PYTHON in error.value.hint
        assert runtimes.INSTALL[name] in error.value.hint


def test_a_python_that_is_none_is_named(pair, monkeypatch):
    monkeypatch.setenv(runtimes.PYTHON, "/no/python")
    with pytest.raises(ProviderError, match=f"{runtimes.PYTHON} is /no/python: No such file"):
        onnx_ecp.compare(*pair, runtime="onnxruntime")


@pytest.mark.parametrize("which", [0, 1])
def test_a_runtime_that_computes_something_else_is_refused(which, pair, tmp_path, monkeypatch):
    body = f"""{AS_USUAL}
import numpy as np
main(folder)
path = os.path.join(folder, "outputs_{which}.npz")
y = np.load(path)["arr_0"]
np.savez(path, y * 1.01)
"""
    monkeypatch.setenv(runtimes.PYTHON, python_that(tmp_path, body))
    with pytest.raises(ProviderError, match=f"something else .* for model {'AB'[which]}: .* 0.01 "):
        onnx_ecp.compare(*pair, runtime="onnxruntime")


@pytest.mark.parametrize(("name", "ir"), [("onnxruntime", 10), ("deepsparse", 9)])
def test_it_is_given_a_version_that_it_takes(name, ir, pair, tmp_path, monkeypatch):
    """And dense weights; both only in a copy."""
    model = onnx.load(pair[1])
    model.ir_version = 10
    onnx.save(model, pair[1])
    onnx_ecp.optimize(
        pair[1], pair[2], output=tmp_path / "s.onnx", format="sparse", method="magnitude",
        measure=False, cleanup=False,
    )  # fmt: skip
    assert onnx.load(tmp_path / "s.onnx").graph.sparse_initializer
    body = """
import onnx
job = json.load(open(os.path.join(folder, "job.json")))
models = [onnx.load(path) for path in job["models"]]
sys.exit(" ".join(f"{m.ir_version}/{len(m.graph.sparse_initializer)}" for m in models))
"""
    monkeypatch.setenv(runtimes.PYTHON, python_that(tmp_path, body))
    with pytest.raises(ProviderError, match=f"failed: {ir}/0 {ir}/0"):
        onnx_ecp.compare(pair[1], tmp_path / "s.onnx", pair[2], runtime=name)
    assert onnx.load(pair[1]).ir_version == 10


def test_a_model_that_it_does_not_take_is_refused(pair):
    model = onnx.load(pair[0])
    model.opset_import[0].version = TARGETS["deepsparse"].opset + 1
    model.ir_version = 10
    onnx.save(model, pair[0])
    with pytest.raises(ModelError, match="DeepSparse takes at most"):
        onnx_ecp.compare(pair[0], pair[0], pair[2], runtime="deepsparse")


def test_an_unknown_runtime_is_refused_with_the_known_ones(pair):
    with pytest.raises(UsageError, match="unknown runtime 'tensorrt'") as error:
        onnx_ecp.compare(*pair, runtime="tensorrt")
    assert "openvino" in error.value.hint
