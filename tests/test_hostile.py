"""Odd and hostile models and arrays: a documented exit code and two plain lines, never a bug.

The files lie in ``shared/cases/hostile`` beside the checkout, or below ONNX_ECP_SHARED; the same
kinds, made here and in ``hostile.py``, are tested everywhere.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from onnx_ecp.cli.commands import main
from onnx_ecp.errors import CalibrationError

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("ONNX_ECP_SHARED", ROOT.parent / "shared")) / "cases" / "hostile"
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8}
# These are valid, and end well.
GOOD = {"name_w_file.onnx", "opt_out.onnx"}
# Compiled code crashes on these, or computes for long: they are survived in a child process.
LONG = {"fold_matmul_60x2048.onnx", "int_min_div.onnx", "trap_loopcount.onnx"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a small model, net.onnx."""
    onnx.save(network("Relu", 1, "activation"), tmp_path / "net.onnx")
    return tmp_path


def files(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in sorted(SHARED.glob(pattern))]
    missing = pytest.mark.skip(reason="shared/cases/hostile is not there")
    return found or [pytest.param(SHARED, marks=missing)]  # type: ignore[list-item]


def told(result: object, output: Path) -> str:
    """The error of a command that must end in order: documented code, two lines, no output."""
    code, stderr = result.exit_code, result.stderr  # type: ignore[attr-defined]
    assert code in DOCUMENTED, result.output  # type: ignore[attr-defined]
    assert "Traceback" not in stderr
    assert "ecp/" not in stderr
    if code:
        lines = [x for x in stderr.splitlines() if not x.startswith("warning: ")]
        assert [line.split(": ")[0] for line in lines] == ["error", "hint"], stderr
        assert not output.exists()
        assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]
    return stderr


def optimized(model: Path, folder: Path, *options: str) -> str:
    """What a short run says on stderr; "" where it ends well."""
    output = folder / "out.onnx"
    words = ["optimize", str(model), str(output), "--samples", "16", "--timeout", "60", *options]
    return told(CliRunner().invoke(main, words), output)


@pytest.mark.parametrize("path", files("*.onnx"), ids=lambda path: path.name)
def test_a_hostile_model_of_the_field_is_survived(path, tmp_path):
    if path.name in LONG:
        pytest.skip("tested in a child process")
    error = optimized(path, tmp_path)
    assert bool(error) == (path.name not in GOOD)


@pytest.mark.parametrize("path", files("*.onnx"), ids=lambda path: path.name)
def test_inspect_survives_a_hostile_model_of_the_field(path, tmp_path):
    if path.name in LONG:
        pytest.skip("tested in a child process")
    told(CliRunner().invoke(main, ["inspect", str(path)]), tmp_path / "out.onnx")


@pytest.mark.parametrize("path", files("*.npy"), ids=lambda path: path.name)
def test_a_hostile_array_of_the_field_is_refused(path, tmp_path):
    onnx.save(network("Relu", 1, "activation"), tmp_path / "net.onnx")
    assert path.name in optimized(tmp_path / "net.onnx", tmp_path, "-c", str(path))


# The same kinds, made here.


