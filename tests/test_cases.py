"""Small networks that show what the field runs into: layers and units that a person expects.

They lie in a folder ``shared/cases`` beside the checkout, or below ONNX_ECP_SHARED; the same
constructs, made in the tests themselves, are in ``test_structure.py`` and others.
"""

import os
from pathlib import Path

import numpy as np
import pytest

import onnx_ecp
from onnx_ecp.errors import ModelError
from onnx_ecp.runtime.session import Session

ROOT = Path(__file__).parent.parent
CASES = Path(os.environ.get("ONNX_ECP_SHARED", ROOT.parent / "shared")) / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="shared/cases is not there")

# Layers, and units of all groups; None where the README names no number.
EXPECTED = {
    "e3sm32": (None, None),
    "saturated_softmax": (3, None),
    "yolo8": (None, None),
    "shufflenet": (None, None),
    "vit_sdpa18": (None, None),
    "zipmap": (2, 16),
    "same_names": (2, 6),
    "gemm_c_forms": (3, 28),
    "if_reads_units": (2, 0),
    "weight_by_transpose_conv": (3, 12),
    "glu_slice": (2, 16),
    "chunk_by_shape": (2, 16),
    "softmax_other_axis": (2, 16),
    "depth_to_space": (2, 6),
    "expand_shape_gate": (4, 20),
    "qkv_unbind": (2, 6),
    "reduce_sum_units": (2, 24),
    "resize_sizes": (2, 8),
    "segnet": (3, 8),
    "groupnorm_native": (2, 4),
    "embedding_bag_first": (2, 16),
    "experts_3d": (2, 16),
    "grouped_conv": (4, 16),
    "vector_weight": (2, 16),
    "cumsum_ssm": (2, 16),
}


def data(name, part=""):
    path = CASES / f"{name}{part}.npz"
    return str(path) if path.exists() else None


def column_errors(model, pruned, feeds):
    a, b = (Session(m).run(feeds) for m in (model, pruned))
    (name,) = a
    return np.sqrt(np.square(b[name] - a[name]).mean(axis=0)) / a[name].std(axis=0)


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_and_units_are_those_that_a_person_expects(name):
    layers, units = EXPECTED[name]
    found = onnx_ecp.inspect(CASES / f"{name}.onnx", calibration=data(name))
    if layers is not None:
        assert len(found.layers) == layers
    if units is not None:
        assert sum(group.units for group in found.unit_groups) == units


@pytest.mark.slow
@pytest.mark.parametrize("choices", [{"sparsity": 0.5}, {"granularity": "unit", "sparsity": 0.2}])
@pytest.mark.parametrize("name", EXPECTED)
def test_they_are_pruned_and_what_is_written_runs(name, choices, tmp_path):
    if "granularity" in choices and EXPECTED[name][1] == 0:
        pytest.skip("it has no units")
    found = onnx_ecp.optimize(
        CASES / f"{name}.onnx", data(name), output=tmp_path / "o.onnx", stages=2, **choices
    )
    assert found.report.sparsity >= choices["sparsity"]
    assert found.report.gap.relative_error < 0.7


def test_a_model_in_training_mode_is_refused_by_name():
    with pytest.raises(ModelError, match=r"BatchNormalization .* is in training mode"):
        onnx_ecp.optimize(CASES / "bn_training.onnx", data("bn_training"))


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7])
def test_small_outputs_beside_large_ones_survive(sparsity):
    """Eight physical quantities of different size, each in units of its own spread."""
    model, feeds = CASES / "e3sm32.onnx", dict(np.load(data("e3sm32", "-test")))
    names = {i.name for i in onnx_ecp.inspect(model).inputs}
    feeds = {k: v for k, v in feeds.items() if k in names}
    ours, magnitude = (
        column_errors(
            model,
            onnx_ecp.optimize(model, data("e3sm32"), sparsity=sparsity, **choice).model,
            feeds,
        )
        for choice in ({}, {"method": "magnitude"})
    )
    assert ours.max() < 0.5
    assert (ours < magnitude).all()


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_a_very_sure_classifier_keeps_its_classes(sparsity):
    model, feeds = (
        CASES / "saturated_softmax.onnx",
        dict(np.load(data("saturated_softmax", "-test"))),
    )
    made = onnx_ecp.optimize(model, data("saturated_softmax"), sparsity=sparsity).model
    a, b = (next(iter(Session(m).run(feeds).values())).argmax(axis=1) for m in (model, made))
    assert (a == b).mean() >= 0.97
