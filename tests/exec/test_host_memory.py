"""What the machine has, and what a container leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hmoe_jax.exec import host_memory
from hmoe_jax.exec.plan import find_hardware

ALL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def container(folder: Path, monkeypatch: pytest.MonkeyPatch, *, limit: str, in_use: int = 0, cached: int = 0) -> None:
    files = folder / "memory.max", folder / "memory.current"
    files[0].write_text(f"{limit}\n")
    files[1].write_text(f"{in_use}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    monkeypatch.setattr(host_memory, "CGROUPS", (files,))


def test_a_containers_limit_is_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container(tmp_path, monkeypatch, limit="1000000", in_use=700_000, cached=100_000)
    assert find_hardware("cpu").memory_bytes == host_memory.usable_bytes() == 1_000_000
    assert host_memory.available_bytes() == 400_000


def test_a_container_that_uses_more_than_its_limit_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container(tmp_path, monkeypatch, limit="1000000", in_use=1_100_000)
    assert host_memory.available_bytes() == 0


@pytest.mark.parametrize("limit", ["max", "9223372036854771712"])
def test_without_a_limit_all_memory_is_the_processs(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container(tmp_path, monkeypatch, limit=limit)
    assert host_memory.usable_bytes() == ALL
    assert 0 < host_memory.available_bytes() < ALL


def test_without_a_container_all_memory_is_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CGROUPS", ())
    assert host_memory.usable_bytes() == ALL