def network(op: str, times: int, where: str):
    """Two MatMuls with a chain of one operator behind the first weight, or between them."""
    rng = np.random.default_rng(0)
    nodes, names = [], {"weight": "W", "activation": "h"}

    def chain(source: str) -> str:
        for i in range(times):
            nodes.append(helper.make_node(op, [source], [f"c{i}"]))
            source = f"c{i}"
        return source

    if where == "weight":
        names["weight"] = chain("W")
    nodes.append(helper.make_node("MatMul", ["x", names["weight"]], ["h"]))
    if where == "activation":
        names["activation"] = chain("h")
    nodes.append(helper.make_node("MatMul", [names["activation"], "V"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), "W"),
            numpy_helper.from_array(rng.normal(size=(4, 3)).astype(np.float32), "V"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["weight", "activation"])
def test_walks_along_a_chain_of_any_length_are_no_recursion(where, tmp_path):
    """1,500 Identity nodes; a call deeper than Python's limit would end the process."""
    onnx.save(network("Identity", 1500, where), tmp_path / "net.onnx")
    assert optimized(tmp_path / "net.onnx", tmp_path) == ""
    assert (tmp_path / "out.onnx").exists()


HEAD = '<ir_version: 8, opset_import: ["": 17]> net '
W = "<float[4,3] W = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] b = {1,0,0}>"
# Valid for the checker; by text the words that the error must have.
ODD = {
    "sequence between nodes": (
        f"""(float[n,4] x) => (float[n,3] y) {W} {{
            a = Gemm(x, W, b)  q = SplitToSequence <axis = 1> (a)
            y = ConcatFromSequence <axis = 1> (q)
        }}""",
        "ConcatFromSequence reads or makes a sequence",
    ),
    "If on a number": (
        f"""(float[n,4] x) => (float[n,3] y) {W} {{
            h = MatMul(x, W)
            y = If (b) <
                then_branch = t () => (float[n,3] p) {{ p = Relu(h) }},
                else_branch = e () => (float[n,3] q) {{ q = Tanh(h) }}
            >
        }}""",
        "ONNX Runtime does not load the model",
    ),
    "sizes that contradict each other": (
        f"""(float[n,4] x) => (float[m,3] y) {W} <int64[2] s = {{7, 5}}> {{
            h = Gemm(x, W, b)  r = Reshape(h, s)  y = MatMul(r, W)
        }}""",
        "ONNX Runtime does not load the model",
    ),
}


@pytest.mark.parametrize(("text", "words"), ODD.values(), ids=ODD)
def test_an_odd_model_is_refused_with_a_reason(text, words, tmp_path):
    text = HEAD + text.replace("> <", ", ")
    onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
    assert words in optimized(tmp_path / "net.onnx", tmp_path)


# Scripts, configurations and names.

SCRIPTS = ["KeyboardInterrupt()", "GeneratorExit()", "SystemExit(3)", "StopIteration()"]


@pytest.mark.parametrize("raised", SCRIPTS)
@pytest.mark.parametrize("when", ["when it is imported", "while it yields"])
def test_whatever_a_script_raises_is_the_script_s_failure(raised, when, folder):
    text = f"raise {raised}\n"
    if when == "while it yields":
        feed = "{'x': numpy.ones((4, 4), numpy.float32)}"
        text = f"import numpy\ndef load_data():\n    yield {feed}\n    {text}"
    (folder / "data.py").write_text(text)
    error = optimized(folder / "net.onnx", folder, "-c", str(folder / "data.py"))
    assert "data.py: failed with " in error


@pytest.mark.parametrize(
    "line",
    ["samples = inf", "samples = 2020-01-01", "seed = 1e400", "threads = 1.5", "force = 12:00:00"],
)
def test_a_configuration_with_an_impossible_value_is_refused(line, folder):
    (folder / "c.toml").write_text(line)
    error = optimized(folder / "net.onnx", folder, "--config", str(folder / "c.toml"))
    assert f"c.toml: {line.split()[0]} cannot be" in error


@pytest.mark.parametrize("pattern", ["(" * 3000 + "a" + ")" * 3000, "(a)" * 3000, "a{9999999999}"])
def test_a_regular_expression_of_any_length_is_answered(pattern, folder):
    error = optimized(folder / "net.onnx", folder, "--include", pattern)
    assert "regular expression" in error or "matches no layer" in error
    assert len(error) < 2000


@pytest.mark.parametrize("option", ["--masks", "--report", ""])
def test_a_name_that_no_file_can_have_is_refused_before_the_work(option, folder):
    suffix = {"--masks": ".npz", "--report": ".html", "": ".onnx"}[option]
    name = str(folder / ("a" * 253 + suffix))
    given = [str(folder / "out.onnx"), option, name] if option else [name]
    done = CliRunner().invoke(main, ["optimize", str(folder / "net.onnx"), *given])
    assert done.exit_code == 8
    assert "File name too long" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["net.onnx"]


def process(folder: Path, *words: str, **streams: object) -> subprocess.CompletedProcess:
    """The command line in a process of its own, with other streams than the test's."""
    command = [sys.executable, "-m", "onnx_ecp", *words]
    settings = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "cwd": folder, "timeout": 100}
    return subprocess.run(command, check=False, text=True, **(settings | streams))  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["full", "closed", "unread"])
