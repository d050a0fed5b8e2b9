"""The command line keeps its contract: names, exit codes, one error line, one last line."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result

import onnx_ecp
from onnx_ecp.api import optimize as pipeline
from onnx_ecp.api.doctor import diagnose
from onnx_ecp.api.options import Options
from onnx_ecp.cli.commands import main
from onnx_ecp.errors import QualityError
from onnx_ecp.methods import COMPENSATIONS, METHODS
from onnx_ecp.report import Report
from onnx_ecp.report.diagnosis import Check, Diagnosis

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
NET = """
<ir_version: 8, opset_import: ["": 17]>
net (float[n, 8] x) => (float[n, 4] y)
{ h = MatMul(x, W) s = Add(h, b) a = Relu(s) y = MatMul(a, V) }
"""
START = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom onnx_ecp.cli.commands import main; main()"
)


def model(text: str, rng: np.random.Generator, **shapes: tuple) -> onnx.ModelProto:
    """A model of a few lines with random initializers of these shapes."""
    proto = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def command(*arguments: object) -> Result:
    """Run ``onnx-ecp`` in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path, rng, monkeypatch) -> Path:
    """The current directory, with a model ``in.onnx`` and data for it beside."""
    onnx.save(model(NET, rng, W=(8, 16), b=(16,), V=(16, 4)), tmp_path / "in.onnx")
    x = rng.standard_normal((40, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    np.savez(tmp_path / "test.npz", x=x, y=rng.integers(0, 4, 40))
    (tmp_path / "old.json").write_text("old")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last_line(result: Result) -> str:
    return result.stdout.splitlines()[-1]


# The main job.


def test_pruning_with_nothing_else_said_works_and_warns_of_made_up_inputs(folder):
    result = command("optimize", "in.onnx", "out.onnx")
    assert (result.exit_code, result.stderr) == (0, "")
    assert last_line(result).startswith("OK out.onnx sparsity=0.5000 error=")
    assert "warning: calibrated on made-up inputs" in result.stdout
    weights = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load("out.onnx").graph.initializer
    }
    # Clean-up may have taken units whose weights were all zero out of the file.
    assert sum(int((weights[name] != 0).sum()) for name in "WV") <= (8 * 16 + 16 * 4) // 2


def test_the_file_beside_the_model_is_taken_without_a_warning(folder):
    (folder / "data.npz").rename("in.npz")
    result = command("optimize", "in.onnx", "out.onnx")
    assert result.exit_code == 0
    assert "made-up" not in result.stdout
    assert "in.npz: 32 samples, 8 held out" in result.stdout


def test_quiet_prints_only_the_last_line(folder):
    arguments = ["optimize", "in.onnx", "out.onnx", "-s", "0.8", "--force"]
    loud, quiet = command(*arguments), command(*arguments, "-q")
    assert quiet.stdout.splitlines() == [last_line(loud)]
    assert quiet.stderr.startswith("warning: calibrated on made-up inputs")


def test_a_dry_run_writes_nothing(folder):
    before = sorted(folder.iterdir())
    result = command("optimize", "in.onnx", "--dry-run", "-c", "data.npz")
    assert (result.exit_code, sorted(folder.iterdir())) == (0, before)
    assert last_line(result).startswith("OK (nothing written) sparsity=0.5000")


def test_a_dry_run_writes_whatever_else_is_asked_for(folder):
    files = {"m.npz", "r.json"}
    result = command(
        "optimize", "in.onnx", "--dry-run", "-c", "data.npz", "--masks", "m.npz",
        "--report", "r.json",
    )  # fmt: skip
    assert result.exit_code == 0
    assert files <= {path.name for path in folder.iterdir()}
    with np.load(folder / "m.npz") as masks:
        assert sum(int((~masks[name]).sum()) for name in masks.files) > 0


def test_reports_say_what_was_printed(folder):
    result = command(
        "optimize",
        "in.onnx",
        "out.onnx",
        "-c",
        "data.npz",
        "--report",
        "r.json",
        "--report",
        "r.html",
    )
    report = Report.from_dict(json.loads((folder / "r.json").read_text()))
    assert f"sparsity={report.sparsity:.4f}" in last_line(result)
    assert report.result.bytes == (folder / "out.onnx").stat().st_size
    assert (report.calibration.samples, report.calibration.held_out) == (32, 8)
    assert report.result.sha256 in (folder / "r.html").read_text()


def test_options_reach_the_library(folder, monkeypatch):
    seen = {}

    def optimize(model, calibration, **given):
        seen.update(given, model=model, calibration=calibration)
        raise QualityError("enough.")

    monkeypatch.setattr(pipeline, "optimize", optimize)
    result = command(
        "optimize", "in.onnx", "out.onnx", "-c", "data.npz", "--layer-sparsity", "fc=1=2:4",
        "--layer-sparsity", "b=.9", "--input-shapes", "x:0:1,8", "--include", "a", "--include", "b",
        "--batch-size", "7", "--force",
    )  # fmt: skip
    assert result.exit_code == 7
    assert seen["layer_sparsity"] == {"fc=1": "2:4", "b": ".9"}
    assert seen["input_shapes"] == {"x:0": (1, 8)}
    assert (seen["include"], seen["batch_size"], seen["force"]) == (("a", "b"), 7, True)
    assert (seen["model"], seen["calibration"], seen["output"]) == (
        "in.onnx",
        "data.npz",
        "out.onnx",
    )


# Names, defaults, help.


def test_the_options_are_those_of_the_library_with_the_same_defaults(given):
    command("optimize", "in.onnx", "out.onnx")
    options = {
        name: given[name]
        for name in given
        if name not in ("calibration", "output", "report", "progress")
    }
    assert set(options) == {field.name for field in dataclasses.fields(Options)}
    assert Options.of(**options) == Options.of()


def test_the_help_names_every_method_and_compensation():
    shown = command("optimize", "--help-all").stdout
    assert all(name in shown for name in METHODS)
    listed = shown.partition("--compensation NAME")[2].partition("[default")[0]
    assert set(re.findall(r"\w+", listed)) - {"or"} == set(COMPENSATIONS)


@pytest.mark.parametrize("name", ["inspect", "compare", "bound", "doctor"])
def test_every_command_has_help_with_every_option(name):
    result = command(name, "--help")
    assert result.exit_code == 0
    for option in main.commands[name].params:
        if isinstance(option, click.Option):
            assert option.opts[-1] in result.stdout
            assert option.help


def test_asking_for_help_loads_nothing_heavy():
    heavy = {"numpy", "onnx", "onnxruntime", "rich", "onnx_graphsurgeon"}
    code = f"import onnx_ecp.cli.commands, sys; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_nothing_said_is_a_question_for_help():
    assert command().stdout == command("--help").stdout
    assert (command().exit_code, command().stderr) == (0, "")
    commands = command().stdout.partition("Commands:")[2]
    assert "..." not in commands  # every command says in one line what it does


def test_public_names_are_there_when_used():
    assert all(getattr(onnx_ecp, name) is not None for name in onnx_ecp.__all__)
    assert set(onnx_ecp.__all__) <= set(dir(onnx_ecp))
    with pytest.raises(AttributeError, match="optimise"):
        _ = onnx_ecp.optimise
    assert command("--version").stdout == f"onnx-ecp {onnx_ecp.__version__}\n"


# What goes wrong.

RUN = ["optimize", "in.onnx", "o.onnx"]
SELF = ["compare", "in.onnx", "in.onnx", "-d", "data.npz"]
ERRORS = {
    "no such command": (["optimise"], 2, "no command 'optimise'", "'optimize'"),
    "no such option": ([*RUN, "--sparcity", "1"], 2, "no option --sparcity", "'--sparsity'"),
    "no value": ([*RUN, "-s"], 2, "requires an argument", "--help"),
    "no model": (["optimize"], 2, "Missing argument 'MODEL'", "--help"),
    "no output": (["optimize", "in.onnx"], 2, "OUTPUT is missing", "--dry-run"),
    "unknown method": ([*RUN, "-m", "epc"], 2, "'epc'", "'ecp'"),
    "unknown scope": ([*RUN, "--scope", "layers"], 2, "'layers'", "'layer'"),
    "unknown format": ([*RUN, "--format", "pack"], 2, "'pack'", "'packed'"),
    "no sparsity": ([*RUN, "-s", "half"], 2, "half", ""),
    "sparsity beyond 1": ([*RUN, "-s", "80"], 2, "80", "Did you mean 0.8?"),
    "unknown provider": ([*RUN, "--provider", "cdua"], 2, "'cdua'", ""),
    "no regular expression": ([*RUN, "--include", "("], 2, "'('", ""),
    "unmatched layer": ([*RUN, "--layer-sparsity", "zzz=0.9"], 2, "'zzz'", "Known"),
    "no pair": ([*RUN, "--layer-sparsity", "0.9"], 2, "'0.9'", "fc1=0.9"),
    "no shape": ([*RUN, "--input-shapes", "x:a"], 2, "'x:a'", "x:1,3"),
    "shape of no input": ([*RUN, "--input-shapes", "z:1,8"], 2, "'z'", "Known: x"),
    "shape of a real input": (
        [*RUN, "-c", "data.npz", "--input-shapes", "x:1,9"],
        2,
        "1,9 for input 'x' contradicts the model's n,8",
        "free axes",
    ),
    "no report format": ([*RUN, "--report", "r.pdf"], 2, "r.pdf", "*.json or *.html"),
    "masks that are no npz": ([*RUN, "--masks", "m.txt"], 2, "m.txt", "*.npz"),
    "no model there": (["optimize", "gone.onnx", "o.onnx"], 3, "gone.onnx: ", ""),
    "not a model": (["inspect", "data.npz"], 3, "data.npz: ", ""),
    "no data there": ([*RUN, "-c", "gone.npz"], 4, "gone.npz: ", ""),
    "no labels there": ([*SELF, "--labels", "data.npz"], 4, "data.npz: has no labels", "y"),
    "nothing to prune": ([*RUN, "--exclude", ".*"], 5, "--exclude", ""),
    "out of time": ([*RUN, "--timeout", "1e-9"], 6, "time limit", "--timeout"),
    "output exists": (["optimize", "in.onnx", "test.npz"], 8, "test.npz: ", "--force"),
    "no such directory": (["optimize", "in.onnx", "no/o.onnx"], 8, "no", ""),
    "report exists": ([*RUN, "--report", "old.json"], 8, "old.json: ", "--force"),
    "masks exist": ([*RUN, "--masks", "data.npz"], 8, "data.npz: ", "--force"),
    "sweep exists": (["sweep", "in.onnx", "-o", "old.json"], 8, "old.json: ", "--force"),
    "report in no directory": ([*RUN, "--report", "no/r.json"], 8, "no/r.json: ", ""),
}


@pytest.mark.parametrize(("arguments", "code", "message", "hint"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_one_line_one_hint_one_code_and_no_file(arguments, code, message, hint, folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    result = command(*arguments)
    assert result.exit_code == code, result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert len(lines) <= 2
    assert hint in "".join(lines[1:])
    assert result.stdout == ""
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


FILES = ["optimize", "in.onnx", "out.onnx", "-c", "data.npz", "--labels", "test.npz"]
OVERWRITING = {
    "masks over the output": ["optimize", "in.onnx", "o.npz", "--masks", "./o.npz"],
    "a report over the output": ["optimize", "in.onnx", "o.json", "--report", "o.json"],
    "a report over a report": [*FILES, "--report", "r.json", "--report", "./r.json"],
    "masks over the model": ["optimize", "in.npz", "in.npz", "--masks", "in.npz"],
    "masks over the data": [*FILES, "--masks", "data.npz"],
    "masks over data by another name": [*FILES, "--masks", "link.npz"],
    "masks over the labels": [*FILES, "--masks", "test.npz"],
    "masks over masks": [*RUN, "--masks", "test.npz", "--apply-masks", "test.npz"],
    "the output over the data": ["optimize", "in.onnx", "data.npz", "-c", "data.npz"],
    "masks among the data": [*RUN, "-c", "data", "--masks", "data/m.npz"],
    "the output over external data": ["optimize", "large.onnx", "large.bin"],
    "masks over what lies beside": ["optimize", "large.onnx", "o.onnx", "--masks", "large.npz"],
    "points over points": ["sweep", "in.onnx", "-o", "p.csv", "-o", "./p.csv"],
    "points over the data": ["sweep", "in.onnx", "-c", "old.json", "-o", "old.json"],
}


@pytest.mark.parametrize("arguments", OVERWRITING.values(), ids=OVERWRITING)
def test_nothing_is_written_over_another_result_or_what_is_read(arguments, folder):
    onnx.save(
        onnx.load("in.onnx"), "large.onnx", save_as_external_data=True, location="large.bin",
        size_threshold=0,
    )  # fmt: skip
    for copied in ("large.npz", "data/0.npz"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / copied).write_bytes((folder / "data.npz").read_bytes())
    (folder / "in.npz").write_bytes((folder / "in.onnx").read_bytes())
    (folder / "link.npz").symlink_to("data.npz")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = command(*arguments, "--force")
    assert result.exit_code == 2, result.output
    assert "overwrite" in result.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_writing_over_the_model_is_told(folder):
    result = command("optimize", "in.onnx", "in.onnx", "-c", "data.npz", "--force")
    assert result.exit_code == 0
    assert "warning: OUTPUT is MODEL: the result has replaced the model" in result.stdout


def test_the_package_runs_as_the_command(folder):
    arguments = [sys.executable, "-m", "onnx_ecp", "inspect", "gone.onnx"]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.splitlines()[0]) == (
        3,
        "error: gone.onnx: No such file or directory.",
    )


def test_force_replaces_files_that_are_there(folder):
    data = ["-c", "data.npz", "--force"]
    assert command(*RUN, *data, "--report", "old.json").exit_code == 0
    assert json.loads((folder / "old.json").read_text())["schema"] == 2
    grid = ["--methods", "magnitude", "--sparsities", "0.5"]
    assert command("sweep", "in.onnx", "-o", "old.json", *grid, *data).exit_code == 0
    assert "points" in json.loads((folder / "old.json").read_text())


BUGS = {
    "a bug": (ZeroDivisionError("1/0\n\x1b[31m"), 1, "a bug in onnx-ecp"),
    "no memory": (MemoryError(), 6, "out of memory"),
}


@pytest.mark.parametrize(("error", "code", "message"), BUGS.values(), ids=BUGS)
def test_unexpected_errors_are_told_too(error, code, message, folder, monkeypatch):
    def optimize(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "optimize", optimize)
    result = command("optimize", "in.onnx", "out.onnx")
    assert result.exit_code == code
    assert message in result.stderr
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error", "hint"]
    assert "\x1b" not in result.stderr
    loud = command("optimize", "in.onnx", "out.onnx", "--traceback")
    assert "Traceback (most recent call last)" in loud.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_at_once_and_nothing_is_written(number, folder):
    Path("slow.py").write_text(
        "import time\ndef load_data():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    before = sorted(folder.iterdir())
    with subprocess.Popen(
        [sys.executable, "-B", "-c", START, "optimize", "in.onnx", "o.onnx", "-c", "slow.py"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-2:] == ["error: interrupted.", "hint: Nothing was written."]
    assert sorted(folder.iterdir()) == before


def test_a_reader_that_goes_away_is_no_bug(folder):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", START, "inspect", "in.onnx"],
            stdout=pipe, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert "bug" not in done.stderr
    assert "Exception ignored" not in done.stderr


# The configuration file.

CONFIGS = {
    "names with - or _": (
        'layer-sparsity = ["a=0.9"]\nbatch_size = 5',
        {"layer_sparsity": {"a": "0.9"}, "batch_size": 5},
    ),
    "tables": (
        "[layer-sparsity]\n'f=1' = 0.9\n[input-shapes]\nx = [1, 8]",
        {"layer_sparsity": {"f=1": "0.9"}, "input_shapes": {"x": (1, 8)}},
    ),
    "numbers, texts and flags": (
        "sparsity = 0.8\nmethod = 'wanda'\nforce = true\ntimeout = 3",
        {"sparsity": "0.8", "method": "wanda", "force": True, "timeout": 3.0},
    ),
    "one value of a repeatable option": ("include = 'fc'", {"include": ("fc",)}),
    "calibration": ("calibration = 'data.npz'", {"calibration": "data.npz"}),
}  # fmt: skip


@pytest.fixture
def given(monkeypatch) -> dict:
    """What ``optimize`` was called with."""
    seen = {}

    def optimize(model, calibration, **options):
        seen.update(options, calibration=calibration)
        raise QualityError("enough.")

    monkeypatch.setattr(pipeline, "optimize", optimize)
    return seen


@pytest.mark.parametrize(("text", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_file_sets_options(text, expected, folder, given):
    Path("c.toml").write_text(text)
    assert command("optimize", "in.onnx", "out.onnx", "--config", "c.toml").exit_code == 7
    assert {name: given[name] for name in expected} == expected


def test_the_command_line_wins_over_the_file(folder, given):
    Path("c.toml").write_text("sparsity = 0.8\nseed = 3\ninclude = ['a']")
    command("optimize", "in.onnx", "o.onnx", "--config", "c.toml", "-s", "0.9", "--include", "b")
    assert (given["sparsity"], given["seed"], given["include"]) == ("0.9", 3, ("b",))


WRONG_CONFIGS = {
    "unknown option": ("sparcity = 0.8", "'sparcity'", "'sparsity'"),
    "itself": ("config = 'c.toml'", "'config'", ""),
    "no TOML": ("sparsity: 0.8", "c.toml: cannot be read", ""),
    "not UTF-8": ("method = '\udcff'", "c.toml: cannot be read", ""),
    "a list where one value goes": ("sparsity = [0.8]", "sparsity cannot be [0.8]", "--help"),
    "a flag that is no flag": ("force = 'yes'", "force cannot be 'yes'", "--help"),
    "a number that is none": ("seed = 'x'", "'x' is not a valid integer", ""),
}


@pytest.mark.parametrize(("text", "message", "hint"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_what_is_wrong_in_a_configuration_file_is_told(text, message, hint, folder):
    Path("c.toml").write_bytes(text.encode(errors="surrogateescape"))
    result = command("optimize", "in.onnx", "out.onnx", "--config", "c.toml")
    assert result.exit_code == 2
    assert message in result.stderr
    assert hint in result.stderr


# inspect, compare, doctor.


def test_inspect_shows_every_layer(folder):
    result = command("inspect", "in.onnx")
    assert result.exit_code == 0
    assert "16 x 8" in result.stdout
    assert "4 x 16" in result.stdout
    shown = json.loads(command("inspect", "in.onnx", "--json").stdout)
    assert [layer["shape"] for layer in shown["layers"]] == [[16, 8], [4, 16]]
    assert [layer["two_four"] for layer in shown["layers"]] == ["", ""]
    assert (shown["weights"], shown["zeros"]) == (192, 0)
    assert shown["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["n", 8]}]


BLOCKED = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n] y, float[n, 4] q, int64[2] k)
{
    h = MatMul(x, W)  t = Relu(h)  m = MatMul(t, V)
    s = Constant<value = int64[3] {-1, 2, 2}>()  r = Reshape(m, s)  y = Det(r)
    q = MatMul(x, U)
    d = MatMul(x, T)  k = Shape(d)
}
"""


def test_inspect_shows_by_which_way_sensitivities_can_be_had(folder, rng):
    onnx.save(model(BLOCKED, rng, **dict.fromkeys("WVUT", (4, 4))), "det.onnx")
    found = {layer.name: layer for layer in onnx_ecp.inspect("det.onnx").layers}
    ways = {name: (layer.sensitivity, layer.blocked) for name, layer in found.items()}
    no_rule = "no gradient rule for Det"
    assert ways == {
        "h": ("differences", no_rule),
        "m": ("differences", no_rule),
        "q": ("reverse graph", ""),
        "d": ("none", "no float output of the model depends on it"),
    }
    shown = " ".join(command("inspect", "det.onnx").stdout.split())
    assert f"no sensitivity but by --gradients numeric: h and 1 more: {no_rule}" in shown
    assert "only methods that need none, such as magnitude: d: no float output" in shown
    # What inspect says is what optimize does.
    report = onnx_ecp.optimize("det.onnx", samples=20).report
    assert [row.name for row in report.layers] == ["q"]
    assert all(ways[skip.name][1] in skip.reason for skip in report.skips)


INSPECTED = {
    "shared by two nodes": (
        "float[n, 4] x", "h = MatMul(x, W) y = MatMul(h, W)", {"W": (4, 4)}, {"weights": 16},
    ),
    "not divisible by four": (
        "float[n, 6] x", "y = MatMul(x, W)", {"W": (6, 4)}, {"two_four": ["4 does not divide 6"]},
    ),
    "refused": (
        "float[4, n] x", "y = Gemm<transA = 1>(x, W)", {"W": (4, 4)}, {"weights": 0, "skips": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "body", "shapes", "expected"), INSPECTED.values(), ids=INSPECTED
)
def test_inspect_counts_stored_weights_once_and_gives_reasons(inputs, body, shapes, expected, rng):
    head = f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float[n, 4] y)'
    found = onnx_ecp.inspect(model(f"{head} {{ {body} }}", rng, **shapes))
    shown = {
        "weights": found.weights,
        "skips": len(found.skips),
        "two_four": [layer.two_four for layer in found.layers],
    }
    assert {name: shown[name] for name in expected} == expected


def test_inspect_works_on_models_newer_than_the_runtime(folder):
    proto = onnx.load("in.onnx")
    proto.ir_version = onnx.IR_VERSION + 90
    onnx.save(proto, "new.onnx")
    result = command("inspect", "new.onnx")
    assert result.exit_code == 0
    assert "16 x 8" in result.stdout
    assert f"IR version {proto.ir_version}" in " ".join(result.stdout.split())


def test_compare_shows_what_the_library_finds(folder):
    command("optimize", "in.onnx", "out.onnx", "-c", "data.npz", "-s", "0.7")
    arguments = ["compare", "in.onnx", "out.onnx", "-d", "test.npz", "--labels", "test.npz"]
    shown = json.loads(command(*arguments, "--json").stdout)
    found = onnx_ecp.compare("in.onnx", "out.onnx", "test.npz", "test.npz")
    assert shown["gap"]["relative_error"] == found.gap.relative_error > 0
    assert shown["gap"]["scores"][0]["metric"] == "accuracy"
    assert shown["latency"] is None
    result = command(*arguments, "--measure")
    assert result.exit_code == 0
    assert "latency" in result.stdout
    assert f"{found.gap.relative_error:.4g}" in result.stdout


def test_doctor_finds_this_installation_sound():
    result = command("doctor")
    assert result.exit_code == 0
    assert onnx.__version__ in result.stdout
    assert "CPUExecutionProvider" in result.stdout
    assert json.loads(command("doctor", "--json").stdout)["checks"][0]["name"] == "python"


RUNTIMES = {
    "one": ({"onnxruntime": "1.0"}, True, ""),
    "two": ({"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}, False, "overwrite each other"),
    "none": ({}, False, "onnx-ecp[cpu]"),
}


@pytest.mark.parametrize(("installed", "ok", "advice"), RUNTIMES.values(), ids=RUNTIMES)
def test_doctor_judges_the_installed_runtimes(installed, ok, advice, monkeypatch):
    monkeypatch.setattr("onnx_ecp.api.doctor.runtimes", lambda: installed)
    check = next(check for check in diagnose().checks if check.name == "ONNX Runtime")
    assert check.ok == ok
    assert advice in check.advice


def test_doctor_ends_with_6_where_something_is_wrong(monkeypatch):
    sick = Diagnosis((Check("ONNX Runtime", "not installed", ok=False, advice="Install it."),))
    monkeypatch.setattr("onnx_ecp.api.doctor.diagnose", lambda: sick)
    result = command("doctor")
    assert result.exit_code == 6
    assert "PROBLEM" in result.stdout
    assert "warning: Install it." in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "heat"])
def test_the_models_here_can_be_pruned(name, tmp_path):
    result = command("optimize", MODELS / f"{name}.onnx", tmp_path / "out.onnx", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "sparsity=0.5000" in result.stdout


@pytest.mark.parametrize(
    "words", [["{config}"], ["o.onnx", "--report", "{config}"], ["o.onnx", "--masks", "{config}"]]
)
def test_the_file_of_settings_is_not_written_over(words, tmp_path):
    config = tmp_path / "settings.json"
    config.write_text("sparsity = 0.5\n")
    link = tmp_path / "link.json"
    link.symlink_to(config)
    for name in (config, link):
        given = [word.format(config=name) for word in words]
        arguments = [
            "optimize",
            str(MODELS / "digits.onnx"),
            *given,
            "--config",
            str(config),
            "--force",
        ]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2
        assert "would overwrite the settings (--config)" in done.stderr
        assert config.read_text() == "sparsity = 0.5\n"
