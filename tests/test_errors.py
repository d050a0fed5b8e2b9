"""Every error message is in a golden file; ``python tests/test_errors.py`` renews both files.

``golden/messages.txt`` holds every message that the source can raise, with ``{}`` for values.
``golden/printed.txt`` holds what the command line prints for the wrong calls of ``CALLS``.
"""

import ast
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from click.testing import CliRunner

from onnx_ecp import errors
from onnx_ecp.cli.commands import main

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
CLASSES = {
    name for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.OnnxEcpError)
}  # fmt: skip
# A usage error may say in its message what to write instead; the others may not.
MAY_LACK_A_HINT = {"UsageError"}


def template(node: ast.expr | None) -> str:
    """The text of an argument, with {} for what is known at run time only."""
    match node:
        case None:
            return ""
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(template(value) for value in values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return template(left) + template(right)
    return "{}"


def raised() -> Iterator[tuple[str, str, str, str]]:
    """(module, class, message, hint) of every error that is made anywhere in the source."""
    for path in sorted((ROOT / "onnx_ecp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id not in CLASSES or node.func.id == "Interrupted":
                    continue
                hint = next((k.value for k in node.keywords if k.arg == "hint"), None)
                message = template(node.args[0]) if node.args else "{}"
                module = path.relative_to(ROOT / "onnx_ecp").as_posix()
                yield module, node.func.id, message, template(hint)


def messages() -> str:
    """The golden file of messages."""
    rows = sorted(set(raised()))
    return "".join(f"{module} {kind}\n  {text}\n  {hint}\n" for module, kind, text, hint in rows)


def test_every_message_is_in_the_golden_file():
    golden = (GOLDEN / "messages.txt").read_text("utf-8")
    assert messages() == golden, "run `python tests/test_errors.py` and look at the difference"


def test_messages_are_sentences_and_say_what_to_do():
    found = list(raised())
    assert len(found) > 300
    for module, kind, message, hint in found:
        assert message.endswith((".", "{}")), (module, message)
        assert kind in MAY_LACK_A_HINT or hint, (module, message)
        assert not hint or hint.endswith((".", "?", "{}", "`")), (module, hint)


CALLS = [
    "optimize",
    "optimize missing.onnx out.onnx",
    "optimize in.onnx",
    "optimize in.onnx out.onnx --sparsty 0.5",
    "optimize in.onnx out.onnx -s 1.5",
    "optimize in.onnx out.onnx -s x",
    "optimize in.onnx out.onnx -s 5:4",
    "optimize in.onnx out.onnx -m magnitud",
    "optimize in.onnx out.onnx --metric l3",
    "optimize in.onnx out.onnx --metric loss",
    "optimize in.onnx out.onnx --effort most",
    "optimize in.onnx out.onnx --effort fast -m magnitude",
    "optimize in.onnx out.onnx --time-budget soon",
    "optimize in.onnx out.onnx --time-budget 0s",
    "optimize in.onnx out.onnx --time-budget 5s --stages 2",
    "optimize in.onnx out.onnx --target abacus",
    "optimize in.onnx out.onnx --speedup 0.5",
    "optimize in.onnx out.onnx --speedup 2 -s 0.5",
    "optimize in.onnx out.onnx --units-and-zeros",
    "optimize in.onnx out.onnx --granularity unit -s 2:4",
    "optimize in.onnx out.onnx --permute",
    "optimize in.onnx out.onnx -s 2:4 --cleanup",
    "optimize in.onnx out.onnx --seed -1",
    "optimize in.onnx out.onnx --samples 0",
    "optimize in.onnx out.onnx --timeout 0",
    "optimize in.onnx out.onnx --damping 0",
    "optimize in.onnx out.onnx --max-memory lots",
    "optimize in.onnx out.onnx --max-error -1",
    "optimize in.onnx out.onnx --max-accuracy-drop 1",
    "optimize in.onnx out.onnx --include (",
    "optimize in.onnx out.onnx --include nothing",
    "optimize in.onnx out.onnx --layer-sparsity x",
    "optimize in.onnx out.onnx --input-shapes x:1,a",
    "optimize in.onnx out.onnx --input-shapes z:1,8",
    "optimize in.onnx out.onnx --output-weights z=1",
    "optimize in.onnx out.onnx --quantize int4",
    "optimize in.onnx out.onnx --quantize int8 --format sparse",
    "optimize in.onnx out.onnx --config missing.toml",
    "optimize in.onnx out.onnx -c missing.npz",
    "optimize in.onnx out.onnx -c wrong.npz",
    "optimize in.onnx out.onnx -c shape.npz",
    "optimize in.onnx out.onnx -c in.onnx",
    "optimize in.onnx out.onnx -c words.csv",
    "optimize in.onnx out.onnx -c words.txt",
    "optimize in.onnx out.onnx --report report.pdf",
    "optimize in.onnx in.onnx",
    "optimize in.onnx missing/out.onnx",
    "optimize in.onnx data.npz",
    "optimize damaged.onnx out.onnx",
    "optimize pointer.onnx out.onnx",
    "inspect missing.onnx",
    "compare in.onnx missing.onnx",
    "sweep in.onnx -o sweep.pdf",
    "sweep in.onnx -o s.html --methods magnitud",
    "sweep in.onnx -o s.html --sparsities 0.5,x",
    "cache list missing",
]  # fmt: skip


def wrong_calls(folder: Path) -> None:
    """Files that the calls name."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> net (float[n, 8] x) => (float[n, 4] y) {
        h = MatMul(x, W) a = Relu(h) y = MatMul(a, V) }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("W", (8, 16)), ("V", (16, 4))):
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, folder / "in.onnx")
    x = rng.standard_normal((20, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)
    np.savez(folder / "wrong.npz", xs=x)
    np.savez(folder / "shape.npz", x=x[:, :5])
    (folder / "words.csv").write_text("a,b\n1,red\n")
    (folder / "words.txt").write_text("a cat\n")
    (folder / "damaged.onnx").write_bytes(b"\x08\x08\x12")
    (folder / "pointer.onnx").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    )


def printed() -> str:
    """The golden file of what is printed; run where ``wrong_calls`` has made the files."""
    parts = []
    for call in CALLS:
        result = CliRunner().invoke(main, shlex.split(call))
        assert "Traceback" not in result.output, call
        parts.append(f"$ onnx-ecp {call}\n{told(result.stderr)}exit code {result.exit_code}\n\n")
    return "".join(parts)


def told(text: str) -> str:
    """The lines of the error, as on any machine."""
    lines = [line for line in text.splitlines() if line.startswith(("error:", "hint:"))]
    return "".join(line.replace(os.sep, "/") + "\n" for line in lines)


def test_what_is_printed_is_in_the_golden_file(tmp_path, monkeypatch):
    wrong_calls(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found, golden = printed(), (GOLDEN / "printed.txt").read_text("utf-8")
    assert found == golden, "run `python tests/test_errors.py` and look at the difference"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("part", re.split(r"\n\n", (GOLDEN / "printed.txt").read_text().strip()))
def test_every_call_ends_with_an_error_a_hint_and_a_documented_code(part):
    lines = part.splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == ["error", "hint"], part
    code = int(lines[-1].removeprefix("exit code "))
    documented = (ROOT / "docs" / "exit-codes.md").read_text("utf-8")
    assert code > 1
    assert re.search(rf"^\| {code} \|", documented, re.M), part


if __name__ == "__main__":
    (GOLDEN / "messages.txt").write_text(messages(), "utf-8")
    with tempfile.TemporaryDirectory() as folder:
        wrong_calls(Path(folder))
        os.chdir(folder)
        (GOLDEN / "printed.txt").write_text(printed(), "utf-8")
    sys.exit()
