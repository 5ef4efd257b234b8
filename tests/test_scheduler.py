"""First come, first served; every page and slot has one owner; everything finishes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.request import Sequence, StopRules
from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.scheduler import Decode, Prefill, Scheduler

MAX_LEN, PREFILL_LEN, NUM_SLOTS, NUM_PAGES = 30, 6, 3, 13
LAYOUT = CacheLayout(num_layers=1, num_pages=NUM_PAGES, page_size=4, latent_dim=1, chunk_pages=2, max_len=MAX_LEN)


def scheduler() -> Scheduler:
    return Scheduler(LAYOUT, num_slots=NUM_SLOTS, piece_len=lambda remaining: min(remaining, PREFILL_LEN))


def sequence(prompt_len: int, max_tokens: int | None = 5) -> Sequence:
    return Sequence(
        list(range(prompt_len)),
        SamplingParams(max_tokens=max_tokens),
        index=0,
        seed=0,
        rules=StopRules(eos_ids=(), stop_ids=(), max_len=MAX_LEN),
        tokenizer=None,
    )


def compute(work: Prefill | Decode, *, at_most: int = PREFILL_LEN) -> None:
    """What an engine does with a step, as far as a scheduler can see: `at_most` prompt tokens, or a token each."""
    if isinstance(work, Prefill):
        work.sequence.num_computed += min(work.length, at_most)
        drawing = [work.sequence] if work.sequence.num_computed == len(work.sequence.prompt_ids) else []
    else:
        drawing = list(work.sequences)
    for each in drawing:
        each.token_ids.append(0)
        if len(each.prompt_ids) + len(each.token_ids) == each.max_len:
            each.finish("length", None)


def test_nothing_to_do_is_none() -> None:
    assert scheduler().next() is None
    assert not scheduler().has_work


def test_prompts_go_before_decoding_and_in_pieces() -> None:
    queue, first, second = scheduler(), sequence(4), sequence(14)
    queue.add(first)
    work = queue.next()
    assert (work.sequence, work.start, work.length, work.is_first) == (first, 0, 4, True)
    compute(work)
    assert queue.next() == Decode((first,))
    queue.add(second)
    pieces = []
    while isinstance(work := queue.next(), Prefill):
        assert work.sequence is second
        pieces.append((work.start, work.length, work.is_first))
        compute(work)
    assert pieces == [(0, 6, True), (6, 6, False), (12, 2, False)]
    assert work == Decode((first, second))


def test_a_sequence_admitted_during_anothers_prompt_is_first_when_it_starts() -> None:
    queue, long, short = scheduler(), sequence(14), sequence(3)
    queue.add(long)
    queue.add(short)
    order = []
    while isinstance(work := queue.next(), Prefill):
        order.append((work.sequence is short, work.is_first))
        compute(work)
    assert order == [(False, True), (False, False), (False, False), (True, True)]


def test_a_step_that_was_not_computed_is_offered_again() -> None:
    queue, one = scheduler(), sequence(4)
    queue.add(one)
    assert queue.next() == queue.next() == Prefill(one, 0, 4)


def test_nobody_overtakes_a_sequence_that_waits_for_pages() -> None:
    queue = scheduler()
    big, bigger, small = sequence(20, 5), sequence(20, 8), sequence(2, 1)
    for each in (big, bigger, small):
        queue.add(each)
    compute(queue.next())
    assert queue.num_free_pages == NUM_PAGES - 1 - 7
    for _ in range(6):
        compute(queue.next())
        assert (bigger.slot, small.slot) == (-1, -1)
    queue.release(big)
    compute(queue.next())
    assert bigger.slot >= 0
    queue.next()
    assert small.slot >= 0


def test_pages_for_the_longest_outcome_are_taken_at_once() -> None:
    queue, unlimited = scheduler(), sequence(2, None)
    queue.add(unlimited)
    queue.next()
    assert len(unlimited.pages) == LAYOUT.pages_for(MAX_LEN)


@pytest.mark.parametrize("is_running", [False, True])
def test_release_forgets_a_sequence_wherever_it_is(is_running: bool) -> None:
    queue, one = scheduler(), sequence(4)
    queue.add(one)
    if is_running:
        queue.next()
    queue.release(one)
    queue.release(one)
    assert not queue.has_work
    assert (queue.num_free_slots, queue.num_free_pages) == (NUM_SLOTS, NUM_PAGES - 1)
    assert (one.slot, one.pages) == (-1, [])


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, finish and are aborted at random. The model: the order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.arrived = scheduler(), []

    @property
    def running(self) -> list[Sequence]:
        return [each for each in self.arrived if each.slot >= 0]

    @rule(prompt_len=st.integers(1, MAX_LEN - 1), max_tokens=st.none() | st.integers(1, 12))
    def add(self, prompt_len: int, max_tokens: int | None) -> None:
        self.arrived.append(sequence(prompt_len, max_tokens))
        self.queue.add(self.arrived[-1])

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self._release(data.draw(st.sampled_from(range(len(self.arrived)))))

    @rule(at_most=st.integers(1, PREFILL_LEN))
    def step(self, at_most: int) -> None:
        before = self.running
        work = self.queue.next()
        assert (work is None) == (not self.arrived)
        self._check_admission(before)
        if work is None:
            return
        unfinished = [each for each in self.running if each.num_computed < len(each.prompt_ids)]
        if unfinished:
            assert work.sequence is unfinished[0]
            assert work.start == work.sequence.num_computed
            assert 1 <= work.length <= PREFILL_LEN
        else:
            assert work == Decode(tuple(self.running))
        compute(work, at_most=at_most)
        for index in reversed(range(len(self.arrived))):
            if self.arrived[index].is_finished:
                self._release(index)

    @precondition(lambda self: self.arrived)
    @rule()
    def run_until_nothing_is_left(self) -> None:
        most_steps = sum(len(each.prompt_ids) + each.max_len for each in self.arrived)
        for _ in range(most_steps):
            self.step(at_most=PREFILL_LEN)
        assert not self.arrived
        assert not self.queue.has_work

    @invariant()
    def slots_and_pages_have_one_owner_and_none_is_lost(self) -> None:
        slots = [each.slot for each in self.running]
        pages = [page for each in self.arrived for page in each.pages]
        assert len(set(slots)) == len(slots) == NUM_SLOTS - self.queue.num_free_slots
        assert len(set(pages)) == len(pages) == NUM_PAGES - 1 - self.queue.num_free_pages
        assert set(slots) <= set(range(NUM_SLOTS))
        assert set(pages) <= set(range(1, NUM_PAGES))
        for each in self.running:
            assert len(each.pages) == LAYOUT.pages_for(each.max_len)

    def _check_admission(self, before: list[Sequence]) -> None:
        """At most one sequence starts, the one that has waited longest; and it does if there is room for it."""
        waiting = [each for each in self.arrived if each not in before]
        admitted = [each for each in waiting if each.slot >= 0]
        assert admitted in ([], waiting[:1])
        if waiting and not admitted:
            pages = LAYOUT.pages_for(waiting[0].max_len)
            assert not self.queue.num_free_slots or pages > self.queue.num_free_pages

    def _release(self, index: int) -> None:
        self.queue.release(self.arrived.pop(index))


TestScheduler = SchedulerMachine.TestCase
