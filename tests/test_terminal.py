"""What a terminal shows fits 80 columns and names what there is; JSON holds all of it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

from onnx_ecp.cli.commands import main
from onnx_ecp.cli.grouped import GROUPS, REST, Grouped, groups
from onnx_ecp.report.names import Names

ROOT = Path(__file__).parent.parent
COLUMNS = 80
GROUPED = [name for name, command in main.commands.items() if isinstance(command, Grouped)]
# 120 characters, alike at both ends as exporters make them.
LONG = [f"/encoder/{'stage/' * 8}layer.{k}/{'attention/' * 5}MatMul".rjust(120, "/") for k in "abc"]
NET = """
<ir_version: 8, opset_import: ["": 17]>
net (float[n, 8] x) => (float[n, 4] y)
{ h = MatMul(x, U) r = Relu(h) g = MatMul(r, V) s = Relu(g) y = MatMul(s, W) }
"""


def command(*arguments):
    """Run ``onnx-ecp`` in a terminal that is wide enough for anything."""
    return CliRunner().invoke(main, [str(x) for x in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose nodes and file have long names, one smaller model, and data."""
    place = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NET)
    for name, shape in {"U": (8, 96), "V": (96, 64), "W": (64, 4)}.items():
        values = rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    nodes = [node for node in proto.graph.node if node.op_type == "MatMul"]
    for node, name in zip(nodes, LONG, strict=True):
        node.name = name
    onnx.save(proto, place / f"{'in' * 40}.onnx")
    x = rng.standard_normal((64, 8)).astype(np.float32)
    np.savez(place / "data.npz", x=x, y=rng.integers(0, 4, 64))
    done = command(
        "optimize",
        place / f"{'in' * 40}.onnx",
        place / "out.onnx",
        "--speedup",
        2,
        "--effort",
        "fast",
    )
    assert done.exit_code == 0, done.output
    return place


DATA = ["-c", "data.npz", "--labels", "data.npz"]
FAST = ["--effort", "fast", "--dry-run"]
RUNS = {
    "optimize, zeros": ["optimize", "IN", *DATA, *FAST, "--measure", "--bound"],
    "optimize, units": ["optimize", "IN", *DATA, *FAST, "--granularity", "unit", "-s", "0.4"],
    "optimize, a pattern": ["optimize", "IN", *DATA, *FAST, "-s", "2:4", "--exclude", "layer.b"],
    "optimize, a limit": [
        "optimize",
        "IN",
        *DATA,
        "-m",
        "magnitude",
        "--dry-run",
        "--max-error",
        "0.9",
    ],
    "inspect": ["inspect", "IN"],
    "compare": ["compare", "IN", "out.onnx", "-d", "data.npz", "--labels", "data.npz"],
    "bound": ["bound", "IN", "out.onnx", "-d", "data.npz", "--input-range", "x:-1,1"],
    "bound, planned": ["bound", "IN", "--method", "magnitude", "--eps", "0.1"],
    "sweep": ["sweep", "IN", *DATA, "--methods", "magnitude,wanda", "--sparsities", "0.5,2:4"],
    "doctor": ["doctor"],
}
each_run = pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS)


@pytest.fixture
def run(folder, monkeypatch):
    """Runs a command in the folder; the stdout of one that ended well."""
    monkeypatch.chdir(folder)

    def running(*arguments):
        named = [f"{'in' * 40}.onnx" if x == "IN" else x for x in arguments]
        result = command(*named)
        assert result.exit_code == 0, result.output
        return result.stdout

    return running


@each_run
def test_no_line_of_a_table_is_wider_than_80_columns(arguments, run):
    lines = run(*arguments).splitlines()
    shown = [line for line in lines if not line.startswith("OK ")]  # a record, for scripts
    assert len(shown) >= 3
    assert max(map(len, shown)) <= COLUMNS
    gone = {name for line in shown if "no room for" in line for name in line.split(": ")[1:]}
    assert gone <= {"effective samples"}


@each_run
def test_json_is_all_there_is_on_stdout_and_holds_what_the_tables_show(arguments, run):
    # Two runs never take the same time, and what is measured decides what else is told.
    timeless = ["--no-measure"] * (arguments[0] == "optimize")
    arguments = [x for x in arguments if x != "--measure"] + timeless
    whole = run(*arguments, "--json")
    json.loads(whole)
    shown = run(*arguments)
    written = re.sub(r"(?<=\d),(?=\d{3})", "", whole)  # in sentences
    for count in re.findall(r"(?<![.\d,])\d{1,3}(?:,\d{3})+", shown):
        assert re.search(rf"\b{count.replace(',', '')}\b", written), count
    held = " ".join(whole.split())
    for warning in re.findall(r"^warning: (.*?)(?=^\w+: |^OK |\Z)", shown, re.M | re.S):
        said = json.dumps(" ".join(warning.split()))[1:-1]
        assert said[:60] in held


