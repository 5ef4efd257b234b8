from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from hmoe_jax.exec import cache
from hmoe_jax.exec.cache import default_cache_dir, enable_compilation_cache


@pytest.fixture(autouse=True)
def cache_setting() -> Iterator[None]:
    """The cache is JAX's, of the whole process: other tests shall not find it on."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A directory that nobody can make, not even root: below a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "below"


def compile_something(constant: float) -> None:
    jax.jit(lambda x: jnp.sort(x) * constant)(jnp.arange(5.0)).block_until_ready()


def test_compiled_programs_are_stored_in_the_named_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MIN_COMPILE_S", 0.0)
    for name in ("first/of/all", "second"):
        enable_compilation_cache(tmp_path / name)
        compile_something(float(len(name)))
        assert list((tmp_path / name).iterdir())


def test_none_leaves_the_setting_alone() -> None:
    before = jax.config.jax_compilation_cache_dir
    enable_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_named_directory_that_cannot_be_written_is_an_error(blocked: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(ValueError, match=r"compilation cache .*below cannot be written \(.+\): name another"):
        enable_compilation_cache(blocked)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_default_directory_that_cannot_be_written_is_a_warning(
    blocked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    before = jax.config.jax_compilation_cache_dir
    with caplog.at_level(logging.WARNING):
        enable_compilation_cache("auto")
    assert f"compilation cache {blocked}" in caplog.text
    assert "every start compiles anew" in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


def test_no_home_directory_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    enable_compilation_cache("auto")
    assert caplog.messages == ["no compilation cache (Could not determine home directory.): every start compiles anew"]
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_is_configured_already_is_left_alone_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert not (tmp_path / "default").exists()
    enable_compilation_cache(tmp_path / "named")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")


def test_an_entry_left_empty_by_an_interrupt_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MIN_COMPILE_S", 0.0)

    def run() -> set[Path]:
        jax.clear_caches()
        enable_compilation_cache(tmp_path)
        compile_something(7.0)
        return set(tmp_path.iterdir())

    entries = run()
    for entry in entries:
        entry.write_bytes(b"")
    assert run() == entries  # and JAX's warning of an unreadable entry would be an error
    assert all(entry.stat().st_size for entry in entries)


def test_the_default_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_cache_dir() == tmp_path / "cache" / "hmoe_jax" / "xla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "hmoe_jax" / "xla"
    enable_compilation_cache("auto")
    assert default_cache_dir().is_dir()
