"""Opening, reading and listing a model folder: every operating-system error becomes a `CheckpointError`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hmoe_jax.core import CheckpointError


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading; links are followed (the Hugging Face cache is made of them)."""
    with os_errors_named(path):
        # Asked before opening: opening a FIFO would wait for a writer for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError("is not a regular file", file=str(path))
        return path.open("rb")


def read_file(path: Path, *, limit_bytes: int) -> bytes:
    """The whole of a small file; one that is longer than `limit_bytes` is an error, not a full memory."""
    with open_file(path) as file, os_errors_named(path):
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise CheckpointError("too long", file=str(path), expected=f"at most {limit_bytes} bytes", actual="more")
    return content


def file_sizes(folder: Path) -> dict[str, int]:
    """Name to bytes of every regular file directly in `folder`, sorted; dangling links are left out."""
    with os_errors_named(folder), os.scandir(folder) as found:
        files = sorted((file for file in found if file.is_file()), key=lambda file: file.name)
        return {file.name: file.stat().st_size for file in files}


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file directly in the folder it is looked up in."""
    return name.isprintable() and name not in ("", ".", "..") and len(name) < 256 and not set(name) & set("/\\")


@contextmanager
def os_errors_named(path: Path) -> Iterator[None]:
    """Turns an `OSError` about `path` into a `CheckpointError` that says which path and why."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})", file=str(path)) from error
