"""Whatever model or data the command line is given, it ends as documented.

That is: the exit code, one ``error:`` line, at most one ``hint:`` line, no traceback, no file.
"""

from __future__ import annotations

from pathlib import Path

import hostile
import numpy as np
import onnx
import onnx.parser
import pytest
import test_calibration
from click.testing import CliRunner
from hostile import HOSTILE
from onnx import TensorProto, helper, numpy_helper

from onnx_ecp.cli.commands import main

OLD = b"what was there before"


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty folder for the case, beside one with an older output."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out.onnx").write_bytes(OLD)
    (tmp_path / "case").mkdir()
    return tmp_path / "case"


def refused(folder: Path, code: int, *arguments: object, command: str = "optimize") -> str:
    """Run a command that must fail and leave every file as it is; its error and hint."""
    before = contents(folder.parent)
    output = folder.parent / "out" / "out.onnx"
    rest = [output, "--force", "--timeout", 60] if command == "optimize" else []
    result = CliRunner().invoke(main, [str(word) for word in (command, *arguments, *rest)])
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] in (["error"], ["error", "hint"])
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    assert result.stdout == ""
    assert contents(folder.parent) == before
    return result.stderr


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, pipes without what is in them."""
    return {p: p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


# Models.


@pytest.mark.parametrize("command", ["optimize", "inspect"])
@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_model_is_refused(case, command, folder):
    path = case.make(folder)
    error = refused(folder, 3, path, command=command)
    assert case.says in error
    assert error.startswith(f"error: {path}: ")


NEWER = {
    "opset": (lambda m: setattr(m.opset_import[0], "version", 99), "99"),
    "IR version": (lambda m: setattr(m, "ir_version", 99), "99"),
}


@pytest.mark.parametrize(("edit", "number"), NEWER.values(), ids=NEWER)
def test_a_model_newer_than_the_runtime_is_refused_but_can_be_inspected(edit, number, folder):
    model = hostile.small_model()
    edit(model)
    onnx.save(model, folder / "new.onnx")
    assert number in refused(folder, 3, folder / "new.onnx")
    assert CliRunner().invoke(main, ["inspect", str(folder / "new.onnx")]).exit_code == 0


HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> net '
# Nothing to prune: the model, and what the message must say of its candidates.
NOTHING = {
    "no layers": ("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }", ["no Gemm, MatMul or Conv"]),
    "two activations": ("(float[4,4] x) => (float[4,4] y) { y = MatMul(x, x) }", ["no Gemm"]),
    "in branches": (
        """(float[n,4] x, bool go) => (float[n,4] y)
        <float[4,4] W = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
            y = If (go) <
                then_branch = a () => (float[n,4] p) { p = MatMul(x, W) },
                else_branch = b () => (float[n,4] q) { q = Relu(x) }
            >
        }""",
        ["p (MatMul): ", "If"],
    ),
    "transposed activation": (
        "(float[4,n] x) => (float[n,2] y) <float[4,2] W = {1,2,3,4,5,6,7,8}> "
        "{ y = Gemm<transA=1>(x, W) }",
        ["y (Gemm): ", "transA"],
    ),
    "quantized": (
        """(float[n,4] x) => (float[n,2] y)
        <int8[4,2] Q = {1,2,3,4,5,6,7,8}, float s = {0.5}, int8 z = {0}>
        { W = DequantizeLinear(Q, s, z) y = MatMul(x, W) }""",
        ["y (MatMul): ", "DequantizeLinear"],
    ),
    "strings": (
        "(string[n] t, float[4] x) => (float[4] y) { y = Relu(x) }",
        ["no Gemm, MatMul or Conv"],
    ),
}


@pytest.mark.parametrize(("text", "words"), NOTHING.values(), ids=NOTHING)
def test_a_model_with_nothing_to_prune_names_every_candidate(text, words, folder):
    onnx.save(onnx.parser.parse_model(HEAD + text), folder / "net.onnx")
    error = refused(folder, 5, folder / "net.onnx")
    assert all(word in error for word in words)


def test_hostile_names_are_made_harmless(folder):
    model = hostile.small_model()
    model.graph.node[0].name = "<script>\x1b[31m\n" + "x" * 2**20
    onnx.save(model, folder / "net.onnx")
    report = folder / "report.html"
    done = CliRunner().invoke(
        main,
        ["optimize", str(folder / "net.onnx"), str(folder / "o.onnx"), "--report", str(report)],
    )
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert len(done.output) < 10_000
    assert "<script>\\x1b" not in report.read_text()
    assert len(report.read_text()) < 100_000


# Inputs that cannot be made up.


@pytest.mark.parametrize("kind", ["string[n]", "seq(float[n])", "optional(float[n])"])
def test_an_input_that_is_no_tensor_of_numbers_cannot_be_calibrated(kind, folder):
    text = f"({kind} t, float[n,4] x) => (float[n,2] y) <float[4,2] W = {{1,2,3,4,5,6,7,8}}> "
    onnx.save(onnx.parser.parse_model(HEAD + text + "{ y = MatMul(x, W) }"), folder / "net.onnx")
    assert "'t'" in refused(folder, 4, folder / "net.onnx")


# Data.

NET = """<ir_version: 8, opset_import: ["": 17]>
net (float[batch,3] x) => (float[batch,2] y) <float[3,2] W = {1,2,3,4,5,6}> { y = MatMul(x, W) }"""


def model_for_data(folder: Path) -> Path:
    path = folder.parent / "net.onnx"
    onnx.save(onnx.parser.parse_model(NET), path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    test_calibration.HOSTILE.values(),
    ids=test_calibration.HOSTILE,
)
@pytest.mark.parametrize("command", ["optimize", "compare"])
def test_a_hostile_data_file_is_refused(name, content, message, command, folder, monkeypatch):
    monkeypatch.setattr("onnx_ecp.data.untrusted.memory_budget", lambda: 2**27)
    (folder / name).write_bytes(content)
    source = folder if name.endswith(".pb") else folder / name
    model = model_for_data(folder)
    given = [model, "-c", source] if command == "optimize" else [model, model, "-d", source]
    assert message in refused(folder, 4, *given, command=command)


X = np.ones((5, 3), np.float32)
NAN, INF = X.copy(), X.copy()
NAN[3, 1], INF[2, 0] = np.nan, np.inf
MISFITS = {
    "wrong name": ({"xs": X}, ["'xs' is not an input", "Did you mean 'x'"]),
    "missing input": ({"y": X}, ["no array for input 'x'", "float32 (batch, 3)"]),
    "no arrays": ({}, ["x"]),
    "double": ({"x": X.astype(np.float64)}, ["float64", "float32", "astype(np.float32)"]),
    "pixels": ({"x": X.astype(np.uint8)}, ["uint8", "/ 255"]),
    "rank": ({"x": X[:, :, None]}, ["(5, 3, 1)", "(batch, 3)"]),
    "shape": ({"x": X[:, :2]}, ["(5, 2)", "(batch, 3)"]),
    "empty": ({"x": X[:0]}, ["empty"]),
    "NaN": ({"x": NAN}, ["'x'", "sample 3"]),
    "Inf": ({"x": INF}, ["'x'", "sample 2"]),
    "objects": ({"x": np.array([{}, None])}, ["pickled Python objects"]),
    "text": ({"x": np.array(["a"])}, ["not numbers"]),
}


@pytest.mark.parametrize(("arrays", "words"), MISFITS.values(), ids=MISFITS)
def test_data_that_do_not_fit_the_model_are_refused(arrays, words, folder):
    np.savez(folder / "data.npz", **arrays)
    error = refused(folder, 4, model_for_data(folder), "-c", folder / "data.npz")
    assert str(folder / "data.npz") in error
    assert all(word in error for word in words)


def test_labels_that_do_not_fit_are_refused(folder):
    np.savez(folder / "data.npz", x=X)
    np.save(folder / "labels.npy", np.arange(4))
    model = model_for_data(folder)
    given = ["-c", folder / "data.npz", "--labels", folder / "labels.npy"]
    assert "labels.npy" in refused(folder, 4, model, *given)


def test_a_bad_file_beside_the_model_is_not_replaced_by_made_up_inputs(folder):
    model = model_for_data(folder)
    np.savez(model.with_suffix(".npz"), x=NAN)
    assert "sample 3" in refused(folder, 4, model)


# Weights that leave nothing to say.


def weighted(weight: np.ndarray) -> onnx.ModelProto:
    """One product with this weight."""
    model = onnx.parser.parse_model(NET)
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "W"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


DEGENERATE = {
    "all zeros": np.zeros((3, 2), np.float32),
    "subnormal": np.full((3, 2), 1e-42, np.float32),
    "as large as can be": np.full((3, 2), 6e4, np.float16),
    "one weight": np.ones((3, 1), np.float32),
}


@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "obs", "wanda"])
@pytest.mark.parametrize("weight", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_weights_are_pruned_or_refused_in_order(weight, method, tmp_path):
    model = weighted(weight)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = weight.shape[1]
    onnx.save(model, tmp_path / "net.onnx")
    arguments = ["optimize", str(tmp_path / "net.onnx"), str(tmp_path / "o.onnx"), "-m", method]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (0, 3)
    assert "Traceback" not in done.output
    if done.exit_code == 0:
        stored = numpy_helper.to_array(onnx.load(tmp_path / "o.onnx").graph.initializer[0])
        assert np.isfinite(stored).all()
        assert np.count_nonzero(stored == 0) >= weight.size // 2


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.INT4])
def test_weights_of_few_bits_are_skipped_with_the_reason(kind, folder):
    cast = helper.make_node("Cast", ["W"], ["V"], to=TensorProto.FLOAT)
    model = helper.make_model(
        helper.make_graph(
            [cast, helper.make_node("MatMul", ["x", "V"], ["y"])],
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
            [helper.make_tensor("W", kind, [4, 2], [1.0, 2.0] * 4)],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, folder / "net.onnx")
    assert "y (MatMul): " in refused(folder, 5, folder / "net.onnx")


# Outputs.

OUTPUTS = {
    "the model itself": "net.onnx",
    "a link to the model": "link.onnx",
    "a folder": "case",
    "in a folder that is not there": "nowhere/o.onnx",
    "in a file": "net.onnx/o.onnx",
    "what exists": "out/out.onnx",
}


@pytest.mark.parametrize("name", OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused(name, folder):
    model = model_for_data(folder)
    (folder.parent / "link.onnx").symlink_to(model)
    before = contents(folder.parent)
    done = CliRunner().invoke(main, ["optimize", str(model), str(folder.parent / name)])
    assert done.exit_code == 8
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= 2
    assert contents(folder.parent) == before
