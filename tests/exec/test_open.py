from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.core import CheckpointError, ConfigError
from hmoe_jax.exec import host_memory
from hmoe_jax.exec import open as open_module
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.step import decode
from hmoe_jax.experts.store import ExpertStore
from hmoe_jax.kernels.pool import ThreadPool
from tests.tiny import write_tiny

SMALL = {"max_model_len": 40, "max_num_seqs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("factor"), "factor", num_shards=2)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the native objects that were closed."""
    names: list[str] = []
    for owner in (ThreadPool, ExpertStore):

        def close(self: Any, *, name: str = owner.__name__, close: Any = owner.close) -> None:
            names.append(name)
            close(self)

        monkeypatch.setattr(owner, "close", close)
    return names


@pytest.mark.parametrize(("executor", "owned"), [("fused", ["ExpertStore", "ThreadPool"]), ("graph", [])])
def test_closing_an_executor_closes_what_it_owns_once_the_store_first(
    folder: Path, closed: list[str], executor: str, owned: list[str]
) -> None:
    opened, plan = open_executor(folder, EngineOptions(executor=executor, **SMALL))
    assert plan.executor == executor
    assert closed == []
    opened.close()
    opened.close()
    assert closed == owned


@pytest.mark.parametrize(
    ("failing", "left"),
    [
        ("load_experts", ["ThreadPool"]),
        ("load_weights", ["ExpertStore", "ThreadPool"]),
        ("Executor", ["ExpertStore", "ThreadPool"]),
    ],
)
def test_a_failure_on_the_way_leaves_nothing_open(
    folder: Path, closed: list[str], monkeypatch: pytest.MonkeyPatch, failing: str, left: list[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(open_module.fused if failing == "load_experts" else open_module, failing, fail)
    with pytest.raises(MemoryError, match="no room"):
        open_executor(folder, EngineOptions(**SMALL))
    assert closed == left


@pytest.mark.parametrize("name", ["deepseek", "plain"])
@pytest.mark.parametrize(
    "wishes", [{"executor": "fused"}, {"executor": "fused", "residency": "arena"}, {"executor": "graph"}], ids=str
)
def test_the_bar_counts_what_is_read_and_ends_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wishes: dict[str, Any]
) -> None:
    bars: dict[str, list[int]] = {}

    @contextmanager
    def progress(total_bytes: int, *, label: str) -> Iterator[Callable[[int], None]]:
        bars[label] = [total_bytes]
        yield bars[label].append

    monkeypatch.setattr(open_module, "byte_progress", progress)
    write_tiny(tmp_path, name)
    open_executor(tmp_path, EngineOptions(**wishes, **SMALL))[0].close()
    with open_checkpoint(tmp_path) as checkpoint:
        mtp_prefix = "model.layers.4." if name == "deepseek" else "none"
        kept = {entry.name: entry.num_bytes for entry in checkpoint.entries.values() if mtp_prefix not in entry.name}
    mapped = {tensor for tensor in kept if ".mlp.experts." in tensor and tensor.endswith(".weight")}
    expected = sum(size for tensor, size in kept.items() if wishes != {"executor": "fused"} or tensor not in mapped)
    total, *told = bars["loading"]
    assert total == sum(told) == expected


def test_automatic_choices_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        executor, plan = open_executor(folder, EngineOptions(**SMALL))
    executor.close()
    for line in plan.describe():
        assert line in caplog.text


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_executor(tmp_path, EngineOptions())


def test_checksums_are_verified_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  config.json\n")
    monkeypatch.setattr(open_module, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    try:
        with pytest.raises(CheckpointError, match="is not in SHA256SUMS"):
            open_executor(folder, EngineOptions(**SMALL))
    finally:
        sums.unlink()


def test_an_arena_that_host_memory_cannot_hold_is_refused_before_anything_is_read(
    folder: Path, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1000)
    monkeypatch.setattr("hmoe_jax.exec.fused.ExpertStore", lambda *_, **__: pytest.fail("a store was made"))
    with pytest.raises(
        ValueError, match=r"residency 'arena' needs [\d,]+ bytes of host memory .*, but 1,000 are avail"
    ):
        open_executor(folder, EngineOptions(residency="arena", **SMALL))
    assert closed == ["ThreadPool"]


def test_a_decode_step_lowers_for_a_gpu_with_a_call_to_the_cpu_for_each_layer(folder: Path) -> None:
    executor, _ = open_executor(folder, EngineOptions(**SMALL))
    model = (executor._weights, executor._backend.operand, executor._state, executor.empty_decode(1))
    try:
        text = executor._traced(decode, model[-1]).lower(lowering_platforms=("cuda",)).as_text()
        num_layers = executor.config.num_moe_layers
    finally:
        executor.close()
    calls = re.findall(r"custom_call @(\w*hmoe\w*)", text)
    assert calls == ["hmoe_moe_experts"] * num_layers