@pytest.mark.parametrize("name", ["optimize, zeros", "inspect"])
def test_long_names_are_told_apart_in_tables_and_whole_in_json(name, run):
    shown, held = run(*RUNS[name]), json.loads(run(*RUNS[name], "--json"))
    assert [layer["name"] for layer in held["layers"]] == LONG
    rows = re.findall(r"^ (\S*\.\.\.\S*) +MatMul ", shown, re.M)
    assert rows
    assert len(set(rows[: len(LONG)])) == len(LONG)


def test_a_reader_of_inputs_that_prints_does_not_break_the_json(run, folder):
    (folder / "loud.py").write_text(
        "import numpy as np\ndef load_data():\n    print('hello')\n"
        "    for k in range(32): yield {'x': np.full((1, 8), k, np.float32)}\n"
    )
    loud = ["optimize", "IN", "-c", "loud.py", "--dry-run", "-m", "magnitude"]
    assert json.loads(run(*loud, "--json"))["calibration"]["source"].startswith("loud.py")


@pytest.mark.parametrize("names", [LONG, ["a" * 50 + "1" + "b" * 9, "a" * 50 + "2" + "b" * 9]])
@pytest.mark.parametrize("width", range(12, 30, 3))
def test_names_are_cut_where_it_leaves_them_apart(names, width):
    column = Names()
    for name in names:
        column(name)
    shown = [column.cut(width)(name) for name in names]
    assert {len(name) for name in shown} == {width}
    assert all("..." in name for name in shown)
    assert len(set(shown)) == len(names)


def test_names_that_fit_are_whole_and_those_apart_are_cut_in_the_middle():
    column = Names()
    column("fc1"), column("first" + "-" * 30), column("second" + "-" * 30)
    assert str(column("fc1")) == "fc1"
    assert column.cut(15)("first" + "-" * 30) == "first-...------"


# Help.


@pytest.mark.parametrize("name", GROUPED)
def test_every_option_is_in_the_whole_help_once(name):
    shown = command(name, "--help-all").stdout
    flags = re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.M)
    options = [x for x in main.commands[name].params if isinstance(x, click.Option)]
    own = ["--help", "--help-all"]
    assert sorted(flags) == sorted([*(option.opts[-1] for option in options), *own])
    for option in options:
        assert option.help
        assert " ".join(option.help.split())[:20] in " ".join(shown.split())


@pytest.mark.parametrize("name", GROUPED)
def test_the_help_is_a_page_of_groups(name):
    lines = command(name, "--help").stdout.splitlines()
    assert len(lines) <= 60
    titles = [line[:-1] for line in lines if re.fullmatch(r"\w[\w ]*:", line)]
    assert titles == list(GROUPS)
    assert "--help-all" in lines[-1]


def test_an_option_is_in_one_group_and_those_of_no_group_come_last():
    flags = [flag for rows in GROUPS.values() for row in rows for flag in row]
    assert len(flags) == len(set(flags))
    [(title, options)] = groups([click.Option(["--unheard-of"])], everything=True)
    assert (title, options[0].opts) == (REST, ["--unheard-of"])


@pytest.mark.parametrize("name", ["", *main.commands])
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_no_line_of_a_help_is_wider_than_80_columns(name, flag):
    if flag == "--help-all" and name not in GROUPED:
        pytest.skip("it has one help")
    lines = command(*filter(None, [name]), flag).stdout.splitlines()
    assert len(lines) >= 5
    assert max(map(len, lines)) <= COLUMNS


# Completion.


def test_a_shell_completes_commands_and_options():
    readme = (ROOT / "README.md").read_text()
    assert '"$(_ONNX_ECP_COMPLETE=bash_source onnx-ecp)"' in readme
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['onnx-ecp']\n"
        "from onnx_ecp.cli.commands import main; main(prog_name='onnx-ecp')"
    )

    def completed(words, at):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True,
            env={
                "_ONNX_ECP_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at),
            },
        )  # fmt: skip
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("onnx-ecp opt", 1) == ["optimize"]
    assert "--sparsity" in completed("onnx-ecp optimize --spa", 2)
