"""Decoding with the experts beside the program gives the bits of the program that computes them itself."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.engine import Engine
from hmoe_jax.exec.activity import Activity
from hmoe_jax.exec.batch import DecodeRow, decode_batch, prefill_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.programs import Executor, StepFunction
from hmoe_jax.exec.step import decode_in_one, decode_in_two, decode_logits, decode_logits_beside, prefill
from tests.serving import assert_idle, drawn, tokens
from tests.tiny import random_ids, write_tiny

NUM_SEQUENCES, CONTEXT, PAGES_EACH = 4, 9, 2
EXPERT_CPUS = "1"
"""Need not exist: then the threads are not pinned."""


@pytest.fixture(scope="module", params=["deepseek", "kimi"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("beside"), request.param)


@pytest.fixture(scope="module")
def executor(folder: Path) -> Iterator[Executor]:
    options = EngineOptions(
        max_num_seqs=NUM_SEQUENCES, max_model_len=128, executor="overlap", expert_cpus=EXPERT_CPUS, device="cpu"
    )
    executor, _ = open_executor(folder, options)
    yield executor
    executor.close()


def pages(sequence: int) -> range:
    return range(1 + sequence * PAGES_EACH, 1 + (sequence + 1) * PAGES_EACH)


def fill(executor: Executor) -> None:
    """The cache: different prompts of different lengths."""
    for i in range(NUM_SEQUENCES):
        ids = random_ids("plain", CONTEXT + 7 * i, seed=i) % executor.config.vocab_size
        batch = prefill_batch(ids.tolist(), executor.layout, size=len(ids), slot=i, pages=pages(i))
        executor.run(prefill, batch)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_logits_are_those_of_experts_inside_the_program_bit_for_bit(executor: Executor, num_rows: int) -> None:
    rows = [DecodeRow(3 + i, CONTEXT + 7 * i, slot=i, pages=pages(i)) for i in range(num_rows)]
    size = executor.buckets.for_decode(num_rows)
    batch = decode_batch(rows, executor.layout, size=size, num_slots=executor.num_slots)
    fill(executor)
    inside = np.asarray(executor.run(decode_logits, batch))[:num_rows]
    fill(executor)
    for _ in range(3):
        beside = np.asarray(executor.run(decode_logits_beside, batch))[:num_rows]
        np.testing.assert_array_equal(beside, inside)


@pytest.mark.parametrize(("num_rows", "num_parts"), [(1, 1), (3, 1), (4, 2)])
def test_the_loop_on_the_host_gives_the_bits_of_the_compiled_step(
    executor: Executor, monkeypatch: pytest.MonkeyPatch, num_rows: int, num_parts: int
) -> None:
    rows = [DecodeRow(3 + i, CONTEXT + 7 * i, slot=i, pages=pages(i)) for i in range(num_rows)]
    size = executor.buckets.for_decode(num_rows)
    batch = decode_batch(rows, executor.layout, size=size, num_slots=executor.num_slots)
    outcomes, gaps = [], []
    monkeypatch.setattr(executor.lane, "is_done", lambda *_: False)  # asks even if the experts were faster

    def look(seconds: float) -> bool:
        gaps.append(seconds)
        return False

    for run in (
        lambda: executor.run(decode_in_two if num_parts == 2 else decode_in_one, batch),
        lambda: executor.loop(batch, num_parts=num_parts, meanwhile=look),
    ):
        executor.reset()
        fill(executor)
        output = run()
        outcomes.append(jax.device_get((output.sampled, output.routes, executor._state.taken.caches)))
    jax.tree.map(np.testing.assert_array_equal, *outcomes)
    assert len(gaps) == num_parts * executor.config.num_moe_layers
    assert set(gaps[:num_parts]) != set(gaps[-num_parts:])  # of every job another


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_host_waits_once_for_the_device_and_once_for_the_experts_of_a_part_and_layer(
    executor: Executor, monkeypatch: pytest.MonkeyPatch, num_parts: int
) -> None:
    rows = [DecodeRow(3 + i, CONTEXT, slot=i, pages=pages(i)) for i in range(4)]
    batch = decode_batch(rows, executor.layout, size=4, num_slots=executor.num_slots)
    executor.loop(batch, num_parts=num_parts)  # compiles
    calls: list[str] = []

    def noted(module: Any, name: str, call: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(call), function(*args, **kwargs))[1])

    array = type(jnp.zeros(1))
    for module, name in ((array, "__array__"), (array, "block_until_ready"), (jax, "block_until_ready")):
        noted(module, name, "device")
    noted(jax, "device_get", "device")
    noted(executor.lane, "submit", "submit")
    noted(executor.lane, "wait", "wait")
    executor.loop(batch, num_parts=num_parts)
    count = num_parts * executor.config.num_moe_layers
    assert (calls.count("submit"), calls.count("wait")) == (count, count)
    # Before each job it reads the three results of one program, of which the first is waited for.
    assert count <= calls.count("device") <= 3 * count
    assert [call for call, _ in itertools.groupby(calls)][:2] == ["device", "submit"]


def test_what_runs_in_the_gaps_of_a_step_changes_nothing_of_it(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of somebody else's, piece by piece, through the same caches."""
    monkeypatch.setattr(executor.lane, "is_done", lambda *_: False)  # asks even if the experts were faster
    rows = [DecodeRow(3 + i, CONTEXT + 7 * i, slot=i, pages=pages(i)) for i in range(3)]
    batch = decode_batch(rows, executor.layout, size=4, num_slots=executor.num_slots)
    prompt = prefill_batch([5, 6, 7], executor.layout, size=3, slot=3, pages=pages(3), is_last=True)
    outcomes = []
    for count in (0, 3):
        left = iter(range(count))

        def meanwhile(seconds: float, left: Iterator[int] = left) -> bool:
            if next(left, None) is None:
                return False
            executor.run(prefill, prompt)
            return True

        executor.reset()
        fill(executor)
        output = executor.step(batch, meanwhile=meanwhile)
        assert next(left, None) is None
        caches = [np.delete(np.asarray(cache), pages(3), axis=0)[1:] for cache in executor._state.caches]
        outcomes.append(jax.device_get((output.sampled, output.routes, caches)))
    jax.tree.map(np.testing.assert_array_equal, *outcomes)


