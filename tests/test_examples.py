"""Every example runs as it stands, from a clone, where the other tool is installed."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "toolchains.md"
# What an example needs besides onnx-ecp, and what it prints or writes in the end.
EXAMPLES = {
    "olive.sh": ("olive", "digits-olive/model.onnx"),
    "onnx_ir_pass.py": ("onnx_ir", "digits-ir.onnx"),
    "openvino_after.py": ("openvino", "half.onnx"),
    "polygraphy.sh": ("polygraphy", "digits-2to4.onnx"),
    "quantize_after.py": ("onnxruntime.quantization", "sparse-int8.onnx"),
    "simplifiers.py": ("onnxslim", "digits-onnxslim.onnx"),
    "sklearn_pipeline.py": ("skl2onnx", "wine-sparse.onnx"),
    "text_folder.py": ("tokenizers", "bert/texts.txt"),
}
# Read by one of them.
PARTS = {"olive_prune.json", "polygraphy_loader.py", "first_look.ipynb"}


def test_every_example_is_run_and_told():
    found = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert found == EXAMPLES.keys() | PARTS
    assert set(re.findall(r"\(\.\./examples/([\w.]+)\)", PAGE.read_text("utf-8"))) == found


@pytest.mark.slow
def test_the_notebook_says_what_its_cells_print(monkeypatch, capsys):
    """Names and words count: digits differ from machine to machine."""
    monkeypatch.chdir(ROOT)
    notebook = json.loads((ROOT / "examples" / "first_look.ipynb").read_text("utf-8"))
    space: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), space)
        told = "".join("".join(output["text"]) for output in cell["outputs"])
        assert words(capsys.readouterr().out) == words(told)


def words(text: str) -> str:
    return re.sub(r"[\d.]+", "0", text)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    needs, written = EXAMPLES[name]
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    if name.endswith(".sh") and sys.platform == "win32":
        pytest.skip("no shell")
    for part in ("examples", "models", "README.md", "tests/fixtures/bert-dynamo.onnx"):
        place = tmp_path / part
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, place)
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = ["bash"] if name.endswith(".sh") else [sys.executable]
    done = subprocess.run(
        [*command, f"examples/{name}"], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / written).stat().st_size > 0
