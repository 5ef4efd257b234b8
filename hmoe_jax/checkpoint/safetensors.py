"""One safetensors file: header checked when it is opened, data mapped and never copied.

Why not the library's reader: its NumPy loader cannot read FP8, and it tells little of what is wrong.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from hmoe_jax.checkpoint.files import open_file, os_errors_named
from hmoe_jax.checkpoint.header import NUMPY_DTYPES, TensorEntry, read_header
from hmoe_jax.core import CheckpointError


class SafetensorsFile:
    """Owns the read-only mapping of one file; `entries` and `metadata` are its checked header.

    Raises `CheckpointError` if the file cannot be opened or is not exactly the format. If the file is shortened while
    it is mapped, reading a page that is gone ends the process (SIGBUS), unless somebody guards the `mapping`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        content = _map(self.path)
        header = read_header(content, file=str(self.path))
        self.entries, self.metadata = header.entries, header.metadata
        self._content: mmap.mmap | None = content

    @property
    def mapping(self) -> mmap.mmap:
        """All bytes of the file."""
        if self._content is None:
            raise ValueError(f"{self.path} is closed: take arrays before leaving its `with` block")
        return self._content

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in the mapped file: nothing is copied.

        The view keeps the mapping alive, also after `close`. It may be unaligned (`flags.aligned`), since the
        format promises no alignment. A BOOL tensor is read at once: bytes other than 0 and 1 are an error.
        """
        content = self.mapping
        if name not in self.entries:
            raise CheckpointError("no such tensor", file=str(self.path), tensor=name)
        entry = self.entries[name]
        data = np.frombuffer(content, np.uint8)[entry.begin : entry.end]
        if entry.dtype == "BOOL":
            _check_bools(entry, data, file=str(self.path))
        return data.view(NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def close(self) -> None:
        """Gives up the mapping; the memory is unmapped when the last view of it is gone."""
        self._content = None

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _map(path: Path) -> mmap.mmap:
    with open_file(path) as file, os_errors_named(path):
        if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
            raise CheckpointError("is empty", file=str(path), expected="at least 8 bytes", actual="0 bytes")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_bools(entry: TensorEntry, data: np.ndarray, *, file: str) -> None:
    largest = data.max(initial=0)
    if largest > 1:
        raise CheckpointError("not booleans", file=file, tensor=entry.name, expected="0 and 1", actual=largest)
