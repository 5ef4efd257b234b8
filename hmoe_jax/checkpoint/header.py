"""The safetensors header, checked in full: each data byte belongs to one tensor of known dtype and shape.

Format: 8 bytes little-endian length n; n bytes of JSON, padded with spaces; the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import mmap
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from hmoe_jax.core import CheckpointError
from hmoe_jax.strict_json import parse_object

# The format's names to NumPy's. Its 4-bit and 6-bit types are left out: their elements are not whole bytes.
NUMPY_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype("<u1"),
        "I8": np.dtype("<i1"),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "F32": np.dtype("<f4"),
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F64": np.dtype("<f8"),
    }
)
DTYPE_NAMES: Mapping[np.dtype, str] = MappingProxyType({dtype: name for name, dtype in NUMPY_DTYPES.items()})
"""The other way round."""

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_NAME_CHARS = 1024  # published names have fewer than 100
MAX_DIMS = 64  # NumPy's limit
MAX_SIZE = 2**63 - 1  # of a dimension, an offset, a tensor in bytes: what NumPy and the kernels can address
ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor; its data are bytes [begin, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header, as read-only mappings in the order of its JSON."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(content: bytes | mmap.mmap, *, file: str) -> Header:
    """Reads the header of a whole safetensors file; `file` is its name in errors.

    Raises `CheckpointError`, and nothing else, for all that is not exactly the format. Looks at no data:
    a changed weight is found by `integrity`.
    """
    text = _header_text(content, file=file)
    data_begin = LENGTH_BYTES + len(text)
    fields = parse_object(text, file=file)
    metadata = _metadata(fields.pop("__metadata__", {}), file=file)
    entries = {name: _entry(name, value, data_begin=data_begin, file=file) for name, value in fields.items()}
    _check_tiling(entries.values(), data_begin=data_begin, file_bytes=len(content), file=file)
    return Header(MappingProxyType(entries), MappingProxyType(metadata))


def check_tensor_name(name: str, *, file: str) -> None:
    """Raises `CheckpointError` for a name that cannot be printed or is absurdly long."""
    if not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
        expected = f"1 to {MAX_NAME_CHARS} printable characters"
        raise CheckpointError("unusable tensor name", file=file, expected=expected, actual=reprlib.repr(name))


def _header_text(content: bytes | mmap.mmap, *, file: str) -> bytes:
    error = partial(CheckpointError, file=file)
    if len(content) < LENGTH_BYTES:
        raise error("too short for a header", expected="at least 8 bytes", actual=f"{len(content)} bytes")
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise error("header too long", expected=f"at most {MAX_HEADER_BYTES} bytes", actual=f"{length} bytes")
    end = LENGTH_BYTES + length
    if end > len(content):
        raise error("header past the end", expected=f"at least {end} bytes", actual=f"{len(content)} bytes")
    text = content[LENGTH_BYTES:end]
    if not text.startswith(b"{"):
        raise error("header does not start with '{'", expected=b"{", actual=text[:1])
    # The JSON parser would take any white space at the end; the format pads with spaces only.
    last = text.rstrip(b" ")[-1:]
    if last != b"}":
        raise error("header does not end with '}' and spaces", expected=b"}", actual=last)
    return text


def _metadata(value: object, *, file: str) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    actual = reprlib.repr(value)
    raise CheckpointError("wrong __metadata__", file=file, expected="an object of strings", actual=actual)


def _entry(name: str, value: Any, *, data_begin: int, file: str) -> TensorEntry:
    check_tensor_name(name, file=file)
    error = partial(CheckpointError, file=file, tensor=name)
    if not isinstance(value, dict) or value.keys() != ENTRY_FIELDS:
        actual = reprlib.repr(sorted(value) if isinstance(value, dict) else value)
        raise error("wrong fields in the header", expected=sorted(ENTRY_FIELDS), actual=actual)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise error("unknown dtype", expected=f"one of {', '.join(NUMPY_DTYPES)}", actual=reprlib.repr(dtype))
    if not _is_sizes(shape):
        expected = f"at most {MAX_DIMS} integers from 0 to 2^63 - 1"
        raise error("wrong shape", expected=expected, actual=reprlib.repr(shape))
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        expected = "[begin, end] with 0 <= begin <= end"
        raise error("wrong data_offsets", expected=expected, actual=reprlib.repr(offsets))
    begin, end = offsets
    _check_num_bytes(end - begin, dtype, shape, error=error)
    return TensorEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    # `type(...) is int`, because True is an instance of int.
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMS
        and all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)
    )


def _check_num_bytes(num_bytes: int, dtype: str, shape: list[int], *, error: partial[CheckpointError]) -> None:
    itemsize = NUMPY_DTYPES[dtype].itemsize
    # A zero must not hide an overflow of the other sizes: strides are their products.
    if math.prod(max(size, 1) for size in shape) * itemsize > MAX_SIZE:
        raise error("shape overflows", expected="less than 2^63 bytes", actual=f"{dtype} {shape}")
    needed = math.prod(shape) * itemsize
    if num_bytes != needed:
        expected = f"{needed} bytes for {dtype} {shape}"
        raise error("data_offsets do not fit dtype and shape", expected=expected, actual=f"{num_bytes} bytes")


def _check_tiling(entries: Iterable[TensorEntry], *, data_begin: int, file_bytes: int, file: str) -> None:
    """The tensors must follow each other from header to end of file, sharing no byte and leaving none out."""
    position = data_begin
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            problem = "data overlaps the tensor before" if entry.begin < position else "gap before the data"
            expected, actual = f"begin {position - data_begin}", f"begin {entry.begin - data_begin}"
            raise CheckpointError(problem, file=file, tensor=entry.name, expected=expected, actual=actual)
        position = entry.end
    if position != file_bytes:
        problem = "bytes after the last tensor" if position < file_bytes else "data past the end of the file"
        expected, actual = f"a file of {position} bytes", f"{file_bytes} bytes"
        raise CheckpointError(problem, file=file, expected=expected, actual=actual)
