"""What was looked at is what is read, whoever changes the folder in between."""

import os

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_ecp.data import untrusted
from onnx_ecp.errors import ModelError
from onnx_ecp.graph.external import extent, map_bytes

pytestmark = pytest.mark.skipif(os.open not in os.supports_dir_fd, reason="needs openat")
VALUES = np.arange(64, dtype=np.float32)


@pytest.fixture
def place(tmp_path):
    """(directory of the model, bytes of an external tensor in a folder of it)."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "data.bin").write_bytes(b"s" * VALUES.nbytes)
    base = tmp_path / "model"
    (base / "weights").mkdir(parents=True)
    (base / "weights" / "data.bin").write_bytes(VALUES.tobytes())
    tensor = numpy_helper.from_array(VALUES, "w")
    onnx.external_data_helper.set_external_data(tensor, "weights/data.bin")
    tensor.ClearField("raw_data")
    return base, extent(tensor, VALUES.nbytes, base)


def test_what_stays_is_read(place):
    assert bytes(map_bytes(place[1])) == VALUES.tobytes()


def link_file(base, secret):
    (base / "weights" / "data.bin").unlink()
    (base / "weights" / "data.bin").symlink_to(secret / "data.bin")


def link_folder(base, secret):
    (base / "weights").rename(base / "old")
    (base / "weights").symlink_to(secret)


def hard_link(base, secret):
    (base / "weights" / "data.bin").unlink()
    os.link(secret / "data.bin", base / "weights" / "data.bin")


def pipe(base, secret):
    (base / "weights" / "data.bin").unlink()
    os.mkfifo(base / "weights" / "data.bin")


def cut(base, secret):
    os.truncate(base / "weights" / "data.bin", 10)


def gone(base, secret):
    (base / "weights" / "data.bin").unlink()


@pytest.mark.parametrize("swap", [link_file, link_folder, hard_link, pipe, cut, gone])
def test_what_is_swapped_after_the_check_is_refused(swap, place, tmp_path):
    base, found = place
    swap(base, tmp_path / "secret")
    with pytest.raises(ModelError, match=r"data\.bin.* cannot be read"):
        map_bytes(found)


def test_an_array_is_read_from_the_file_whose_header_was_read(tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    np.save(path, VALUES)
    check = untrusted._check_size

    def swapped(*arguments):
        check(*arguments)
        path.unlink()
        path.write_bytes(b"")

    monkeypatch.setattr(untrusted, "_check_size", swapped)
    np.testing.assert_array_equal(untrusted.read_npy(path), VALUES)
