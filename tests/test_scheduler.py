"""First come, first served within a priority; no page is lost or shared wrongly; everything finishes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.request import Sequence, StopRules, Terms
from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.scheduler import Prefill, Scheduler

MAX_LEN, PREFILL_LEN, NUM_SLOTS, NUM_PAGES = 30, 6, 3, 11
LAYOUT = CacheLayout(num_layers=1, num_pages=NUM_PAGES, page_size=4, latent_dim=1, chunk_pages=2, max_len=MAX_LEN)


def scheduler(layout: CacheLayout = LAYOUT, **options: Any) -> Scheduler:
    return Scheduler(layout, num_slots=NUM_SLOTS, piece_len=lambda remaining: min(remaining, PREFILL_LEN), **options)


def sequence(
    prompt: int | list[int], max_tokens: int | None = 5, *, terms: Terms | None = None, **params: Any
) -> Sequence:
    """With so many tokens of nobody else's, or with those given."""
    sequence.counter = getattr(sequence, "counter", 0) + 1
    ids = [1000 * sequence.counter + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    rules = StopRules(eos_ids=(), stop_ids=(), max_len=MAX_LEN)
    wishes = SamplingParams(max_tokens=max_tokens, **params)
    return Sequence(ids, wishes, index=0, seed=0, rules=rules, tokenizer=None, terms=terms)


def compute(queue: Scheduler, work: Prefill, *, at_most: int = PREFILL_LEN) -> None:
    """What a server does with a piece of a prompt, as far as a scheduler can see."""
    one, end = work.sequence, work.start + min(work.length, at_most)
    queue.prefilled(one, end)
    if end == len(one.prompt_ids) and not one.token_ids:
        append(queue, one)


def decode(queue: Scheduler) -> tuple[Sequence, ...]:
    decoding = queue.next_decode()
    for each in decoding:
        draws = each.draws_next
        each.num_computed += 1
        if draws:
            append(queue, each)
    return decoding


def append(queue: Scheduler, one: Sequence) -> None:
    one.token_ids.append(0)
    if one.length == one.max_len:
        one.finish("length", None)
        queue.release(one)


def prefill_all(queue: Scheduler) -> list[tuple[Sequence, int, int]]:
    pieces = []
    while work := queue.next_prefill():
        pieces.append((work.sequence, work.start, work.length))
        compute(queue, work)
    return pieces


# --- order ---


def test_nothing_to_do_is_none() -> None:
    assert scheduler().next_prefill() is None
    assert scheduler().next_decode() == ()
    assert not scheduler().has_work


def test_prompts_are_computed_in_pieces_one_after_the_other_while_others_decode() -> None:
    queue, first, second = scheduler(), sequence(4), sequence(14)
    queue.add([first, second])
    assert queue.next_prefill() == Prefill(first, 0, 4, is_first=True)
    assert queue.next_decode() == ()
    compute(queue, Prefill(first, 0, 4, is_first=True))
    pieces = []
    while work := queue.next_prefill():
        assert work.sequence is second
        pieces.append((work.start, work.length, work.is_first))
        compute(queue, work)
        assert decode(queue)[0] is first
    assert pieces == [(0, 6, True), (6, 6, False), (12, 2, False)]
    assert queue.next_decode() == (first, second)


def test_a_piece_that_was_not_computed_is_offered_again() -> None:
    queue, one = scheduler(), sequence(4)
    queue.add([one])
    assert queue.next_prefill() == Prefill(one, 0, 4, is_first=True)
    assert queue.next_prefill() == Prefill(one, 0, 4, is_first=False)


def test_nobody_overtakes_a_sequence_that_waits_for_pages() -> None:
    queue, big, bigger, small = scheduler(), sequence(22), sequence(20), sequence(2, 1)
    queue.add([big, bigger, small])
    prefill_all(queue)
    assert [each.is_admitted for each in (big, bigger, small)] == [True, False, False]
    queue.release(big)
    prefill_all(queue)
    assert bigger.is_admitted
    assert small.is_finished


def test_a_lower_priority_number_goes_before_those_that_wait_but_takes_nothing_from_those_that_run() -> None:
    queue = scheduler()
    running = [sequence(3) for _ in range(NUM_SLOTS)]
    queue.add(running)
    prefill_all(queue)
    late, urgent = sequence(3), sequence(3, terms=Terms(priority=-1))
    queue.add([late])
    queue.add([urgent])
    assert queue.next_prefill() is None
    queue.release(running[1])
    assert queue.next_prefill().sequence is urgent
    assert queue.next_decode() == (running[0], running[2])


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    small = CacheLayout(num_layers=1, num_pages=4, page_size=4, latent_dim=1, chunk_pages=2, max_len=MAX_LEN)
    queue = Scheduler(small, num_slots=1, piece_len=lambda remaining: remaining)
    queue.check_fits([sequence(7, 5)])
    with pytest.raises(ValueError, match="a sequence may come to 13 tokens, but the cache holds 12: lower max_tokens"):
        queue.check_fits([sequence(2), sequence(8, 5)])


# --- pages run out ---


def test_the_youngest_gives_up_its_pages_and_starts_again_where_it_stood() -> None:
    queue, old, young, waiting = scheduler(), sequence(12, 17), sequence(13, 17), sequence(1)
    queue.add([old, young])
    prefill_all(queue)
    queue.add([waiting])
    while young.is_admitted:
        assert decode(queue)
    tokens = list(young.token_ids)
    assert (young.num_preemptions, queue.num_preemptions, young.num_computed) == (1, 1, 0)
    assert queue.waiting == (young, waiting)
    while not old.is_finished:
        decode(queue)
    prefill_all(queue)
    assert young.token_ids == tokens
    assert len(young.pages) == LAYOUT.pages_for(young.length + 1)
    for _ in tokens[1:]:
        assert not young.draws_next
        decode(queue)
    assert young.draws_next
    assert young.token_ids == tokens


def test_a_low_priority_is_preempted_before_a_young_age() -> None:
    queue = scheduler()
    patient, others = sequence(9, 17, terms=Terms(priority=5)), [sequence(9, 17) for _ in range(2)]
    queue.add([patient])
    prefill_all(queue)
    queue.add(others)
    prefill_all(queue)
    while not queue.num_preemptions:
        decode(queue)
    assert [each.num_preemptions for each in (patient, *others)] == [1, 0, 0]


def test_a_prompt_in_the_middle_can_be_preempted() -> None:
    queue, old, young = scheduler(), sequence(12, 17), sequence(16)
    queue.add([old])
    prefill_all(queue)
    queue.add([young])
    compute(queue, queue.next_prefill())
    while young.is_admitted:
        assert decode(queue) == (old,)
    assert (young.num_computed, young.pages) == (0, [])


# --- what is found in the cache ---


def test_a_prompt_finds_the_full_pages_of_an_earlier_one_but_for_its_last_token() -> None:
    queue, ids = scheduler(), list(range(12))
    queue.add([sequence(ids, 1)])
    prefill_all(queue)
    again, longer, other = sequence(ids), sequence([*ids, 99]), sequence([*ids[:5], 77, *ids[6:]])
    starts = []
    for each in (again, longer, other):
        queue.add([each])
        starts.append(prefill_all(queue)[0][1])
        queue.release(each)
    assert starts == [8, 12, 4]
    assert [each.num_cached for each in (again, longer, other)] == starts
    assert (queue.num_cached_tokens, queue.num_prompt_tokens) == (24, 12 + 12 + 13 + 12)


def test_sequences_read_the_same_pages_while_both_run() -> None:
    queue, ids = scheduler(), list(range(12))
    first, second = sequence(ids), sequence([*ids, 5])
    queue.add([first, second])
    prefill_all(queue)
    assert second.pages[:3] == first.pages[:3]
    assert not set(second.pages[3:]) & set(first.pages)
    queue.release(first)
    queue.check()


@pytest.mark.parametrize("why", ["salt", "off", "prompt_logprobs", "return_routed_experts"])
def test_nothing_is_found_by_who_should_not(why: str) -> None:
    queue, ids = scheduler(finds_prefixes=why != "off"), list(range(12))
    params = {"prompt_logprobs": {"prompt_logprobs": 1}, "return_routed_experts": {"return_routed_experts": True}}
    queue.add([sequence(ids, 1)])
    prefill_all(queue)
    terms = Terms(cache_salt="mine" if why == "salt" else "")
    queue.add([sequence(ids, 1, terms=terms, **params.get(why, {}))])
    assert queue.next_prefill().start == 0


def test_decoded_tokens_are_not_found() -> None:
    queue, ids = scheduler(), list(range(6))
    first = sequence(ids, 8)
    queue.add([first])
    prefill_all(queue)
    while not first.is_finished:
        decode(queue)
    queue.add([sequence([*ids, *first.token_ids])])
    assert queue.next_prefill().start == 4


def test_a_lost_cache_is_computed_again() -> None:
    queue, ids = scheduler(), list(range(12))
    first = sequence(ids)
    queue.add([first])
    prefill_all(queue)
    queue.forget_cache()
    assert queue.waiting == (first,)
    assert queue.next_prefill().start == 0


# --- ends ---


@pytest.mark.parametrize("is_running", [False, True])
def test_release_forgets_a_sequence_wherever_it_is(is_running: bool) -> None:
    queue, one = scheduler(), sequence(4)
    queue.add([one])
    if is_running:
        queue.next_prefill()
    queue.release(one)
    queue.release(one)
    assert not queue.has_work
    assert (queue.num_free_slots, queue.num_free_pages) == (NUM_SLOTS, NUM_PAGES - 1)
    assert (one.slot, one.pages) == (-1, [])


def test_deadlines_expire_once_and_in_their_order() -> None:
    queue = scheduler()
    late, soon, never = (sequence(2, terms=Terms(deadline_ns=ns)) for ns in (30, 20, None))
    queue.add([late, soon, never])
    assert queue.expired(19) == []
    assert queue.expired(40) == [soon, late]
    assert queue.expired(50) == []


def test_suspects_decode_alone() -> None:
    queue, *all_three = scheduler(), sequence(2), sequence(2), sequence(2)
    queue.add(all_three)
    prefill_all(queue)
    all_three[1].num_failures = all_three[2].num_failures = 1
    assert queue.next_decode() == tuple(all_three)
    all_three[1].num_failures = all_three[2].num_failures = 2
    assert queue.next_decode() == (all_three[1],)
    all_three[1].num_failures = 0
    assert queue.next_decode() == (all_three[2],)
    all_three[2].num_failures = 0
    assert queue.next_decode() == tuple(all_three)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, finish, are preempted and aborted at random.

    The model: who is there, in order of rank, and what each page holds: the tokens that were written into it. A
    sequence reads its pages before every token, and has to find its own tokens there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue = scheduler()
        self.present: list[Sequence] = []
        self.written: dict[int, dict[int, int]] = {}  # page -> place -> token

    @initialize(num_pages=st.integers(LAYOUT.pages_for(MAX_LEN) + 1, 2 * NUM_PAGES))
    def begin(self, num_pages: int) -> None:
        self.queue = scheduler(replace(LAYOUT, num_pages=num_pages))

    @property
    def running(self) -> list[Sequence]:
        return [each for each in self.present if each.is_admitted]

    @rule(
        shared=st.integers(0, MAX_LEN - 2),
        own=st.integers(1, MAX_LEN),
        max_tokens=st.none() | st.integers(1, 12),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        salt=st.sampled_from(["", "", "x"]),
    )
    def add(self, shared: int, own: int, max_tokens: int | None, priority: int, salt: str) -> None:
        ids = [*range(shared), *([5000 + own] * own)][: MAX_LEN - 1]
        self.present.append(sequence(ids, max_tokens, terms=Terms(priority=priority, cache_salt=salt)))
        self.queue.add([self.present[-1]])

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.present))
        one.finish("abort", None)
        self.queue.release(one)

    @rule(at_most=st.integers(1, PREFILL_LEN))
    def prefill(self, at_most: int = PREFILL_LEN) -> None:
        self._drop_finished()
        waiting, half_done = self.queue.waiting, [each for each in self.running if each.is_prefilling]
        work = self.queue.next_prefill()
        if work is None:
            assert not half_done
            assert not waiting or self.running, "the first one has room if nobody runs"
            return
        one = work.sequence
        assert one is (half_done[0] if half_done else min(waiting, key=lambda each: each.rank))
        assert work.is_first == (not half_done)
        assert work.start == one.num_computed
        assert 1 <= work.length <= PREFILL_LEN
        assert work.start < len(one.prompt_ids)
        self._read(one, work.start)
        for position in range(work.start, work.start + min(work.length, at_most)):
            self._write(one, position, one.prompt_ids[position])
        compute(self.queue, work, at_most=at_most)

    @rule()
    def decode(self) -> None:
        self._drop_finished()
        decoding = self.queue.next_decode()
        ready = [each for each in self.running if not each.is_prefilling]
        assert list(decoding) == sorted(ready, key=lambda each: each.rank)
        for each in decoding:
            self._read(each, each.num_computed)
            self._write(each, each.num_computed, each.next_input)
            draws = each.draws_next
            each.num_computed += 1
            if draws:
                append(self.queue, each)

    @rule()
    def lose_the_cache(self) -> None:
        self.queue.forget_cache()
        self.written.clear()

    @precondition(lambda self: self.present)
    @rule()
    def run_until_nothing_is_left(self) -> None:
        self._drop_finished()
        most_steps = 2 * sum(2 * each.max_len for each in self.present) + 2
        while self.present and most_steps:
            self.prefill()
            self.decode()
            self._drop_finished()
            most_steps -= 1
        assert not self.present, "somebody starves"
        assert not self.queue.has_work

    @invariant()
    def slots_and_pages_add_up(self) -> None:
        self.queue.check()
        assert set(self.queue.running) | set(self.queue.waiting) == {
            each for each in self.present if not each.is_finished
        }
        for each in self.running:
            assert len(each.pages) >= LAYOUT.pages_for(each.num_computed)

    def _write(self, one: Sequence, position: int, token: int) -> None:
        page = one.pages[position // LAYOUT.page_size]
        holders = [each for each in self.running if page in each.pages]
        assert holders == [one], "nobody else reads a page that is written"
        self.written.setdefault(page, {})[position % LAYOUT.page_size] = token

    def _read(self, one: Sequence, count: int) -> None:
        tokens = [*one.prompt_ids, *one.token_ids][:count]
        size = LAYOUT.page_size
        found = [self.written[one.pages[i // size]][i % size] for i in range(count)]
        assert found == tokens

    def _drop_finished(self) -> None:
        for each in self.present:
            if each.is_finished:
                assert each.finish_reason in ("length", "abort")
                assert (each.slot, each.pages) == (-1, [])
        self.present = [each for each in self.present if not each.is_finished]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=40)
