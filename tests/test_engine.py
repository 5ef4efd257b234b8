"""What an engine returns for well-formed requests. The fixture `engine` also checks that nothing leaks or compiles."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from hmoe_jax.engine import Engine
from hmoe_jax.sampling_params import SamplingParams
from tests.serving import LETTERS, MAX_LEN, drawn, greedy, prompt, tokens
from tests.tiny import BOS_ID


def test_outputs_come_in_the_order_of_the_prompts(engine: Engine) -> None:
    # The first takes longest: in the order of completion it would come last.
    prompts = [prompt(length, seed=length) for length in (70, 3, 33, 1, 12)]
    lengths = [20, 2, 9, 1, 5]
    outputs = engine.generate(prompts, [greedy(length) for length in lengths], use_tqdm=False)
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [len(tokens) for tokens in tokens(outputs)] == lengths
    assert all(output.finished for output in outputs)
    assert len({output.request_id for output in outputs}) == len(outputs)


def test_one_prompt_gives_a_list_of_one(engine: Engine) -> None:
    ids = engine.tokenizer.encode("It was a cold night")
    (text_output,) = engine.generate("It was a cold night", greedy(4), use_tqdm=False)
    (ids_output,) = engine.generate(ids, greedy(4), use_tqdm=False)
    assert text_output.prompt == "It was a cold night"
    assert list(text_output.prompt_token_ids) == ids
    assert ids[0] == BOS_ID
    assert ids_output.prompt is None
    assert ids_output.outputs == text_output.outputs


def test_text_and_ids_may_be_mixed_and_ids_may_be_numpy(engine: Engine) -> None:
    as_numpy = list(np.array(engine.tokenizer.encode("ab"), np.int64))
    outputs = engine.generate(["ab", engine.tokenizer.encode("ab"), as_numpy], greedy(3), use_tqdm=False)
    assert tokens(outputs) == [tokens(outputs)[0]] * 3


def test_no_prompts_give_no_outputs(engine: Engine) -> None:
    assert engine.generate([], use_tqdm=False) == []


def test_without_params_the_checkpoints_recommendations_hold(engine: Engine) -> None:
    assert engine.default_sampling_params == SamplingParams(temperature=0.8, top_p=0.9, max_tokens=9)
    (output,) = engine.generate(prompt(5), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 9 or output.outputs[0].finish_reason == "stop"


def test_text_is_the_decoded_tokens(engine: Engine) -> None:
    (output,) = engine.generate("x", drawn(12, seed=4, logit_bias=LETTERS), use_tqdm=False)
    text = output.outputs[0].text
    assert text == engine.tokenizer.decode(output.outputs[0].token_ids)
    assert len(text) == 12
    assert text.isalpha()


def test_chat_answers_the_rendered_conversation(engine: Engine) -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (one,) = engine.chat(conversation, greedy(3), use_tqdm=False, chat_template_kwargs={"suffix": "!"})
    rendered = engine.tokenizer.encode("<bos>[user]hi[assistant]ho!", add_special_tokens=False)
    assert list(one.prompt_token_ids) == rendered
    assert rendered.count(BOS_ID) == 1
    two = engine.chat([conversation, conversation[:1]], [greedy(3), greedy(2)], use_tqdm=False)
    assert [len(tokens) for tokens in tokens(two)] == [3, 2]
    assert len(two[1].prompt_token_ids) < len(two[0].prompt_token_ids)


def test_the_last_output_of_a_stream_is_that_of_generate(engine: Engine) -> None:
    params = drawn(15, seed=8, logprobs=2, prompt_logprobs=1, return_routed_experts=True, logit_bias=LETTERS)
    (whole,) = engine.generate("stream me", params, use_tqdm=False)
    *_, last = engine.stream("stream me", params)
    assert last.prompt_token_ids == whole.prompt_token_ids
    assert last.prompt_logprobs == whole.prompt_logprobs
    np.testing.assert_array_equal(last.outputs[0].routed_experts, whole.outputs[0].routed_experts)
    assert _without_routes(last) == _without_routes(whole)


def test_streamed_outputs_grow_by_one_token_and_never_take_text_back(engine: Engine) -> None:
    outputs = [output.outputs[0] for output in engine.stream(prompt(5), drawn(40, seed=1))]
    assert [len(output.token_ids) for output in outputs] == list(range(1, 41))
    for before, after in itertools.pairwise(outputs):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids
        assert after.text.startswith(before.text)
    assert [output.finished() for output in outputs] == [False] * 39 + [True]


def test_a_stream_shows_every_piece_of_a_long_prompt(engine: Engine) -> None:
    lengths = [len(output.outputs[0].token_ids) for output in engine.stream(prompt(70), greedy(2))]
    assert lengths == [0, 0, 1, 2]


def test_metrics_add_up(engine: Engine) -> None:
    start = time.perf_counter()
    params = drawn(6, seed=2, n=2)
    (output,) = engine.generate([prompt(40)], params, use_tqdm=False)
    elapsed_s = time.perf_counter() - start
    metrics = output.metrics
    assert (metrics.num_prompt_tokens, metrics.num_cached_tokens, metrics.num_generated_tokens) == (40, 0, 12)
    assert metrics.prompt_s > 0
    assert metrics.decode_s > 0
    assert metrics.total_s < elapsed_s


def test_the_engine_names_its_limits(engine: Engine) -> None:
    assert engine.max_model_len == MAX_LEN
    assert engine.config.vocab_size == 271
    assert engine.plan.executor == "graph"


def test_nobody_counts_expert_bytes_where_xla_computes_them(engine: Engine) -> None:
    assert engine.expert_stats() is None


def test_the_engines_seed_decides_requests_without_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    def two_runs(seed: int) -> list[list[int]]:
        monkeypatch.setattr(engine, "_seeds", np.random.SeedSequence(seed))
        return [tokens(engine.generate([prompt(4)], params, use_tqdm=False))[0] for _ in range(2)]

    first, second = two_runs(7)
    assert first != second
    assert two_runs(7) == [first, second]
    assert two_runs(8) != [first, second]


def _without_routes(output):
    """Its completions as dictionaries that can be compared: arrays have no truth value."""
    return [vars(completion) | {"routed_experts": None} for completion in output.outputs]
