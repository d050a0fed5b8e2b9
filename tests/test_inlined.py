"""Layers inside local functions and constant Ifs: what is inlined, found, and stored."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

import onnx_ecp
from onnx_ecp.evaluation.work import work
from onnx_ecp.graph import load
from onnx_ecp.graph.inlining import inline
from onnx_ecp.layers import find_layers

LINEAR = """<opset_import: ["" : 17], domain: "loc">
    linear (a, w, b) => (r) { t = MatMul(a, w) r = Add(t, b) }"""
PLAIN = """<opset_import: ["" : 17], domain: "loc">
    plain (a, w) => (r) { r = MatMul(a, w) }"""


def choice(condition, then, other):
    """An If of which both branches compute y."""
    return f"""{condition} y = If (c) <then_branch = g1 () => (float[n,4] p) {{ {then} }},
        else_branch = g2 () => (float[n,4] q) {{ {other} }}>"""


TRUE, FALSE = (f"c = Constant<value = bool {{{x}}}>()" for x in (1, 0))
SIZES = """s = Shape(x) i = Constant<value_int = 1>() d = Gather(s, i)
    k = Constant<value_ints = [3]>() c = Equal(d, k)"""
# Of a sum of sizes that are partly unknown.
PARTLY = """s = Shape(x) two = Constant<value_ints = [2]>() t = Concat<axis = 0>(s, two)
    i = Constant<value_ints = [1]>() j = Constant<value_ints = [3]>() u = Slice(t, i, j)
    m = ReduceProd<keepdims = 0>(u) k = Constant<value_int = 7>() c = Less(m, k)"""

# By case: body, functions, and the layers' names with whether they have a bias.
CASES = {
    "a function with a bias": ("y = loc.linear(x, W, b)", LINEAR, {"y/t": True}),
    "calls of one function": (
        "[one] h = loc.linear(x, W, b) y = loc.linear(h, V, d)",
        LINEAR,
        {"one/t": True, "y/t": True},
    ),
    "one weight for two calls": (
        "h = loc.linear(x, U, a) y0 = loc.linear(h, U, a) y = loc.linear(y0, W, b)",
        LINEAR,
        {"y/t": True},
    ),
    "a function without a bias": ("y = loc.plain(x, W)", PLAIN, {"y": False}),
    "a bias behind the call": ("t = loc.plain(x, W) y = Add(t, b)", PLAIN, {"t": True}),
    "a bias in another call": (
        "t = MatMul(x, W) y = loc.add(t, b)",
        """<opset_import: ["" : 17], domain: "loc"> add (x, b) => (y) { y = Add(x, b) }""",
        {"t": True},
    ),
    "a bias that others read, in another call": (
        "t = MatMul(x, W) h = loc.add(t, b) y = Add(h, b)",
        """<opset_import: ["" : 17], domain: "loc"> add (x, b) => (y) { y = Add(x, b) }""",
        {"t": False},
    ),
    "functions in functions": (
        "y = loc.outer<f = 2.0>(x, W, b)",
        """<opset_import: ["" : 17, "loc" : 1], domain: "loc"> outer <f> (x, w, b) => (y)
        { y = loc.scaled<alpha: float = @f>(x, w, b) } """
        """<opset_import: ["" : 17], domain: "loc"> scaled <alpha, beta> (x, w, b) => (y)
        { y = Gemm<alpha: float = @alpha, beta: float = @beta>(x, w, b) }""",
        {"y": True},
    ),
    "a view of a weight": (
        "w = Transpose(T) y = loc.linear(x, w, b)",
        LINEAR,
        {"y/t": True},
    ),
    "a constant condition": (
        choice(TRUE, "t = MatMul(x, W) p = Add(t, b)", "q = MatMul(x, W)"),
        "",
        {"y/then_branch/t": True},
    ),
    "what runs alone counts": (
        choice(FALSE, "p = MatMul(x, W)", "t = Tanh(x) q = Gemm(t, W, b)"),
        "",
        {"y": True},
    ),
    "sizes": (choice(SIZES, "p = MatMul(x, W)", "q = Gemm(x, Q)"), "", {"y": False}),
    "sizes, partly known": (
        choice(PARTLY, "p = MatMul(x, W)", "q = Gemm(x, Q)"),
        "",
        {"y": False},
    ),
    "an If in an If": (
        choice(
            TRUE,
            """p = If (c) <then_branch = g3 () => (float[n,4] r) { r = Gemm(x, W, b) },
            else_branch = g4 () => (float[n,4] s) { s = Gemm(x, W) }>""",
            "q = MatMul(x, W)",
        ),
        "",
        {"y": True},
    ),
    "an If in a function": (
        "y = loc.maybe(x, W, b)",
        """<opset_import: ["" : 17], domain: "loc"> maybe (x, w, b) => (y) {"""
        + TRUE
        + """ y = If (c) <then_branch = g1 () => (float[n,4] p) { p = Gemm(x, w, b) },
        else_branch = g2 () => (float[n,4] q) { q = Gemm(x, w) }> }""",
        {"y": True},
    ),
    "a layer in front": (
        "h = MatMul(x, W) " + choice(TRUE, "p = Tanh(h)", "q = Relu(h)"),
        "",
        {"h": False},
    ),
    "names that occur in several Ifs": (
        "h = MatMul(x, W) "
        + choice(TRUE, "t = Tanh(h) p = Neg(t)", "q = Relu(h)").replace("y =", "y0 =")
        + choice("", "t = Neg(y0) p = Tanh(t)", "q = Relu(h)"),
        "",
        {"h": False},
    ),
}
by_case = pytest.mark.parametrize(("body", "functions", "layers"), CASES.values(), ids=CASES)

SHAPES = {
    "W": (3, 4),
    "V": (4, 4),
    "Q": (3, 4),
    "U": (3, 3),
    "T": (4, 3),
    "O": (4, 4),
    "P": (4, 4),
    "a": (3,),
    "b": (4,),
    "d": (4,),
}


def parse(body, functions, rng):
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17, "loc" : 1]>
        g (float[n,3] x) => (float[n,4] y) {{ {body} }} {functions}"""
    )
    # A name in the text is one of a tensor wherever a word begins and ends with it.
    words = set("".join(c if c.isalnum() else " " for c in body).split())
    for name in sorted(words & set(SHAPES)):
        if all(name not in node.output for node in model.graph.node):
            values = rng.standard_normal(SHAPES[name]).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.checker.check_model(model)
    return model


