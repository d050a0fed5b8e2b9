"""Reading and writing models: nothing but what was asked for changes, and files stay whole."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from onnx_ecp.errors import ModelError, OutputError, UsageError
from onnx_ecp.graph import (
    ENCODINGS,
    Model,
    check_output,
    compressed_size,
    constants,
    decode_sparse,
    digest,
    load,
    output_names,
    printable,
    read_tensor,
    save,
    saving,
    signature,
    write_tensor,
)
from onnx_ecp.runtime.session import Session

ROOT = Path(__file__).parent.parent  # where the package is, when it is not installed

NETWORK = """<ir_version: 8, opset_import: ["" : 14]>
net (float[batch,32] x) => (float[batch,8] y)
<float[32,24] W, float[24] b>
{
    V = Constant <value = float[1] {0}> ()
    h = MatMul(x, W)
    s = Add(h, b)
    r = Relu(s)
    y = Gemm <transB = 1> (r, V)
}"""


def filled(name: str, array: np.ndarray) -> TensorProto:
    tensor = numpy_helper.from_array(array, name)
    tensor.doc_string = f"the values of {name}"
    tensor.metadata_props.add(key="origin", value="test")
    return tensor


def pruned(rng: np.random.Generator, *shape: int, density: float = 0.1) -> np.ndarray:
    """Mostly zeros, as pruning leaves them."""
    return np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(np.float32)


@pytest.fixture
def network(rng) -> onnx.ModelProto:
    """Two pruned weights, one in an initializer and one in a Constant node."""
    model = parser.parse_model(NETWORK)
    graph = model.graph
    graph.initializer.append(filled("W", pruned(rng, 32, 24)))
    graph.initializer.append(filled("b", rng.normal(size=24).astype(np.float32)))
    graph.node[0].attribute[0].t.CopyFrom(filled("inner name", pruned(rng, 8, 24)))
    model.metadata_props.add(key="author", value="nobody")
    model.doc_string, model.producer_name, model.domain = "doc", "producer", "org.example"
    graph.doc_string = "graph doc"
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 24]))
    return model


def outputs(model: onnx.ModelProto | Path, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=(5, 32)).astype(np.float32)
    return Session(model, threads=1).run({"x": x})["y"]


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


# Dense: the identity.


def test_saving_what_was_loaded_gives_the_same_bytes(network, tmp_path):
    first = tmp_path / "first.onnx"
    first.write_bytes(network.SerializeToString(deterministic=True))
    written = save(load(first).proto, tmp_path / "second.onnx", base=tmp_path)
    assert written == [tmp_path / "second.onnx"]
    assert written[0].read_bytes() == first.read_bytes()
    assert digest(first) == digest(written[0]) == digest(network)


def test_a_saved_file_obeys_the_umask(network, tmp_path):
    [path] = save(network, tmp_path / "model.onnx", base=None)
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


# Encodings.


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_computes_the_same(network, encoding, tmp_path, rng):
    before = copied(network)
    [path] = save(network, tmp_path / "out.onnx", base=None, encoding=encoding, pruned=["W", "V"])
    assert network == before
    state = rng.bit_generator.state
    expected = outputs(network, rng)
    rng.bit_generator.state = state
    np.testing.assert_array_equal(outputs(load(path).path, rng), expected)
    dense = path.stat().st_size == len(network.SerializeToString())
    assert dense == (encoding == "dense")


def test_packed_models_pass_the_full_check_and_the_reference(network, tmp_path, rng):
    [path] = save(network, tmp_path / "out.onnx", base=None, encoding="packed", pruned=["W", "V"])
    packed = onnx.load(path)
    onnx.checker.check_model(packed, full_check=True)
    x = rng.normal(size=(5, 32)).astype(np.float32)
    np.testing.assert_array_equal(
        ReferenceEvaluator(packed).run(None, {"x": x})[0],
        ReferenceEvaluator(network).run(None, {"x": x})[0],
    )


def test_sparse_encoding_comes_back_as_it_was(network, tmp_path):
    [path] = save(network, tmp_path / "out.onnx", base=None, encoding="sparse", pruned=["W", "V"])
    proto = load(path).proto
    assert [s.values.name for s in proto.graph.sparse_initializer] == ["W"]
    assert proto.graph.node[0].attribute[0].name == "sparse_value"
    back = decode_sparse(proto)
    # Only the order of the initializers is lost.
    assert sorted(t.name for t in back.graph.initializer) == ["W", "b"]
    back.graph.initializer.sort(key=lambda tensor: tensor.name)
    assert back == network


def without(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The model less the named tensors and whatever makes them."""
    rest = copied(model)
    graph = rest.graph
    for field in ("initializer", "node", "sparse_initializer"):
        entries = list(getattr(graph, field))
        graph.ClearField(field)
        getattr(graph, field).extend(
            e for e in entries if not any(name in str(e) for name in names)
        )
    return rest


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_only_the_pruned_tensors_are_encoded(network, encoding, tmp_path):
    [path] = save(network, tmp_path / "out.onnx", base=None, encoding=encoding, pruned=["W"])
    # Pieces of W are called W/...; MatMul reads W, so it is left out of the comparison.
    assert without(onnx.load(path), "W") == without(network, "W")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_would_not_become_smaller_stays_dense(network, encoding, tmp_path, rng):
    full = rng.normal(size=(32, 24)).astype(np.float32)
    write_tensor(constants(network)["W"], full)
    [path] = save(network, tmp_path / "out.onnx", base=None, encoding=encoding, pruned=["W", "b"])
    assert onnx.load(path) == network


