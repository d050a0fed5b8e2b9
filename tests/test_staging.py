"""Files of a run appear together, after everything was checked, or not at all."""

import os
import signal
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.api import account, result
from onnx_ecp.api import optimize as pipeline
from onnx_ecp.api.options import Options
from onnx_ecp.cli.commands import main
from onnx_ecp.errors import Interrupted, ModelError, OnnxEcpError, OutputError
from onnx_ecp.graph import Model
from onnx_ecp.graph import staging as staged
from onnx_ecp.graph.staging import Staging

ROOT = Path(__file__).parent.parent
DIGITS, DATA = ROOT / "models" / "digits.onnx", ROOT / "models" / "digits.npz"
CHOICES = {"method": "ecp", "force": True, "sparsity": 0.5}


@pytest.fixture
def outputs(tmp_path):
    """What a run writes, where older files lie."""
    names = {"output": "out.onnx", "masks": "masks.npz", "report": "report.html"}
    paths = {what: tmp_path / name for what, name in names.items()}
    for path in paths.values():
        path.write_bytes(b"older")
    return paths


def untouched(outputs):
    folder = outputs["output"].parent
    assert {path.name for path in folder.iterdir()} == {path.name for path in outputs.values()}
    return all(path.read_bytes() == b"older" for path in outputs.values())


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


# Everything that comes after the model is made, in order.
STEPS = {
    "writing the model": (result, "staged"),
    "comparing": (account, "compare"),
    "the report's values": (account, "build_report"),
    "the masks": (pipeline, "archived"),
    "the report": (pipeline, "rendered"),
    "writing masks and report": (pipeline, "written"),
    "taking their places": (staged, "_renamed"),
}
ERRORS = {
    "a full disk": OSError(28, "No space left on device"),
    "SIGINT": Interrupted(signal.SIGINT),
    "out of memory": MemoryError(),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("step", STEPS)
def test_whatever_fails_leaves_what_was_there(step, error, outputs, monkeypatch):
    monkeypatch.setattr(*STEPS[step], failing(error))
    with pytest.raises((OSError, Interrupted, MemoryError, OutputError)):
        onnx_ecp.optimize(DIGITS, str(DATA), **outputs, **CHOICES)
    assert untouched(outputs)


def test_what_was_committed_is_what_was_compared(outputs):
    result = onnx_ecp.optimize(DIGITS, str(DATA), **outputs, **CHOICES)
    assert result.report.result.path == str(outputs["output"])
    assert onnx.load(outputs["output"]) == result.model
    with np.load(outputs["masks"]) as stored:
        assert set(stored) == set(result.masks)
    assert outputs["report"].read_bytes().startswith(b"<!DOCTYPE html>")
    assert len(list(outputs["output"].parent.iterdir())) == 3


def test_the_second_of_two_places_fails_and_the_first_is_given_back(tmp_path, monkeypatch):
    real, calls = staged._renamed, []

    def once(stage, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(1, "Operation not permitted")
        real(stage, path)

    (tmp_path / "a").write_bytes(b"older")
    monkeypatch.setattr(staged, "_renamed", once)
    with Staging() as staging:
        for name in "ab":
            staging.write(tmp_path / name, [b"new"])
        with pytest.raises(OutputError, match="Operation not permitted"):
            staging.commit()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"older")]


def test_a_signal_between_two_places_does_not_leave_half(tmp_path, monkeypatch):
    real = os.replace

    def interrupted(stage, path):
        real(stage, path)
        raise KeyboardInterrupt

    with Staging() as staging:
        for name in "ab":
            staging.write(tmp_path / name, [b"new"])
        monkeypatch.setattr(os, "replace", interrupted)
        staging.commit()
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == [
        ("a", b"new"),
        ("b", b"new"),
    ]


def test_two_runs_never_take_one_name(tmp_path):
    with Staging() as one, Staging() as other:
        assert one.reserve(tmp_path / "out.data")
        assert not other.reserve(tmp_path / "out.data")
    assert not list(tmp_path.iterdir())


def test_permissions_of_what_is_replaced_stay(outputs):
    outputs["output"].chmod(0o640)
    onnx_ecp.optimize(DIGITS, str(DATA), output=outputs["output"], **CHOICES)
    assert outputs["output"].stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write what is read-only")
def test_a_read_only_file_is_not_replaced(outputs):
    outputs["output"].chmod(0o440)
    with pytest.raises(OutputError, match="read-only"):
        onnx_ecp.optimize(DIGITS, str(DATA), output=outputs["output"], **CHOICES)


@pytest.mark.parametrize("name", ["file", "allow_pickle", "args", "a/b"])
def test_masks_of_tensors_with_any_name(name, tmp_path):
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 4] x) => (float[n, 3] y) { y = MatMul(x, W) }"""
    )
    model.graph.node[0].input[1] = name
    w = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(w, name))
    x = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)
    masks = tmp_path / "m.npz"
    found = onnx_ecp.optimize(model, x, masks=masks, method="magnitude")
    with np.load(masks) as stored:
        np.testing.assert_array_equal(stored[name], found.masks[name])


def test_the_command_line_leaves_the_output_when_the_report_cannot_be_written(
    tmp_path, monkeypatch
):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"older")
    monkeypatch.setattr(pipeline, "written", failing(OutputError("no.", hint="None.")))
    arguments = ["optimize", str(DIGITS), str(out), "-m", "ecp", "--force"]
    done = CliRunner().invoke(main, [*arguments, "--report", str(tmp_path / "r.json")])
    assert done.exit_code == 8
    assert out.read_bytes() == b"older"


def test_a_result_that_is_refused_is_named_as_it_would_be_called(outputs, monkeypatch):
    def refused(path):
        raise ModelError(f"{path}: weights are NaN.", hint="None.")

    monkeypatch.setattr("onnx_ecp.graph.load", refused)
    with pytest.raises(ModelError) as error:
        result.staged(*staged_arguments(outputs["output"]))
    assert error.value.message == f"{outputs['output']}: weights are NaN."


def staged_arguments(output):
    """What ``staged`` takes, of a model that nothing was done to."""
    model = Model(onnx.load(DIGITS), None, None)
    return model, model, (), output, Options(), Staging()


@pytest.mark.parametrize("change", ["replaced", "written to", "removed"])
def test_data_that_change_after_they_were_checked_end_the_run(change, tmp_path, monkeypatch, rng):
    """What was validated is what the result is made from, or nothing is written."""
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[n, 8] x) => (float[n, 8] y) {'
    model = onnx.parser.parse_model(text + "y = MatMul(x, W) }")
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    given, data, output = (tmp_path / name for name in ("in.onnx", "in.bin", "out.onnx"))
    onnx.save(model, given, save_as_external_data=True, location=data.name, size_threshold=0)
    stage = result.staged

    def then(*args):
        if change == "replaced":
            (tmp_path / "other").write_bytes(bytes(data.stat().st_size))
            (tmp_path / "other").replace(data)
        elif change == "written to":
            data.write_bytes(bytes(data.stat().st_size))
        else:
            data.unlink()
        return stage(*args)

    monkeypatch.setattr(result, "staged", then)
    x = rng.standard_normal((40, 8)).astype(np.float32)
    with pytest.raises(OnnxEcpError, match=r"in\.bin"):
        onnx_ecp.optimize(given, x, output=output, sparsity=0.5)
    assert not output.exists()
