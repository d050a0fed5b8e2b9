"""The public calls are typed: names agree everywhere, and a type checker refuses wrong ones."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import onnx_ecp
from onnx_ecp.api.choices import Choices, CommonChoices
from onnx_ecp.api.options import Options
from onnx_ecp.cli import commands
from onnx_ecp.errors import UsageError, named_as_options
from onnx_ecp.methods import METHODS

ROOT = Path(__file__).parent.parent
# What the commands have besides the keywords of the calls.
OF_THE_COMMAND = {"calibration"}


def parameters(command: str) -> set[str]:
    """Names of a command's options as Python has them."""
    known = {
        p.name for p in commands.main.commands[command].params if p.param_type_name == "option"
    }
    return {name for name in known if name is not None}


def test_options_choices_and_the_command_line_have_the_same_names():
    names = {field.name for field in dataclasses.fields(Options)}
    assert set(Choices.__annotations__) == names
    presentation = {"quiet", "verbose", "traceback", "report", "config", "as_json"}
    assert parameters("optimize") - presentation - OF_THE_COMMAND == names


def test_every_common_choice_is_an_option_of_the_sweep():
    assert set(CommonChoices.__annotations__) <= parameters("sweep")


def test_every_choice_is_described():
    for kind in (CommonChoices, Choices):
        described = set(re.findall(r"^        (\w+):", kind.__doc__ or "", re.M))
        base = set(CommonChoices.__annotations__) if kind is Choices else set()
        assert described == set(kind.__annotations__) - base


@pytest.mark.slow
def test_a_type_checker_refuses_what_does_not_exist_and_takes_the_readme(tmp_path):
    pytest.importorskip("mypy", reason="mypy checks types; it is in the extra `dev`")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    head = "import numpy as np\nsamples = others = np.zeros((8, 64), np.float32)\n"
    (tmp_path / "good.py").write_text(head + "\n".join(blocks))
    wrong = ("sparsty=0.8", "method=3", "stages='four'", "include=3")
    calls = [f'onnx_ecp.optimize("m.onnx", {text})\n' for text in wrong]
    (tmp_path / "bad.py").write_text("import onnx_ecp\n" + "".join(calls))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "good.py", "bad.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(\w+)\.py:(\d+): error", done.stdout, re.M)
    assert found == [("bad", str(line)) for line in range(2, 2 + len(wrong))], done.stdout


def test_errors_name_arguments_in_python_and_options_on_the_command_line():
    with pytest.raises(UsageError, match=r"^`stages` is 0;"):
        Options.of(stages=0)
    with named_as_options(), pytest.raises(UsageError, match=r"^--stages is 0;"):
        Options.of(stages=0)


def test_an_option_of_one_method_is_refused_with_the_others():
    own = {option for method in METHODS.values() for option in method.options}
    assert own
    for option in own:
        with pytest.raises(UsageError, match=f"`{option}=False` needs"):
            onnx_ecp.optimize("m.onnx", method="magnitude", **{option: False})
