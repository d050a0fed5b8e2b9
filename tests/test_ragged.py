"""Samples that differ in shape: every source, every command, and what all samples share."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import onnx_ecp
from onnx_ecp.cli.commands import main
from onnx_ecp.data.calibration import load
from onnx_ecp.data.ragged import Ragged
from onnx_ecp.errors import CalibrationError, UsageError
from onnx_ecp.evaluation import bounds
from onnx_ecp.evaluation.compare import compare, measure_gap
from onnx_ecp.evaluation.facts import model_of
from onnx_ecp.graph import InputSpec, signature
from onnx_ecp.layers import find_layers
from onnx_ecp.runtime.session import Session
from onnx_ecp.statistics.collection import measure
from onnx_ecp.statistics.observer import Observer, original_state

HEAD = '<ir_version: 8, opset_import: ["": 17]> g '
TEXT = (
    """(int64[n, l] ids, int64[n, l] mask) => (float[n, 3] y) {
      e = Gather(E, ids)  f = Cast<to = 1>(mask)  m = Unsqueeze(f, two)
      q = MatMul(e, Q)  k = MatMul(e, K)  v = MatMul(e, V)  kt = Transpose<perm = [0, 2, 1]>(k)
      s = MatMul(q, kt)  p = Softmax(s)  c = MatMul(p, v)  r = Add(e, c)
      h = MatMul(r, A)  g1 = Relu(h)  o = MatMul(g1, B)  z = Add(o, r)  zm = Mul(z, m)
      sum = ReduceSum<keepdims = 0>(zm, one)  len = ReduceSum<keepdims = 0>(m, one)
      pooled = Div(sum, len)  y = Gemm(pooled, C, c0) }""",
    {"E": (50, 12), "Q": (12, 12), "K": (12, 12), "V": (12, 12), "A": (12, 24), "B": (24, 12),
     "C": (12, 3), "c0": (3,), "two": np.int64([2]), "one": np.int64([1])},
)  # fmt: skip
TOKENS = (
    """(int64[n, l] ids) => (float[n, l, 5] y) {
      e = Gather(E, ids)  h = MatMul(e, A)  g1 = Relu(h)  o = MatMul(g1, B)  y = Add(o, b0) }""",
    {"E": (50, 12), "A": (12, 24), "B": (24, 5), "b0": (5,)},
)
IMAGE = (
    """(float[n, 3, h, w] x) => (float[n, 4] y) {
      a = Conv<pads = [1, 1, 1, 1]>(x, A, a0)  r = Relu(a)
      b = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r, B, b0)  s = Relu(b)
      p = GlobalAveragePool(s)  f = Flatten(p)  y = Gemm(f, C, c0) }""",
    {"A": (8, 3, 3, 3), "a0": (8,), "B": (12, 8, 3, 3), "b0": (12,), "C": (12, 4), "c0": (4,)},
)
SEGMENTS = (
    """(float[1, 3, h, w] x) => (float[1, 2, h, w] y) {
      a = Conv<pads = [1, 1, 1, 1]>(x, A, a0)  r = Relu(a)
      y = Conv<pads = [1, 1, 1, 1]>(r, B, b0) }""",
    {"A": (8, 3, 3, 3), "a0": (8,), "B": (2, 8, 3, 3), "b0": (2,)},
)
SPEECH = (
    """(float[n, t] x, float[2, n, 8] state, int64 sr) => (float[n, 1] y, float[2, n, 8] next) {
      f = Cast<to = 1>(sr)  k = Div(f, big)  xs = Mul(x, k)
      m = ReduceMean<axes = [1], keepdims = 1>(xs)  d = Sub(xs, m)  q = Mul(d, d)
      e = ReduceMean<axes = [1], keepdims = 1>(q)  u = Concat<axis = 1>(m, e)
      h0 = Gather(state, zero)  c0 = Gather(state, first)  a = Gemm(u, A, a0)  b = MatMul(h0, B)
      s = Add(a, b)  h1 = Tanh(s)  g1 = MatMul(h1, G)  c1 = Add(c0, g1)  y1 = MatMul(h1, C)
      y = Sigmoid(y1)  hu = Unsqueeze(h1, ax)  cu = Unsqueeze(c1, ax)
      next = Concat<axis = 0>(hu, cu) }""",
    {"A": (2, 8), "a0": (8,), "B": (8, 8), "G": (8, 8), "C": (8, 1), "big": np.float32(16000),
     "zero": np.int64(0), "first": np.int64(1), "ax": np.int64([0])},
)  # fmt: skip
KINDS = {"text": TEXT, "tokens": TOKENS, "image": IMAGE, "segments": SEGMENTS, "speech": SPEECH}


def model(kind, rng):
    body, stored = KINDS[kind]
    proto = onnx.parser.parse_model(HEAD + body)
    for name, value in stored.items():
        drawn = rng.normal(0, 0.4, value).astype(np.float32) if isinstance(value, tuple) else value
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(drawn), name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def inputs(kind, rng, n=40):
    sizes = rng.integers(3, 7, (n, 2))
    if kind in ("text", "tokens"):
        ids = [rng.integers(0, 50, size) for size, _ in sizes]
        return (
            {"ids": ids, "mask": [np.ones_like(x) for x in ids]} if kind == "text" else {"ids": ids}
        )
    if kind == "speech":
        x = [rng.standard_normal(16 * size).astype(np.float32) for size, _ in sizes]
        state = np.full((2, 1, 8), 0.1, np.float32)
        return {"x": x, "state": state, "sr": np.int64(16000)}
    return {"x": [rng.standard_normal((3, 4 + h, 4 + w)).astype(np.float32) for h, w in sizes]}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def feeds_of(kind, data):
    """What the model takes for every sample, one at a time."""
    listed = next(iter(data.values()))
    for i in range(len(listed)):
        one = {n: x[i] if isinstance(x, list) else x for n, x in data.items()}
        yield {n: np.asarray(x) if n in ("state", "sr") else x[None] for n, x in one.items()}


def run_all(proto, kind, data):
    session = Session(proto)
    return [session.run(feed)["y"] for feed in feeds_of(kind, data)]


CHOICES = {
    "default": {},
    "ecp, numeric": {"method": "ecp", "gradients": "numeric"},
    "obd": {"method": "obd"},
    "gradient-magnitude": {"method": "gradient-magnitude"},
    "sparsegpt": {"method": "sparsegpt"},
    "woodfisher": {"method": "woodfisher"},
    "fine-tuned": {"method": "ecp", "finetune_steps": 3},
    "positions reduced": {"method": "ecp", "positions": "reduce"},
}


@pytest.mark.slow
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_the_stated_error_is_that_of_samples_run_one_by_one(kind, choices, rng):
    proto, data = model(kind, rng), inputs(kind, rng)
    made = onnx_ecp.optimize(proto, data, sparsity=0.5, **choices)
    assert made.report.calibration.samples + made.report.calibration.held_out == 40
    a, b = (run_all(m, kind, data) for m in (proto, made.model))
    axis = 1 if kind == "segments" else -1
    x, y = (
        np.concatenate([np.moveaxis(z, axis, -1).reshape(-1, z.shape[axis]) for z in side])
        for side in (a, b)
    )
    found = compare(proto, made.model, data).gap
    (deviation,) = [d for d in found.outputs if d.output == "y"]
    errors = np.square(y - x).mean(axis=0) / x.var(axis=0)
    assert deviation.relative_error == pytest.approx(np.sqrt(errors.mean()), rel=1e-3)
    assert deviation.columns == x.shape[1]
    assert np.isfinite(made.report.gap.relative_error)
    # The held-out samples tell about the same as all of them; below, all is rounding.
    (stated,) = [d.relative_error for d in made.report.gap.outputs if d.output == "y"]
    assert 0.5 < stated / deviation.relative_error < 2 or stated < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image", "segments"])
def test_units_targets_and_bounds_take_them_too(kind, rng):
    proto, data = model(kind, rng), inputs(kind, rng)
    units = onnx_ecp.optimize(proto, data, sparsity=0.3, granularity="unit").report
    assert any(row.after < row.before for row in units.units)
    searched = onnx_ecp.optimize(proto, data, method="magnitude", max_error=0.5).report
    assert searched.gap.relative_error <= 0.5
    pruned = onnx_ecp.optimize(proto, data, sparsity=0.3, method="magnitude", cleanup=False).model
    found = bounds.bound(proto, pruned, data)
    assert 0 < found.conformal.gap <= found.measured
    gap = compare(proto, pruned, data).gap.relative_error
    assert gap < found.measured
    with pytest.raises(UsageError, match="differ in shape"):
        bounds.bound(proto, pruned, data, input_range={"": (0, 1)})


def test_sums_over_samples_of_several_shapes_are_the_sums_of_each_shape(rng):
    proto, data = model("image", rng), inputs("image", rng)
    loaded = model_of(proto)
    whole = load(data, signature(proto)).grouped()
    layers = find_layers(proto).layers
    observer = Observer(
        loaded, layers, next(whole.batches(2)), metric="l2-raw", other=whole.another()
    )
    state = original_state(loaded, observer.layers)
    found = measure(observer, state, whole, size=4).moments
    groups = {whole.shapes(i) for i in range(len(whole))}
    assert len(groups) > 3
    sums = {}
    for shapes in groups:
        part = whole.take([i for i in range(len(whole)) if whole.shapes(i) == shapes])
        alone = Observer(loaded, layers, next(part.batches(2)), metric="l2-raw")
        for name, moments in measure(alone, state, part, size=4).moments.items():
            sums[name] = sums[name] + moments if name in sums else moments
    for name, moments in found.items():
        assert moments.count == sums[name].count
        moments = moments.recentred(sums[name].centre)
        np.testing.assert_allclose(moments.ww, sums[name].ww, rtol=1e-4)
        np.testing.assert_allclose(moments.bb, sums[name].bb, rtol=1e-4)


def test_samples_of_one_shape_in_a_list_are_an_array(rng):
    """Byte for byte the same result."""
    proto = model("image", rng)
    x = rng.standard_normal((30, 3, 6, 6)).astype(np.float32)
    results = [
        onnx_ecp.optimize(proto, d, sparsity=0.5).model for d in ({"x": x}, {"x": list(x)}, list(x))
    ]
    assert len({m.SerializeToString() for m in results}) == 1


# Every source.

SOURCES = {
    "dict of lists": lambda data, folder: data,
    "feeds": lambda data, folder: [{n: x[i] for n, x in data.items()} for i in range(40)],
    "feeds with a batch axis": lambda data, folder: [
        {n: x[i][None] for n, x in data.items()} for i in range(40)
    ],
    ".npz": lambda data, folder: saved(
        folder / "d.npz", {f"{n}/{i}": x for n, xs in data.items() for i, x in enumerate(xs)}
    ),
    "a file per sample": lambda data, folder: files(data, folder),
    "a script": lambda data, folder: script(data, folder),
}


def saved(path, arrays):
    np.savez(path, **arrays)
    return path


def files(data, folder):
    for i in range(40):
        saved(folder / f"{i:03}.npz", {n: x[i] for n, x in data.items()})
    return folder


def script(data, folder):
    saved(folder / "all.npz", {f"{n}_{i}": x for n, xs in data.items() for i, x in enumerate(xs)})
    text = (
        "import numpy as np\n"
        "def load_data():\n"
        f"    found = np.load({str(folder / 'all.npz')!r})\n"
        "    for i in range(40):\n"
        f"        yield {{n: found[f'{{n}}_{{i}}'] for n in {list(data)!r}}}\n"
    )
    (folder / "feeds.py").write_text(text)
    return folder / "feeds.py"


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_samples(make, rng, tmp_path):
    data = inputs("text", rng)
    found = load(make(data, tmp_path), signature(model("text", rng)))
    assert (len(found), found.stacked, found.uneven) == (40, True, True)
    for name, wanted in data.items():
        array = found.arrays[name]
        assert isinstance(array, Ragged)
        for mine, theirs in zip(array, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_folder_of_arrays_of_one_input(rng, tmp_path):
    data = inputs("image", rng)
    for i, x in enumerate(data["x"]):
        np.save(tmp_path / f"{i:03}.npy", x)
    found = load(tmp_path, signature(model("image", rng)))
    assert len(found) == 40
    np.testing.assert_array_equal(found.arrays["x"].parts[3], data["x"][3])


@pytest.mark.slow
def test_the_command_line_takes_them(rng, tmp_path):
    onnx.save(model("image", rng), tmp_path / "in.onnx")
    data = inputs("image", rng)
    saved(tmp_path / "in.npz", {f"x/{i}": x for i, x in enumerate(data["x"])})
    a, b, c = (str(tmp_path / name) for name in ("in.onnx", "out.onnx", "in.npz"))
    done = CliRunner().invoke(main, ["optimize", a, b, "--report", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "r.json").read_text())["calibration"]
    assert (facts["samples"], facts["held_out"]) == (32, 8)
    for words in (["compare", a, b, "-d", c], ["bound", a, b, "-d", c]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output


# Batches.


def test_batches_hold_samples_of_one_shape_and_leave_out_none(kind, rng):
    data = load(inputs(kind, rng), signature(model(kind, rng)))
    for samples in (data, data.grouped(), data.split(0.3, 0)[0]):
        batches = list(samples.batches(8))
        assert sum(batch.samples for batch in batches) == len(samples)
        assert [batch.start for batch in batches] == list(
            np.cumsum([0, *(batch.samples for batch in batches[:-1])])
        )
    first, grouped = data.grouped().shapes(0), data.grouped()
    assert sum(grouped.shapes(i) == first for i in range(40)) > 1
    assert grouped.another().feeds.keys() == data.arrays.keys()
    assert len(list(grouped.batches(8))) <= len(list(data.batches(8)))


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_batch_size_changes_no_error(size, rng):
    proto = model("tokens", rng)
    data = load(inputs("tokens", rng), signature(proto)).grouped()
    other = model_of(model("tokens", np.random.default_rng(5)))
    one = measure_gap(model_of(proto), other, data, batch_size=7)
    found = measure_gap(model_of(proto), other, data, batch_size=size)
    assert found.relative_error == pytest.approx(one.relative_error, rel=1e-5)
    assert found.certainty.high == pytest.approx(one.certainty.high, rel=1e-3)


# Graphs: what their first axes count are nodes and edges, no samples.

EDGES = {
    "of one input": (
        "int64[2, edges] edge",
        "src = Gather<axis = 0>(edge, zero)  dst = Gather<axis = 0>(edge, first)",
        {"zero": np.int64(0), "first": np.int64(1)},
    ),
    "of two inputs": ("int64[edges] src, int64[edges] dst", "", {}),
}


def graphs(rng, form, n=40):
    """A layer of messages along edges; and nodes and edges of some graphs, as lists."""
    declared, before, stored = EDGES[form]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 18]> g (float[nodes, 8] x, {declared})
        => (float[nodes, 3] y) {{ {before} h = MatMul(x, A)  r = Relu(h)
        m = Gather<axis = 0>(r, src)  at = Unsqueeze(dst, ax)
        sum = ScatterND<reduction = "add">(r, at, m)  y = Gemm(sum, C, c0) }}"""
    )
    weights = {"A": (8, 16), "C": (16, 3), "c0": (3,)}
    stored = stored | {k: rng.normal(0, 0.4, s).astype(np.float32) for k, s in weights.items()}
    for name, value in (stored | {"ax": np.int64([1])}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    sizes = rng.integers(4, 8, (n, 2))  # in some as many edges as nodes
    x = [rng.standard_normal((nodes, 8)).astype(np.float32) for nodes, _ in sizes]
    ends = [rng.integers(0, nodes, (2, edges)) for nodes, edges in sizes]
    if form == "of one input":
        return proto, {"x": x, "edge": ends}
    return proto, {"x": x, "src": [e[0] for e in ends], "dst": [e[1] for e in ends]}


@pytest.mark.parametrize("form", EDGES)
@pytest.mark.parametrize("choices", [{}, {"method": "ecp"}, {"method": "wanda"}], ids=str)
def test_graphs_are_samples(form, choices, rng):
    proto, data = graphs(rng, form)
    feeds = [{name: x[i] for name, x in data.items()} for i in range(40)]
    assert any(len({len(x) for x in feed.values()}) == 1 for feed in feeds) or "edge" in data
    made = [onnx_ecp.optimize(proto, d, sparsity=0.5, **choices) for d in (data, feeds)]
    assert made[0].model.SerializeToString() == made[1].model.SerializeToString()
    facts = made[0].report.calibration
    assert str(facts) == "32 samples, 8 held out"
    sessions = [Session(m) for m in (proto, made[0].model)]
    y, z = (np.concatenate([s.run(f)["y"] for f in feeds]) for s in sessions)
    error = np.sqrt((np.square(z - y).mean(axis=0) / y.var(axis=0)).mean())
    assert compare(proto, made[0].model, data).gap.relative_error == pytest.approx(error, rel=1e-4)


# What all samples share, and what does not fit.


def test_what_all_samples_share_is_given_once(rng):
    proto = model("speech", rng)
    x = rng.standard_normal((20, 64)).astype(np.float32)
    state = rng.standard_normal((2, 1, 8)).astype(np.float32)
    once = load({"x": x, "state": state, "sr": np.int64(16000)}, signature(proto))
    repeated = {"x": x, "state": np.repeat(state[None], 20, axis=0), "sr": np.full(20, 16000)}
    each = load(repeated, signature(proto))
    for a, b in zip(once.batches(1), each.batches(1), strict=True):
        for name in ("x", "state", "sr"):
            np.testing.assert_array_equal(a.feeds[name], b.feeds[name])
    pruned = [onnx_ecp.optimize(proto, d, sparsity=0.5).model for d in (once, each)]
    assert pruned[0].SerializeToString() == pruned[1].SerializeToString()


IDS = InputSpec("ids", np.dtype(np.int64), ("n", "l"))
MASK = InputSpec("mask", np.dtype(np.int64), ("n", "l"))
REFUSED = {
    "other numbers of samples": (
        {"ids": [np.ones(3, int), np.ones(4, int)], "mask": [np.ones(k, int) for k in (3, 4, 5)]},
        "'ids' has 2, 'mask' has 3",
    ),
    "a fixed axis": ({"ids": [np.ones((3, 2), int), np.ones((4, 2, 1), int)]}, "shape"),
    "another type": ({"ids": [np.ones(3), np.ones(4)]}, "float64"),
    "lists of numbers beside": (
        {"ids": [np.ones(3, int), np.ones(4, int)], "mask": [[1], [1, 2]]},
        "'mask' is no array",
    ),
    "a scalar": ([{"ids": np.int64(1), "mask": np.ones((1, 3), int)}], r"shape \(\)"),
    "an empty one": ({"ids": [np.ones(3, int), np.ones(0, int)]}, "empty"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_the_sample(source, message):
    specs = [IDS, MASK] if "mask" in str(source) else [IDS]
    with pytest.raises(CalibrationError, match=message):
        load(source, specs)


def test_an_input_that_is_neither_shared_nor_per_sample_is_told_the_form(rng):
    proto = model("speech", rng)
    data = {"x": np.zeros((5, 64), np.float32), "state": np.zeros((3, 2, 1, 8), np.float32)}
    with pytest.raises(CalibrationError, match="different numbers of samples") as caught:
        load(data | {"sr": np.int64(1)}, signature(proto))
    assert "state float32 (2, n, 8)" in caught.value.hint
    assert "once" in caught.value.hint


def test_pickled_lists_are_refused_with_the_form_to_use(tmp_path):
    ragged = np.empty(2, object)
    ragged[:] = [np.ones(3, int), np.ones(4, int)]
    np.savez(tmp_path / "d.npz", ids=ragged)
    with pytest.raises(CalibrationError, match="pickled") as caught:
        load(tmp_path / "d.npz", [IDS])
    assert "NAME/" in caught.value.hint


def test_a_nan_is_found_in_its_sample(rng):
    x = [rng.standard_normal((3, 5, 5 + k)).astype(np.float32) for k in range(3)]
    x[2][0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match="sample 2"):
        load({"x": x}, signature(model("image", rng)))
