"""A mapped safetensors file: the arrays are views of the file's own bytes, in the right dtype."""

import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hmoe_jax.checkpoint.header import NUMPY_DTYPES
from hmoe_jax.checkpoint.safetensors import SafetensorsFile
from hmoe_jax.core import CheckpointError

from .crafted import entry, pack


@pytest.mark.parametrize(
    "dtype",
    [
        np.bool_,
        np.uint8,
        np.int8,
        np.uint16,
        np.int16,
        np.uint32,
        np.int32,
        np.uint64,
        np.int64,
        np.float16,
        np.float32,
        np.float64,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e8m0fnu,
    ],
)
def test_arrays_written_by_the_library_come_back_bit_for_bit(tmp_path, dtype):
    bits = np.arange(15 * np.dtype(dtype).itemsize, dtype=np.uint8)
    bits = bits % 2 if dtype is np.bool_ else bits
    written = {"a": bits.view(dtype).reshape(5, 3), "scalar": bits.view(dtype)[:1].reshape(())}
    save_file(written, tmp_path / "m.safetensors")
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        for name, array in written.items():
            assert file.array(name).dtype == array.dtype
            assert file.array(name).shape == array.shape
            assert file.array(name).tobytes() == array.tobytes()


def test_the_test_above_covers_every_dtype():
    assert len(NUMPY_DTYPES) == 16


def test_an_array_is_a_read_only_view_that_outlives_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32)}, path)
    with SafetensorsFile(path) as file:
        array = file.array("a")
        assert np.shares_memory(array, file.array("a"))
    path.unlink()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32))


def test_unaligned_data_is_readable(tmp_path):
    values = np.array([1.5, -2.0], np.float32)
    header = {"byte": entry("U8", [1], [0, 1]), "a": entry(data_offsets=[1, 9])}
    text = pack(header, b"\x07" + values.tobytes())
    (tmp_path / "m.safetensors").write_bytes(text)
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        array = file.array("a")
        assert array.flags.aligned == (file.entries["a"].begin % 4 == 0)
        np.testing.assert_array_equal(array, values)


def test_an_empty_tensor_at_the_end_of_the_file_is_readable(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(pack({"a": entry(shape=[0, 2**31], data_offsets=[0, 0])}))
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        assert file.array("a").shape == (0, 2**31)


def test_booleans_other_than_0_and_1_are_refused(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(pack({"a": entry("BOOL", [3], [0, 3])}, b"\0\x01\x02"))
    with (
        SafetensorsFile(tmp_path / "m.safetensors") as file,
        pytest.raises(CheckpointError, match="tensor 'a': not booleans: expected 0 and 1, got 2"),
    ):
        file.array("a")


def test_an_unknown_name_is_refused(tmp_path):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "m.safetensors")
    with (
        SafetensorsFile(tmp_path / "m.safetensors") as file,
        pytest.raises(CheckpointError, match=r"m\.safetensors tensor 'b': no such tensor"),
    ):
        file.array("b")


def test_a_closed_file_gives_no_arrays(tmp_path):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    file.close()
    file.close()
    with pytest.raises(ValueError, match=r"m\.safetensors is closed"):
        file.array("a")


def test_a_link_to_a_file_is_followed(tmp_path):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "blob")
    (tmp_path / "m.safetensors").symlink_to("blob")
    assert list(SafetensorsFile(tmp_path / "m.safetensors").entries) == ["a"]


def make_missing(path):
    pass


def make_empty(path):
    path.write_bytes(b"")


def make_link_loop(path):
    path.symlink_to(path.name)


def make_forbidden(path):
    path.write_bytes(pack(b"{}"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (make_missing, r"cannot be read \(No such file or directory\)"),
        (os.mkdir, "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (make_link_loop, r"cannot be read \(Too many levels of symbolic links\)"),
        (make_forbidden, r"cannot be read \(Permission denied\)"),
        (make_empty, "is empty: expected at least 8 bytes, got 0 bytes"),
    ],
)
def test_a_path_that_is_no_readable_file_is_refused(tmp_path, make, problem):
    path = tmp_path / "m.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=rf"m\.safetensors: {problem}") as caught:
        SafetensorsFile(path)
    assert caught.value.file == str(path)
