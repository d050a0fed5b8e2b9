"""The observation graph: what it bears, and what it refuses."""

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_ecp.api.inspect import inspect
from onnx_ecp.data.calibration import Batch
from onnx_ecp.errors import ModelError, ProviderError
from onnx_ecp.gradients.reverse import NO_OUTPUT
from onnx_ecp.gradients.rules import RULES
from onnx_ecp.graph import Model
from onnx_ecp.layers import find_layers
from onnx_ecp.statistics.observer import Observer, original_state


def network(text, rng, *, opset=17, dtype=np.float32, **shapes):
    """A model with drawn weights."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> g {text}"""
    )
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(dtype)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for y in proto.graph.output:
        y.type.tensor_type.ClearField("shape")
    return Model(proto, None, None)


def batch_of(**feeds):
    return Batch(feeds=feeds, start=0, samples=len(next(iter(feeds.values()))))


def observed(model, batch, **options):
    """The observer and what it sees of a batch."""
    layers = find_layers(model.proto).layers
    observer = Observer(model, layers, batch, **options)
    return observer, observer.observe(original_state(model, layers), batch)


# Networks that were refused, misunderstood, or did not run: both engines agree on them.
BORNE = {
    "names that look like ours": """(float[n,4] x) => (float[n,3] y) {
        z = MatMul(x, W)  t = Tanh(z)
        <P> = Identity(t)  <Q> = Sin(<P>)  y = MatMul(<Q>, V) }""",
    "the power zero": """(float[n,4] x) => (float[n,3] y) {
        z = MatMul(x, W)  r = Relu(z)  k = Constant<value = float[6] {0, 1, 2, 0, 1, 2}>()
        p = Pow(r, k)  y = MatMul(p, V) }""",
}


@pytest.mark.parametrize("text", BORNE.values(), ids=BORNE)
def test_both_engines_agree(text, rng):
    text = text.replace("<P>", "P").replace("<Q>", "Q")
    model = network(text, rng, W=(4, 6), V=(6, 3))
    for node in model.proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"P": "z/ecp/raw", "Q": "ecp/shift/z"}.get(x, x) for x in names]
    batch = batch_of(x=rng.standard_normal((5, 4)).astype(np.float32))
    (_, exact), (_, differences) = (
        observed(model, batch, engine=engine) for engine in ("vjp", "numeric")
    )
    for name, adjoint in exact.adjoints.items():
        np.testing.assert_allclose(adjoint, differences.adjoints[name], rtol=5e-2, atol=5e-3)


WIDE = "(float[n,4] x) => (float[n,9] y) { z = MatMul(x, W)  r = Tanh(z)  y = MatMul(r, V) }"


@pytest.mark.parametrize("engine", ["vjp", "numeric"])
def test_a_rough_look_expects_what_an_exact_one_sees(engine, rng):
    model = network(WIDE, rng, W=(4, 3), V=(3, 9))
    batch = batch_of(x=rng.standard_normal((400, 4)).astype(np.float32))
    exact, seen = observed(model, batch, engine=engine)
    roughly = exact.rough.observe(original_state(model, exact.layers), batch)
    for name, adjoint in seen.adjoints.items():
        assert len(adjoint) == 9
        assert len(roughly.adjoints[name]) == 2
        both = (adjoint, roughly.adjoints[name])
        wanted, found = (np.square(x).sum(axis=(0, 1, 2)) for x in both)
        np.testing.assert_allclose(found, wanted, rtol=0.2)


@pytest.mark.parametrize(("outputs", "probes"), [(9, 9), (9, 1), (2, None)])
def test_probes_that_were_asked_for_and_few_outputs_stay(outputs, probes, rng):
    model = network(WIDE.replace("9", str(outputs)), rng, W=(4, 3), V=(3, outputs))
    batch = batch_of(x=rng.standard_normal((5, 4)).astype(np.float32))
    observer, _ = observed(model, batch, probes=probes)
    assert observer.rough is observer


