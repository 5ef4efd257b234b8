"""The engine with experts in native kernels, on a block-FP8 model. (What the numbers must be: see `tests/oracle`.)"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hmoe_jax.engine import Engine
from hmoe_jax.outputs import CompletionOutput, RequestOutput
from hmoe_jax.sampling_params import SamplingParams
from tests.serving import assert_idle, drawn, greedy
from tests.tiny import random_ids, write_tiny

MODEL = "deepseek"


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Programs are compiled when first needed."""
    folder = write_tiny(tmp_path_factory.mktemp("fused"), MODEL, with_tokenizer=True)
    with Engine(
        folder,
        max_num_seqs=4,
        max_model_len=300,
        max_prefill_tokens=32,
        warm_up=False,
        compilation_cache=None,
        use_tqdm=False,
    ) as engine:
        yield engine
        assert_idle(engine)


def ids(length: int, seed: int = 0) -> list[int]:
    return random_ids(MODEL, length, seed=seed).tolist()


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[CompletionOutput]:
    return [output.outputs[0] for output in engine.generate(prompts, params, use_tqdm=False)]


def test_bf16_on_the_cpu_is_served_by_native_kernels(fused: Engine) -> None:
    assert fused.plan.executor == "fused"
    assert fused.plan.reasons["executor"].startswith("fused: routed experts in native kernels")


def test_kernels_read_only_the_chosen_experts_once_per_step(fused: Engine) -> None:
    config = fused.config
    before = fused.expert_stats()
    run(fused, [ids(1)], [greedy(9)])
    after = fused.expert_stats()
    assert after.calls - before.calls == 9 * config.num_moe_layers
    # One FP8 byte per weight; their scales, one per block of 128 x 128, come on top.
    weights = 3 * config.hidden_size * config.expert_ffn
    per_expert = (after.expert_bytes - before.expert_bytes) / (9 * config.num_moe_layers * config.top_k)
    assert weights <= per_expert <= weights * 1.01


def test_companions_of_a_request_do_not_change_a_bit_of_it(fused: Engine) -> None:
    # Always four in a batch, so that the same programs run; what the other rows hold must not matter.
    mine, params = ids(45), drawn(10, seed=5, logprobs=3, return_routed_experts=True)
    first, *_ = run(fused, [mine, ids(7, 1), ids(20, 2), ids(31, 3)], [params] + [greedy(10)] * 3)
    second, *_ = run(fused, [mine, ids(60, 4), ids(3, 5), ids(32, 6)], [params] + [drawn(14, seed=i) for i in range(3)])
    assert second.token_ids == first.token_ids
    assert second.logprobs == first.logprobs
    np.testing.assert_array_equal(second.routed_experts, first.routed_experts)


def test_a_prompt_of_two_chunks_is_continued(fused: Engine) -> None:
    (output,) = run(fused, [ids(255)], [greedy(6, return_routed_experts=True)])
    assert len(output.token_ids) == 6
    assert output.routed_experts.shape == (260, fused.config.num_moe_layers, fused.config.top_k)


def test_two_engines_in_one_process_do_not_disturb_each_other(
    fused: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_tiny(tmp_path_factory.mktemp("other"), "halves", with_tokenizer=True)
    params = [greedy(40), drawn(40, seed=3)]
    with Engine(folder, max_num_seqs=2, num_threads=1, warm_up=False, compilation_cache=None, use_tqdm=False) as other:
        assert other.plan.executor == "fused"
        prompts = {fused: [ids(9), ids(50, seed=1)], other: [random_ids("halves", n).tolist() for n in (7, 31)]}
        alone = {engine: _token_ids(run(engine, prompts[engine], params)) for engine in prompts}
        with ThreadPoolExecutor() as threads:
            calls = {engine: threads.submit(run, engine, prompts[engine], params) for engine in prompts}
            together = {engine: _token_ids(call.result()) for engine, call in calls.items()}
        assert together == alone
        assert_idle(other)


def _token_ids(completions: list[CompletionOutput]) -> list[list[int]]:
    return [list(each.token_ids) for each in completions]


def test_companions_a_common_beginning_and_preemptions_change_no_bit(fused: Engine) -> None:
    draw = random.Random(1)
    mine = [*ids(100, seed=3), *ids(20, seed=4)]
    params = drawn(25, seed=8, temperature=1.1, presence_penalty=0.5, logprobs=20)
    fused.add_request("alone", {"prompt_token_ids": mine, "cache_salt": "alone"}, params)
    (alone,) = finish(fused, "alone")
    fused.generate([[*ids(100, seed=3), 7]], greedy(1), use_tqdm=False)
    fused.add_request("mine", mine, params)
    outputs: list[RequestOutput] = []
    for number in range(3000):
        if draw.random() < 0.3:
            fused.add_request(str(number), ids(draw.randrange(1, 90), seed=number), drawn(9, seed=number))
        outputs += [output for output in fused.step() if output.request_id == "mine"]
        if outputs and outputs[-1].finished:
            break
        if fused._scheduler.running and number % 9 == 5:
            fused._scheduler.preempt(draw.choice(fused._scheduler.running))
    fused.abort([str(number) for number in range(3000)])
    finish(fused, "nobody")
    (together,) = outputs[-1:]
    assert together.metrics.num_cached_tokens == 64
    assert together.metrics.num_preemptions > 0
    assert together.outputs == alone.outputs


def finish(engine: Engine, request_id: str) -> list[RequestOutput]:
    """The last output of a request, once all are done."""
    last = []
    while engine.has_unfinished_requests:
        last = [output for output in engine.step() if output.request_id == request_id][-1:] or last
    return last
