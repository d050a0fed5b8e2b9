"""Tables, texts, images and sounds become what the model takes; what does not fit is refused."""

import json
import wave

import numpy as np
import pytest

from onnx_ecp.data.calibration import load
from onnx_ecp.errors import CalibrationError
from onnx_ecp.graph import InputSpec

F32, F16, I64, U8 = (np.dtype(x) for x in (np.float32, np.float16, np.int64, np.uint8))
X = InputSpec("x", F32, ("n", 3))
WORDS = ["[UNK]", "[PAD]", "a", "cat", "sat"]


# Tables


def test_columns_named_like_the_inputs_are_the_inputs(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('age,y,"height, cm",n\n31,0,1.5,7\n22,1,2.5,8.0\n')
    inputs = [
        InputSpec("age", I64, (None, 1)),
        InputSpec("height, cm", F32, ("n",)),
        InputSpec("n", I64, ("n",)),
    ]
    data = load(path, inputs)
    assert {name: x.tolist() for name, x in data.arrays.items()} == {
        "age": [[31], [22]],
        "height, cm": [1.5, 2.5],
        "n": [7, 8],
    }


def test_columns_of_labels_are_no_features(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,labels,b,c\n1,9,2,3\n")
    assert load(path, [X]).arrays["x"].tolist() == [[1, 2, 3]]


def test_a_parquet_table_is_a_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    table = {"a": [1, 4], "b": [2.5, 5.5], "y": ["u", "v"], "c": [3, 6]}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    data = load(tmp_path / "t.parquet", [X])
    assert data.arrays["x"].tolist() == [[1, 2.5, 3], [4, 5.5, 6]]


TABLES = {
    "text": ("a,b,c\n1,2,red\n", X, "row 0, column 'c': 'red' is not a number."),
    "empty cell": ("a,b,c\n1,2,3\n1,,3\n", X, "row 1, column 'b': '' is not a number."),
    "fraction": (
        "i\n1.5\n", InputSpec("i", I64, ("n",)), "row 0, column 'i': '1.5' is not a whole number.",
    ),
    "range": ("i\n300\n", InputSpec("i", U8, ("n",)), "column 'i' does not fit the input"),
    "ragged": ("a,b,c\n1,2,3\n1,2\n", X, "row 1 has 2 cells; 3 expected."),
    "same names": ("a,a,b\n1,2,3\n", X, "two columns have the same name."),
    "no rows": ("a,b,c\n", X, ""),
    "empty": ("", X, ""),
    "quotes": ('a,b,c\n"1,2,3\n', X, "cannot be read"),
    "not finite": ("a,b,c\n1,2,nan\n", X, "has NaN or Inf in sample 0"),
    "too few columns": ("a,b\n1,2\n", X, "has shape (1, 2)"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "spec", "message"), TABLES.values(), ids=TABLES)
def test_a_table_that_does_not_fit_is_refused(text, spec, message, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(CalibrationError) as caught:
        load(path, [spec])
    assert message in caught.value.message
    assert caught.value.hint


def test_inputs_without_a_column_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CalibrationError, match="no column for the inputs 'c'"):
        load(path, [InputSpec("a", F32, ("n",)), InputSpec("c", F32, ("n",))])


# Sounds


def write_wav(path, levels, width=2, rate=8000):
    """``levels`` (length, channels) in [-1, 1) as PCM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.round(np.asarray(levels) * 2.0 ** (8 * width - 1)).astype("<i4")
    raw = (whole + 128).astype(np.uint8)[..., None] if width == 1 else None
    if raw is None:
        raw = np.ascontiguousarray(whole).view(np.uint8).reshape(*whole.shape, 4)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setparams((whole.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(raw.tobytes())


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_levels_are_what_was_recorded_in_any_width(width, tmp_path):
    levels = np.array([[-1.0, -0.5], [0.25, 0.25], [0.5, 0.0]])
    write_wav(tmp_path / "d" / "a.WAV", levels, width)
    data = load(tmp_path, [InputSpec("audio", F32, ("n", "t"))])
    np.testing.assert_array_equal(data.arrays["audio"][0], [-0.75, 0.25, 0.25])
    assert data.source == f"{tmp_path} (mono)"


def test_windows_of_a_fixed_length_do_not_overlap_and_short_files_end_in_silence(tmp_path):
    write_wav(tmp_path / "a.wav", np.arange(9)[:, None] / 16)
    write_wav(tmp_path / "b.wav", np.full((2, 1), 0.5))
    inputs = [InputSpec("audio", F32, (1, 1, 4)), InputSpec("sr", I64, ())]
    data = load(tmp_path, inputs)
    wanted = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 8, 0, 0]]
    np.testing.assert_array_equal(data.arrays["audio"].reshape(3, 4) * 16, wanted)
    assert data.arrays["sr"].tolist() == [8000] * 3


def test_sounds_that_do_not_fit_are_refused(tmp_path):
    write_wav(tmp_path / "a.wav", np.zeros((4, 1)))
    mono = [InputSpec("audio", F32, ("n", "t"))]
    with pytest.raises(CalibrationError, match="fit an input float32"):
        load(tmp_path, [InputSpec("spectrogram", F32, ("n", 1, 80, "t"))])
    write_wav(tmp_path / "b.wav", np.zeros((4, 1)), rate=16000)
    with pytest.raises(CalibrationError, match=r"16000 samples a second, a\.wav has 8000"):
        load(tmp_path, mono)
    for content in (b"", b"RIFF", b"no sound"):
        (tmp_path / "b.wav").write_bytes(content)
        with pytest.raises(CalibrationError, match=r"b\.wav: cannot be read"):
            load(tmp_path, mono)
    write_wav(tmp_path / "b.wav", np.zeros((0, 1)))
    with pytest.raises(CalibrationError, match="it holds no samples"):
        load(tmp_path, mono)


# Texts


@pytest.fixture
def texts(tmp_path):
    """A folder with three texts and the tokenizer of a few words, which pads by itself."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {word: i for i, word in enumerate(WORDS)}
    model = tokenizers.models.WordLevel(words, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=1, pad_token="[PAD]", length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts.txt").write_text("a cat sat\n\ncat\na dog\n")
    return tmp_path / "texts.txt"


def test_lines_are_samples_of_their_own_length(texts):
    inputs = [InputSpec(name, I64, ("n", "t")) for name in ("input_ids", "attention_mask")]
    data = load(texts, inputs)
    assert [x.tolist() for x in data.arrays["input_ids"]] == [[2, 3, 4], [3], [2, 0]]
    assert [x.tolist() for x in data.arrays["attention_mask"]] == [[1, 1, 1], [1], [1, 1]]


def test_texts_are_cut_and_padded_to_a_fixed_length(texts):
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    data = load(texts, [InputSpec(name, np.dtype(np.int32), (1, 2)) for name in names])
    found = {name: x.reshape(3, 2).tolist() for name, x in data.arrays.items()}
    assert found["input_ids"] == [[2, 3], [3, 1], [2, 0]]
    assert found["attention_mask"] == [[1, 1], [1, 0], [1, 1]]
    assert found["position_ids"] == [[0, 1]] * 3
    assert found["token_type_ids"] == [[0, 0]] * 3


def test_the_longest_text_is_what_the_folder_says(texts):
    texts.with_name("tokenizer_config.json").write_text(json.dumps({"model_max_length": 1}))
    data = load(texts, [InputSpec("input_ids", I64, ("n", "t"))])
    assert data.arrays["input_ids"].tolist() == [[2], [3], [2]]


def test_texts_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a cat\n")
    with pytest.raises(CalibrationError, match=r"no tokenizer\.json lies beside it"):
        load(path, [InputSpec("input_ids", I64, ("n", "t"))])
    with pytest.raises(CalibrationError, match="text gives no 'pixels'"):
        load(path, [InputSpec("pixels", F32, ("n", "t"))])


def test_a_damaged_tokenizer_is_refused(texts):
    texts.with_name("tokenizer.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"tokenizer\.json: cannot be read"):
        load(texts, [InputSpec("input_ids", I64, ("n", "t"))])


# Images


@pytest.fixture
def pictures(tmp_path):
    """A folder, and a function that writes bytes (height, width[, 3]) into it."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

    def write(name, array):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.asarray(array, np.uint8)).save(path)

    return tmp_path, write


def test_images_are_normalised_as_usual_and_the_report_says_so(pictures):
    folder, write = pictures
    write("cats/a.png", np.full((40, 60, 3), (255, 0, 51)))
    data = load(folder, [InputSpec("x", F32, ("n", 3, 28, 28))])
    assert data.arrays["x"].shape == (1, 3, 28, 28)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = (np.array([1, 0, 0.2]) - mean) / std
    np.testing.assert_allclose(data.arrays["x"][0, :, 5, 7], wanted, rtol=1e-5)
    assert "shorter side 32, centre 28 x 28" in data.source
    assert "the usual, as preprocessor_config.json is not there" in data.source


def test_channels_last_grey_and_bytes_are_taken_as_the_model_has_them(pictures):
    folder, write = pictures
    write("a.png", np.full((28, 28), 77))
    assert load(folder, [InputSpec("x", U8, (None, 24, 24, 3))]).arrays["x"].min() == 77
    grey = load(folder, [InputSpec("x", F16, (None, 24, 24, 1))]).arrays["x"]
    assert (grey.shape, grey.dtype) == ((1, 24, 24, 1), F16)


def test_the_folders_own_configuration_is_followed(pictures):
    folder, write = pictures
    array = np.zeros((4, 6, 3), np.uint8)
    array[:, 1:5] = 200
    write("a.png", array)
    said = {
        "do_resize": False, "crop_size": {"height": 4, "width": 4}, "rescale_factor": 0.01,
        "image_mean": [1, 1, 1], "image_std": [0.5, 0.5, 1],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    data = load(folder, [InputSpec("x", F32, ("n", 3, 4, 4))])
    np.testing.assert_allclose(data.arrays["x"][0, :, 0, 0], [2, 2, 1], rtol=1e-6)
    assert data.arrays["x"].std(axis=(2, 3)).max() == 0
    assert "usual" not in data.source


def test_images_that_do_not_fit_are_refused(pictures):
    folder, write = pictures
    write("a.png", np.zeros((8, 8)))
    square = InputSpec("x", F32, ("n", 3, 8, 8))
    with pytest.raises(CalibrationError, match="images fit one input"):
        load(folder, [InputSpec("x", F32, ("n", 5, 8, 8))])
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(CalibrationError, match=r"preprocessor_config\.json: cannot be read"):
        load(folder, [square])
    (folder / "preprocessor_config.json").unlink()
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    with pytest.raises(CalibrationError, match=r"b\.png: cannot be read"):
        load(folder, [square])


PACKAGES = {
    "images": ("PIL", "a.png", InputSpec("x", F32, ("n", 3, 8, 8)), "pillow"),
    "Parquet": ("pyarrow", "t.parquet", X, "pyarrow"),
    "text": ("tokenizers", "t.txt", InputSpec("input_ids", I64, ("n", "t")), "tokenizers"),
}


@pytest.mark.parametrize(("module", "name", "spec", "told"), PACKAGES.values(), ids=PACKAGES)
def test_a_package_that_is_missing_is_named(module, name, spec, told, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / name).write_text("a")
    (tmp_path / "tokenizer.json").write_text("{}")
    source = tmp_path if module == "PIL" else tmp_path / name
    with pytest.raises(CalibrationError, match=f"needs the package {told}") as caught:
        load(source, [spec])
    assert 'pip install "onnx-ecp[sources]"' in caught.value.hint