def test_a_stdout_that_takes_nothing_does_not_hide_what_was_written(stdout, folder):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    words = ["optimize", "net.onnx", "out.onnx"]
    if stdout == "full":
        with open("/dev/full", "w") as full:
            done = process(folder, *words, stdout=full, stderr=subprocess.PIPE)
    elif stdout == "closed":
        done = process(folder, *words, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = process(folder, *words, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
    assert (folder / "out.onnx").exists()
    assert done.returncode == (0 if stdout == "closed" else 8)
    if stdout != "closed":
        error, hint = done.stderr.splitlines()[-2:]
        assert error.startswith("error: ")
        assert hint == f"hint: Written: {folder / 'out.onnx'}."


@pytest.mark.slow
def test_a_working_directory_that_is_gone_is_named(folder):
    gone = folder / "gone"
    gone.mkdir()
    words = ["optimize", str(folder / "net.onnx"), "out.onnx"]
    done = process(gone, *words, preexec_fn=gone.rmdir, capture_output=True)
    assert done.returncode == 8
    assert "error: the working directory does not exist any more." in done.stderr


@pytest.mark.slow
def test_a_script_that_leaves_the_process_is_told_by_its_parent(folder):
    (folder / "data.py").write_text("import os\nos._exit(7)\n")
    done = process(folder, "optimize", "net.onnx", "out.onnx", "-c", "data.py", capture_output=True)
    assert done.returncode == 4
    assert "error: the process was left with code 7" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["data.py", "net.onnx"]


# Memory before proof.


def npz(path: Path, shape: tuple[int, ...], dtype: str = "<f4", payload: int = 2**28) -> None:
    """An .npz file of some kilobytes whose array unpacks to ``payload`` zeros."""
    header = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(header.getvalue())
        for _ in range(payload // 2**20):
            stream.write(bytes(2**20))


SIZES = {
    "one sample declared": ((1, 4), "<f4", "takes 16 bytes, but 268435456 are there"),
    "wrong dtype": ((2**23, 4), "<f8", "float64"),
    "wrong shape": ((2**13, 2**13), "<f4", "(8192, 8192)"),
    "wrong rank": ((2**26,), "<f4", "(67108864)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype", "words"), SIZES.values(), ids=SIZES)
def test_arrays_that_do_not_fit_are_refused_before_they_are_unpacked(
    shape, dtype, words, folder, monkeypatch
):
    npz(folder / "data.npz", shape, dtype)
    monkeypatch.setattr("onnx_ecp.data.calibration.read_npz", None)  # nothing may be unpacked
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = optimized(folder / "net.onnx", folder, "-c", str(folder / "data.npz"))
    assert words in error
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 2**27


def test_a_header_that_claims_to_be_long_is_not_read(folder):
    size = (2**28).to_bytes(4, "little")
    with zipfile.ZipFile(folder / "data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + size + b" " * 2**28)
    tracemalloc.start()
    error = optimized(folder / "net.onnx", folder, "-c", str(folder / "data.npz"))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "cannot be read" in error
    assert most < 2**26


@pytest.mark.parametrize("kind", ["fifo", "a link to /dev/zero", "a folder"])
@pytest.mark.parametrize("name", ["data.npy", "data.npz", "data.json", "set/input_0.pb", "m.onnx"])
def test_only_regular_files_are_read(name, kind, folder):
    """A pipe would be waited for and a device read for ever."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case _:
            path.symlink_to("/dev/zero")
    if name == "m.onnx":
        assert "not a regular file" in optimized(path, folder)
        return
    source = path.parent if name.endswith(".pb") else path
    assert str(source) in optimized(folder / "net.onnx", folder, "-c", str(source))
    if name.endswith((".npy", ".npz")):
        optimized(folder / "net.onnx", folder, "--labels", str(path))


# The page of the docs.

PAGE = (ROOT / "docs" / "what-can-go-wrong.md").read_text(encoding="utf-8")
X = np.zeros((8, 4), np.float32)
BROKEN = X.copy()
BROKEN[3, 1] = np.nan
SHOWN = {
    "nan.npz": {"x": BROKEN},
    "f64.npz": {"x": X.astype(np.float64)},
    "shape.npz": {"x": np.zeros((8, 5), np.float32)},
    "name.npz": {"xs": X},
    "obj.npz": {"x": np.array([{}, None])},
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_page_on_errors_has_the_message_that_is_printed(name, folder):
    np.savez(folder / name, **SHOWN[name])
    error = optimized(folder / "net.onnx", folder, "-c", str(folder / name))
    message = error.splitlines()[0].removeprefix("error: ").replace(f"{folder}/", "")
    assert f"`{message}`" in PAGE
    assert str(CalibrationError.exit_code) in PAGE


@pytest.mark.parametrize("path", files("*.onnx"), ids=lambda path: path.name)
def test_the_page_on_errors_has_the_messages_of_damaged_models(path, tmp_path):
    if path.name not in {"const_two.onnx", "conv_pad_odd.onnx", "fn_too_many_args.onnx"}:
        pytest.skip("its message is not on the page word for word")
    error = optimized(path, tmp_path).splitlines()[0]
    assert f"`{error.removeprefix(f'error: {path}: ')}`" in PAGE


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", files("fold_*.onnx", "int_*.onnx", "trap_*.onnx"), ids=lambda p: p.name
)
@pytest.mark.parametrize("command", ["optimize", "inspect"])
def test_crashes_and_endless_work_are_survived_in_a_child_process(path, command, tmp_path):
    words = [command, str(path), "--timeout", "5"]
    words += [str(tmp_path / "out.onnx")] if command == "optimize" else []
    done = process(tmp_path, *words, capture_output=True)
    assert done.returncode == 6 or (command, done.returncode) == ("inspect", 0)
    if done.returncode:
        assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert not list(tmp_path.iterdir())