def test_differences_of_an_output_without_axes(rng):
    text = """(float[1,4] x) => (float y) {
        z = MatMul(x, W)  t = Tanh(z)  y = ReduceSum<keepdims = 0>(t) }"""
    batch = batch_of(x=rng.standard_normal((1, 4)).astype(np.float32))
    model = network(text, rng, W=(4, 6))
    _, seen = observed(model, batch, engine="numeric")
    (slope,) = np.abs(seen.adjoints["z"]).reshape(1, -1)
    w = onnx.numpy_helper.to_array(model.proto.graph.initializer[0])
    expected = 1 - np.tanh(batch.feeds["x"] @ w) ** 2
    np.testing.assert_allclose(slope, expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("engine", ["vjp", "numeric"])
def test_without_a_float_output_every_layer_is_blocked(engine, rng):
    text = "(float[n,4] x) => (int64[2] y) { z = MatMul(x, W)  y = Shape(z) }"
    batch = batch_of(x=rng.standard_normal((5, 4)).astype(np.float32))
    observer, seen = observed(network(text, rng, W=(4, 6)), batch, engine=engine)
    assert observer.blocked == {"z": NO_OUTPUT}
    assert not seen.adjoints


DECIDES = {
    "ArgMax": "(int64[n] y) { z = MatMul(x, W)  y = ArgMax<keepdims = 0>(z) }",
    "TopK": "(int64[n, 2] y) { z = MatMul(x, W)  k = Constant<value_ints = [2]>()  "
    "v, y = TopK(z, k) }",
    "NonZero": "(int64[2, m] y) { z = MatMul(x, W)  r = Relu(z)  y = NonZero(r) }",
    "Greater": "(bool[n, 6] y) { z = MatMul(x, W)  c = Constant<value_floats = [0.5]>()  "
    "y = Greater(z, c) }",
    "Cast": "(int64[n, 6] y) { z = MatMul(x, W)  y = Cast<to = 7>(z) }",
}


@pytest.mark.parametrize("engine", ["vjp", "numeric"])
@pytest.mark.parametrize("op", DECIDES)
def test_what_a_selection_reads_is_observed_where_nothing_else_tells(op, engine, rng):
    batch = batch_of(x=rng.standard_normal((5, 4)).astype(np.float32))
    model = network(f"(float[n,4] x) => {DECIDES[op]}", rng, W=(4, 6))
    observer, seen = observed(model, batch, engine=engine)
    assert not observer.blocked
    assert [(s.op, set(s.layers)) for s in observer.selections] == [(op, {"z"})]
    assert np.abs(seen.adjoints["z"]).max() > 0


def test_half_precision_is_widened_inside_bodies(rng):
    """The condition depends on the batch, so the If stays."""
    text = """(float16[n,4] x) => (float16[n,6] y) {
        z = MatMul(x, W)  h = Tanh(z)  s = Shape<end = 1>(x)
        m = Constant<value_ints = [3]>()  c = Less(s, m)
        k = If (c) <
            then_branch = g1 () => (float16[1] p) {
                u = Constant<value_floats = [2.0]>()  p = Cast<to = 10>(u) },
            else_branch = g2 () => (float16[1] q) { q = Identity(B) }>
        y = Mul(h, k) }"""
    model = network(text, rng, dtype=np.float16, W=(4, 6), B=(1,))
    batch = batch_of(x=rng.standard_normal((5, 4)).astype(np.float16))
    _, seen = observed(model, batch)
    assert seen.adjoints["z"].dtype == np.float32


# Networks that did not run, or whose opset could not be lifted.
RUNNING = {
    "a standard domain spelt out": (
        """(float[n,4] x) => (float[n,3] y) {
        z = MatMul(x, W)  r, m = Dropout(z)  t = Tanh(r)  y = MatMul(t, V) }""",
        17,
        "ai.onnx",
    ),
    "an operator that only ONNX Runtime has": (
        """(float[n,4] x) => (float[n,3] y) {
        z = MatMul(x, W)  S = Constant<value = float[6] {1, 2, 3, 4, 5, 6}>()
        t = SimplifiedLayerNormalization(z, S)  y = MatMul(t, V) }""",
        14,
        "",
    ),
}


@pytest.mark.parametrize(("text", "opset", "domain"), RUNNING.values(), ids=RUNNING)
def test_what_onnx_runtime_runs_is_observed(text, opset, domain, rng):
    model = network(text, rng, opset=opset, W=(4, 6), V=(6, 3))
    model.proto.opset_import[0].domain = domain
    batch = batch_of(x=rng.standard_normal((5, 4)).astype(np.float32))
    observer, seen = observed(model, batch)
    assert not observer.blocked
    assert set(seen.adjoints) == {"z", "y"}


def test_an_operator_that_is_gone_is_named(rng):
    text = "(float[n,4] x) => (float[n,6] y) { z = MatMul(x, W)  y = ScaledTanh(z) }"
    batch = batch_of(x=rng.standard_normal((5, 4)).astype(np.float32))
    with pytest.raises(ModelError, match="operator ScaledTanh is gone from newer opsets"):
        observed(network(text, rng, opset=7, W=(4, 6)), batch)


def test_layers_behind_differences_are_named(rng, monkeypatch):
    """An operator on the way that has no rule but works element by element."""
    monkeypatch.delitem(RULES, "Sin")
    text = """(float[n,4] x) => (float[n,3] y) {
        z = MatMul(x, W)  t = Tanh(z)  s = Sin(t)  y = MatMul(s, V) }"""
    model = network(text, rng, W=(4, 6), V=(6, 3))
    batch = batch_of(x=rng.standard_normal((5, 4)).astype(np.float32))
    observer, seen = observed(model, batch)
    assert observer.numeric == {"z": "Sin"}
    _, differences = observed(model, batch, engine="numeric")
    np.testing.assert_allclose(seen.adjoints["z"], differences.adjoints["z"], rtol=5e-2, atol=5e-3)
    found = {row.name: (row.sensitivity, row.blocked) for row in inspect(model.proto).layers}
    assert found == {"z": ("numeric", "no gradient rule for Sin"), "y": ("reverse graph", "")}


def test_broadcasting_that_differs_from_the_first_batch_is_noticed(rng):
    """How often h is repeated depends on its values: once in the first batch, then thrice."""
    text = """(float[1,4] x) => (float y) {
        z = MatMul(x, W)  h = Relu(z)  i = Constant<value_float = 0.0>()  b = Greater(x, i)
        c = Cast<to = 7>(b)  k = ReduceSum<keepdims = 0>(c)  one = Constant<value_ints = [1]>()
        kk = Reshape(k, one)  six = Constant<value_ints = [6]>()  s = Concat<axis = 0>(kk, six)
        e = Expand(h, s)  y = ReduceSum<keepdims = 0>(e) }"""
    model = network(text, rng, W=(4, 6))
    layers = find_layers(model.proto).layers
    once, thrice = (
        batch_of(x=np.array([[1.0, *values]], np.float32)) for values in ([-1] * 3, [1, 1, -1])
    )
    observer, state = Observer(model, layers, once), original_state(model, layers)
    observer.observe(state, once)
    with pytest.raises(ModelError, match="broadcast that were not in the first"):
        observer.observe(state, thrice)


def test_what_onnx_runtime_has_no_kernel_for_says_what_to_do(rng):
    text = "(double[n,3,6,6] x) => (double[n,4,4,4] y) { y = Conv(x, W) }"
    model = network(text, rng, dtype=np.float64, W=(4, 3, 3, 3))
    with pytest.raises(ProviderError, match="Conv") as error:
        observed(model, batch_of(x=rng.standard_normal((5, 3, 6, 6))))
    assert "convert the model to float32" in error.value.hint
