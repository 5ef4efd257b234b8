"""JAX's persistent compilation cache: a second start compiles nothing."""

from __future__ import annotations

import logging
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

import jax
from jax.experimental.compilation_cache import compilation_cache

from hmoe_jax.core import cache_home

logger = logging.getLogger(__name__)

MIN_COMPILE_S = 0.1
"""Programs that compile faster than this are not stored."""


def default_cache_dir() -> Path:
    return cache_home() / "xla"


def enable_compilation_cache(directory: str | Path | Literal["auto"] | None) -> None:
    """Turns the cache on for this process: it is a setting of JAX's, shared by all engines.

    None leaves that setting alone, and so does "auto" where there is one already (`JAX_COMPILATION_CACHE_DIR`).
    Raises `ValueError` for a directory that cannot be written; with "auto" that is a warning, and no cache.
    """
    if directory is None or (directory == "auto" and jax.config.values["jax_compilation_cache_dir"]):
        return
    try:
        path = default_cache_dir() if directory == "auto" else Path(directory)
    except RuntimeError as error:  # no home directory
        logger.warning("no compilation cache (%s): every start compiles anew", error)
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        problem = f"compilation cache {path} cannot be written ({error.strerror})"
        if directory != "auto":
            raise ValueError(f"{problem}: name another compilation_cache, or None") from None
        logger.warning("%s: every start compiles anew", problem)
        return
    _remove_empty_entries(path)
    compilation_cache.reset_cache()  # JAX keeps to the first directory that it has used
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)


def _remove_empty_entries(path: Path) -> None:
    """What Ctrl-C leaves of an entry that JAX was about to write, never to replace it: a warning at every start.

    An entry cut off inside (SIGTERM, a full disk) cannot be told without unpacking all: JAX warns and compiles anew.
    """
    for entry in path.glob("*-cache"):
        with suppress(OSError):  # gone by now, or somebody else's
            if entry.stat().st_size == 0:
                entry.unlink()
