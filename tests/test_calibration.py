"""Every source gives the same samples; whatever does not fit the model is refused."""

import base64
import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from onnx_ecp.data import calibration
from onnx_ecp.data.calibration import SOURCES, Calibration, load, load_labels, sidecar, subset
from onnx_ecp.errors import CalibrationError, UsageError
from onnx_ecp.graph import InputSpec, signature

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = InputSpec("x", F32, ("batch", 3))
IDS = InputSpec("ids", I64, ("batch", "seq"))


def samples(*shape):
    """Distinct float32 values."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def together(data, name="x", size=4):
    """All values of an input in the order in which batches deliver them."""
    return np.concatenate([batch.feeds[name].ravel() for batch in data.batches(size)])


# What fits, and how: model's shape, given shape -> samples, stacked, shape of the first batch of 4.
FITS = {
    "free batch": (("batch", 3), (10, 3), 10, True, (4, 3)),
    "free batch without a name": ((None, 3), (10, 3), 10, True, (4, 3)),
    "free inner axes": (("batch", "seq", 2), (10, 5, 2), 10, True, (4, 5, 2)),
    "unknown rank": (None, (10, 7), 10, True, (4, 7)),
    "fixed to one": ((1, 3), (10, 3), 10, False, (1, 3)),
    "fixed to one, deep": ((1, 1, 1, 5), (10, 1, 1, 5), 10, False, (1, 1, 1, 5)),
    "fixed to one, whole sets": ((1, 3), (10, 1, 3), 10, False, (1, 3)),
    "fixed batch": ((2, 3), (10, 3), 5, False, (2, 3)),
    "fixed batch, whole sets": ((2, 3), (5, 2, 3), 5, False, (2, 3)),
    "batch not first": (("seq", "batch", 2), (10, 5, 1, 2), 10, False, (5, 1, 2)),
    "scalar": ((), (10,), 10, False, ()),
    "exporters' zero for free": ((0, 3), (10, 3), 10, True, (4, 3)),
}


@pytest.mark.parametrize(("shape", "given", "n", "stacked", "first"), FITS.values(), ids=FITS)
def test_batches_deliver_every_value_once_and_in_order(shape, given, n, stacked, first):
    data = load(samples(*given), [InputSpec("x", F32, shape)])
    batches = list(data.batches(4))
    assert (len(data), data.stacked) == (n, stacked)
    assert batches[0].feeds["x"].shape == first
    np.testing.assert_array_equal(together(data), samples(*given).ravel())
    assert [batch.start for batch in batches] == list(range(0, n, 4 if stacked else 1))
    assert sum(batch.samples for batch in batches) == n


def test_halves_are_the_batch():
    (batch,) = load(samples(5, 3), [X]).batches(5)
    first, second = batch.halves()
    assert [(half.start, half.samples) for half in (first, second)] == [(0, 2), (2, 3)]
    both = np.concatenate([first.feeds["x"], second.feeds["x"]])
    np.testing.assert_array_equal(both, batch.feeds["x"])


def test_an_input_that_cannot_be_stacked_opens_the_batches_of_the_others():
    inputs = [X, InputSpec("scale", F32, ())]
    data = load({"x": samples(5, 3), "scale": samples(5)}, inputs)
    assert not data.stacked
    assert [b.feeds["x"].shape for b in data.batches(4)] == [(1, 3)] * 5
    assert [b.feeds["scale"].shape for b in data.batches(4)] == [()] * 5


def test_integers_become_wider_integers_and_nothing_else_is_cast():
    data = load({"ids": np.full((4, 2), 200, np.uint8)}, [IDS])
    assert data.arrays["ids"].dtype == I64
    assert (data.arrays["ids"] == 200).all()


def test_byte_order_is_not_a_type():
    data = load(samples(4, 3).astype(">f4"), [X])
    assert data.arrays["x"].dtype == F32
    np.testing.assert_array_equal(data.arrays["x"], samples(4, 3))


# Every kind of source, made from the same 6 samples: (folder, values) -> source.


def as_files(write, suffix):
    def make(folder, x):
        (folder / "data").mkdir()
        for i, part in enumerate(np.split(x, 3)):
            write(folder / "data" / f"part{i}{suffix}", part)
        return folder / "data"

    return make


def as_test_data(folder, x):
    for i, part in enumerate(np.split(x, 6)):
        # The second one named otherwise: then the order of the inputs counts.
        tensor = numpy_helper.from_array(part, "x" if i else "input.1")
        (folder / f"test_data_set_{i + 8}").mkdir()
        onnx.save_tensor(tensor, folder / f"test_data_set_{i + 8}" / "input_0.pb")
    return folder


def encoded(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def as_polygraphy(folder, x):
    new = [{"x": {"array": encoded(p), "polygraphy_class": "ndarray"}} for p in x[:3, None]]
    mark = {"__polygraphy_encoded_ndarray": "polygraphy_serialized_json_type"}
    old = [{"x": {"array": encoded(part)} | mark} for part in x[3:, None]]
    (folder / "in.json").write_text(json.dumps(new + old))
    return folder / "in.json"


def as_script(folder, x):
    np.save(folder / "x.npy", x)
    (folder / "sibling_of_script.py").write_text("SIZE = 2\n")
    (folder / "feeds.py").write_text(
        "import pathlib, numpy as np\n"
        "from sibling_of_script import SIZE\n"
        "def load_data():\n"
        "    x = np.load(pathlib.Path(__file__).parent / 'x.npy')\n"
        "    for i in range(0, len(x), SIZE):\n"
        "        yield {'x': x[i:i + SIZE]}\n"
    )
    return f"{folder / 'feeds.py'}:load_data"


class Reader:
    def __init__(self, x):
        self.feeds = iter([{"x": part} for part in np.split(x, 2)])

    def get_next(self):
        return next(self.feeds, None)


def write_npz(path, x):
    np.savez_compressed(path, x=x, y=np.arange(len(x)))


def write_one(write, suffix):
    def make(folder, x):
        write(folder / f"in{suffix}", x)
        return str(folder / f"in{suffix}")

    return make


MAKE = {
    "test_data_set folder": as_test_data,
    "folder": as_files(np.save, ".npy"),
    "folder, npz": as_files(write_npz, ".npz"),
    ".npz": write_one(write_npz, ".npz"),
    ".npy": write_one(np.save, ".npy"),
    ".npy, Fortran order": write_one(lambda p, x: np.save(p, np.asfortranarray(x)), ".npy"),
    ".csv": write_one(lambda p, x: np.savetxt(p, x, delimiter=","), ".csv"),
    ".csv, names": write_one(
        lambda p, x: np.savetxt(p, x, delimiter=",", header="a,b,c", comments=""), ".csv"
    ),
    "Polygraphy .json": as_polygraphy,
    "SCRIPT.py[:function]": as_script,
    "CalibrationDataReader": lambda folder, x: Reader(x),
    "dict of arrays": lambda folder, x: {"x": x, "labels": np.arange(len(x))},
    "array": lambda folder, x: x,
    "iterable of dicts": lambda folder, x: ({"x": part} for part in np.split(x, 3)),
    "iterable of dicts, no batch axis": lambda folder, x: [{"x": row} for row in x],
    "iterable of dicts, arrays": lambda folder, x: list(x[:, None]),
}


# Sources that make numbers of something else: tests/test_sources.py.
OTHERS = {"folder of images", "folder of .wav", ".parquet", ".txt beside tokenizer.json"}


def test_every_row_of_the_table_of_sources_is_tested():
    assert {name.split(", ")[0] for name in MAKE} | OTHERS == set(SOURCES)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("shape", [("batch", 3), (1, 3)], ids=str)
def test_every_source_gives_the_same_samples(make, shape, tmp_path):
    x = samples(6, 3)
    data = load(make(tmp_path, x), [InputSpec("x", F32, shape)], seed=3)
    np.testing.assert_array_equal(together(data), x.ravel())
    assert len(data) == 6
    assert (data.stacked, data.synthetic, data.seed) == (shape[0] == "batch", False, 3)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_fewer_samples_are_a_part_of_all(make, tmp_path):
    x = samples(6, 3)
    data = load(make(tmp_path, x), [X], samples=4)
    assert len(data) == 4
    rows = data.arrays["x"][:, 0] / 3
    assert (np.diff(rows) > 0).all()
    assert set(rows) <= set(range(6))


def test_an_endless_iterable_is_read_as_far_as_needed():
    def forever():
        while True:
            yield {"x": samples(3, 3)}

    assert len(load(forever(), [X], samples=7)) == 7


def test_a_folder_of_arrays_named_like_the_inputs(tmp_path):
    np.save(tmp_path / "x.npy", samples(4, 3))
    np.save(tmp_path / "ids.npy", np.ones((4, 2), np.int64))
    np.save(tmp_path / "y.npy", np.arange(4))
    data = load(tmp_path, [X, IDS])
    assert set(data.arrays) == {"x", "ids"}


def test_test_data_may_come_in_any_order_of_names(tmp_path):
    onnx.save_tensor(
        numpy_helper.from_array(np.ones((1, 2), np.int64), "ids"), tmp_path / "input_0.pb"
    )
    onnx.save_tensor(numpy_helper.from_array(samples(1, 3), "x"), tmp_path / "input_1.pb")
    data = load(tmp_path, [X, IDS])
    assert len(data) == 1
    np.testing.assert_array_equal(data.arrays["x"], samples(1, 3))


def test_a_feed_of_fixed_shapes_is_one_sample():
    inputs = [X, InputSpec("state", F32, (2, "batch", 5)), InputSpec("rate", I64, ())]
    feed = {"x": samples(4, 3), "state": samples(2, 4, 5), "rate": np.int64(16000)}
    data = load([feed] * 3, inputs)
    assert (len(data), data.stacked) == (3, False)
    (first, *_) = data.batches(8)
    assert {name: array.shape for name, array in first.feeds.items()} == {
        "x": (4, 3),
        "state": (2, 4, 5),
        "rate": (),
    }


def test_a_calibration_is_a_source():
    data = load(samples(6, 3), [X])
    assert load(data, [X]) is data
    assert len(load(data, [X], samples=2)) == 2


# Splitting.


@pytest.mark.parametrize(("n", "fraction", "held"), [(10, 0.2, 2), (2, 0.01, 1), (3, 0.99, 2)])
def test_a_split_parts_the_samples(n, fraction, held):
    data = load(samples(n, 3), [X])
    kept, held_out = data.split(fraction, seed=1)
    assert (len(kept), len(held_out)) == (n - held, held)
    rows = np.concatenate([kept.arrays["x"], held_out.arrays["x"]])
    np.testing.assert_array_equal(np.sort(rows, axis=0), data.arrays["x"])
    assert (np.diff(kept.arrays["x"][:, 0]) > 0).all()
    again, _ = data.split(fraction, seed=1)
    np.testing.assert_array_equal(kept.arrays["x"], again.arrays["x"])


def test_a_single_sample_is_both_parts():
    kept, held_out = load(samples(1, 3), [X]).split(0.5, seed=0)
    assert len(kept) == 1
    assert held_out is kept


def test_a_limit_is_the_subset_of_the_same_seed():
    data = load(samples(100, 3), [X])
    limited = data.limit(7, seed=5)
    np.testing.assert_array_equal(limited.arrays["x"], data.arrays["x"][subset(100, 7, 5)])
    assert data.limit(100, seed=5) is data
    assert not np.array_equal(subset(100, 7, 5), subset(100, 7, 6))


# What does not fit: given -> words of the message and hint.
BAD = -np.ones((5, 3), np.float32)
BAD[3, 1] = np.nan
MISFITS = {
    "wrong name": ({"xx": samples(5, 3)}, "'xx' is not an input", "'x'"),
    "name that is no text": ({7: samples(5, 3)}, "7 is not an input", "x"),
    "missing": ({"y": np.arange(5)}, "no array for input 'x': float32 (batch, 3)", "y"),
    "nothing": ({}, "no array for input 'x'", "none"),
    "double": ({"x": samples(5, 3).astype(np.float64)}, "float64", ".astype(np.float32)"),
    "half": ({"x": samples(5, 3).astype(np.float16)}, "float16", ".astype(np.float32)"),
    "bytes": ({"x": np.ones((5, 3), np.uint8)}, "uint8", "(array / 255).astype(np.float32)"),
    "bool": ({"x": np.ones((5, 3), np.bool_)}, "bool", ".astype(np.float32)"),
    "objects": ({"x": np.array([None, {}])}, "object", "plain numeric arrays"),
    "text": ({"x": np.array(["a", "b"])}, "<U1", "plain numeric arrays"),
    "ragged": ({"x": [[1.0], [1.0, 2.0]]}, "is no array", ""),
    "no samples axis": ({"x": samples(3)}, "shape (3); float32 (batch, 3) expected", "first axis"),
    "scalar": ({"x": np.float32(1)}, "shape ()", "first axis"),
    "rank": ({"x": samples(5, 1, 1, 3)}, "(5, 1, 1, 3)", "first axis"),
    "fixed axis": ({"x": samples(5, 4)}, "shape (5, 4); float32 (batch, 3) expected", "first axis"),
    "empty": ({"x": samples(0, 3)}, "is empty", ""),
    "NaN": ({"x": BAD}, "NaN or Inf in sample 3", "repair"),
    "Inf": ({"x": np.where(np.isnan(BAD), np.float32(np.inf), BAD)}, "Inf in sample 3", "repair"),
    "empty iterable": ([], "no samples", ""),
    "ragged feeds": ([{"x": samples(1, 2, 3)}, {"x": samples(1, 4, 3)}], "differ in shape", "rows"),
    "feed in a list": ([[samples(1, 3), 0]], "list without the name", "x"),
    "number": (5, "not a kind of calibration data", "array"),
    "nowhere": ("nowhere.npz", "no such file or folder", ""),
    "script nowhere": ("nowhere.py:feeds", "no such file", ""),
}


@pytest.mark.parametrize(("source", "message", "hint"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_with_what_and_why(source, message, hint):
    with pytest.raises(CalibrationError) as caught:
        load(source, [X])
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_different_numbers_of_samples_are_refused():
    with pytest.raises(CalibrationError, match="'x' has 5, 'ids' has 4"):
        load({"x": samples(5, 3), "ids": np.ones((4, 2), np.int64)}, [X, IDS])


def test_narrower_integers_are_refused():
    with pytest.raises(CalibrationError, match="int64") as caught:
        load(np.ones((4, 2), np.int64), [InputSpec("ids", np.dtype(np.int32), ("batch", 2))])
    assert ".astype(np.int32)" in caught.value.hint


def test_a_rest_of_a_fixed_batch_is_refused_not_dropped():
    with pytest.raises(CalibrationError, match="no multiple") as caught:
        load(samples(7, 3), [InputSpec("x", F32, (2, 3))])
    assert "6 or 8" in caught.value.hint


def test_an_array_without_a_name_needs_a_single_input():
    with pytest.raises(CalibrationError, match="without the name"):
        load(samples(5, 3), [X, IDS])


@pytest.mark.parametrize("dtype", [None, np.dtype(object)], ids=["sequence", "text"])
def test_an_input_that_is_no_tensor_of_numbers_is_refused(dtype):
    inputs = [InputSpec("x", dtype, ("batch",))]
    with pytest.raises(CalibrationError, match="no tensor of numbers"):
        load({"x": np.array(["a"], dtype=object)}, inputs)
    with pytest.raises(CalibrationError, match="no tensor of numbers"):
        calibration.synthetic(onnx.ModelProto(), inputs)


def test_the_sample_of_a_nan_is_that_of_the_source():
    x = samples(100, 3)
    x[90:] = np.inf
    chosen = subset(100, 50, 0)
    with pytest.raises(CalibrationError, match=f"sample {chosen[chosen >= 90][0]}"):
        load(x, [X], samples=50, seed=0)


def test_no_samples_wanted_is_a_usage_error():
    with pytest.raises(UsageError):
        load(samples(5, 3), [X], samples=0)


SCRIPTS = {
    "no function": ("def load_dat(): pass", "has no function 'load_data'", "'load_dat'"),
    "no program": ("def (", "SyntaxError", "yield"),
    "its own error": ("def load_data():\n    raise KeyError('z')\n    yield", "KeyError", "yield"),
    "it exits": ("import sys; sys.exit(3)", "SystemExit", "yield"),
    "nothing": ("def load_data(): return None", "TypeError", "yield"),
    "misfit": ("def load_data(): yield {'z': 1}", "feed 0: 'z' is not an input", "x"),
}


@pytest.mark.parametrize(("text", "message", "hint"), SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_that_fails_is_named(text, message, hint, tmp_path):
    path = tmp_path / "feeds.py"
    path.write_text(text)
    with pytest.raises(CalibrationError) as caught:
        load(path, [X])
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.hint


# Hostile files: what is written under a name -> a word of the message.


def npy(shape, descr="'<f4'", data=b""):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def zipped(content, name="x.npy"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def saved(save, *arrays, **named):
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


GOOD_NPY = saved(np.save, samples(5, 3))
GOOD_NPZ = saved(np.savez_compressed, x=samples(5, 3))
PICKLE = saved(lambda s, a: np.save(s, a, allow_pickle=True), np.array([None, os.getcwd]))
TENSOR = numpy_helper.from_array(samples(5, 3), "x")
ELSEWHERE = onnx.TensorProto(name="x", data_type=1, dims=[5, 3], data_location=1)
ELSEWHERE.external_data.add(key="location", value="../secret")
HUGE = "(1099511627776, 3)"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
JSON = '[{"x": {"array": "%s", "polygraphy_class": "%s"}}]'

HOSTILE = {
    "npy header bomb": ("in.npy", npy(HUGE), "bytes"),
    "npy overflow": ("in.npy", npy("(4294967296, 4294967296, 4)"), "bytes"),
    "npy negative": ("in.npy", npy("(-5, 3)"), "negative"),
    "npy too many axes": ("in.npy", npy((1,) * 100, data=b"1234"), "cannot be read"),
    "npy truncated": ("in.npy", GOOD_NPY[:-1], "truncated"),
    "npy header cut": ("in.npy", GOOD_NPY[:40], "cannot be read"),
    "npy trailing": ("in.npy", GOOD_NPY + GOOD_NPY, "bytes"),
    "npy nested header": ("in.npy", npy("(" * 5000), "damaged .npy header"),
    "npy unknown version": ("in.npy", b"\x93NUMPY\x09\x00" + GOOD_NPY[8:], "cannot be read"),
    "npy pickle": ("in.npy", PICKLE, "pickled Python objects"),
    "npy text": ("in.npy", saved(np.save, np.array(["a"])), "not numbers"),
    "npy fields": ("in.npy", npy("(1,)", "[('a', '<f4')]", b"1234"), "not numbers"),
    "npy empty": ("in.npy", saved(np.save, samples(0, 3)), "empty"),
    "npy is something else": ("in.npy", b"hello", "cannot be read"),
    "npy no bytes": ("in.npy", b"", "cannot be read"),
    "npy git-lfs": ("in.npy", LFS, "git lfs pull"),
    "npz truncated": ("in.npz", GOOD_NPZ[:-30], "cannot be read"),
    "npz damaged": ("in.npz", GOOD_NPZ.replace(GOOD_NPZ[70:80], b"\xff" * 10), "cannot be read"),
    "npz is something else": ("in.npz", b"hello", "cannot be read"),
    "npz git-lfs": ("in.npz", LFS, "git lfs pull"),
    "npz header bomb": ("in.npz", zipped(npy(HUGE)), "bytes"),
    "npz zip bomb": ("in.npz", zipped(npy("(50000000, 3)", data=bytes(2**28))), "bytes"),
    "npz pickle": ("in.npz", zipped(PICKLE), "pickled Python objects"),
    "npz member is no array": ("in.npz", zipped(b"hello", "x"), "cannot be read"),
    "npz wrong name": ("in.npz", zipped(GOOD_NPY, "z.npy"), "'z' is not an input"),
    "npz has no arrays": ("in.npz", saved(lambda s: zipfile.ZipFile(s, "w").close()), "no array"),
    "pb external": ("input_0.pb", ELSEWHERE.SerializeToString(), "in another file"),
    "pb sizes": ("input_0.pb", helper.make_tensor("x", 1, [0], []).SerializeToString(), "empty"),
    "pb bomb": (
        "input_0.pb",
        onnx.TensorProto(data_type=1, dims=[2**40, 2**20], raw_data=b"1234").SerializeToString(),
        "cannot be read",
    ),
    "pb truncated": ("input_0.pb", TENSOR.SerializeToString()[:-1], "cannot be read"),
    "pb no bytes": ("input_0.pb", b"", "cannot be read"),
    "json": ("in.json", b"{", "cannot be read"),
    "json nested": ("in.json", b"[" * 100_000, "cannot be read"),
    "json of outputs": ("in.json", b'{"lst": []}', "not a list of named inputs"),
    "json empty": ("in.json", b"[]", "no samples"),
    "json list": ("in.json", b'[{"x": [1, 2]}]', "not a NumPy array"),
    "json torch": ("in.json", (JSON % ("", "Tensor")).encode(), "not a NumPy array"),
    "json base64": ("in.json", (JSON % ("?", "ndarray")).encode(), "cannot be read"),
    "json pickle": (
        "in.json",
        (JSON % (base64.b64encode(PICKLE).decode(), "ndarray")).encode(),
        "pickled Python objects",
    ),
    "unknown kind": ("in.dat", b"1,2,3", "not a kind of calibration data"),
}


@pytest.mark.parametrize(("name", "content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_before_it_takes_memory(
    name, content, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("onnx_ecp.data.untrusted.memory_budget", lambda: 2**27)
    path = tmp_path / name
    path.write_bytes(content)
    source = tmp_path if name.endswith(".pb") else path
    tracemalloc.start()
    with pytest.raises(CalibrationError) as caught:
        load(source, [X])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message in caught.value.message + caught.value.hint
    assert str(tmp_path) in caught.value.message
    assert peak < 2**26


@pytest.mark.parametrize("name", ["in.npy", "in.npz", "in.json"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CalibrationError, match="not a regular file"):
        load(tmp_path / name, [X])


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match=r"has no \.npz"):
        load(tmp_path, [X])


def test_as_many_tensors_as_inputs(tmp_path):
    onnx.save_tensor(TENSOR, tmp_path / "input_0.pb")
    with pytest.raises(CalibrationError, match=r"has 1 input_\*\.pb; the model has 2"):
        load(tmp_path, [X, IDS])


GOOD_FILES = {
    "in.npy": GOOD_NPY,
    "in.npz": GOOD_NPZ,
    "input_0.pb": TENSOR.SerializeToString(),
    "in.json": (JSON % (base64.b64encode(GOOD_NPY).decode(), "ndarray")).encode(),
}


@pytest.mark.filterwarnings("ignore")  # NumPy remarks on headers of Python 2
@pytest.mark.parametrize("name", GOOD_FILES)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0, 2**10), st.binary(max_size=6)), max_size=4))
def test_damage_ends_in_samples_or_in_a_calibration_error(name, changes, tmp_path):
    content = bytearray(GOOD_FILES[name])
    for position, piece in changes:
        position %= len(content)
        content[position : position + max(len(piece), 1)] = piece
        content = content or bytearray(b"0")
    (tmp_path / name).write_bytes(content)
    try:
        data = load(tmp_path if name.endswith(".pb") else tmp_path / name, [X])
    except CalibrationError:
        return
    assert data.arrays["x"].shape[1:] == (3,)


# Labels and the sidecar.


@pytest.mark.parametrize("name", ["y", "labels"])
def test_labels_beside_the_inputs(name, tmp_path):
    np.savez(tmp_path / "in.npz", x=samples(5, 3), **{name: np.arange(5, dtype=np.uint8)})
    labels = load_labels(tmp_path / "in.npz", 5)
    assert labels.dtype == I64
    np.testing.assert_array_equal(labels, np.arange(5))
    assert len(load(tmp_path / "in.npz", [X])) == 5


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3)])
def test_floating_labels_are_targets(shape, tmp_path):
    np.save(tmp_path / "y.npy", np.full(shape, 0.5, np.float32))
    targets = load_labels(tmp_path / "y.npy", 5)
    assert (targets.dtype, targets.shape) == (np.float64, shape)


LABELS = {
    "count": (np.arange(4), "(5)"),
    "one-hot": (np.eye(5, dtype=np.int64), "(5, 5)"),
    "text": (np.array(list("abcde")), "text"),
    "targets, count": (np.zeros((4, 5)), "(4, 5)"),
    "targets, not finite": (np.array([0, 1, np.nan, 3, 4]), "sample 2"),
    "negative": (np.arange(5) - 1, "-1"),
    "too large": (np.full(5, 2**63, np.uint64), "no class index"),
}


@pytest.mark.parametrize(("labels", "message"), LABELS.values(), ids=LABELS)
def test_what_are_no_labels_is_refused(labels, message, tmp_path):
    np.save(tmp_path / "y.npy", labels)
    with pytest.raises(CalibrationError) as caught:
        load_labels(tmp_path / "y.npy", 5)
    assert message in caught.value.message


def test_missing_labels_are_refused(tmp_path):
    np.savez(tmp_path / "in.npz", x=samples(5, 3))
    with pytest.raises(CalibrationError, match="has no labels"):
        load_labels(tmp_path / "in.npz", 5)
    with pytest.raises(CalibrationError, match="no such file"):
        load_labels(tmp_path / "other.npz", 5)


def test_the_sidecar_lies_beside_the_model(tmp_path):
    assert sidecar(tmp_path / "in.onnx") is None
    np.savez(tmp_path / "in.npz", x=samples(5, 3))
    assert sidecar(tmp_path / "in.onnx") == tmp_path / "in.npz"


# Synthetic inputs: graph, and what must hold for the arrays.
HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
TABLE = "float[7, 4] table = {" + ", ".join(["0.5"] * 28) + "}"
SYNTHETIC = {
    "floats are normal": (
        "g (float[batch, 50] x) => (float[batch, 50] y) { y = Relu(x) }",
        lambda x: abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1,
    ),
    "a fixed batch": (
        "g (float[1, 50] x) => (float[1, 50] y) { y = Relu(x) }",
        lambda x: x.shape == (128, 1, 50),
    ),
    "doubles": (
        "g (double[n, 3] x) => (double[n, 3] y) { y = Relu(x) }",
        lambda x: x.dtype == np.float64,
    ),
    "booleans": ("g (bool[n, 3] x) => (bool[n, 3] y) { y = Not(x) }", lambda x: x.all()),
    "pixels": (
        "g (uint8[n, 3, height, width] x) => (float[n, 3, height, width] y)"
        " { y = Cast<to = 1>(x) }",
        lambda x: x.max() > 200 and x.shape == (128, 3, 64, 64),
    ),
    "unknown integers": (
        "g (int64[n, 3] x) => (int64[n, 3] y) { y = Neg(x) }",
        lambda x: set(np.unique(x)) == {0, 1},
    ),
    "ids": (
        f"g (int64[n, sequence] x) => (float[n, sequence, 4] y) <{TABLE}>"
        " { y = Gather(table, x) }",
        lambda x: x.shape == (128, 16) and x.min() == 0 and x.max() == 6,
    ),
    "ids on the way": (
        f"g (int32[n, s] x) => (float[n, s, 1, 4] y) <{TABLE}, int64[1] two = {{2}}>"
        " { c = Cast<to = 7>(x) u = Unsqueeze(c, two) t = Identity(table) y = Gather(t, u) }",
        lambda x: x.dtype == np.int32 and x.max() == 6,
    ),
    "ids of columns": (
        f"g (int64[n, s] x) => (float[7, n, s] y) <{TABLE}> {{ y = Gather<axis = -1>(table, x) }}",
        lambda x: x.max() == 3,
    ),
    "ids of a constant node": (
        "g (int64[n, s] x) => (float[n, s] y)"
        " { t = Constant<value = float[5] {0.,1.,2.,3.,4.}>() y = Gather(t, x) }",
        lambda x: x.max() == 4,
    ),
    "a scalar": ("g (int64 x) => (int64 y) { y = Neg(x) }", lambda x: x.shape == (128,)),
}


def runs(proto, data):
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, batch.feeds) for batch in data.batches(64)]


@pytest.mark.parametrize(("text", "holds"), SYNTHETIC.values(), ids=SYNTHETIC)
def test_synthetic_inputs_are_legal(text, holds):
    proto = parser.parse_model(HEAD + text)
    data = calibration.synthetic(proto, signature(proto))
    assert data.synthetic
    assert len(data) == 128
    assert holds(data.arrays["x"])
    assert runs(proto, data)


BERT = f"""{HEAD} g (int64[batch, sequence] tokens, int64[batch, sequence] attends,
  int64[batch, sequence] token_type_ids, int64[batch, sequence] position_ids,
  float[batch, sequence] pad_mask) => (float[batch, sequence, 4] y) <{TABLE}>
{{
  t = Gather(table, tokens)  s = Gather(table, token_type_ids)  p = Gather(table, position_ids)
  ts = Add(t, s)  e = Add(ts, p)
  a = Cast<to = 1>(attends)  m = Mul(a, pad_mask)
  axes = Constant<value = int64[1] {{2}}>()
  column = Unsqueeze(m, axes)
  y = Mul(e, column)
}}"""


def test_synthetic_tokens_come_with_masks_segments_and_positions():
    proto = parser.parse_model(BERT)
    data = calibration.synthetic(proto, signature(proto), samples=20)
    arrays = data.arrays
    assert arrays["tokens"].max() == 6
    assert (arrays["attends"] == 1).all()
    assert (arrays["pad_mask"] == 1).all()
    assert (arrays["token_type_ids"] == 0).all()
    assert (arrays["position_ids"] == np.arange(16) % 7).all()
    assert runs(proto, data)


def test_shapes_of_one_name_have_one_size():
    proto = parser.parse_model(BERT)
    data = calibration.synthetic(proto, signature(proto), shapes={"tokens": (1, 5)})
    assert data.stacked
    assert {array.shape for array in data.arrays.values()} == {(128, 5)}
    whole = calibration.synthetic(proto, signature(proto), shapes={"tokens": (3, 5)})
    assert not whole.stacked
    assert {array.shape for array in whole.arrays.values()} == {(128, 3, 5)}
    assert runs(proto, whole)


@pytest.mark.parametrize(
    "shapes", [{"token": (1, 5)}, {"tokens": (1,)}, {"tokens": (1, 0)}, {"x": (1, 4)}], ids=str
)
def test_shapes_that_contradict_the_model_are_usage_errors(shapes):
    proto = parser.parse_model(
        f"{HEAD} g (int64[n, s] tokens, float[n, 3] x) => (float[n, 3] y) {{ y = Relu(x) }}"
    )
    with pytest.raises(UsageError):
        calibration.synthetic(proto, signature(proto), shapes=shapes)


def test_synthetic_inputs_open_the_batch_of_a_recurrent_state():
    proto = parser.parse_model(
        f"{HEAD} g (float[batch, 3] x, float[2, batch, 5] h, int64 position) =>"
        " (float[batch, 3] y) { y = Relu(x) }"
    )
    data = calibration.synthetic(proto, signature(proto))
    assert {n: a.shape for n, a in data.arrays.items()} == {
        "x": (128, 1, 3),
        "h": (128, 2, 1, 5),
        "position": (128,),
    }
    assert (data.arrays["position"] == 0).all()


def test_synthetic_inputs_beyond_memory_are_refused():
    with pytest.raises(CalibrationError, match="free memory"):
        calibration.synthetic(onnx.ModelProto(), [InputSpec("x", F32, (1, 2**40))])


def test_synthetic_inputs_depend_on_the_seed_alone():
    proto = parser.parse_model(HEAD + SYNTHETIC["floats are normal"][0])
    first, again, other = (
        calibration.synthetic(proto, signature(proto), seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.arrays["x"], again.arrays["x"])
    assert not np.array_equal(first.arrays["x"], other.arrays["x"])


def test_a_calibration_knows_its_length():
    assert len(Calibration({"x": samples(5, 3)}, True, "here", False, 0)) == 5


class Refilling:
    """A reader that fills one buffer again and again."""

    def __init__(self, x):
        self._x, self._buffer, self._at = x, np.empty_like(x[:1]), 0

    def get_next(self):
        if self._at == len(self._x):
            return None
        self._buffer[:] = self._x[self._at]
        self._at += 1
        return {"x": self._buffer}


def refilled(x):
    buffer = np.empty_like(x[0])
    for row in x:
        buffer[:] = row
        yield {"x": buffer}


@pytest.mark.parametrize("make", [Refilling, refilled], ids=["reader", "generator"])
def test_what_is_yielded_is_copied(make):
    x = samples(6, 3)
    data = load(make(x), [X])
    np.testing.assert_array_equal(together(data), x.ravel())


@pytest.mark.parametrize("form", ["array", "mapping", "list", "samples"])
def test_masked_values_are_no_values(form, rng):
    values = rng.standard_normal((6, 3)).astype(np.float32)
    x = np.ma.masked_array(values, values > 1)
    x[2, 1] = np.ma.masked
    given = {"array": x, "mapping": {"x": x}, "list": [*x], "samples": [{"x": row} for row in x]}
    with pytest.raises(CalibrationError, match="masked"):
        load(given[form], [X])


def test_a_masked_array_without_masked_values_is_an_array(rng):
    values = rng.standard_normal((6, 3)).astype(np.float32)
    found = load({"x": np.ma.masked_array(values)}, [X])
    np.testing.assert_array_equal(found.arrays["x"], values)