@pytest.mark.parametrize("encoding", ["sparse", "packed"])
@pytest.mark.parametrize("density", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(600,), (30, 20), (5, 4, 10, 3)], ids=str)
def test_encodings_keep_every_dtype_and_shape(encoding, density, dtype, shape, tmp_path, rng):
    values = pruned(rng, *shape, density=density).astype(dtype)
    tensor = numpy_helper.from_array(values, "W")
    value = helper.make_tensor_value_info("y", tensor.data_type, shape)
    node = helper.make_node("Identity", ["W"], ["y"])
    graph = helper.make_graph([node], "g", [], [value], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    [path] = save(model, tmp_path / "out.onnx", base=None, encoding=encoding, pruned=["W"])
    assert path.stat().st_size < len(model.SerializeToString())
    [found] = ReferenceEvaluator(decode_sparse(load(path).proto)).run(None, {})
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_packed_never_takes_a_name_that_exists(network, tmp_path, rng):
    for node in network.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"h": "W/values", "r": "W/flat"}.get(name, name) for name in names]
    [path] = save(network, tmp_path / "out.onnx", base=None, encoding="packed", pruned=["W"])
    outputs(load(path).path, rng)


def test_packed_leaves_overridable_initializers_dense(network, tmp_path):
    network.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [32, 24]))
    [path] = save(network, tmp_path / "out.onnx", base=None, encoding="packed", pruned=["W"])
    assert onnx.load(path) == network


def test_packed_refuses_old_opsets(network, tmp_path):
    network.opset_import[0].version = 10
    with pytest.raises(UsageError, match="opset 11"):
        save(network, tmp_path / "out.onnx", base=None, encoding="packed", pruned=["W"])
    assert not list(tmp_path.iterdir())


def test_an_unknown_encoding_is_named(network, tmp_path):
    with pytest.raises(UsageError, match="sprase") as caught:
        save(network, tmp_path / "out.onnx", base=None, encoding="sprase")
    assert "'sparse'" in caught.value.hint


# Tensors.

