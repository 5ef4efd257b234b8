"""An optional `SHA256SUMS` in the model folder: what makes one flipped bit of a weight an error.

The format is that of `sha256sum`: `sha256sum -c SHA256SUMS` checks the same digests without this package.
"""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

from hmoe_jax.checkpoint.files import file_sizes, is_plain_name, open_file, os_errors_named, read_file
from hmoe_jax.core import CheckpointError

SUMS_NAME = "SHA256SUMS"
TEMPORARY_NAME = "SHA256SUMS.tmp"
MUST_BE_LISTED = (".safetensors", ".json")
AUTO_LIMIT_BYTES = 1 << 30  # a few seconds of hashing
MAX_SUMS_BYTES = 10_000_000
CHUNK_BYTES = 1 << 20
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def should_verify(folder: str | Path, verify: bool | Literal["auto"]) -> bool:
    """Whether to `verify` before loading: as told, or with "auto" if there are sums and under 1 GiB to hash.

    Hashing 650 GB adds minutes to a start: say `True` for that, or run `sha256sum -c` once after a download.
    """
    if isinstance(verify, bool):
        return verify
    if verify != "auto":
        raise ValueError(f"verify must be True, False or 'auto', got {verify!r}")
    return SUMS_NAME in file_sizes(Path(folder)) and covered_bytes(folder) < AUTO_LIMIT_BYTES


def covered_bytes(folder: str | Path) -> int:
    """Bytes of all files that sums are about: the total of a progress bar."""
    return sum(_covered_files(Path(folder)).values())


def verify(
    folder: str | Path, *, on_bytes: Callable[[int], object] = lambda num_bytes: None, num_threads: int = 8
) -> None:
    """Raises `CheckpointError` unless every file listed in `SHA256SUMS` is there and has its digest.

    A safetensors or JSON file that is not listed is an error too: it could steer the load unseen.
    `on_bytes` is called from several threads, with the bytes hashed since the call before.
    """
    folder = Path(folder)
    digests = _read_sums(folder / SUMS_NAME)
    _check_listing(folder, digests)

    def check(name: str) -> None:
        actual = _sha256(folder / name, on_bytes=on_bytes)
        if actual != digests[name]:
            problem = f"SHA-256 is not that of {SUMS_NAME}"
            raise CheckpointError(problem, file=str(folder / name), expected=digests[name], actual=actual)

    # hashlib lets go of the GIL. The first error cancels the files that are not begun.
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(check, digests):
            pass


def write_sums(
    folder: str | Path, *, on_bytes: Callable[[int], object] = lambda num_bytes: None, num_threads: int = 8
) -> Path:
    """Writes `SHA256SUMS` of all regular files directly in `folder`, replacing older sums in one step.

    Returns its path. Raises `CheckpointError` for a file that cannot be read or whose name cannot be listed,
    `OSError` if the folder cannot be written. `on_bytes` as in `verify`.
    """
    folder = Path(folder)
    names = list(_covered_files(folder))
    _check_names(names, file=str(folder))
    with ThreadPoolExecutor(num_threads) as pool:
        digests = list(pool.map(partial(_sha256, on_bytes=on_bytes), [folder / name for name in names]))
    lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    return _write_atomically(folder, "".join(lines))


def _covered_files(folder: Path) -> dict[str, int]:
    sizes = file_sizes(folder)
    return {name: size for name, size in sizes.items() if name not in (SUMS_NAME, TEMPORARY_NAME)}


def _read_sums(path: Path) -> dict[str, str]:
    """File name to digest."""
    error = partial(CheckpointError, file=str(path))
    try:
        text = read_file(path, limit_bytes=MAX_SUMS_BYTES).decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"not UTF-8 ({cause})") from cause
    digests: dict[str, str] = {}
    # Not `splitlines`, which splits at more than the line feed.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        match = LINE.fullmatch(line)
        if not match:
            expected = "64 lower-case hex digits, two spaces, a file name"
            raise error(f"malformed line {number}", expected=expected, actual=reprlib.repr(line))
        digest, name = match.groups()
        if name in digests:
            raise error(f"line {number} lists {name!r} a second time")
        digests[name] = digest
    _check_names(digests, file=str(path))
    return digests


def _check_names(names: Iterable[str], *, file: str) -> None:
    for name in names:
        if not is_plain_name(name):
            expected = "a plain name, of a file in the same folder"
            raise CheckpointError("unusable file name", file=file, expected=expected, actual=reprlib.repr(name))


def _check_listing(folder: Path, digests: dict[str, str]) -> None:
    present = file_sizes(folder)
    for name in digests:
        if name not in present:
            raise CheckpointError(f"is in {SUMS_NAME}, but not in the folder", file=str(folder / name))
    for name in present:
        if name.endswith(MUST_BE_LISTED) and name not in digests:
            raise CheckpointError(f"is not in {SUMS_NAME}", file=str(folder / name))


def _sha256(path: Path, *, on_bytes: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file, os_errors_named(path):
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def _write_atomically(folder: Path, text: str) -> Path:
    target, temporary = folder / SUMS_NAME, folder / TEMPORARY_NAME
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a crash could leave the new name with no content
    return temporary.replace(target)
