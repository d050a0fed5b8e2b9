"""The networks of models/ are what their README says."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

MODELS = Path(__file__).parent.parent / "models"
ROW = re.compile(r"^\| `(\w+)` \|.*\| (\d+) \| (\w+) (0\.\d+) \((\d+)", re.MULTILINE)


def accuracy(target, output):
    return np.mean(output.argmax(axis=1) == target)


def determination(target, output):
    unexplained = np.square(target - output).sum(axis=0)
    return np.mean(1 - unexplained / np.square(target - target.mean(axis=0)).sum(axis=0))


METRICS = {"accuracy": accuracy, "R2": determination}
README = {row[0]: row[1:] for row in ROW.findall((MODELS / "README.md").read_text())}


def test_readme_lists_every_network():
    assert set(README) == {path.stem for path in MODELS.glob("*.onnx")}
    assert len(README) >= 2


@pytest.mark.parametrize("name", README)
def test_network_is_valid_small_and_as_large_as_stated(name):
    path = MODELS / f"{name}.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    weights = sum(np.prod(t.dims) for t in model.graph.initializer if len(t.dims) == 2)
    assert weights == int(README[name][0])
    assert 30_000 <= weights <= 300_000
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("name", README)
def test_metric_is_the_one_in_the_readme(name):
    _, metric, value, rows = README[name]
    session = ort.InferenceSession(MODELS / f"{name}.onnx", providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    with np.load(MODELS / f"{name}-test.npz") as data:
        (output,) = session.run(None, {entry.name: data[entry.name]})
        target = data["y"]
    assert len(target) == int(rows)
    # Another CPU may round a logit the other way: one digit of 600 is 0.0017.
    assert METRICS[metric](target, output) == pytest.approx(float(value), abs=2e-3)


@pytest.mark.parametrize("name", README)
def test_no_test_row_is_a_calibration_row(name):
    with np.load(MODELS / f"{name}.npz") as data, np.load(MODELS / f"{name}-test.npz") as test:
        (entry,) = data.files
        assert set(test.files) == {entry, "y"}
        seen = {row.tobytes() for row in data[entry]}
        assert len(seen) == len(data[entry])
        assert seen.isdisjoint(row.tobytes() for row in test[entry])
