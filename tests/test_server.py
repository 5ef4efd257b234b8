"""Every request ends with one reason, whatever happens at whatever stage, and with the tokens that it gets alone."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from hmoe_jax.core import QueueFullError
from hmoe_jax.exec.batch import DecodeBatch
from hmoe_jax.exec.step import StepOutput
from hmoe_jax.loop import ServingLoop
from hmoe_jax.request import Request, Sequence
from tests.fake_executor import MAX_LEN, NUM_PARTS, NUM_SLOTS, PAGE_SIZE, PART_S, solo_run
from tests.server_case import Case, assert_right

# --- what goes well ---


def test_requests_of_all_lengths_get_what_each_gets_alone() -> None:
    case = Case()
    requests = [case.submit(length, 1 + length % 9, n=1 + length % 3) for length in range(1, 30)]
    case.run()
    assert_right(*requests)


def test_tokens_are_preempted_and_computed_again_without_a_difference() -> None:
    case = Case()
    requests = [case.submit(3, 37) for _ in range(NUM_SLOTS)]
    case.run()
    assert_right(*requests)
    assert case.scheduler.num_preemptions > 0
    assert requests[0].metrics().num_preemptions == 0
    assert sum(request.metrics().num_preemptions for request in requests) == case.scheduler.num_preemptions


def test_a_long_prompt_beside_decoding_takes_its_share_of_time_and_no_more() -> None:
    case = Case(slowdown_permille=500, step_s=0.01)
    decoding = case.submit(2, 30)
    case.server.step()
    prompt = case.submit(30, 1)
    steps = 0
    while not prompt.is_finished:
        case.server.step()
        steps += 1
    # 4 pieces of 2 parts and an end that takes no time; each part of 10 ms is paid off by 2 steps of 10 ms.
    assert 16 <= steps <= 20
    case.run()
    assert_right(decoding, prompt)


@pytest.mark.parametrize(("gap_parts", "most_steps"), [(1, 9), (2.5, 5)])
def test_a_prompt_in_the_gaps_of_decode_steps_delays_nobody(gap_parts: float | int, most_steps: int) -> None:
    """Eight parts, of which each step's gap holds so many."""
    case = Case(slowdown_permille=1, step_s=PART_S, gap_s=gap_parts * PART_S)
    decoding = case.submit(2, 30)
    case.server.step()
    case.server.step()  # alone: so long is a step
    prompt = case.submit(30, 1)
    begin, steps = case.now_s, 0
    while not prompt.is_finished:
        case.server.step()
        steps += 1
    assert steps <= most_steps
    admission_s = PART_S
    assert case.now_s - begin == pytest.approx(steps * (1 + gap_parts) * PART_S + admission_s)
    case.run()
    assert_right(decoding, prompt)


@pytest.mark.parametrize("gap_parts", [0.1, 0.5])
def test_parts_that_are_longer_than_a_gap_take_no_more_than_they_may(gap_parts: float) -> None:
    case = Case(slowdown_permille=250, step_s=PART_S, gap_s=gap_parts * PART_S)
    decoding = case.submit(2, 36)
    case.server.step()
    case.server.step()
    alone_s = (1 + gap_parts) * PART_S
    prompt = case.submit(7, 1)
    begin, steps = case.now_s, 0
    while not prompt.is_finished:
        case.server.step()
        steps += 1
    slowdown = (case.now_s - begin - PART_S) / (steps * alone_s) - 1
    assert slowdown <= 0.25 + PART_S / (steps * alone_s)
    case.run()
    assert_right(decoding, prompt)


def test_where_nobody_decodes_a_step_is_a_whole_piece() -> None:
    case = Case()
    prompt = case.submit(8, 1)
    case.server.step()
    assert prompt.is_finished


def test_a_step_that_is_interrupted_goes_on_with_its_prompt_next_time() -> None:
    case = Case()
    prompt = case.submit(8, 1)
    case.server.step(is_interrupted=lambda: True)
    assert case.executor.num_open_prompts == 0  # it has not begun
    answers = iter([False, True])
    case.server.step(is_interrupted=lambda: next(answers))
    assert case.executor.num_open_prompts == 1
    case.run()
    assert_right(prompt)


def test_thousands_of_tiny_requests_are_served() -> None:
    case = Case(max_waiting=5000)
    requests = [case.submit(1 + i % 3, 1 + i % 2) for i in range(2000)]
    case.run(most_steps=20_000)
    assert_right(*requests)


