"""Streaming prefill against the executor that has all experts as arrays, and against itself cut otherwise."""

from __future__ import annotations

import gc
import itertools
import math
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hmoe_jax.exec import copies, quantum
from hmoe_jax.exec import open as opening
from hmoe_jax.exec.batch import PrefillBatch, prefill_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.passes import TileShape
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.programs import Executor
from hmoe_jax.exec.quanta import QuantumPrograms
from hmoe_jax.exec.quantum import NOWHERE, Quantum, Room
from hmoe_jax.exec.score import Scorer, load_for_scoring
from hmoe_jax.exec.step import prefill, prefill_logits, prefill_scored
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.experts.store import ExpertStore
from tests.exec.streaming import streaming
from tests.experts.gpu import StandInDriver
from tests.oracle.bounds import relative_error
from tests.tiny import random_ids, write_tiny

LONG = 500
Reference = Callable[[str], tuple[Path, np.ndarray]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A model's folder, and the logits of `LONG` of its tokens by executor `graph`."""

    @cache
    def find(name: str) -> tuple[Path, np.ndarray]:
        folder = write_tiny(tmp_path_factory.mktemp(name), name)
        with load_for_scoring(folder, executor="graph", dtype="float32") as scorer:
            length = min(LONG, scorer.executor.layout.max_len)
            return folder, scorer.logits(random_ids(name, length).tolist())

    return find


def assert_close(actual: np.ndarray, expected: np.ndarray, bound: float) -> None:
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= bound


def check(reference: Reference, name: str, *, length: int = LONG, piece: int = 0, **setting: Any) -> None:
    folder, expected = reference(name)
    length = min(length, len(expected))
    with streaming(folder, **setting) as executor:
        actual = Scorer(executor).logits(random_ids(name, length).tolist(), piece=piece)
        bound = relative_error(executor.config, "float32", num_tokens=length)
    assert_close(actual, expected[:length], bound)


@pytest.mark.parametrize("name", ["deepseek", "halves", "factor"])
def test_every_architecture_equals_the_graph_executor(reference: Reference, name: str) -> None:
    check(reference, name)


ROOMS = {"short": [Room(0.0, late_s=math.inf)], "any": [None, Room(), Room(0.0, late_s=math.inf), NOWHERE]}


@pytest.mark.parametrize("rooms", ROOMS)
@pytest.mark.parametrize(("num_devices", "block_len"), [(1, 256), (1, 250), (2, 256)])
def test_parts_of_any_size_give_the_same_prompt(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, rooms: str, num_devices: int, block_len: int
) -> None:
    monkeypatch.setattr(quantum, "WORTH_CUTTING", 1.0)  # the shortest part that there is
    folder, expected = reference("deepseek")
    ids, give = random_ids("deepseek", LONG).tolist(), itertools.cycle(ROOMS[rooms])
    tiles = tuple(TileShape(rows, places) for rows in (16, 128) for places in (1, 3))
    sizes: dict[str, Any] = {"block_len": block_len, "group_size": 3, "tiles": tiles}
    with streaming(folder, num_devices=num_devices, fills_gaps=True, **sizes) as executor:
        batch = prefill_batch(ids, executor.layout, size=LONG, pages=range(1, 9))
        logits, quanta = in_rooms(executor, batch, give)
        bound = relative_error(executor.config, "float32", num_tokens=LONG)
        shortest = executor.stream.block_lens(LONG, num_devices)[-1]
    names = [each.name for each in quanta]
    assert all(each.has_begun == (each.name not in ("room", "copies")) for each in quanta)
    assert_close(logits, expected, bound)
    assert ("room" in names) == (rooms == "any")
    if rooms == "short":
        assert names.count("front") == -(-LONG // shortest) * executor.config.num_moe_layers


def in_rooms(executor: Executor, batch: PrefillBatch, rooms: Iterator[Room | None]) -> tuple[np.ndarray, list[Quantum]]:
    """Logits, and the quanta that gave them."""
    quanta, seen = executor.quanta(prefill_logits, batch), []
    next(quanta)
    while True:
        try:
            seen.append(quanta.send(next(rooms)))
        except StopIteration as end:
            return np.asarray(end.value), seen


@pytest.mark.parametrize("name", ["deepseek", "kimi"])
def test_no_bit_depends_on_the_parts_of_a_prompt(tmp_path: Path, name: str) -> None:
    """As served. `late_s` says how much of the room a part may miss: another one fits each time."""
    ids = random_ids(name, LONG).tolist()
    rng = random.Random(0)
    how: dict[str, Any] = {"executor": "overlap", "expert_cpus": "1", "prefill": "stream"}
    wishes = EngineOptions(max_num_seqs=1, max_model_len=512, **how)
    executor, plan = open_executor(write_tiny(tmp_path / name, name), wishes)
    with closing(executor):
        assert plan.stream is not None
        assert plan.stream.fills_gaps
        assert isinstance(executor, StreamExecutor)
        tiles = tuple(tile for tile in plan.stream.tiles if tile.rows in (16, 64, 256))  # each is a program to compile
        executor.stream = replace(plan.stream, tiles=tiles)
        page_size = executor.layout.page_size

        def logits(start: int, rooms: Iterator[Room | None]) -> np.ndarray:
            batch = prefill_batch(ids[start:], executor.layout, size=512 - start, start=start, pages=range(1, 9))
            return in_rooms(executor, batch, rooms)[0][: LONG - start].view(np.uint32)

        expected = logits(0, itertools.repeat(None))
        last_page = LONG // page_size * page_size
        for start in (0, 0, 0, page_size, last_page):  # what is before is in the cache
            rooms = (Room(rng.expovariate(1000), late_s=rng.choice([0.0, math.inf])) for _ in itertools.count())
            np.testing.assert_array_equal(logits(start, rooms), expected[start:])
            np.testing.assert_array_equal(logits(start, itertools.repeat(None)), expected[start:])
        executor.stream = replace(executor.stream, expanded_len=0)  # each block expands all that it looks at
        np.testing.assert_array_equal(logits(0, itertools.repeat(None)), expected)


@pytest.mark.parametrize("length", [1, 7])
def test_short_prompts_copy_only_the_experts_that_they_use(reference: Reference, length: int) -> None:
    folder, expected = reference("deepseek")
    ids = random_ids("deepseek", length).tolist()
    with streaming(folder, group_size=1) as executor:
        output = executor.run(prefill, prefill_batch(ids, executor.layout, size=length, pages=[1]))
        copied = sum(span.num_bytes for span in executor.recorder.copies)
        record_bytes = executor._records.num_bytes
        logits = Scorer(executor).logits(ids)
    used = sum(len(np.unique(layer)) for layer in np.asarray(output.routes))
    assert copied == used * record_bytes
    assert_close(logits, expected[:length], 1e-4)


@pytest.mark.parametrize("num_devices", [2, 3, 4])
def test_devices_divide_the_experts(reference: Reference, num_devices: int) -> None:
    # 16 experts over 3 devices are 5, 5 and 6.
    check(reference, "deepseek", num_devices=num_devices, group_size=2, block_len=24)


@pytest.mark.parametrize("group_size", [1, 3])
def test_groups_of_any_size(reference: Reference, group_size: int) -> None:
    check(reference, "halves", group_size=group_size)


def test_the_leanest_way_to_multiply_a_group(reference: Reference) -> None:
    check(reference, "kimi", length=150, variant="looped")


@pytest.mark.parametrize("expanded_len", [0, 100, 180])
@pytest.mark.parametrize(("piece", "block_len"), [(150, 500), (33, 32)])
def test_passes_and_blocks_of_any_length(reference: Reference, piece: int, block_len: int, expanded_len: int) -> None:
    """Keys and values are kept of no piece, of those that end early enough, or of all."""
    check(reference, "halves", length=180, piece=piece, block_len=block_len, expanded_len=expanded_len)


def test_scores_of_a_prompt_are_those_of_its_logits(reference: Reference) -> None:
    folder, expected = reference("halves")
    ids = random_ids("halves", 150).tolist()
    with streaming(folder) as executor:
        batch = prefill_batch(ids, executor.layout, size=160, targets=ids[1:], pages=[1, 2, 3])
        output = executor.run(prefill_scored, batch)
    log_probs = jax.nn.log_softmax(expected[:149], axis=-1)
    np.testing.assert_allclose(output.prompt.logprob[:149], log_probs[np.arange(149), np.array(ids[1:])], atol=1e-3)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_prompt_can_be_cancelled_after_every_quantum(reference: Reference, num_devices: int) -> None:
    """With a ring of three groups and three MoE layers: buffers are reused, copies run ahead of the next layer."""
    folder, expected = reference("deepseek")
    ids = random_ids("deepseek", 60).tolist()
    with streaming(folder, num_devices=num_devices, group_size=2, depth=3, block_len=32) as executor:
        scorer = Scorer(executor)
        whole = scorer.logits(ids)
        batch = prefill_batch(ids, executor.layout, size=len(ids), pages=[1])
        num_quanta = sum(1 for _ in executor.quanta(prefill_logits, batch))
        assert num_quanta >= 3 * 8 // num_devices
        baseline = len(jax.live_arrays())
        for stop in range(num_quanta):
            quanta = executor.quanta(prefill_logits, batch)
            for _ in range(stop + 1):
                quantum = next(quanta)
            assert 0 <= quantum.layer < quantum.num_layers
            quanta.close()
            assert len(jax.live_arrays()) <= baseline
            np.testing.assert_array_equal(scorer.logits(ids), whole)
    assert_close(whole, expected[:60], 1e-4)


def test_two_gpus_get_collectives_and_no_cpu_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a served (BF16) model's programs lower to for `cuda`, from a machine without one."""
    folder = write_tiny(tmp_path / "deepseek", "deepseek")
    lowered: dict[str, str] = {}

    def traced(self: QuantumPrograms, form: Any, name: str, *rest: Any) -> Any:
        program = trace(self, form, name, *rest)
        lowered[name.split("_", maxsplit=1)[0]] = program.lower(lowering_platforms=("cuda",)).as_text()
        return program

    trace, pools = QuantumPrograms._traced, opening._pools
    monkeypatch.setattr(QuantumPrograms, "_traced", traced)
    monkeypatch.setattr(opening, "_pools", lambda plan, owned, platform: pools(plan, owned, platform="gpu"))
    wishes = EngineOptions(prefill="stream", prefill_devices=2, max_num_seqs=1, max_model_len=100)
    executor, _ = open_executor(folder, wishes)
    try:
        executor.run(prefill, prefill_batch([5] * 40, executor.layout, size=40, pages=[1]))
    finally:
        executor.close()
    assert set(lowered) == {"begin", "attention", "mlp", "front", "sort", "group", "back"}
    assert all("hmoe_" not in text and "mhlo.num_partitions = 2" in text for text in lowered.values())
    for name in ("attention", "mlp", "front", "back"):
        assert "stablehlo.all_gather" in lowered[name]
    assert lowered["back"].count("stablehlo.reduce_scatter") == 1  # the one sum over the devices of a layer
    for name in ("sort", "group"):  # each for itself
        assert "all_gather" not in lowered[name]
        assert "reduce_scatter" not in lowered[name]
    assert "f8E4M3FN" in lowered["group"]  # decoded inside the program


def test_two_processes_stream_one_prompt(tmp_path: Path) -> None:
    """The same bits as two devices of one process: each copies half of the experts."""
    folder = write_tiny(tmp_path / "deepseek", "deepseek")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.exec.two_processes", str(folder), str(port)]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    with load_for_scoring(folder, prefill="stream", prefill_devices=2, max_model_len=200) as scorer:
        expected = scorer.logits(random_ids("deepseek", 90).tolist())
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npy"), expected)


@pytest.mark.parametrize("failing", [0, 1, 9])
def test_a_copy_that_fails_harms_no_later_prompt(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    folder, _ = reference("deepseek")
    ids = random_ids("deepseek", 60).tolist()
    with streaming(folder, group_size=2, depth=3) as executor:
        scorer = Scorer(executor)
        whole = scorer.logits(ids)
        copy_records, calls = ExpertStore.copy_records, itertools.count()

        def copy(self: ExpertStore, *args: Any) -> None:
            if next(calls) == failing:
                raise ValueError("the link is down")
            copy_records(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(ExpertStore, "copy_records", copy)
            with pytest.raises(ValueError, match="the link is down"):
                scorer.logits(ids)
        np.testing.assert_array_equal(scorer.logits(ids), whole)


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("kind", ["pinned", "staged"])
def test_other_ways_to_the_device_give_the_same_bits(
    reference: Reference, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch, num_devices: int, kind: str
) -> None:
    folder, _ = reference("deepseek")
    sizes: dict[str, Any] = {"num_devices": num_devices, "group_size": 3}
    ids = [random_ids("deepseek", length).tolist() for length in (2, 90)]
    with streaming(folder, **sizes) as executor:
        expected = [Scorer(executor).logits(each) for each in ids]
    if kind == "staged":
        monkeypatch.setattr(copies, "HostRecords", copies.StagedRecords)
    with streaming(folder, residency="auto" if kind == "staged" else "pinned", **sizes) as executor:
        assert all(lane.source.part_rows == 1 for lane in executor.lanes.values())
        assert driver.pinned_bytes > 0
        for prompt, logits in zip(ids, expected, strict=True):
            np.testing.assert_array_equal(Scorer(executor).logits(prompt), logits)
        executor._warm_up_prefill(32)
    gc.collect()


def test_a_prompt_that_waits_for_a_copy_is_cancelled_at_once(reference: Reference) -> None:
    """Every group takes a second to come, the whole prompt more than twenty."""
    folder, _ = reference("deepseek")
    with streaming(folder, group_size=2, depth=3) as executor:
        batch = prefill_batch(random_ids("deepseek", 60).tolist(), executor.layout, size=60, pages=[1])
        executor.run(prefill, batch)  # compiles
        (lane,) = executor.lanes.values()
        lane._link_gbps = 2 * executor._records.num_bytes / 1e9
        begin = time.perf_counter()
        with closing(executor.quanta(prefill, batch)) as quanta:
            for _ in quanta:
                if time.perf_counter() > begin + 2:
                    break
        assert time.perf_counter() - begin < 2 + 1 + 2  # the copy that is under way, and a slow machine
        lane._link_gbps = None
        executor.run(prefill, batch)
