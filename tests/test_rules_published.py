"""The gradient rules on the cases that onnx publishes for its operators, in double precision."""

import re
import warnings

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from differences import disagreement, facts_of, float_outputs, in_reference, with_adjoints
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

from onnx_ecp.gradients.lowering import lower
from onnx_ecp.graph.builder import Fact

WIDENED = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
DOUBLE = onnx.TensorProto.DOUBLE
OPSET = 18

# Operators that no float network needs on a path from a weight to an output, or not yet.
NO_RULE = {
    "control flow and sequences": "If Loop OptionalGetElement Scan SequenceMap SplitToSequence",
    "random": "Bernoulli",
    "integers or quantised on one side": "DequantizeLinear DynamicQuantizeLinear OneHot QLinearConv"
    " QLinearMatMul QuantizeLinear Range Unique",
    "training": "Adagrad Adam Momentum NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "transforms and windows of signals": "DFT MelWeightMatrix STFT",
    "vision, not yet": "AffineGrid Col2Im DeformConv GridSample RoiAlign",
    "other, not yet": "CumProd Det",
    "newer than ONNX Runtime": "CausalConvWithState FlexAttention LinearAttention TensorScatter",
    "gone before opset 18": "Scatter Upsample",
}

# Cases that show nothing about a rule, as regular expressions.
EXCLUDED = {
    "the data or an output hold infinities or NaN": "cast(like)?_.*|mod_float_edge_cases.*"
    "|reduce_.*empty_set|attention_.*qk_matmul_bias_[34]d_mask_causal",
    "the data lie at the end of the domain or at a pole": "acosh_example|tan",
    "the derivative is zero everywhere": "ceil.*|floor.*|hardmax.*|round|sign",
    "the reference computes in single precision": "gelu_default_.|group_normalization_.*|mvn"
    "|attention_24_qk_matmul_output_mode3_softmax_precision",
    "the reference gives wrong indices": "maxpool_(1d|2d|3d)_(default|same_upper|same_lower|pads)",
    "the reference lacks Scan against the direction of time": "gru_.*|lstm_.*|simple_rnn_.*|rnn_.*",
    "training mode": "batchnorm_.*_training_mode|training_dropout_.*",
    "column-major indices": "maxpool_with_argmax_2d_precomputed_strides",
    "an output size of its own": "maxunpool_export_with_output_shape",
    "a box of the input": "resize_tf_crop_and_resize.*",
    "sizes that only bound": "resize_.*_not_(larger|smaller)",
    "reductions that are not sums": "scatter(nd|_elements).*_(mul|multiply|max|min)(_.*)?",
}


def candidates():
    """Cases with one standard node and float inputs, as a model in double precision and feeds."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # making the cases casts out of range
        cases = collect_testcases(None)
    for case in cases:
        nodes = case.model.graph.node
        if len(nodes) != 1 or nodes[0].domain or not case.data_sets:
            continue
        values = case.data_sets[0][0]
        if all(isinstance(v, np.ndarray) and v.dtype != object for v in values):
            names = [x.name for x in case.model.graph.input]
            model, feeds = in_double(case.model, dict(zip(names, values, strict=True)))
            if feeds and is_meant(model):
                yield case.name.removeprefix("test_"), model, feeds


def in_double(model, values):
    """The model with floats in double precision, everything else stored, and its float feeds."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for x in [*wide.graph.input, *wide.graph.output]:
        if x.type.tensor_type.elem_type in WIDENED:
            x.type.tensor_type.elem_type = DOUBLE
    for attribute in wide.graph.node[0].attribute:
        if attribute.name in ("to", "dtype") and attribute.i in WIDENED:
            attribute.i = DOUBLE
    floats = [x for x in wide.graph.input if x.type.tensor_type.elem_type == DOUBLE]
    stored = {n: v for n, v in values.items() if n not in {x.name for x in floats}}
    wide.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in stored.items())
    del wide.graph.input[:]
    wide.graph.input.extend(floats)
    # Moved a little, away from kinks and ties.
    rng = np.random.default_rng(1)
    feeds = {x.name: values[x.name].astype(np.float64) for x in floats}
    return wide, {n: 0.97 * v + rng.uniform(0.001, 0.01, v.shape) for n, v in feeds.items()}


def is_meant(model):
    """Whether the operator is the same at the opset of the rules, and has a float output."""
    (opset,) = (o for o in model.opset_import if o.domain in ("", "ai.onnx"))
    op_type = model.graph.node[0].op_type
    if opset.version < OPSET:
        versions = {onnx.defs.get_schema(op_type, v).since_version for v in (opset.version, OPSET)}
        opset.version = OPSET
        if len(versions) > 1:
            return False
    return any(y.type.tensor_type.elem_type == DOUBLE for y in model.graph.output)


def error_of(model, feeds):
    """Error of all adjoints that the rules offer; None where they offer none."""
    graph = gs.import_onnx(model)
    lower(graph, {n: Fact(x.shape, x.dtype) for n, x in feeds.items()})
    standard = gs.export_onnx(graph, do_type_check=False)
    facts = facts_of(standard, feeds, in_reference)
    outputs = float_outputs(standard, facts)
    # Statistics that a normalization gives out besides have no derivative: then the first only.
    for seeded in (outputs, outputs[:1]):
        offered = [n for n in feeds if not with_adjoints(standard, facts, [n], seeded)[2]]
        if offered:
            extended, names, _ = with_adjoints(standard, facts, offered, seeded)
            return disagreement(
                model,
                extended,
                names,
                feeds,
                seeded,
                np.random.default_rng(0),
                engine=in_reference,
                differences=in_reference,
                step=1e-5,
            )
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the reference implementation
def test_the_rules_hold_on_the_published_cases():
    without = set(" ".join(NO_RULE.values()).split())
    excluded = re.compile("|".join(EXCLUDED.values()))
    errors = {
        name: error_of(model, feeds)
        for name, model, feeds in candidates()
        if model.graph.node[0].op_type not in without and not excluded.fullmatch(name)
    }
    assert len(errors) > 500
    wrong = {n: e for n, e in errors.items() if e is None or not e < 1e-6}
    assert not wrong
