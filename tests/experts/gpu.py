"""A GPU's driver for machines without one: `ffi/tests/stand_in_driver.cc`, built on the spot."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hmoe_jax.experts import pinned

SOURCE = Path(__file__).parents[2] / "ffi" / "tests" / "stand_in_driver.cc"

OUT_OF_MEMORY = 2


class StandInDriver:
    """What it was asked, what it holds, and how to make it fail."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.stand_in_calls.restype = ctypes.c_char_p
        self._library.stand_in_registered.restype = ctypes.c_int64

    def calls(self) -> list[str]:
        """Since the last time."""
        return self._library.stand_in_calls().decode().splitlines()

    def fail(self, function: str, *, in_calls: int = 1, error: int = OUT_OF_MEMORY) -> None:
        self._library.stand_in_fail(function.encode(), in_calls, error)

    @property
    def pinned_bytes(self) -> int:
        return self._library.stand_in_registered()


@pytest.fixture(scope="session")
def stand_in_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler to build the stand-in driver: {compiler[0]}")
    library = tmp_path_factory.mktemp("driver") / "libstand_in.so"
    subprocess.run([*compiler, "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(library)], check=True)
    return library


@pytest.fixture
def driver(stand_in_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInDriver]:
    """Stands in for the GPU's driver during a test, after which nothing may be pinned any more."""
    monkeypatch.setattr(pinned, "GPU_DRIVER", str(stand_in_library))
    stand_in = StandInDriver(stand_in_library)
    stand_in.calls()
    yield stand_in
    assert stand_in.pinned_bytes == 0
