"""A sequence while it grows: what ends it, what its output says, and the times of its request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmoe_jax.request import Request, Sequence, StopRules
from hmoe_jax.sampling import Sampled
from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.tokenizer import Tokenizer

EOS, STOP, NUM_BEST = 1, 7, 6


@pytest.fixture(scope="module")
def tokenizer(served_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(served_folder)


def sequence(prompt_len: int = 3, *, tokenizer: Tokenizer | None = None, max_len: int = 20, **params: Any) -> Sequence:
    wishes = SamplingParams(**{"max_tokens": 5, **params})
    eos_ids = () if wishes.ignore_eos else (EOS,)
    rules = StopRules(eos_ids=eos_ids, stop_ids=wishes.stop_token_ids, max_len=max_len)
    return Sequence(list(range(30, 30 + prompt_len)), wishes, index=2, seed=0, rules=rules, tokenizer=tokenizer)


def sampled(*tokens: int, rank: int = 9) -> Sampled:
    """Rows in which token t has log-probability -t/8; the best are 50, 51... with -1/2, -1..."""
    rows = len(tokens)
    return Sampled(
        tokens=np.array(tokens, np.int32),
        logprob=np.array(tokens, np.float32) / -8,
        rank=np.full(rows, rank, np.int32),
        top_ids=np.tile(np.arange(50, 50 + NUM_BEST, dtype=np.int32), (rows, 1)),
        top_logprobs=np.tile(np.arange(1, 1 + NUM_BEST, dtype=np.float32) / -2, (rows, 1)),
    )


def append(sequence: Sequence, *tokens: int) -> None:
    for token in tokens:
        sequence.append(token, sampled(token), 0)


# --- what ends it ---


def test_stop_ids_are_eos_and_the_callers_without_repeats() -> None:
    assert sorted(StopRules(eos_ids=(1, 3), stop_ids=(3, 5), max_len=9).all_ids) == [1, 3, 5]


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "max_len", "want"),
    [(3, 5, 20, 8), (3, 50, 20, 20), (3, None, 20, 20), (19, 1, 20, 20)],
)
def test_the_longest_a_sequence_can_become(prompt_len: int, max_tokens: int, max_len: int, want: int) -> None:
    assert sequence(prompt_len, max_len=max_len, max_tokens=max_tokens).max_len == want


def test_the_last_token_that_fits_ends_it() -> None:
    one = sequence(max_tokens=2)
    append(one, 9)
    assert (one.is_finished, one.finish_reason) == (False, None)
    append(one, 9)
    assert (one.is_finished, one.finish_reason) == (True, "length")


@pytest.mark.parametrize(
    ("params", "token", "want"),
    [
        ({}, EOS, ("stop", None)),
        ({"ignore_eos": True}, EOS, (None, None)),
        ({"stop_token_ids": [STOP]}, STOP, ("stop", STOP)),
        ({"stop_token_ids": [STOP]}, EOS, ("stop", None)),
        ({"stop_token_ids": [EOS]}, EOS, ("stop", EOS)),
        ({"max_tokens": 1, "stop_token_ids": [STOP]}, STOP, ("stop", STOP)),
    ],
    ids=str,
)
def test_the_reason_of_the_end(params: dict[str, Any], token: int, want: tuple[Any, Any]) -> None:
    one = sequence(**params)
    append(one, token)
    output = one.output()
    assert (output.finish_reason, output.stop_reason) == want
    assert output.token_ids == (token,)


def test_a_stop_string_ends_it_even_with_the_last_token(tokenizer: Tokenizer) -> None:
    one = sequence(tokenizer=tokenizer, stop="bc", max_tokens=3)
    append(one, *tokenizer.encode("abc", add_special_tokens=False))
    assert (one.finish_reason, one.stop_reason, one.text) == ("stop", "bc", "a")


def test_an_end_is_final() -> None:
    one = sequence()
    one.finish("stop", None)
    one.finish("abort", None)
    assert one.finish_reason == "stop"


def test_an_end_releases_the_text_that_was_held_back(tokenizer: Tokenizer) -> None:
    one = sequence(tokenizer=tokenizer, stop="bcd")
    append(one, *tokenizer.encode("abc", add_special_tokens=False))
    assert one.text == "a"
    one.finish("abort", None)
    assert one.text == "abc"


def test_a_stop_tokens_text_is_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab", add_special_tokens=False)
    for include, text in ((False, "a"), (True, "ab")):
        one = sequence(tokenizer=tokenizer, stop_token_ids=[b], include_stop_str_in_output=include)
        append(one, a, b)
        assert one.text == text


def test_without_a_tokenizer_there_is_no_text() -> None:
    one = sequence()
    append(one, 9, 10)
    assert one.output().text == ""


# --- what its output says ---


def test_an_output_is_a_picture_of_the_moment() -> None:
    one = sequence(logprobs=1)
    append(one, 9)
    early = one.output()
    append(one, 10)
    assert (early.index, early.token_ids, len(early.logprobs)) == (2, (9,), 1)
    assert one.output().token_ids == (9, 10)


@pytest.mark.parametrize("count", [0, 2, NUM_BEST])
def test_a_position_lists_the_best_and_the_drawn_token(count: int) -> None:
    one = sequence(logprobs=count)
    append(one, 16)
    (position,) = one.output().logprobs
    want = {50 + i: (-(i + 1) / 2, i + 1) for i in range(count)} | {16: (-2.0, 9)}
    assert {token: (each.logprob, each.rank) for token, each in position.items()} == want


def test_a_drawn_token_among_the_best_is_listed_once() -> None:
    one = sequence(logprobs=3)
    append(one, 51)
    (position,) = one.output().logprobs
    assert list(position) == [50, 51, 52]
    assert position[51].rank == 2


def test_cumulative_logprob_is_the_sum_over_drawn_tokens() -> None:
    one = sequence(logprobs=0)
    append(one, 8, 16, 24)
    assert one.output().cumulative_logprob == -6.0


def test_prompt_logprobs_begin_with_none_and_take_scores_piece_by_piece() -> None:
    request = Request("7", None, [sequence(4, prompt_logprobs=0)])
    (one,) = request.sequences
    one.add_prompt_logprobs(sampled(31, 32), 2, start=0)
    one.add_prompt_logprobs(sampled(32, 33, 0), 2, start=1)  # one again, after a preemption
    scores = request.output().prompt_logprobs
    assert scores[0] is None
    assert [list(position) for position in scores[1:]] == [[31], [32], [33]]
    assert scores[3][33].logprob == -33 / 8


def test_routes_are_joined_along_the_tokens() -> None:
    one = sequence(return_routed_experts=True)
    layers, tokens, k = 3, 4, 2
    routes = np.arange(layers * tokens * k, dtype=np.int32).reshape(layers, tokens, k)
    one.add_routes(routes[:, :3], start=0)
    one.add_routes(np.zeros_like(routes[:, :2]), start=0)  # again, after a preemption
    one.add_routes(routes[:, 2:], start=2)
    joined = one.output().routed_experts
    assert joined.shape == (tokens, layers, k)
    np.testing.assert_array_equal(joined[2, 1], routes[1, 2])


def test_nothing_routed_yet_is_none() -> None:
    assert sequence(return_routed_experts=True).output().routed_experts is None


# --- requests ---


def test_a_request_is_finished_when_all_its_sequences_are() -> None:
    request = Request("1", "text", [sequence(max_tokens=1), sequence(max_tokens=2)])
    append(request.sequences[0], 9)
    assert not request.output().finished
    append(request.sequences[1], 9, 9)
    output = request.output()
    assert output.finished
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("1", "text", (30, 31, 32))


def test_times_count_from_arrival_and_tokens_over_all_sequences() -> None:
    now_s = 100.0
    request = Request("1", None, [sequence(), sequence()], lambda: now_s)
    first, second = request.sequences
    now_s += 2.0
    request.mark_started()
    now_s += 3.0
    assert request.mark_token(first) == ("ttft", 5.0)
    now_s += 1.0
    assert request.mark_token(second) == (None, 0.0)
    request.mark_started()  # the second sequence starts
    append(first, 9, 9)
    append(second, 9)
    assert request.mark_token(first) == ("itl", 1.0)
    now_s += 50.0
    metrics = request.output().metrics
    assert (metrics.queue_s, metrics.prompt_s, metrics.decode_s) == (2.0, 3.0, 1.0)
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (3, 3)


def test_a_request_that_waits_has_only_been_queued() -> None:
    now_s = 100.0
    request = Request("1", None, [sequence()], lambda: now_s)
    now_s += 4.0
    metrics = request.output().metrics
    assert (metrics.queue_s, metrics.prompt_s, metrics.decode_s) == (4.0, 0.0, 0.0)