def test_one_huge_request_among_tiny_ones_fills_the_cache_and_harms_nobody() -> None:
    case = Case()
    tiny = [case.submit(1, 1 + i % 3) for i in range(20)]
    huge = case.submit(MAX_LEN - 20, 20, n=3)  # three times ten pages, of sixteen
    more = [case.submit(2, 2) for _ in range(20)]
    case.run()
    assert_right(*tiny, huge, *more)
    assert case.scheduler.num_preemptions > 0


def test_a_prompt_that_can_never_fit_is_refused_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    small = replace(case.executor.layout, num_pages=1 + 12 // PAGE_SIZE)
    monkeypatch.setattr(case.scheduler, "_layout", small)
    good = case.submit(9, 3)
    with pytest.raises(ValueError, match="may come to 13 tokens, but the cache holds 12"):
        case.submit(9, 4)
    case.run()
    assert_right(good)


def test_an_idle_server_notices_a_lost_page() -> None:
    case = Case()
    case.submit(3)
    case.run()
    case.scheduler._pool._free.pop()
    with pytest.raises(AssertionError, match="pages lost or shared"):
        case.server.step()


def test_rows_are_dealt_out_so_that_parts_look_back_at_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    case, seen = Case(), []
    step = case.executor.step

    def watched(batch: DecodeBatch, **others: Any) -> StepOutput:
        seen.append([int(position) for position in batch.positions[batch.valid]])
        return step(batch, **others)

    monkeypatch.setattr(case.executor, "step", watched)
    requests = [case.submit(length, 12) for length in (11, 2, 7, 3)]
    case.run()
    assert_right(*requests)
    assert any(len(positions) == 4 for positions in seen)
    assert all(positions == sorted(positions) for positions in seen)


# --- what ends early ---


@pytest.mark.parametrize("num_steps", range(12))
def test_an_abort_at_any_moment_ends_it_and_nobody_else(num_steps: int) -> None:
    case = Case()
    other, doomed = case.submit(9), case.submit(20, n=2)
    for _ in range(num_steps):
        case.server.step()
    case.server.abort(doomed.sequences)
    case.server.abort(doomed.sequences)  # twice is nobody's mistake
    case.run()
    assert {each.finish_reason for each in doomed.sequences} <= {"abort", "length"}
    assert num_steps > 8 or doomed.sequences[1].finish_reason == "abort"
    assert_right(other)


def test_an_abort_inside_a_prompt_is_seen_between_two_of_its_parts() -> None:
    case = Case()
    doomed, parts = case.submit(8), []
    case.executor.on["part"] = lambda slots: (parts.append(slots), case.server.abort(doomed.sequences))
    case.run()
    assert doomed.sequences[0].finish_reason == "abort"
    assert len(parts) == 1


@pytest.mark.parametrize(("timeout_s", "num_tokens"), [(0.0, 0), (0.015, 0), (0.1, 8)])
def test_a_deadline_ends_a_request_that_waits_or_runs_and_keeps_what_it_has(timeout_s: float, num_tokens: int) -> None:
    case = Case()
    late = case.submit(8, 30, timeout_s=timeout_s)
    case.run()
    (one,) = late.sequences
    assert (one.finish_reason, len(one.token_ids)) == ("timeout", num_tokens)
    assert one.token_ids == solo_run(one.prompt_ids, seed=one.seed, max_tokens=30)[:num_tokens]


def test_a_deadline_passes_while_others_have_all_slots() -> None:
    case = Case()
    others = [case.submit(2, 30) for _ in range(NUM_SLOTS)]
    late = case.submit(2, timeout_s=0.05)
    case.run()
    assert (late.sequences[0].finish_reason, late.started_s) == ("timeout", None)
    assert_right(*others)


def test_a_request_that_is_done_has_no_deadline_any_more() -> None:
    case = Case()
    done = case.submit(2, 1, timeout_s=5.0)
    case.run()
    case.pass_time(10.0)
    other = case.submit(2, 1)
    case.run()
    assert_right(done, other)


@pytest.mark.parametrize("jump_s", [-1000.0, 1e6])
def test_a_clock_that_jumps_harms_no_request_without_a_deadline(jump_s: float) -> None:
    case = Case()
    request, other = case.submit(20), case.submit(3, timeout_s=1e9)
    for _ in range(3):
        case.server.step()
    case.pass_time(jump_s)
    case.run()
    assert_right(request, other)
    metrics = request.metrics()
    assert min(metrics.queue_s, metrics.prompt_s, metrics.decode_s) >= 0


# --- the queue ---


def test_a_full_queue_refuses_and_has_room_again_later() -> None:
    case = Case(max_waiting=3)
    first = [case.submit(2), case.submit(2, n=2)]
    with pytest.raises(QueueFullError, match="the queue is full: 3 sequences wait, max_num_waiting is 3"):
        case.submit(2)
    case.server.step()
    later = case.submit(2)
    case.run()
    assert_right(*first, later)
    assert case.server.meters.num_refused == 1


def test_an_empty_queue_takes_a_request_of_any_number_of_sequences() -> None:
    case = Case(max_waiting=3)
    request = case.submit(2, n=7)
    with pytest.raises(QueueFullError):
        case.submit(2)
    case.run()
    assert_right(request)


def test_many_threads_submit_and_abort_while_one_steps() -> None:
    case = Case(max_waiting=10_000)
    requests: list[Request] = []
    made = threading.Lock()

    def client() -> None:
        for i in range(50):
            with made:  # the case numbers its requests
                request = case.request(1 + i % 9, 30 if i % 3 == 0 else 6)
                requests.append(request)
            case.server.submit(request)
            if i % 3 == 0:
                case.server.abort(request.sequences)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for each in clients:
        each.start()
    while any(each.is_alive() for each in clients):
        case.server.step()
    case.run(most_steps=20_000)
    reasons = [request.sequences[0].finish_reason for request in requests]
    assert len(reasons) == 200
    assert set(reasons) == {"length", "abort"}
    assert_right(*(request for request in requests if request.sequences[0].finish_reason == "length"))


def test_an_abort_between_two_looks_at_the_inbox_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    late = case.request(3, 30)
    submitted = iter([True])

    def expired(now_ns: int) -> list[Sequence]:
        if next(submitted, False):
            case.server.submit(late)
            case.server.abort(late.sequences)
        return []

    monkeypatch.setattr(case.scheduler, "expired", expired)
    case.submit(3)
    case.run()
    assert late.sequences[0].finish_reason == "abort"


def test_the_queue_remembers_no_request_that_has_ended_before_its_deadline() -> None:
    case = Case()
    for _ in range(20):
        case.submit(3, 2, timeout_s=1e6)
        case.run()
    assert not case.scheduler._timed
    assert not case.scheduler._deadlines


def test_deadlines_come_in_their_order_however_many_others_have_ended() -> None:
    case = Case(max_waiting=1000)
    late = [case.submit(2, 30, timeout_s=each) for each in (900.0, 700.0, 800.0)]
    for _ in range(50):
        case.server.abort(case.submit(3, 2, timeout_s=1e6).sequences)
    case.server.tidy()
    case.now_s += 750.0
    case.server.tidy()
    assert [each.sequences[0].finish_reason for each in late] == [None, "timeout", None]
    case.now_s += 200.0
    case.server.tidy()
    assert [each.sequences[0].finish_reason for each in late] == ["timeout"] * 3


def test_closing_aborts_what_is_left() -> None:
    case = Case()
    running, waiting = case.submit(20), case.submit(3)
    case.server.step(is_interrupted=iter([False, True]).__next__)
    case.server.close()
    assert {running.sequences[0].finish_reason, waiting.sequences[0].finish_reason} == {"abort"}
    assert case.executor.num_open_prompts == 0
    with pytest.raises(ValueError, match="the engine is closed"):
        case.submit(3)


def test_closing_ends_a_prompt_between_two_of_its_parts() -> None:
    case = Case()
    loop = ServingLoop(case.server, case.executor)
    has_begun, goes_on, parts = threading.Event(), threading.Event(), []

    def part(slots: list[int]) -> None:
        parts.append(slots)
        has_begun.set()
        assert goes_on.wait(30)

    case.executor.on["part"] = part
    request = case.request(NUM_PARTS * 4)
    loop.add(request)
    stepping, closing = threading.Thread(target=loop.step_if_open), threading.Thread(target=loop.close)
    stepping.start()
    assert has_begun.wait(30)
    closing.start()
    while not loop._is_closing:
        time.sleep(1e-3)
    goes_on.set()
    stepping.join(30)
    closing.join(30)
    assert (request.sequences[0].finish_reason, len(parts)) == ("abort", 1)
    assert case.executor.num_open_prompts == 0


# --- progress ---


def test_latencies_are_those_of_sequences() -> None:
    case = Case(step_s=0.01)
    case.submit(3, 6, n=4)
    case.run()
    latencies = case.server.meters.durations
    assert latencies["ttft"].snapshot().num == 1
    assert latencies["itl"].snapshot().num == 4 * 5
    assert latencies["itl"].snapshot().mean_s >= 0.01


def test_polled_requests_are_told_once_for_every_change() -> None:
    case = Case()
    request, other = case.request(3, 2), case.submit(3)
    request.is_polled = True
    case.server.submit(request)
    seen = []
    while case.server.has_work:
        case.server.step()
        seen += [len(each.sequences[0].token_ids) for each in case.server.take_changed()]
    assert seen == [1, 2]
    assert_right(request, other)