STORED = {
    "float_data": helper.make_tensor("t", TensorProto.FLOAT, [2], [1.5, -2]),
    "raw float": numpy_helper.from_array(np.array([1.5, -2], np.float32), "t"),
    "half in int32_data": helper.make_tensor("t", TensorProto.FLOAT16, [2], [1.5, -2]),
    "bfloat16": numpy_helper.from_array(np.array([1.5, -2], ml_dtypes.bfloat16), "t"),
    "double_data": helper.make_tensor("t", TensorProto.DOUBLE, [2], [1.5, -2]),
    "scalar": helper.make_tensor("t", TensorProto.FLOAT, [], [1.5]),
    "empty": helper.make_tensor("t", TensorProto.FLOAT, [0, 3], []),
    "int64_data": helper.make_tensor("t", TensorProto.INT64, [2], [1, -2]),
    "int8 in int32_data": helper.make_tensor("t", TensorProto.INT8, [2], [1, -2]),
    "int4": helper.make_tensor("t", TensorProto.INT4, [3], [1, -2, 7]),
    "bool": helper.make_tensor("t", TensorProto.BOOL, [2], [True, False]),
    "strings": helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"b"]),
}


def external(tensor: TensorProto, folder: Path) -> TensorProto:
    """The same tensor with its values in a file."""
    outside = TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=1
    )
    (folder / "t.bin").write_bytes(
        b"pad_" + numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
    )
    for key, value in (("location", "t.bin"), ("offset", "4")):
        outside.external_data.add(key=key, value=value)
    return outside


@pytest.mark.parametrize("tensor", STORED.values(), ids=STORED)
def test_a_tensor_reads_the_same_from_inside_and_outside(tensor, tmp_path):
    model = Model(onnx.ModelProto(), None, tmp_path)
    expected = numpy_helper.to_array(tensor)
    inside = read_tensor(model, tensor)
    assert inside.dtype == expected.dtype
    np.testing.assert_array_equal(inside, expected)
    if tensor.data_type != TensorProto.STRING:
        outside = read_tensor(model, external(tensor, tmp_path))
        assert outside.dtype == expected.dtype
        np.testing.assert_array_equal(outside, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=str)
def test_writing_back_what_was_read_changes_nothing(dtype, rng, tmp_path):
    tensor = filled("t", rng.normal(size=(3, 4)).astype(dtype))
    model = Model(onnx.ModelProto(), None, tmp_path)
    same = TensorProto()
    same.CopyFrom(tensor)
    write_tensor(same, read_tensor(model, tensor).astype(np.float64))
    assert same == tensor
    outside = external(tensor, tmp_path)
    write_tensor(outside, read_tensor(model, outside))
    assert outside.raw_data == tensor.raw_data
    assert not outside.HasField("data_location")


@pytest.mark.parametrize(
    ("dtype", "bits"), [(np.float16, 10), (ml_dtypes.bfloat16, 7), (np.float32, 23)], ids=str
)
def test_values_are_rounded_once(dtype, bits):
    """A hair above a tie: rounded on the way through float32 it would become the tie."""
    ulp, hair = 2.0**-bits, 2.0**-45
    cases = np.array([1 + ulp / 2 + hair, 1 + ulp / 2 - hair, 1 + ulp / 2, 1 + 3 * ulp / 2])
    wanted = np.array([1 + ulp, 1, 1, 1 + 2 * ulp])
    tensor = numpy_helper.from_array(np.zeros(1, dtype), "t")
    for sign in (1, -1):
        write_tensor(tensor, sign * cases)
        assert list(tensor.dims) == [4]
        np.testing.assert_array_equal(
            numpy_helper.to_array(tensor).astype(np.float64), sign * wanted
        )


def test_values_beyond_the_range_are_refused():
    tensor = numpy_helper.from_array(np.zeros(1, np.float16), "t")
    with pytest.raises(ModelError, match="beyond the range"):
        write_tensor(tensor, np.array([1e6]))
    assert tensor == numpy_helper.from_array(np.zeros(1, np.float16), "t")


def test_constants_are_live_and_named_as_the_graph_sees_them(network):
    found = constants(network)
    assert list(found) == ["W", "b", "V"]
    write_tensor(found["V"], np.zeros((8, 24)))
    assert not numpy_helper.to_array(network.graph.node[0].attribute[0].t).any()


