"""Log-probabilities and routed experts of requests, against logits that were computed all at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hmoe_jax.engine import Engine
from hmoe_jax.outputs import PositionLogprobs
from tests.oracle.bounds import relative_error
from tests.serving import MAX_LEN, PREFILL_LEN, drawn, greedy, log_softmax, prompt

FullLogits = Callable[[list[int]], np.ndarray]


@pytest.fixture
def expected(engine: Engine, full_logits: FullLogits) -> Callable[[list[int]], tuple[np.ndarray, float]]:
    """Log-probabilities `[t, v]` after each token, and how far those of another order of sums may be from them."""

    def log_probs(token_ids: list[int]) -> tuple[np.ndarray, float]:
        logits = full_logits(token_ids)
        # Each logit is off by at most the 2-norm of its row's error, and so is the logarithm of their sum.
        error = relative_error(engine.config, "float32", num_tokens=MAX_LEN)
        return log_softmax(logits), 2 * error * float(np.linalg.norm(logits, axis=-1).max())

    return log_probs


def assert_position(position: PositionLogprobs, log_probs: np.ndarray, *, token: int, count: int, bound: float) -> None:
    """`position` reports `token` and the `count` best of `log_probs [v]`, with values and ranks that are right."""
    best = np.sort(log_probs)[::-1]
    ranks = [logprob.rank for logprob in position.values()]
    assert token in position
    assert ranks[:count] == list(range(1, count + 1))
    assert len(position) in (count, count + 1)
    for token_id, reported in position.items():
        assert abs(reported.logprob - log_probs[token_id]) <= bound
        # Nearly equal ones may change places.
        assert abs(reported.logprob - best[reported.rank - 1]) <= bound


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_logprobs_are_the_models_own_whatever_the_sampling(
    engine: Engine, expected: Callable, count: int, temperature: float
) -> None:
    # Hot draws are seldom among the best, and penalties do not change what is reported.
    params = drawn(8, seed=3, temperature=temperature, logprobs=count, presence_penalty=1.0, logit_bias={9: 3.0})
    (output,) = engine.generate([prompt(10)], params, use_tqdm=False)
    generated = output.outputs[0]
    log_probs, bound = expected([*prompt(10), *generated.token_ids])
    assert len(generated.logprobs) == 8
    for index, (token, position) in enumerate(zip(generated.token_ids, generated.logprobs, strict=True)):
        assert_position(position, log_probs[9 + index], token=token, count=count, bound=bound)
    total = sum(
        position[token].logprob for token, position in zip(generated.token_ids, generated.logprobs, strict=True)
    )
    assert generated.cumulative_logprob == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("length", [1, 2, PREFILL_LEN, PREFILL_LEN + 1, 75])
def test_prompt_logprobs_have_an_entry_for_every_token_also_in_pieces(
    engine: Engine, expected: Callable, length: int
) -> None:
    ids = prompt(length, seed=length)
    (output,) = engine.generate([ids], greedy(2, prompt_logprobs=3), use_tqdm=False)
    log_probs, bound = expected(ids)
    assert len(output.prompt_logprobs) == length
    assert output.prompt_logprobs[0] is None
    for index, position in enumerate(output.prompt_logprobs[1:]):
        assert_position(position, log_probs[index], token=ids[index + 1], count=3, bound=bound)


def test_asking_for_prompt_logprobs_does_not_change_what_is_generated(engine: Engine) -> None:
    plain, scored = (
        engine.generate([prompt(75)], drawn(6, seed=1, prompt_logprobs=wanted), use_tqdm=False)[0].outputs[0]
        for wanted in (None, 0)
    )
    assert plain.token_ids == scored.token_ids


def test_nothing_is_reported_unasked(engine: Engine) -> None:
    (output,) = engine.generate([prompt(4)], greedy(2), use_tqdm=False)
    generated = output.outputs[0]
    assert output.prompt_logprobs is None
    assert (generated.logprobs, generated.cumulative_logprob, generated.routed_experts) == (None, None, None)


def test_logprobs_name_the_tokens_text(engine: Engine) -> None:
    (output,) = engine.generate("ab", greedy(3, logprobs=2, prompt_logprobs=1), use_tqdm=False)
    positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    for position in positions:
        assert all(each.decoded_token == engine.tokenizer.token_text(token) for token, each in position.items())


@pytest.mark.parametrize(("length", "generated"), [(1, 1), (40, 7)])
def test_routed_experts_are_those_of_every_token_that_was_run(engine: Engine, length: int, generated: int) -> None:
    params = greedy(generated, return_routed_experts=True)
    others = [drawn(5, seed=i, prompt_logprobs=1, return_routed_experts=True) for i in range(2)]
    outputs = engine.generate([prompt(9), prompt(length), prompt(33)], [others[0], params, others[1]], use_tqdm=False)
    routed = outputs[1].outputs[0].routed_experts
    config = engine.config
    assert routed.shape == (length + generated - 1, config.num_moe_layers, config.top_k)
    assert routed.min() >= 0
    assert routed.max() < config.num_experts
    # Nobody is chosen twice by the same token.
    assert (np.diff(np.sort(routed, axis=-1), axis=-1) > 0).all()
    (alone,) = engine.generate([prompt(length)], params, use_tqdm=False)
    np.testing.assert_array_equal(routed, alone.outputs[0].routed_experts)


def test_tokens_that_went_through_the_cache_are_routed_as_in_one_pass(engine: Engine) -> None:
    ids = prompt(20)
    params = greedy(10, return_routed_experts=True)
    (stepwise,) = (output.outputs[0] for output in engine.generate([ids], params, use_tqdm=False))
    whole = [*ids, *stepwise.token_ids[:-1]]
    (at_once,) = engine.generate([whole], greedy(1, return_routed_experts=True), use_tqdm=False)
    np.testing.assert_array_equal(stepwise.routed_experts, at_once.outputs[0].routed_experts)
