"""Numbers of rows that depend on the data: refused with the node that selects, or left alone."""

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.cli.commands import main
from onnx_ecp.errors import ModelError
from onnx_ecp.evaluation import bounds
from onnx_ecp.evaluation.compare import compare
from onnx_ecp.graph.selected_rows import decided_by, selecting_node

HEAD = '<ir_version: 8, opset_import: ["": 17]> g '
STAGES = """a = Conv<pads = [1, 1, 1, 1]>(x, A, a0)  r = Relu(a)  s = Conv(r, S)
  flat = Reshape(s, minus)  p = Greater(flat, zero)
  fm = Reshape(r, rows)  ft = Transpose<perm = [1, 0]>(fm) """
STORED = {
    "A": (8, 3, 3, 3), "a0": (8,), "S": (1, 8, 1, 1), "C": (8, 12), "D": (12, 4),
    "minus": np.int64([-1]), "rows": np.int64([8, -1]), "zero": np.float32(0), "ax": np.int64([0]),
}  # fmt: skip
MODELS = {
    "Compress": (
        f"(float[1, 3, 8, 8] x) => (float[k, 4] y) {{ {STAGES} sel = Compress<axis = 0>(ft, p) "
        "h = MatMul(sel, C)  g1 = Relu(h)  y = MatMul(g1, D) }",
        {"ft", "flat"},
    ),
    "NonZero": (
        f"(float[1, 3, 8, 8] x) => (float[k, 4] y) {{ {STAGES} nz = NonZero(p) "
        "i = Squeeze(nz, ax)  sel = Gather<axis = 0>(ft, i)  h = MatMul(sel, C)  g1 = Relu(h) "
        "y = MatMul(g1, D) }",
        {"flat"},
    ),
    "rows of a batch": (
        "(float[n, 3, 8, 8] x) => (float[k, 12] y) { a = Conv<pads = [1, 1, 1, 1]>(x, A, a0) "
        "r = Relu(a)  m = GlobalAveragePool(r)  f = Flatten(m)  z = MatMul(f, C) "
        "top = ReduceMean<axes = [1], keepdims = 0>(z)  p = Greater(top, zero) "
        "y = Compress<axis = 0>(z, p) }",
        {"z", "top"},
    ),
}
# The rows in between depend on the data, those of the output do not.
POOLED = (
    f"(float[1, 3, 8, 8] x) => (float[1, 4] y) {{ {STAGES} sel = Compress<axis = 0>(ft, p) "
    "h = MatMul(sel, C)  g1 = Relu(h)  m = ReduceSum(g1, ax)  y = MatMul(m, D) }"
)


def model(body, rng):
    proto = onnx.parser.parse_model(HEAD + body)
    for name, value in STORED.items():
        if any(name in node.input for node in proto.graph.node):
            shape = isinstance(value, tuple)
            drawn = rng.normal(0, 0.4, value).astype(np.float32) if shape else value
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(drawn), name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.fixture
def x(rng):
    return rng.standard_normal((30, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "magnitude", "wanda", "cbs"])
@pytest.mark.parametrize(("body", "decides"), MODELS.values(), ids=MODELS)
def test_outputs_with_rows_that_the_data_select_are_refused(body, decides, method, x, rng):
    proto = model(body, rng)
    with pytest.raises(ModelError, match="selects from the data") as error:
        onnx_ecp.optimize(proto, x, method=method, sparsity=0.5)
    node = selecting_node(proto, "y")
    assert node.op_type in error.value.message
    assert set(decided_by(proto, node)) == decides
    assert all(repr(name) in error.value.hint for name in decides)


@pytest.mark.parametrize("method", ["ecp-refit", "magnitude", "sparsegpt"])
def test_layers_with_such_rows_are_left_alone(method, x, rng):
    proto = model(POOLED, rng)
    report = onnx_ecp.optimize(proto, x, method=method, sparsity=0.5).report
    (skipped,) = [skip for skip in report.skips if "selects from the data" in skip.reason]
    assert skipped.op == "MatMul"
    assert "Compress 'sel'" in skipped.reason
    assert 0 < report.gap.relative_error < np.inf


def test_what_the_hint_says_works(x, rng, tmp_path):
    body, decides = MODELS["Compress"]
    onnx.save(model(body, rng), tmp_path / "in.onnx")
    onnx.utils.extract_model(tmp_path / "in.onnx", tmp_path / "cut.onnx", ["x"], sorted(decides))
    report = onnx_ecp.optimize(tmp_path / "cut.onnx", x, sparsity=0.5).report
    assert report.gap.relative_error < 1


@pytest.mark.parametrize("command", [compare, bounds.bound], ids=["compare", "bound"])
def test_two_models_with_other_rows_are_told_why(command, x, rng):
    proto = model(MODELS["NonZero"][0], rng)
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    for tensor in other.graph.initializer:
        if tensor.name == "zero":
            tensor.CopyFrom(numpy_helper.from_array(np.float32(0.5), "zero"))
    with pytest.raises(ModelError, match="NonZero 'nz' selects as many rows") as error:
        command(proto, other, x)
    assert "'flat'" in error.value.hint
    assert command(proto, proto, x) is not None


def test_the_command_line_ends_with_the_code_of_models(x, rng, tmp_path):
    onnx.save(model(MODELS["NonZero"][0], rng), tmp_path / "in.onnx")
    np.savez(tmp_path / "in.npz", x=x)
    done = CliRunner().invoke(
        main, ["optimize", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    )
    assert done.exit_code == 3
    assert "out.onnx" not in done.output
    assert not (tmp_path / "out.onnx").exists()