SPARSE_INDICES = {
    "linear": lambda flat, shape: flat,
    "coordinates": lambda flat, shape: np.stack(np.unravel_index(flat, shape), axis=1),
}


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("indices", SPARSE_INDICES.values(), ids=SPARSE_INDICES)
@pytest.mark.parametrize("shape", [(12,), (4, 3), (2, 3, 2)], ids=str)
def test_every_sparse_spelling_is_decoded(raw, indices, shape, rng):
    array = pruned(rng, *shape, density=0.4)
    flat = np.flatnonzero(array)
    places = indices(flat, shape).astype(np.int64)
    model = onnx.ModelProto()
    sparse = model.graph.sparse_initializer.add(dims=shape)
    for target, name, values in (
        (sparse.values, "W", array.reshape(-1)[flat]),
        (sparse.indices, "", places),
    ):
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        data = values.tobytes() if raw else values.reshape(-1)
        target.CopyFrom(helper.make_tensor(name, kind, values.shape, data, raw=raw))
    dense = decode_sparse(model)
    assert not dense.graph.sparse_initializer
    np.testing.assert_array_equal(numpy_helper.to_array(constants(dense)["W"]), array)


# Inputs and names.


def test_the_signature_lists_real_inputs_only():
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 14]>
        net (float[batch,3,N] x, int64[2] ids, seq(float[1]) s, float w, string[1] t) => (float y)
        <float w = {1}> { y = Identity(w) }"""
    )
    model.graph.input[1].type.tensor_type.shape.dim[0].ClearField("dim_value")
    assert [(spec.name, spec.dtype, spec.shape) for spec in signature(model)] == [
        ("x", np.dtype(np.float32), ("batch", 3, "N")),
        ("ids", np.dtype(np.int64), (None,)),
        ("s", None, None),
        ("t", np.dtype(object), (1,)),
    ]
    assert output_names(model) == ("y",)


@pytest.mark.parametrize(
    "name", ["\x1b[31m", "a\nb", "\u202egnp.exe", "\x00", "x" * 2**20, b"\xff\x1b"], ids=ascii
)
def test_a_shown_name_is_one_short_printable_line(name):
    assert printable(name).isprintable()
    assert len(printable(name)) < 100


def test_letters_of_any_script_are_shown_as_they_are():
    assert printable("Gewicht_äöü/重み") == "Gewicht_äöü/重み"


# External data.


@pytest.fixture
def divided(network, tmp_path, monkeypatch) -> Path:
    """The network with its weights in a data file."""
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(saving, "LARGEST_FILE", 1000)
    model, data = save(network, tmp_path / "in" / "model.onnx", base=None)
    monkeypatch.undo()
    assert data == tmp_path / "in" / "model.onnx.data"
    return model


def values(model: Model) -> dict[str, bytes]:
    found = constants(model.proto)
    return {name: read_tensor(model, tensor).tobytes() for name, tensor in found.items()}


def test_large_models_are_divided_and_come_back(network, divided, tmp_path, rng):
    loaded = load(divided)
    assert values(loaded) == values(Model(network, None, None))
    weight, bias = loaded.proto.graph.initializer
    assert weight.data_location == TensorProto.EXTERNAL
    assert int({e.key: e.value for e in weight.external_data}["offset"]) % 4096 == 0
    assert bias == network.graph.initializer[1], "small tensors stay inside"
    assert weight.doc_string == network.graph.initializer[0].doc_string
    state = rng.bit_generator.state
    expected = outputs(network, rng)
    rng.bit_generator.state = state
    np.testing.assert_array_equal(outputs(divided, rng), expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_external_models_are_saved_elsewhere_whole(network, divided, encoding, tmp_path, rng):
    loaded = load(divided)
    before = copied(loaded.proto)
    (tmp_path / "out").mkdir()
    files = save(
        loaded.proto, tmp_path / "out" / "m.onnx", base=loaded.base, encoding=encoding,
        pruned=["W"], source=divided,
    )  # fmt: skip
    assert loaded.proto == before
    for file in divided.parent.iterdir():
        file.unlink()
    state = rng.bit_generator.state
    expected = outputs(network, rng)
    rng.bit_generator.state = state
    np.testing.assert_array_equal(outputs(load(files[0]).path, rng), expected)
    assert sorted(files) == sorted((tmp_path / "out").iterdir())


def test_tensors_that_share_bytes_go_on_sharing_them(divided, tmp_path):
    proto = copied(load(divided).proto)
    twin = proto.graph.initializer.add()
    twin.CopyFrom(proto.graph.initializer[0])
    twin.name = "twin"
    _, data = save(proto, tmp_path / "out.onnx", base=divided.parent)
    assert data.stat().st_size == 32 * 24 * 4
    assert values(load(tmp_path / "out.onnx"))["twin"] == values(load(divided))["W"]


def test_overwriting_the_source_leaves_its_data_alone(network, divided):
    loaded = load(divided)
    old = divided.with_name("model.onnx.data")
    content = old.read_bytes()
    with pytest.raises(OutputError, match="the input itself"):
        save(loaded.proto, divided, base=loaded.base, source=divided)
    files = save(loaded.proto, divided, base=loaded.base, source=divided, force=True)
    assert files == [divided, divided.with_name("model.onnx.data.1")]
    assert old.read_bytes() == content
    assert values(load(divided)) == values(Model(network, None, None))


def test_overwriting_an_old_output_removes_its_data_file(divided, tmp_path):
    loaded = load(divided)
    output = tmp_path / "out.onnx"
    foreign = tmp_path / "out.onnx.data.backup"
    foreign.write_bytes(b"not ours")
    for expected in ("out.onnx.data", "out.onnx.data.1", "out.onnx.data"):
        files = save(loaded.proto, output, base=loaded.base, source=divided, force=True)
        assert files == [output, tmp_path / expected]
        assert {*tmp_path.iterdir()} == {*files, foreign, divided.parent}
        assert values(load(output)) == values(loaded)


def test_no_tensor_is_in_memory_as_a_whole(tmp_path):
    """300 MB of weights are loaded, checked and saved by a process that may use 250 MB more."""
    size = 75_000_000
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 14]> g (float[1] x) => (float[1] y) '
        "{ y = Identity(x) }"
    )
    tensor = model.graph.initializer.add(name="W", data_type=1, dims=[size], data_location=1)
    tensor.external_data.add(key="location", value="w.bin")
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(4 * size)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    script = (
        "import resource, sys; from onnx_ecp.graph import load, save\n"
        "used = int(open('/proc/self/statm').read().split()[5]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 250_000_000,) * 2)\n"
        "m = load(sys.argv[1]); save(m.proto, sys.argv[2], base=m.base)\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know how much memory is used")
    command = [sys.executable, "-c", script, tmp_path / "m.onnx", tmp_path / "out.onnx"]
    subprocess.run(command, check=True, cwd=ROOT)
    assert (tmp_path / "out.onnx.data").stat().st_size == 4 * size


# Faults.


def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def works_once(function):
    """The function, which fails from its second call on."""
    calls = []

    def wrapped(*args):
        calls.append(args)
        return function(*args) if len(calls) == 1 else fail()

    return wrapped


FAULTS = {
    "the disk is full": ("fsync", fail),
    "no file can be renamed": ("replace", fail),
    "the data file can be renamed, the model cannot": ("replace", works_once(os.replace)),
}


@pytest.mark.parametrize(("call", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_failed_write_leaves_what_was_there(call, fault, divided, monkeypatch):
    loaded = load(divided)
    before = {file: file.read_bytes() for file in divided.parent.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(saving.os, call, fault)
        with pytest.raises(OutputError, match="No space left"):
            save(loaded.proto, divided, base=loaded.base, force=True)
    assert {file: file.read_bytes() for file in divided.parent.iterdir()} == before


def test_a_file_size_limit_is_an_output_error(network, tmp_path):
    """A real write that fails half-way."""
    resource = pytest.importorskip("resource", reason="no file size limits on this system")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(OutputError, match="too large"):
            save(network, tmp_path / "out.onnx", base=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("survived", [0, 1, 2, 3])
def test_a_killed_process_leaves_the_old_output_or_the_new(call, survived, divided, network):
    loaded = load(divided)
    write_tensor(constants(network)["W"], np.ones((32, 24)))
    (divided.parent / "new.onnx").write_bytes(network.SerializeToString())
    script = (
        "import os, sys; from pathlib import Path; from onnx_ecp.graph import load, save, saving\n"
        "new, output, call, left = sys.argv[1:]\n"
        "left, real, saving.LARGEST_FILE = int(left), getattr(os, call), 1000\n"
        "def fatal(*args):\n"
        "    global left\n"
        "    if left == 0: os.kill(os.getpid(), 9)\n"
        "    left -= 1\n"
        "    return real(*args)\n"
        "setattr(os, call, fatal)\n"
        "save(load(new).proto, output, base=Path(new).parent, force=True)\n"
    )
    old, new = values(loaded), values(Model(network, None, None))
    command = [sys.executable, "-c", script, divided.parent / "new.onnx", divided]
    ended = subprocess.run([*command, call, str(survived)], check=False, cwd=ROOT)
    assert ended.returncode == (-9 if survived < {"replace": 2, "fsync": 4}[call] else 0)
    assert values(load(divided)) in ((old, new) if ended.returncode else (new,))


BAD_OUTPUTS = {
    "missing directory": (lambda folder: folder / "none" / "out.onnx", "no such directory"),
    "directory": (lambda folder: folder, "is a directory"),
    "device": (lambda folder: Path("/dev/null"), "not a regular file"),
    "exists": (lambda folder: folder / "old.onnx", "exists already"),
    "input": (lambda folder: folder / "in.onnx", "the input itself"),
    "input by another name": (lambda folder: folder / "link.onnx", "the input itself"),
    "dangling link": (lambda folder: folder / "dangling.onnx", "exists already"),
}


@pytest.mark.parametrize(("place", "says"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_a_bad_output_is_refused_before_the_work(place, says, network, tmp_path):
    for name in ("old.onnx", "in.onnx"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "link.onnx").symlink_to("in.onnx")
    (tmp_path / "dangling.onnx").symlink_to("nothing")
    source, before = tmp_path / "in.onnx", sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=says):
        check_output(place(tmp_path), force=False, source=source)
    with pytest.raises(OutputError, match=says):
        save(network, place(tmp_path), base=None, source=source)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.onnx").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["old.onnx", "in.onnx", "new.onnx"])
def test_force_overwrites_files(name, network, tmp_path):
    for old in ("old.onnx", "in.onnx"):
        (tmp_path / old).write_bytes(b"old")
    save(network, tmp_path / name, base=None, force=True, source=tmp_path / "in.onnx")
    assert load(tmp_path / name).proto == network


# Size and digest.


def test_the_compressed_size_is_gzips(network, divided):
    data = network.SerializeToString()
    # A gzip header with a time and one without are of equal length.
    assert compressed_size(data) == len(gzip.compress(data, 6))
    both = divided.read_bytes() + divided.with_name("model.onnx.data").read_bytes()
    assert compressed_size(divided) == len(gzip.compress(both, 6))


def test_the_compressed_size_of_a_large_model_is_told_from_a_part_of_it(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    values[np.abs(values) < 0.7] = 0
    model = helper.make_model(
        helper.make_graph([], "g", [], [], [numpy_helper.from_array(values, "w")])
    )
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True)
    whole = compressed_size(tmp_path / "m.onnx")
    monkeypatch.setattr("onnx_ecp.graph.loading._BLOCK", 2**14)
    monkeypatch.setattr("onnx_ecp.graph.loading.MOST_COMPRESSED", 2**17)
    assert compressed_size(tmp_path / "m.onnx") == pytest.approx(whole, rel=0.02)


def test_the_digest_sees_external_data(divided):
    data = divided.with_name("model.onnx.data")
    before = digest(divided)
    assert before == hashlib.sha256(divided.read_bytes() + data.read_bytes()).hexdigest()
    assert before == digest(load(divided))
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    assert digest(divided) != before
