"""Compiled steps: which there are, and what they leave alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hmoe_jax.engine import Engine
from hmoe_jax.exec.batch import DecodeRow, decode_batch, prefill_batch
from hmoe_jax.exec.programs import Executor
from hmoe_jax.sampling import sampler_row
from hmoe_jax.sampling_params import SamplingParams
from tests.serving import NUM_SLOTS, PREFILL_LEN, prompt


@pytest.fixture
def executor(engine: Engine) -> Iterator[Executor]:
    """That of a warm engine, which serves nobody now."""
    return engine._executor


def admit(executor: Executor, slot: int, *, seed: int = 0) -> None:
    params = SamplingParams(temperature=1.0, logprobs=1)
    executor.admit(slot, sampler_row(params, executor.config.vocab_size, prompt_ids=(), stop_ids=(), seed=seed))


def drawn(executor: Executor) -> list[int]:
    return np.asarray(executor._state.sampler.drawn).tolist()


def test_there_is_a_program_for_every_kind_and_bucket(executor: Executor) -> None:
    buckets = executor.buckets
    kinds = {"prefill": buckets.prefill, "prefill_scored": (buckets.scored,), "decode": buckets.decode}
    assert {(kind, size) for kind, sizes in kinds.items() for size in sizes} <= set(executor.programs)


def test_programs_are_named_after_their_step_and_bucket(executor: Executor) -> None:
    program = executor.programs["decode", NUM_SLOTS]
    assert f"jit_decode_{NUM_SLOTS}" in program.as_text()[:200]


def test_padding_is_routed_nowhere(executor: Executor) -> None:
    routes = np.asarray(executor.step(executor.empty_prefill(PREFILL_LEN)).routes)
    config = executor.config
    assert routes.shape == (config.num_moe_layers, PREFILL_LEN, config.top_k)
    assert (routes[:, 0] >= 0).all()
    assert (routes[:, 1:] == -1).all()
    assert (np.asarray(executor.step(executor.empty_decode(4)).routes) == -1).all()


def test_only_rows_that_draw_move_on(executor: Executor) -> None:
    for slot in range(3):
        admit(executor, slot)
    before = drawn(executor)
    pieces = [(False, [1, 1]), (True, [1, 2])]
    for index, (is_last, pages) in enumerate(pieces):
        batch = prefill_batch(
            prompt(4), executor.layout, size=PREFILL_LEN, start=4 * index, is_last=is_last, slot=1, pages=pages
        )
        executor.step(batch)
    assert np.subtract(drawn(executor), before).tolist() == [0, 1, 0, *[0] * (NUM_SLOTS - 2)]
    rows = [DecodeRow(5, 8, 1, [1]), DecodeRow(5, 0, 2, [2])]
    executor.step(decode_batch(rows, executor.layout, size=4, num_slots=NUM_SLOTS))
    assert np.subtract(drawn(executor), before).tolist() == [0, 2, 1, *[0] * (NUM_SLOTS - 2)]


def test_admission_resets_a_slot_and_no_other(executor: Executor) -> None:
    admit(executor, 0)
    admit(executor, 3)
    executor.step(prefill_batch(prompt(4), executor.layout, size=PREFILL_LEN, is_last=True, slot=0, pages=[1]))
    executor.step(prefill_batch(prompt(4), executor.layout, size=PREFILL_LEN, is_last=True, slot=3, pages=[2]))
    admit(executor, 0)
    assert (drawn(executor)[0], drawn(executor)[3]) == (0, 1)


def test_pages_of_others_keep_their_bits(executor: Executor) -> None:
    before = [np.array(cache) for cache in executor._state.caches]
    executor.step(
        prefill_batch(prompt(32), executor.layout, size=PREFILL_LEN, start=50, is_last=True, slot=0, pages=[3, 7])
    )
    rows = [DecodeRow(5, 82, 0, [3, 7]), DecodeRow(6, 1, 1, [9])]
    executor.step(decode_batch(rows, executor.layout, size=4, num_slots=NUM_SLOTS))
    for old, new in zip(before, executor._state.caches, strict=True):
        touched = set(np.flatnonzero((old != np.asarray(new)).any(axis=(1, 2))).tolist())
        assert touched <= {0, 3, 7, 9}
        assert {3, 7, 9} <= touched


def test_a_prompts_scores_come_only_if_asked(executor: Executor) -> None:
    batch = prefill_batch(prompt(4), executor.layout, size=PREFILL_LEN, targets=prompt(4)[1:], slot=NUM_SLOTS)
    assert executor.step(batch).prompt is None
    scored = executor.step(batch, scored=True).prompt
    assert np.asarray(scored.tokens)[:3].tolist() == prompt(4)[1:]
    assert (np.asarray(scored.logprob)[:3] < 0).all()
