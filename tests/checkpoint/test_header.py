"""The safetensors header: each way of being wrong is refused, naming file, tensor and both values."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from hmoe_jax.checkpoint.header import MAX_HEADER_BYTES, NUMPY_DTYPES, read_header
from hmoe_jax.core import CheckpointError

from .crafted import entry, pack


def rejected(content: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_header(content, file="m.safetensors")
    assert caught.value.file == "m.safetensors"
    assert str(caught.value).startswith("m.safetensors")
    return caught.value


def test_a_file_of_the_library_is_read_with_offsets_from_the_start_of_the_file():
    content = save({"w": np.ones((3, 2), ml_dtypes.bfloat16), "s": np.full((), 7, np.float32)}, {"format": "pt"})
    header = read_header(content, file="m.safetensors")
    assert header.metadata == {"format": "pt"}
    assert {name: (e.dtype, e.shape, e.num_bytes) for name, e in header.entries.items()} == {
        "w": ("BF16", (3, 2), 12),
        "s": ("F32", (), 4),
    }
    scalar = header.entries["s"]
    assert content[scalar.begin : scalar.end] == np.float32(7).tobytes()


def test_padding_no_tensors_and_empty_tensors_are_part_of_the_format():
    assert read_header(pack(b"{}   "), file="f").entries == {}
    header = {"a": entry(shape=[0, 3], data_offsets=[0, 0]), "b": entry(), "c": entry("U8", [0], [8, 8])}
    assert read_header(pack(header, bytes(8)), file="f").entries["c"].num_bytes == 0


def test_entries_and_metadata_cannot_be_changed():
    header = read_header(pack({"a": entry()}, bytes(8)), file="f")
    with pytest.raises(TypeError):
        header.entries["b"] = header.entries["a"]
    with pytest.raises(TypeError):
        header.metadata["b"] = "c"


@pytest.mark.parametrize(
    ("content", "problem", "expected", "actual"),
    [
        (b"", "too short for a header", "at least 8 bytes", "0 bytes"),
        (b"\x02\0\0\0\0\0\0", "too short for a header", "at least 8 bytes", "7 bytes"),
        (pack(b"{}")[:-1], "header past the end", "at least 10 bytes", "9 bytes"),
        (b"\xff" * 8 + b"{}", "header too long", f"at most {MAX_HEADER_BYTES} bytes", f"{2**64 - 1} bytes"),
        (
            (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
            "header too long",
            f"at most {MAX_HEADER_BYTES} bytes",
            f"{MAX_HEADER_BYTES + 1} bytes",
        ),
        (pack(b""), "header does not start with '{'", b"{", b""),
        (pack(b" {}"), "header does not start with '{'", b"{", b" "),
        (pack(b"[]"), "header does not start with '{'", b"{", b"["),
        (pack(b"{}\n"), "header does not end with '}' and spaces", b"}", b"\n"),
        (pack(b"{}\0\0"), "header does not end with '}' and spaces", b"}", b"\0"),
        (pack(b"{} x"), "header does not end with '}' and spaces", b"}", b"x"),
        (pack(b"{}", b"\0"), "bytes after the last tensor", "a file of 10 bytes", "11 bytes"),
        (pack({"__metadata__": {"a": 1}}), "wrong __metadata__", "an object of strings", "{'a': 1}"),
        (pack({"__metadata__": None}), "wrong __metadata__", "an object of strings", "None"),
        (pack({"": entry()}, bytes(8)), "unusable tensor name", "1 to 1024 printable characters", "''"),
        (
            pack({"a\n": entry()}, bytes(8)),
            "unusable tensor name",
            "1 to 1024 printable characters",
            "'a\\n'",
        ),
        (pack({"\ud800": entry()}), "unusable tensor name", "1 to 1024 printable characters", "'\\ud800'"),
        (
            pack({"a" * 1025: entry()}, bytes(8)),
            "unusable tensor name",
            "1 to 1024 printable characters",
            "'aaaaaaaaaaaa...aaaaaaaaaaaaa'",
        ),
    ],
)
def test_a_broken_file_is_refused(content, problem, expected, actual):
    error = rejected(content)
    assert (error.problem, error.tensor, error.expected, error.actual) == (problem, "", expected, actual)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{} {}", "Extra data"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": {}, "a": {}}', "duplicate key 'a'"),
        (
            b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}',
            "duplicate key 'dtype'",
        ),
        (b'{"\xff": {}}', "'utf-8' codec"),
        (b'{"a":' * 100_000 + b"0" + b"}" * 100_000, "nested too deeply"),
    ],
)
def test_a_header_that_is_not_strict_json_is_refused(text, problem):
    error = rejected(pack(text))
    assert error.problem.startswith("not valid JSON")
    assert problem in error.problem


FIELDS = ["data_offsets", "dtype", "shape"]
SIZES = "at most 64 integers from 0 to 2^63 - 1"
OFFSETS = "[begin, end] with 0 <= begin <= end"
WHICH_DTYPE = f"one of {', '.join(NUMPY_DTYPES)}"


@pytest.mark.parametrize(
    ("value", "problem", "expected", "actual"),
    [
        (7, "wrong fields in the header", FIELDS, "7"),
        ({"dtype": "F32", "shape": [2]}, "wrong fields in the header", FIELDS, "['dtype', 'shape']"),
        (
            entry() | {"x": 1},
            "wrong fields in the header",
            FIELDS,
            "['data_offsets', 'dtype', 'shape', 'x']",
        ),
        (entry(dtype="F4"), "unknown dtype", WHICH_DTYPE, "'F4'"),
        (entry(dtype="f32"), "unknown dtype", WHICH_DTYPE, "'f32'"),
        (entry(dtype=32), "unknown dtype", WHICH_DTYPE, "32"),
        (entry(dtype=["F32"]), "unknown dtype", WHICH_DTYPE, "['F32']"),
        (entry(shape=2), "wrong shape", SIZES, "2"),
        (entry(shape=[-2]), "wrong shape", SIZES, "[-2]"),
        (entry(shape=[2.0]), "wrong shape", SIZES, "[2.0]"),
        (entry(shape=[2, True]), "wrong shape", SIZES, "[2, True]"),
        (entry(shape=["2"]), "wrong shape", SIZES, "['2']"),
        (entry(shape=[2**63]), "wrong shape", SIZES, "[9223372036854775808]"),
        (entry(shape=[2] + [1] * 64), "wrong shape", SIZES, "[2, 1, 1, 1, 1, 1, ...]"),
        (entry(data_offsets=None), "wrong data_offsets", OFFSETS, "None"),
        (entry(data_offsets=[8]), "wrong data_offsets", OFFSETS, "[8]"),
        (entry(data_offsets=[0, 4, 8]), "wrong data_offsets", OFFSETS, "[0, 4, 8]"),
        (entry(data_offsets=[8, 0]), "wrong data_offsets", OFFSETS, "[8, 0]"),
        (entry(data_offsets=[-8, 0]), "wrong data_offsets", OFFSETS, "[-8, 0]"),
        (entry(data_offsets=[False, 8]), "wrong data_offsets", OFFSETS, "[False, 8]"),
        (entry(data_offsets=[0, 8.0]), "wrong data_offsets", OFFSETS, "[0, 8.0]"),
        (
            entry(shape=[3]),
            "data_offsets do not fit dtype and shape",
            "12 bytes for F32 [3]",
            "8 bytes",
        ),
        (
            entry(dtype="BF16"),
            "data_offsets do not fit dtype and shape",
            "4 bytes for BF16 [2]",
            "8 bytes",
        ),
        (
            entry(shape=[2**31, 2**31]),
            "shape overflows",
            "less than 2^63 bytes",
            "F32 [2147483648, 2147483648]",
        ),
        (
            entry(shape=[0, 2**62, 2], data_offsets=[0, 0]),
            "shape overflows",
            "less than 2^63 bytes",
            "F32 [0, 4611686018427387904, 2]",
        ),
        (entry(data_offsets=[1, 9]), "gap before the data", "begin 0", "begin 1"),
    ],
)
def test_a_broken_entry_is_refused(value, problem, expected, actual):
    error = rejected(pack({"w": value}, bytes(8)))
    assert (error.problem, error.tensor, error.expected, error.actual) == (problem, "w", expected, actual)
    assert str(error) == f"m.safetensors tensor 'w': {problem}: expected {expected}, got {actual}"


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ((4, 12), "data overlaps the tensor before"),
        ((0, 8), "data overlaps the tensor before"),
        ((9, 17), "gap before the data"),
    ],
)
def test_tensors_that_share_or_leave_out_bytes_are_refused(second, problem):
    error = rejected(pack({"a": entry(), "b": entry(data_offsets=second)}, bytes(second[1])))
    assert (error.problem, error.tensor) == (problem, "b")
    assert (error.expected, error.actual) == ("begin 8", f"begin {second[0]}")


@pytest.mark.parametrize(
    ("data_bytes", "problem"), [(15, "data past the end of the file"), (17, "bytes after the last tensor")]
)
def test_data_that_do_not_end_with_the_file_are_refused(data_bytes, problem):
    content = pack({"a": entry(), "b": entry(data_offsets=(8, 16))}, bytes(data_bytes))
    error = rejected(content)
    assert error.problem == problem
    assert error.expected == f"a file of {len(content) - data_bytes + 16} bytes"
    assert error.actual == f"{len(content)} bytes"


def test_data_in_another_order_than_the_header_is_part_of_the_format():
    header = {"a": entry(data_offsets=[4, 12]), "b": entry("U8", [4], [0, 4])}
    assert list(read_header(pack(header, bytes(12)), file="f").entries) == ["a", "b"]


def test_every_truncation_and_extension_is_refused():
    content = save({"w": np.ones((3, 2), ml_dtypes.float8_e4m3fn), "s": np.ones(3, np.float32)})
    for length in range(len(content)):
        rejected(content[:length])
    for extra in range(1, 17):
        rejected(content + b" " * extra)


def test_every_flipped_header_bit_is_refused_or_changes_names_only():
    """A flipped letter of a name is left to index and specs; dtype, shape and place never change."""
    content = save({"weight": np.ones((3, 2), ml_dtypes.bfloat16), "s": np.ones(3, np.float32)}, {"a": "b"})
    good = read_header(content, file="f").entries.values()
    places = [(e.dtype, e.shape, e.begin, e.end) for e in good]
    accepted = 0
    for bit in range(8 * min(e.begin for e in good)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            entries = read_header(bytes(flipped), file="f").entries.values()
        except CheckpointError:
            continue
        accepted += 1
        assert [(e.dtype, e.shape, e.begin, e.end) for e in entries] == places
    assert accepted > 0
