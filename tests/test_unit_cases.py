"""Units found in small networks of the field, against the number that a person expects."""

import os
from pathlib import Path

import pytest

from onnx_ecp.api.inspect import inspect

ROOT = Path(__file__).parents[1]
CASES = Path(os.environ.get("ONNX_ECP_SHARED", ROOT.parent / "shared")) / "cases"
# By case, the number of units in each group; in ascending order.
UNITS = {
    "chunk_by_shape": [16],
    "cumsum_ssm": [16],
    "depth_to_space": [6],
    "e3sm32": [64, 96],
    "embedding_bag_first": [16],
    "expand_shape_gate": [8, 12],
    "experts_3d": [16],  # of each of the three experts
    "gemm_c_forms": [12, 16],
    "glu_slice": [16],
    "grouped_conv": [4, 12],  # whole groups: of four channels, and the four that they make
    "groupnorm_native": [4],
    "qkv_unbind": [2, 4],  # heads, and dimensions of all heads in queries, keys and values
    "reduce_sum_units": [24],
    "resize_sizes": [8],
    "same_names": [6],
    "saturated_softmax": [64, 96],
    "segnet": [8],  # of the encoder, and those that are put where it found its own
    "shufflenet": [6, 6, 12, 12, 12, 32],
    "softmax_other_axis": [16],
    "transposed_conv": [6, 8],
    "vector_weight": [16],
    "vit_sdpa18": [3, 3, 8, 8, 8, 8, 72, 72],  # heads, their dimensions twice, feed-forward
    "weight_by_transpose_conv": [12],
    "yolo8": [*[12] * 6, *[16] * 12, *[24] * 4, *[32] * 4],
    "zipmap": [16],
}
# By case and layer, what the reason for keeping its units says.
REASONS = {
    "if_reads_units": ("h", "they are read inside If"),
    "bn_training": ("h", "training mode"),
}


def found(case):
    """What inspect says of a case and its calibration data."""
    path = CASES / f"{case}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return inspect(path)


@pytest.mark.parametrize(("case", "units"), UNITS.items(), ids=UNITS)
def test_all_units_that_a_person_expects_are_found(case, units):
    assert sorted(group.units for group in found(case).unit_groups) == units


@pytest.mark.parametrize(("case", "layer", "reason"), [(k, *v) for k, v in REASONS.items()])
def test_units_that_stay_have_the_reason_that_a_person_expects(case, layer, reason):
    inspection = found(case)
    assert inspection.unit_groups == ()
    assert reason in {row.name: row.reason for row in inspection.unit_refusals}[layer]