def copy_of(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def run(model, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(["y"], feeds)[0]


@by_case
def test_what_is_inlined_computes_the_same(body, functions, layers, rng):
    model = parse(body, functions, rng)
    flat = copy_of(model)
    assert inline(flat)
    assert not flat.functions
    assert all(node.op_type != "If" for node in flat.graph.node)
    onnx.checker.check_model(flat)
    x = rng.standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(flat, {"x": x}), run(model, {"x": x}))


@by_case
def test_layers_are_found_where_they_run(body, functions, layers, rng):
    found = find_layers(parse(body, functions, rng)).layers
    named = {layer.name: layer.has_bias for layer in found}
    assert layers.items() <= named.items()


@by_case
def test_what_is_stored_is_what_the_model_then_computes(body, functions, layers, rng):
    """Shifts behind z in the inlined copy are the measure; no body changes."""
    model = parse(body, functions, rng)
    stored, flat = copy_of(model), copy_of(model)
    inline(flat)
    for layer in find_layers(model).layers:
        if layer.name not in layers:
            continue
        new = rng.standard_normal(layer.weight.shape).astype(np.float32)
        shift = rng.standard_normal(layer.shape[0]).astype(np.float32)
        assert layer.store(stored, new, shift.astype(float)) == (not layer.has_bias)
        tensors = {t.name: t for t in flat.graph.initializer}
        tensors[layer.weight.tensor].raw_data = new.tobytes()
        _shift(flat, layer.output, shift)
    onnx.checker.check_model(stored)
    names = [[layer.name for layer in find_layers(m).layers] for m in (model, stored)]
    assert names[0] == names[1]
    x = rng.standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_allclose(run(stored, {"x": x}), run(flat, {"x": x}), rtol=1e-4, atol=1e-5)
    assert stored.functions == model.functions
    bodies = [[n.attribute for n in m.graph.node if n.op_type == "If"] for m in (stored, model)]
    assert bodies[0] == bodies[1]


def _shift(model, z, shift):
    """Let an Add stand behind a tensor."""
    graph = model.graph
    index = next(k for k, node in enumerate(graph.node) if node.output[0] == z)
    graph.node[index].output[0] = f"{z}/raw"
    graph.initializer.append(onnx.numpy_helper.from_array(shift, f"{z}/shift"))
    graph.node.insert(index + 1, onnx.helper.make_node("Add", [f"{z}/raw", f"{z}/shift"], [z]))


# By case: body, functions, words of the reason.
REFUSED = {
    "a bias that would be inside": (
        "y = loc.two(x, W)",
        """<opset_import: ["" : 17], domain: "loc">
        two (x, w) => (y) { t = MatMul(x, w) y = Relu(t) }""",
        "inside the local function 'two', where no bias can be added",
    ),
    "a result that the body reads, too": (
        "t, y = loc.two(x, W)",
        """<opset_import: ["" : 17], domain: "loc">
        two (x, w) => (t, y) { t = MatMul(x, w) y = Relu(t) }""",
        "where no bias can be added",
    ),
    "a weight in a branch": (
        choice(
            TRUE,
            "i = Constant<value = float[3,4] {1,2,3,4,5,6,7,8,9,1,2,3}>() p = MatMul(x, i)",
            "q = MatMul(x, W)",
        ),
        "",
        "its weight is inside then_branch of If 'y'",
    ),
    "a condition that depends on values": (
        choice(
            "i = ReduceSum<keepdims = 0>(x) c = Cast<to = 9>(i)", "p = Gemm(x, W)", "q = Gemm(x, Q)"
        ),
        "",
        "inside then_branch of If 'y'",
    ),
    "a condition that depends on the batch": (
        choice(
            "s = Shape<end = 1>(x) k = Constant<value_ints = [2]>() c = Equal(s, k)",
            "p = Gemm(x, W)",
            "q = Gemm(x, Q)",
        ),
        "",
        "inside then_branch of If 'y'",
    ),
    "a function of another opset": (
        "y = loc.plain(x, W)",
        PLAIN.replace("17", "16"),
        "inside the local function 'plain'; inline functions first",
    ),
}


@pytest.mark.parametrize(("body", "functions", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stored_says_why(body, functions, words, rng):
    found = find_layers(parse(body, functions, rng))
    assert not found.layers
    assert words in found.skips[0].reason


def test_functions_that_would_become_too_many_nodes_stay(rng):
    """Each calls the next one ten times: 10^12 nodes."""
    calls = " ".join(f"t{k + 1} = loc.fNEXT(t{k}, w)" for k in range(10))
    functions = "".join(
        f'<opset_import: ["" : 17, "loc" : 1], domain: "loc"> f{k} (t0, w) => (t10) {{ '
        + (calls.replace("NEXT", str(k + 1)) if k < 12 else "t10 = MatMul(t0, w)")
        + " }"
        for k in range(13)
    )
    model = parse("t = loc.f0(x, U) y = Gemm(t, W)", functions, rng)
    assert inline(copy_of(model)) == {}
    assert [layer.name for layer in find_layers(model).layers] == ["y"]


@pytest.mark.parametrize("options", [{}, {"granularity": "unit", "sparsity": 0.25}])
def test_a_network_of_functions_and_ifs_is_pruned(options, rng):
    """What is not in the main graph keeps its units; everything else stays byte for byte."""
    body = (
        "h = loc.linear(x, W, b) r = Relu(h) k = MatMul(r, V) l = Relu(k) t = MatMul(l, P) "
        + choice(TRUE, "u = MatMul(t, O) p = Add(u, d)", "q = Relu(t)")
    )  # fmt: skip
    model = parse(body, LINEAR, rng)
    x = rng.standard_normal((80, 3)).astype(np.float32)
    result = onnx_ecp.optimize(model, {"x": x}, **{"sparsity": 0.5, "cleanup": False, **options})
    names = [layer.name for layer in result.report.layers]
    assert names == (["h/t", "k", "t", "y/then_branch/u"] if not options else names)
    assert result.model.functions == model.functions
    assert [n.op_type for n in result.model.graph.node if n.op_type != "Add"] == [
        n.op_type for n in model.graph.node
    ]
    assert result.report.gap.relative_error < 1


LAST = """<domain: "loc", opset_import: ["" : 17]>
    last (x, w) => (o) {{ {body} }}"""


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("r = Relu(x) o = MatMul(r, w)", 12 + 16),
        ("z = MatMul(x, w) o = Relu(z)", 12),  # no layer: a shift of z has no place
    ],
)
def test_layers_inside_functions_count_and_are_cleaned_up_after(body, weights, rng):
    """Wherever in the function the layer is, at its end or before."""
    model = parse("h = MatMul(x, W) y = loc.last(h, V)", LAST.format(body=body), rng)
    x = rng.standard_normal((80, 3)).astype(np.float32)
    taken = work(load(model), {"x": x[:2]}, {})
    assert (taken.weights, taken.flops) == (weights, weights)
    result = onnx_ecp.optimize(model, {"x": x}, sparsity=0.5)
    assert np.isfinite(run(result.model, {"x": x})).all()
    assert result.report.sparsity == pytest.approx(0.5, abs=0.05)
