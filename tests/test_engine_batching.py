"""Requests that run side by side get what each would get alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hmoe_jax.engine import Engine
from hmoe_jax.sampling_params import SamplingParams
from tests.serving import LETTERS, NUM_SLOTS, drawn, greedy, prompt, tokens

PROMPTS = [prompt(length, seed=length) for length in (1, 2, 7, 31, 32, 33, 50, 64)]

GREEDY = [greedy(6 + index) for index in range(8)]
SEEDED = [drawn(13 - index, seed=index, temperature=0.3 + 0.3 * index) for index in range(8)]
MIXED = [
    greedy(9),
    drawn(9, seed=3, top_k=5),
    drawn(9, seed=3, top_p=0.6, repetition_penalty=1.4),
    greedy(9, presence_penalty=1.5, frequency_penalty=0.5),
    drawn(9, seed=5, min_p=0.2, logprobs=3),
    greedy(9, logit_bias={5: -100.0, 6: 4.0}),
    drawn(9, seed=6, min_tokens=4, ignore_eos=False, stop_token_ids=list(range(2, 200))),
    drawn(9, seed=7, prompt_logprobs=2),
]


@pytest.mark.parametrize("params", [GREEDY, SEEDED, MIXED], ids=["greedy", "seeded", "mixed"])
def test_a_batch_of_eight_gives_what_eight_single_runs_give(engine: Engine, params: list[SamplingParams]) -> None:
    alone = [tokens(engine.generate([p], q, use_tqdm=False))[0] for p, q in zip(PROMPTS, params, strict=True)]
    assert tokens(engine.generate(PROMPTS, params, use_tqdm=False)) == alone
    assert len({tuple(tokens) for tokens in alone}) == 8


def test_a_seeded_request_repeats_whatever_it_is_batched_with(engine: Engine) -> None:
    request = drawn(12, seed=99, temperature=1.3, top_p=0.95)
    runs = [engine.generate([PROMPTS[3]], request, use_tqdm=False)[0]]
    for place, others in ((0, 1), (1, 3), (5, 7)):
        prompts = [prompt(9 + i, seed=i) for i in range(others)]
        params = [drawn(4 + 3 * i, seed=i, n=1 + i % 2, top_k=3 * i) for i in range(others)]
        prompts.insert(place, PROMPTS[3])
        params.insert(place, request)
        runs.append(engine.generate(prompts, params, use_tqdm=False)[place])
    assert tokens(runs) == [tokens(runs)[0]] * 4


def test_requests_without_seeds_differ(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    assert len({tuple(each) for each in tokens(engine.generate([prompt(4)] * 6, params, use_tqdm=False))}) == 6


def test_sequences_of_one_request_differ_and_repeat_under_a_seed(engine: Engine) -> None:
    params = drawn(8, seed=11, n=5)
    first, again = (engine.generate([prompt(6)], params, use_tqdm=False)[0] for _ in range(2))
    continuations = [output.token_ids for output in first.outputs]
    assert len(set(continuations)) == 5
    assert [output.token_ids for output in again.outputs] == continuations
    assert [output.index for output in first.outputs] == [0, 1, 2, 3, 4]


def test_more_requests_than_slots_wait_and_all_finish(engine: Engine) -> None:
    lengths = [1 + (7 * index) % 15 for index in range(3 * NUM_SLOTS)]
    prompts = [prompt(3 + index % 5, seed=index) for index in range(len(lengths))]
    outputs = engine.generate(prompts, [greedy(length) for length in lengths], use_tqdm=False)
    assert [len(each) for each in tokens(outputs)] == lengths
    alone = [tokens(engine.generate([prompts[i]], greedy(lengths[i]), use_tqdm=False))[0] for i in (0, 9, 23)]
    assert [tokens(outputs)[i] for i in (0, 9, 23)] == alone


def test_more_requests_than_pages_wait_and_all_finish(engine: Engine) -> None:
    # 5 pages each, of 12: at most two run at a time, and a request of one page behind them waits its turn.
    prompts = [prompt(250 + index, seed=index) for index in range(4)] + [prompt(5)]
    params = [greedy(10)] * 4 + [greedy(3)]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    alone = [tokens(engine.generate([p], q, use_tqdm=False))[0] for p, q in zip(prompts, params, strict=True)]
    assert tokens(outputs) == alone


def test_a_request_behind_a_prompt_in_pieces_gets_its_own_sampling(engine: Engine) -> None:
    # It is admitted while the first prompt is half computed, and starts some steps later.
    params = [greedy(4), drawn(9, seed=17, temperature=1.5)]
    outputs = engine.generate([prompt(100), prompt(8)], params, use_tqdm=False)
    assert tokens(outputs)[1] == tokens(engine.generate([prompt(8)], params[1], use_tqdm=False))[0]
    assert outputs[1].metrics.queue_s > 0


def test_a_slot_keeps_nothing_of_its_last_user(engine: Engine) -> None:
    want = tokens(engine.generate([prompt(8)], greedy(6), use_tqdm=False))
    strange = drawn(6, seed=1, temperature=9.0, repetition_penalty=2.0, logit_bias=LETTERS, min_tokens=5)
    engine.generate([prompt(9)] * NUM_SLOTS, strange, use_tqdm=False)
    assert tokens(engine.generate([prompt(8)], greedy(6), use_tqdm=False)) == want


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 127, 129, 254, 255, 256, 257])
def test_pieces_pages_and_chunks_of_any_number_give_the_tokens_of_one_whole_pass(
    engine: Engine, full_logits: Callable[[list[int]], np.ndarray], length: int
) -> None:
    ids = prompt(length, seed=length)
    (generated,) = tokens(engine.generate([ids], greedy(5), use_tqdm=False))
    assert generated == full_logits(ids + generated)[length - 1 : -1].argmax(axis=1).tolist()


def test_two_threads_get_what_each_would_get_alone(engine: Engine) -> None:
    def run(name: int) -> list[list[int]]:
        rounds = range(3)
        prompts = [prompt(20 + 15 * name + i, seed=100 * name + i) for i in rounds]
        together = engine.generate(prompts, [drawn(10, seed=i) for i in rounds], use_tqdm=False)
        streamed = [list(engine.stream(p, drawn(6, seed=name)))[-1] for p in prompts]
        return tokens([*together, *streamed])

    alone = [run(name) for name in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, range(2))) == alone