def test_the_program_gives_the_lane_both_parts_before_it_waits_for_one(executor: Executor) -> None:
    """In the order in which the CPU runs them: A, then B and A in turn."""
    batch = executor.empty_decode(4)
    text = executor._traced(decode_logits_beside, batch).lower().compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="hmoe_experts_' in line]
    kinds = ["submit" if "experts_submit" in line else "wait" for line in calls]
    num_layers = executor.config.num_moe_layers
    assert sorted(kinds) == ["submit"] * 2 * num_layers + ["wait"] * 2 * num_layers
    is_scheduled = "is_scheduled=true" in text
    assert is_scheduled
    assert kinds == ["submit", "submit", *["wait", "submit"] * 2 * (num_layers - 1), "wait", "wait"]


@pytest.mark.parametrize("function", [decode_in_one, decode_in_two])
@pytest.mark.parametrize("size", [2, 4])
def test_no_step_copies_a_cache(executor: Executor, function: StepFunction, size: int) -> None:
    program = executor._compile(function, executor.empty_decode(size)).as_text()
    shape = ",".join(map(str, executor._state.caches[0].shape))
    caches = re.findall(rf"= u16\[{shape}\]\S* ([\w-]+)", program)
    assert "parameter" in caches
    assert "copy" not in caches


def test_the_same_program_lowers_for_cuda(executor: Executor) -> None:
    text = (
        executor._traced(decode_logits_beside, executor.empty_decode(4)).lower(lowering_platforms=("cuda",)).as_text()
    )
    num_calls = 2 * executor.config.num_moe_layers
    assert text.count("@hmoe_experts_submit(") == text.count("@hmoe_experts_wait(") == num_calls


def test_an_engine_writes_what_the_fused_one_writes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "deepseek", with_tokenizer=True)
    prompts = [random_ids("plain", 5 + 9 * i, seed=i) % 250 + 2 for i in range(5)]
    params = [drawn(12 + i, seed=i, temperature=1.2) for i in range(5)]
    options = {"max_num_seqs": NUM_SEQUENCES, "max_model_len": 128, "warm_up": False, "compilation_cache": None}
    written, efficiencies, activities = [], [], []
    for wishes in (
        {"executor": "fused"},
        {"executor": "overlap", "expert_cpus": EXPERT_CPUS, "microbatches": 2},
    ):
        with Engine(folder, **wishes, **options, use_tqdm=False) as engine:
            outputs = engine.generate([each.tolist() for each in prompts], params, use_tqdm=False)
            written.append(tokens(outputs))
            efficiencies.append(engine.metrics().overlap_efficiency)
            before = engine.metrics()
            activities.append(engine.activity())
            jobs = [] if engine._executor.lane is None else engine._executor.lane.jobs()
            assert_idle(engine)
        after = engine.metrics()  # of a closed engine
        assert (after.experts_busy_s, after.num_generated_tokens) == (
            before.experts_busy_s,
            before.num_generated_tokens,
        )
        assert engine.activity() == activities[-1]
    assert written[1] == written[0]
    assert (efficiencies[0], activities[0]) == (0.0, Activity())
    assert 0 <= efficiencies[1] <= 1
    pairs = [(a, b) for a, b in itertools.pairwise(jobs) if b.slot == 1]
    assert pairs
    for a, b in pairs:
        assert (a.slot, a.layer) == (0, b.layer)
        # The device computed B's front when the experts had A, and waits for A when they have B.
        assert a.submitted_s <= b.submitted_s <= a.awaited_s
    for spans in (activities[1].device, activities[1].experts):
        assert {"A", "B"} <= {span.name for span in spans}
        assert all(first.end <= second.begin for first, second in itertools.pairwise(spans))


def test_a_store_that_is_closed_under_a_step_is_an_error_and_not_a_hang(folder: Path) -> None:
    options = EngineOptions(max_num_seqs=2, max_model_len=64, executor="overlap", expert_cpus=EXPERT_CPUS)
    executor, _ = open_executor(folder, options)
    executor._backend.store.close()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"expert store \d+ is closed"):
        jax.block_until_ready(executor.step(executor.empty_decode(2)))
    executor.close()
