"""Every gradient rule against directional differences of the operator itself."""

from typing import NamedTuple

import numpy as np
import onnx
import pytest
from differences import (
    disagreement,
    facts_of,
    float_outputs,
    in_onnxruntime,
    in_reference,
    with_adjoints,
)

from onnx_ecp.gradients.rules import RULES
from onnx_ecp.graph.operators import OPERATORS

SIGNED, UNIT, ABOVE = (-2.0, 2.0), (0.15, 0.85), (1.2, 2.0)


class Case(NamedTuple):
    """ONNX text (outputs begin with y), shapes of the inputs, which of them, and their range."""

    body: str
    shapes: dict
    wrt: str = ""
    domain: tuple = SIGNED


def ints(name, *values):
    return f"{name} = Constant<value_ints=[{', '.join(map(str, values))}]>()\n"


def tensor(name, kind, *values):
    return f"{name} = Constant<value={kind} {{{', '.join(map(str, values))}}}>()\n"


X = {"x": (2, 3, 4)}
AB = {"a": (2, 3, 4), "b": (3, 1)}
IMAGE = {"x": (2, 4, 6, 7)}
WRITE = tensor("k", "int64[2,3,2]", 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 2, 0)

UNARY = [
    "Abs",
    "Atan",
    "Asinh",
    "Celu",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Mish",
    "Neg",
    "Reciprocal",
    "Relu",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
EINSUMS = {
    "bij,bjk->bik": [(2, 3, 4), (2, 4, 5)],
    "ij,jk": [(2, 3), (3, 4)],
    "...ij,jk->...ik": [(2, 3, 4), (4, 5)],
    "bij->b": [(2, 3, 4)],
    "bhwc,hkc->bhwk": [(2, 3, 4, 5), (3, 6, 5)],
    "...i,...i->...": [(2, 3, 4), (2, 3, 4)],
    "bii->bi": [(2, 3, 3)],
    "ii,i->": [(3, 3), (3,)],
}

# Smooth around the data: differences in double precision by the reference implementation.
SMOOTH = {
    **{
        name: Case(f"y = {name}(x)", X)
        for name in UNARY
    },
    **{
        name: Case(f"y = {name}(x)", X, domain=UNIT)
        for name in ("Acos", "Asin", "Atanh", "Log", "Sqrt")
    },
    "Acosh": Case("y = Acosh(x)", X, domain=ABOVE),
    "Celu, alpha": Case("y = Celu<alpha=0.7>(x)", X),
    "Elu, alpha": Case("y = Elu<alpha=0.7>(x)", X),
    "Gelu, tanh": Case('y = Gelu<approximate="tanh">(x)', X),
    "HardSigmoid, wide": Case("y = HardSigmoid<alpha=0.4, beta=0.3>(x)", X),
    "LeakyRelu, alpha": Case("y = LeakyRelu<alpha=0.3>(x)", X),
    **{
        f"{name}({order})": Case(
            f"y = {name}({order})", AB, domain=UNIT if name == "Pow" else SIGNED
        )
        for name in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum")
        for order in ("a, b", "b, a")
    },
    "Add, unit axis that is not broadcast": Case("y = Add(a, b)", {"a": (2, 1), "b": (2, 1)}),
    "Max of three": Case("y = Max(a, b, c)", {**AB, "c": (4,)}),
    "Max of equals": Case("y = Max(x, x)", X),
    "Mean": Case("y = Mean(a, b)", AB),
    "Mod": Case("y = Mod<fmod=1>(a, b)", AB, domain=ABOVE),
    "Pow, number": Case("p = Constant<value_int=3>()\ny = Pow(x, p)", X),
    "Pow, zero to the power of zero": Case(
        tensor("k", "float[4]", 0, 1, 2, 3) + "r = Relu(x)\ny = Pow(r, k)", X
    ),
    "PRelu": Case("y = PRelu(a, b)", AB),
    "Where": Case(tensor("c", "bool[3,1]", 1, 0, 1) + "y = Where(c, a, b)", AB),
    "Clip": Case("y = Clip(x, a, b)", {**X, "a": (), "b": ()}),
    "Cast": Case("u = Cast<to=11>(x)\ny = CastLike(u, x)", X),
    "Dropout": Case("y = Dropout(x)", X),
    "steps": Case("u = Floor(x)\ny = Mul(u, x)", X),
    **{
        f"Gemm {a}{b}": Case(
            f"y = Gemm<transA={a}, transB={b}, alpha=0.5, beta=2.0>(a, b, c)",
            {"a": (3, 2) if a else (2, 3), "b": (4, 3) if b else (3, 4), "c": (2, 1)},
        )
        for a in (0, 1)
        for b in (0, 1)
    },
    "Gemm, bias in a row": Case("y = Gemm(a, b, c)", {"a": (2, 3), "b": (3, 4), "c": (4,)}),
    **{
        f"MatMul {a} {b}": Case("y = MatMul(a, b)", {"a": a, "b": b})
        for a, b in [
            ((2, 3), (3, 4)),
            ((5, 2, 3), (3, 4)),
            ((2, 3), (5, 3, 4)),
            ((3,), (3,)),
            ((3,), (3, 4)),
            ((2, 3), (3,)),
            ((3,), (5, 3, 4)),
            ((5, 2, 3), (3,)),
            ((2, 1, 2, 3), (5, 3, 4)),
            ((2, 1, 1, 3), (1, 5, 3, 1)),
        ]
    },
    **{
        f"Einsum {e}": Case(
            f'y = Einsum<equation="{e}">({", ".join("ab"[: len(shapes)])})',
            dict(zip("ab", shapes, strict=False)),
        )
        for e, shapes in EINSUMS.items()
    },
    **{
        f"Reduce{name}{which}": Case(
            f"{ints('k', *axes)}y = Reduce{name}<keepdims={keep}>(x, k)",
            X,
            domain=UNIT if name == "LogSum" else SIGNED,
        )
        for name in REDUCTIONS
        for which, axes, keep in (("", (-1, 0), 0), (", kept", (1,), 1))
    },
    "ReduceMean, all": Case("y = ReduceMean<keepdims=0>(x)", X),
    "ReduceSum, none": Case("y = ReduceSum<noop_with_empty_axes=1>(x)", X),
    "Softmax": Case("y = Softmax<axis=1>(x)", X),
    "LogSoftmax": Case("y = LogSoftmax(x)", X),
    "LayerNormalization": Case(
        "y = LayerNormalization<axis=1>(x, s, b)", {**X, "s": (3, 4), "b": (3, 4)}, "x"
    ),
    "RMSNormalization": Case("y = RMSNormalization(x, s)", {**X, "s": (4,)}, "x"),
    "InstanceNormalization": Case(
        "y = InstanceNormalization(x, s, b)", {**X, "s": (3,), "b": (3,)}, "x"
    ),
    "BatchNormalization": Case(
        "y = BatchNormalization(x, s, b, m, v)",
        {**X, "s": (3,), "b": (3,), "m": (3,), "v": (3,)},
        "x",
        UNIT,
    ),
    "LpNormalization": Case("y = LpNormalization<axis=1>(x)", X),
    "LpNormalization, p 1": Case("y = LpNormalization<p=1>(x)", X, domain=UNIT),
    "Reshape": Case(ints("k", 4, -1) + "y = Reshape(x, k)", X),
    "Flatten": Case("y = Flatten<axis=2>(x)", X),
    "Squeeze": Case(ints("k", 1) + "y = Squeeze(x, k)", {"x": (2, 1, 3)}),
    "Unsqueeze": Case(ints("k", -1) + "y = Unsqueeze(x, k)", X),
    "Transpose": Case("y = Transpose<perm=[1, 2, 0]>(x)", X),
    "Transpose, default": Case("y = Transpose(x)", X),
    "Expand": Case(ints("k", 2, 5, 3) + "y = Expand(x, k)", {"x": (5, 1)}),
    "Concat": Case("y = Concat<axis=-1>(a, b, c)", {"a": (2, 3), "b": (2, 1), "c": (2, 4)}),
    "Split": Case("y1, y2 = Split<axis=-1, num_outputs=2>(x)", X),
    "Split, one part unused": Case(ints("k", 1, 2) + "u, y = Split<axis=1>(x, k)", X),
    "Slice": Case(
        ints("s", -3, 0) + ints("e", 9, 2) + ints("k", -1, 1) + "y = Slice(x, s, e, k)", X
    ),
    "Slice, all axes": Case(ints("s", 0, 1, 1) + ints("e", 2, 9, -1) + "y = Slice(x, s, e)", X),
    "Slice, backwards": Case(
        ints("s", -1) + ints("e", -9) + ints("k", 1) + ints("t", -2) + "y = Slice(x, s, e, k, t)", X
    ),
    "Slice, computed": Case(
        ints("k", 1) + "n = Shape<start=1, end=2>(x)\ns = Sub(n, k)\ny = Slice(x, s, n, k)", X
    ),
    "Gather, number": Case("k = Constant<value_int=-1>()\ny = Gather<axis=1>(x, k)", X),
    "Gather": Case(tensor("k", "int64[2,2]", 0, 1, 1, 2) + "y = Gather<axis=1>(x, k)", X),
    "GatherElements": Case(WRITE + "y = GatherElements<axis=1>(x, k)", {"x": (2, 3, 2)}),
    "GatherND": Case(tensor("k", "int64[2,2]", 0, 1, 1, 2) + "y = GatherND(x, k)", X),
    "GatherND, batch": Case(
        tensor("k", "int64[2,1]", 1, 2) + "y = GatherND<batch_dims=1>(x, k)", X
    ),
    "ScatterElements": Case(
        WRITE + "y = ScatterElements<axis=1>(x, k, u)", {"x": (2, 3, 2), "u": (2, 3, 2)}
    ),
    "ScatterElements, add": Case(
        WRITE + 'y = ScatterElements<axis=1, reduction="add">(x, k, u)',
        {"x": (2, 3, 2), "u": (2, 3, 2)},
    ),
    "ScatterND": Case(
        tensor("k", "int64[2,2]", 0, 1, 1, 2) + "y = ScatterND(x, k, u)", {**X, "u": (2, 4)}
    ),
    "ScatterND, add": Case(
        tensor("k", "int64[2,2]", 0, 1, 0, 1) + 'y = ScatterND<reduction="add">(x, k, u)',
        {**X, "u": (2, 4)},
    ),
    "Tile": Case(ints("k", 2, 1, 3) + "y = Tile(x, k)", X),
    "Pad, cut": Case(ints("k", 1, -1, 0, 2) + ints("t", 0, -1) + "y = Pad(x, k, , t)", X),
    "Pad, reflect": Case(ints("k", 0, 1, 1, 0, 1, 2) + 'y = Pad<mode="reflect">(x, k)', X),
    "Pad, edge": Case(ints("k", 0, 1, 1, 0, 1, 2) + 'y = Pad<mode="edge">(x, k)', X),
    "Trilu": Case("k = Constant<value_int=1>()\ny = Trilu<upper=0>(x, k)", X),
    "CumSum": Case(
        "k = Constant<value_int=-2>()\ny = CumSum<exclusive=1, reverse=1>(x, k)", X
    ),
    "TopK": Case(ints("k", 2) + "y, i = TopK<axis=1>(x, k)", X),
    "DepthToSpace": Case("y = DepthToSpace<blocksize=2>(x)", {"x": (2, 8, 2, 3)}),
    "DepthToSpace, CRD": Case('y = DepthToSpace<blocksize=2, mode="CRD">(x)', {"x": (2, 8, 2, 3)}),
    "SpaceToDepth": Case("y = SpaceToDepth<blocksize=2>(x)", {"x": (2, 2, 4, 6)}),
    "ReverseSequence": Case(ints("k", 2, 3, 1, 1) + "y = ReverseSequence(x, k)", {"x": (3, 4, 2)}),
    "Compress": Case(tensor("k", "bool[3]", 1, 0, 1) + "y = Compress<axis=1>(x, k)", X),
}  # fmt: skip


def conv(attributes, x, w, op="Conv"):
    return Case(f"y = {op}<{attributes}>(x, w)" if attributes else f"y = {op}(x, w)",
                {"x": x, "w": w}, "x")  # fmt: skip


def resize(attributes, x, *, scales=None, sizes=None):
    values = f"value_floats={scales}" if scales else f"value_ints={sizes}"
    place = ", k" if scales else ", , k"
    return Case(f"k = Constant<{values}>()\ny = Resize<{attributes}>(x, {place})", {"x": x})


POOL_GEOMETRIES = {
    "plain": "kernel_shape=[2, 3]",
    "strides and pads": "kernel_shape=[2, 3], strides=[2, 2], pads=[1, 1, 0, 1]",
    "dilations": "kernel_shape=[2, 3], strides=[1, 2], dilations=[2, 2]",
    "ceil": "kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1",
    "same upper": 'kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"',
    "same lower": 'kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_LOWER"',
}

# Linear in what is asked for, so that differences with step 1 are exact; by ONNX Runtime.
LINEAR = {
    "Conv": conv("", (2, 3, 5, 6), (4, 3, 3, 2)),
    "Conv, pads": conv("pads=[1, 2, 0, 1]", (2, 3, 5, 6), (4, 3, 3, 2)),
    "Conv, groups": conv("group=3, pads=[1, 1, 1, 1]", (2, 6, 5, 6), (9, 2, 3, 3)),
    "Conv, depthwise": conv("group=6, pads=[1, 1, 1, 1]", (2, 6, 5, 6), (6, 1, 3, 3)),
    "Conv, strides": conv("strides=[2, 3], pads=[1, 0, 1, 2]", (2, 3, 6, 9), (4, 3, 3, 2)),
    "Conv, strides, dilations, groups": conv(
        "strides=[2, 2], dilations=[2, 1], group=2", (2, 4, 8, 8), (4, 2, 3, 2)
    ),
    "Conv, dilations": conv("dilations=[2, 2], pads=[2, 2, 2, 2]", (2, 3, 6, 7), (4, 3, 3, 3)),
    "Conv, same upper": conv('auto_pad="SAME_UPPER"', (2, 3, 5, 6), (4, 3, 4, 3)),
    "Conv, same lower": conv('auto_pad="SAME_LOWER"', (2, 3, 5, 6), (4, 3, 4, 3)),
    "Conv, same, strides": conv(
        'auto_pad="SAME_LOWER", strides=[2, 1]', (2, 3, 5, 6), (4, 3, 4, 3)
    ),
    "Conv, valid": conv('auto_pad="VALID"', (2, 3, 5, 6), (4, 3, 4, 3)),
    "Conv, more padding than kernel": conv("pads=[2, 2, 2, 2]", (2, 3, 5, 6), (4, 3, 2, 2)),
    "Conv of lines": conv("pads=[1, 1]", (2, 3, 7), (4, 3, 3)),
    "Conv of volumes": conv(
        "pads=[1, 0, 1, 1, 0, 1], strides=[1, 2, 1]", (2, 3, 4, 5, 4), (4, 3, 2, 3, 2)
    ),
    "ConvTranspose": conv("", (2, 3, 4, 5), (3, 4, 3, 2), "ConvTranspose"),
    "ConvTranspose, strides": conv(
        "strides=[2, 3], pads=[1, 0, 1, 1], output_padding=[1, 0]",
        (2, 3, 4, 5),
        (3, 4, 3, 2),
        "ConvTranspose",
    ),
    "ConvTranspose, groups": conv(
        "strides=[2, 2], group=3, dilations=[2, 1]", (2, 6, 4, 5), (6, 2, 3, 2), "ConvTranspose"
    ),
    **{
        f"ConvTranspose, {how}": conv(
            f"strides=[2, 2], {how}", (2, 3, 4, 5), (3, 4, 3, 4), "ConvTranspose"
        )
        for how in ("output_shape=[8, 11]", 'auto_pad="SAME_UPPER"', 'auto_pad="SAME_LOWER"')
    },
    **{
        f"AveragePool, {name}": Case(f"y = AveragePool<{geometry}>(x)", IMAGE)
        for name, geometry in POOL_GEOMETRIES.items()
    },
    **{
        f"AveragePool with padding, {name}": Case(
            f"y = AveragePool<{geometry}, count_include_pad=1>(x)", IMAGE
        )
        for name, geometry in {
            **POOL_GEOMETRIES,
            "ceil and pads": "kernel_shape=[3, 3], pads=[1, 1, 0, 1], strides=[2, 2], ceil_mode=1",
        }.items()
    },
    "AveragePool of lines": Case("y = AveragePool<kernel_shape=[3]>(x)", X),
    "GlobalAveragePool": Case("y = GlobalAveragePool(x)", IMAGE),
    "MaxUnpool": Case(
        """p, i = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(w)
        y = MaxUnpool<kernel_shape=[2, 2], strides=[2, 2]>(x, i)""",
        {"x": (2, 4, 3, 4), "w": (2, 4, 6, 8)},
        "x",
    ),
    **{
        f"Resize, {mode}, {coordinates}, {'up' if up else 'down'}": resize(
            f'mode="{mode}", coordinate_transformation_mode="{coordinates}"',
            (2, 3, 6, 5),
            scales=[1.0, 1.0, 1.5, 2.0] if up else None,
            sizes=None if up else [2, 3, 4, 3],
        )
        for mode in ("nearest", "linear", "cubic")
        for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for up in (True, False)
    },
    "Resize, antialias": resize(
        'mode="linear", antialias=1', (2, 3, 8, 7), scales=[1.0, 1.0, 0.5, 0.6]
    ),
    "Resize, axes": resize('mode="linear", axes=[2, 3]', (2, 3, 8, 7), scales=[0.5, 0.6]),
    "Resize, cubic": resize(
        'mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5',
        (2, 3, 8, 7),
        scales=[1.0, 1.0, 0.5, 1.6],
    ),
}


def recurrent(op, direction, attributes="", lengths=()):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    passes = 2 if direction == "bidirectional" else 1
    states = {"h": (passes, 2, 4)} | ({"c": (passes, 2, 4)} if op == "LSTM" else {})
    shapes = {
        "x": (5, 2, 3),
        "w": (passes, gates * 4, 3),
        "r": (passes, gates * 4, 4),
        "b": (passes, 2 * gates * 4),
        **states,
    }
    outputs = "y, y2, y3" if op == "LSTM" else "y, y2"
    given = ints("n", *lengths) + "m = Cast<to=6>(n)\n" if lengths else ""
    return Case(
        f'{given}{outputs} = {op}<hidden_size=4, direction="{direction}"{attributes}>'
        f"(x, w, r, b, {'m' if lengths else ''}, {', '.join(states)})",
        shapes,
        " ".join(["x", *states]),
        (-0.7, 0.7),
    )


# Curved, and missing or wrong in the reference: single precision differences by ONNX Runtime.
CURVED = {
    **{
        f"{op}, {name}": Case(f"y = {op}<{geometry}>(x)", IMAGE)
        for op in ("MaxPool", "LpPool")
        for name, geometry in POOL_GEOMETRIES.items()
    },
    "MaxPool of lines": Case("y = MaxPool<kernel_shape=[2]>(x)", X),
    "MaxPool of volumes": Case("y = MaxPool<kernel_shape=[2, 2, 2]>(x)", {"x": (2, 2, 3, 4, 3)}),
    "MaxPool with indices": Case("y, i = MaxPool<kernel_shape=[2, 2]>(x)", IMAGE),
    "Gelu": Case("y = Gelu(x)", X),
    "GlobalMaxPool": Case("y = GlobalMaxPool(x)", IMAGE),
    "LRN": Case("y = LRN<size=3, alpha=0.5>(x)", IMAGE),
    "GroupNormalization": Case(
        "y = GroupNormalization<num_groups=2>(x, s, b)", {**IMAGE, "s": (4,), "b": (4,)}, "x"
    ),
    "LpNormalization of any sign": Case("y = LpNormalization<p=1>(x)", X),
    **{
        f"{op}, {direction}": recurrent(op, direction)
        for op in ("LSTM", "GRU", "RNN")
        for direction in ("forward", "reverse", "bidirectional")
    },
    **{
        f"{op}, {direction}, lengths": recurrent(op, direction, lengths=(2, 5))
        for op in ("LSTM", "GRU", "RNN")
        for direction in ("forward", "reverse", "bidirectional")
    },
    "GRU, late reset": recurrent("GRU", "bidirectional", ", linear_before_reset=1"),
    "RNN, relu": recurrent("RNN", "forward", ', activations=["Relu"]'),
    "LSTM, last state only": Case(
        ", y = LSTM<hidden_size=4>(x, w, r)",
        {"x": (5, 2, 3), "w": (1, 16, 3), "r": (1, 16, 4)},
        "x",
    ),
}


def model_of(case, dtype="float"):
    outputs = [n.strip() for line in case.body.splitlines() for n in line.split("=")[0].split(",")]
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g ('
        + ", ".join(f"{dtype}[{','.join(map(str, s))}] {n}" for n, s in case.shapes.items())
        + ") => ("
        + ", ".join(f"{dtype} {n}" for n in outputs if n.startswith("y"))
        + f") {{ {case.body} }}"
    )
    for y in model.graph.output:
        y.type.tensor_type.ClearField("shape")
    return model


def drawn(rng, case, dtype):
    """Values at a distance from zero, so that no kink is near."""
    values = {n: rng.uniform(*case.domain, s) for n, s in case.shapes.items()}
    away = {n: np.where(abs(v) < 0.1, np.copysign(0.1, v), v) for n, v in values.items()}
    return {n: np.asarray(v, dtype) for n, v in away.items()}


def check(case, rng, *, dtype, engine, differences, step):
    model, feeds = (
        model_of(case, "double" if dtype == np.float64 else "float"),
        drawn(rng, case, dtype),
    )
    facts = facts_of(model, feeds, engine)
    wrt = case.wrt.split() or list(case.shapes)
    seeded = float_outputs(model, facts)
    extended, names, blocked = with_adjoints(model, facts, wrt, seeded)
    assert not blocked
    return disagreement(
        model,
        extended,
        names,
        feeds,
        seeded,
        rng,
        engine=engine,
        differences=differences,
        step=step,
    )


def by_name(table):
    return pytest.mark.parametrize("case", table.values(), ids=table)


@by_name(SMOOTH)
def test_a_rule_equals_differences_in_double_precision(case, rng):
    error = check(
        case, rng, dtype=np.float64, engine=in_reference, differences=in_reference, step=1e-5
    )
    assert error < 1e-6


@by_name(SMOOTH)
def test_a_rule_runs_in_onnxruntime_in_single_precision(case, rng):
    error = check(
        case, rng, dtype=np.float32, engine=in_onnxruntime, differences=in_reference, step=1e-5
    )
    assert error < 1e-4


@by_name(LINEAR)
def test_a_rule_of_a_linear_operator_is_exact(case, rng):
    error = check(
        case, rng, dtype=np.float32, engine=in_onnxruntime, differences=in_onnxruntime, step=1.0
    )
    assert error < 1e-5


@by_name(CURVED)
def test_a_rule_equals_differences_in_single_precision(case, rng):
    error = check(
        case, rng, dtype=np.float32, engine=in_onnxruntime, differences=in_onnxruntime, step=2e-3
    )
    assert error < 5e-3


# Newer than the newest opset of ONNX Runtime; the published cases of onnx check it.
ELSEWHERE = {"Swish", "Optional", "OptionalGetElement"}
WITHOUT_DERIVATIVE = {op for (domain, op), row in OPERATORS.items() if row.flat and not domain} - {
    "Floor"
}


def test_every_rule_has_a_case():
    models = [model_of(case) for table in (SMOOTH, LINEAR, CURVED) for case in table.values()]
    covered = {node.op_type for model in models for node in model.graph.node}
    assert set(RULES) - covered == ELSEWHERE | WITHOUT_DERIVATIVE


WITHOUT_RULE = {
    **{name: Case(f"y = {name}(x)", X) for name in UNARY if name not in ("Sinh", "Cosh")},
    "attributes": Case("y = Elu<alpha=0.7>(x)", X),
    "no kernel in double precision": Case("y = HardSwish(x)", X),
    "large values": Case("y = Tanh(x)", X, domain=(-300.0, 300.0)),
}


@by_name(WITHOUT_RULE)
def test_differences_are_good_enough_where_there_is_no_rule(case, rng, monkeypatch):
    """What works element by element gets about what its rule gives; see ``by_differences``."""
    model, feeds = model_of(case), drawn(rng, case, np.float32)
    facts = facts_of(model, feeds, in_onnxruntime)
    seed = {"seed/y": rng.standard_normal((2, *facts["y"].shape)).astype(np.float32)}

    def adjoint():
        extended, names, blocked = with_adjoints(model, facts, ["x"], ["y"])
        assert not blocked
        return in_onnxruntime(extended)({**feeds, **seed})[names["x"]]

    exact = adjoint()
    monkeypatch.delitem(RULES, model.graph.node[-1].op_type)
    np.testing.assert_allclose(adjoint(), exact, atol=5e-3, rtol=5e-3)


DEPENDENT = {
    "a softmax": Case("y = Softmax(x)", X),
    "a sum": Case(tensor("k", "int64", 1) + "y = CumSum(x, k)", X),
    "another place": Case("y = Transpose<perm=[1, 0, 2]>(x)", {"x": (3, 3, 3)}),
    "another shape": Case("y = Flatten(x)", X),
    "the mean of all": Case("y = MeanVarianceNormalization<axes=[0, 1, 2]>(x)", X),
}


@by_name(DEPENDENT)
def test_what_does_not_work_element_by_element_is_refused(case, rng, monkeypatch):
    model, feeds = model_of(case), drawn(rng, case, np.float32)
    facts = facts_of(model, feeds, in_onnxruntime)
    operator = model.graph.node[-1].op_type
    monkeypatch.delitem(RULES, operator, raising=False)
    _, names, blocked = with_adjoints(model, facts, ["x"], ["y"])
    assert (names, blocked) == ({}, {"x": f"no gradient rule for {operator}"})


REFUSED = {
    "training": Case(
        "t = Constant<value=bool {1}>()\nr = Constant<value_float=0.5>()\ny = Dropout(x, r, t)", X
    ),
    "repeated writes": Case(
        WRITE + 'y = ScatterElements<axis=1, reduction="mul">(x, k, x)', {"x": (2, 3, 2)}
    ),
    "weight of a convolution": conv("", (2, 3, 5, 5), (4, 3, 2, 2))._replace(wrt="w"),
    "aspect": resize(
        'keep_aspect_ratio_policy="not_larger"', (2, 3, 6, 5), sizes=[2, 3, 3, 3]
    ),
    "clipping": Case(
        "y = GRU<hidden_size=4, clip=1.0>(x, w, r)",
        {"x": (5, 2, 3), "w": (1, 12, 3), "r": (1, 12, 4)},
        "x",
    ),
}  # fmt: skip


@by_name(REFUSED)
def test_what_a_rule_does_not_cover_is_named(case, rng):
    model, feeds = model_of(case), drawn(rng, case, np.float32)
    facts = facts_of(model, feeds, in_onnxruntime)
    wrt = case.wrt.split() or list(case.shapes)
    _, names, blocked = with_adjoints(model, facts, wrt, ["y"])
    assert not names
    assert all(model.graph.node[-1].op_type in reason for reason in blocked.values())


# Batch first; the reverse graph is built from a batch of two.
NETWORKS = {
    "convolutions": Case(
        """c = Conv<pads=[1, 1, 1, 1]>(x, w)
        r = Relu(c)
        p = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(r)
        d = Conv<strides=[2, 1], group=2>(p, v)
        e = AveragePool<kernel_shape=[2, 2], auto_pad="SAME_UPPER">(d)
        s = InstanceNormalization(e, i, i)
        h = Concat<axis=1>(e, s)
        a, b = Split<axis=1, num_outputs=2>(h)
        f = Add(a, b)
        t = SpaceToDepth<blocksize=2>(p)
        m = GlobalAveragePool(t)
        n = Flatten(m)
        g = GlobalMaxPool(f)
        k = Flatten(g)
        y1 = Gemm<transB=1>(k, u)
        y2 = Tanh(n)""",
        {"x": (2, 2, 8, 8), "w": (4, 2, 3, 3), "v": (4, 2, 2, 2), "i": (4,), "u": (3, 4)},
        "x",
    ),
    "attention": Case(
        ints("heads", 0, 0, 2, -1)
        + ints("join", 0, 0, -1)
        + ints("one", 1)
        + """n = LayerNormalization(x, s)
        q = MatMul(n, w)
        k = MatMul(n, v)
        qr = Reshape(q, heads)
        kr = Reshape(k, heads)
        qh = Transpose<perm=[0, 2, 1, 3]>(qr)
        kh = Transpose<perm=[0, 2, 3, 1]>(kr)
        a = MatMul(qh, kh)
        p = Softmax(a)
        vh = Transpose<perm=[0, 1, 3, 2]>(kh)
        o = MatMul(p, vh)
        ot = Transpose<perm=[0, 2, 1, 3]>(o)
        oj = Reshape(ot, join)
        f = Add(x, oj)
        zero = Constant<value_int=0>()
        c = Gather<axis=1>(f, zero)
        m = ReduceMean<keepdims=0>(f, one)
        y = Sub(c, m)""",
        {"x": (2, 5, 6), "s": (6,), "w": (6, 6), "v": (6, 6)},
        "x",
    ),
    "recurrence": Case(
        """t = Transpose<perm=[1, 0, 2]>(x)
        o, h = LSTM<hidden_size=4, direction="bidirectional">(t, w, r)
        b = Transpose<perm=[1, 0, 2]>(h)
        y = Flatten(b)""",
        {"x": (2, 5, 3), "w": (2, 16, 3), "r": (2, 16, 4)},
        "x",
    ),
}


@by_name(NETWORKS)
def test_the_adjoint_of_a_sample_does_not_depend_on_its_batch(case, rng):
    model = model_of(case)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    feeds = drawn(rng, case, np.float32)
    facts = facts_of(model, feeds, in_onnxruntime)
    outputs = float_outputs(model, facts)
    extended, names, _ = with_adjoints(model, facts, ["x"], outputs)
    run = in_onnxruntime(extended)
    x = rng.standard_normal((5, *case.shapes["x"][1:])).astype(np.float32)
    seeds = {
        f"seed/{y}": rng.standard_normal((2, 5, *facts[y].shape[1:])).astype(np.float32)
        for y in outputs
    }
    together = run({**feeds, "x": x, **seeds})[names["x"]]
    for k in range(5):
        own = {name: v[:1, k : k + 1] for name, v in seeds.items()}
        alone = run({**feeds, "x": x[k : k + 1], **own})[names["x"]]
        np.testing.assert_allclose(together[:1, k : k + 1], alone, rtol=1e-4, atol=1e-5)
