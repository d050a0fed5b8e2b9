"""Models whose signature frees a batch axis that their own constants fix to one."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_ecp import compare, inspect, optimize
from onnx_ecp.api.sweep import sweep
from onnx_ecp.data.calibration import load as load_samples
from onnx_ecp.evaluation.batching import as_taken
from onnx_ecp.evaluation.bounds import bound
from onnx_ecp.graph import load, signature

RNG = np.random.default_rng(0)
# What holds the one: a shape, and a state that is joined with what depends on the inputs.
KINDS = {
    "reshape": """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2, 4] x) => (float[N, 3] y) <int64[2] s = {1, -1}> {
            f = Reshape(x, s)
            y = Gemm(f, w, b)
        }""",
    "joined": """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 8] x) => (float[N, 3] y) <float[1, 8] token = {1, 1, 1, 1, 1, 1, 1, 1}> {
            two = Concat<axis = 1>(x, token)
            f = Slice(two, start, end, axis)
            y = Gemm(f, w, b)
        }""",
}


def network(kind: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(KINDS[kind])
    constants = {
        "w": RNG.standard_normal((8, 3)).astype(np.float32),
        "b": RNG.standard_normal(3).astype(np.float32),
    }
    if kind == "joined":
        constants |= {"start": np.array([4]), "end": np.array([12]), "axis": np.array([1])}
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


def data(kind: str) -> np.ndarray:
    shape = (2, 4) if kind == "reshape" else (8,)
    return RNG.standard_normal((40, *shape)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_one_sample_at_a_time(kind, tmp_path):
    path, x = tmp_path / "m.onnx", data(kind)
    onnx.save(network(kind), path)
    result = optimize(path, x, method="ecp", sparsity=0.5)
    assert result.report.layers[0].zeros_after == 12
    assert compare(path, result.model, x).gap.relative_error > 0
    assert bound(path, result.model, x).measured > 0
    assert inspect(path, x).layers[0].blocked == ""
    assert len(sweep(path, x, methods=["ecp"], sparsities=[0.5], evaluation=x).points) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_that_of_the_model_with_a_fixed_batch(kind):
    free = network(kind)
    fixed = copy.deepcopy(free)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    x = data(kind)
    of_free = optimize(free, x, sparsity=0.5).model.graph.initializer
    of_fixed = optimize(fixed, x[:, None], sparsity=0.5).model.graph.initializer
    assert [t.SerializeToString() for t in of_free] == [t.SerializeToString() for t in of_fixed]


def test_samples_stay_as_they_are_where_no_form_runs():
    model = network("reshape")
    model.graph.initializer[-2].CopyFrom(
        onnx.numpy_helper.from_array(np.ones((7, 3), np.float32), "w")
    )
    loaded = load(model)
    samples = load_samples(data("reshape"), signature(loaded.proto))
    assert as_taken(loaded, samples) is samples
