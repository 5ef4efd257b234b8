import numpy as np
import pytest

from hmoe_jax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def completion(**fields) -> CompletionOutput:
    return CompletionOutput(**{"index": 0, "text": "ab", "token_ids": (5, 6)} | fields)


def test_a_completion_is_finished_once_it_has_a_reason():
    assert not completion().finished()
    assert completion(finish_reason="length").finished()
    assert completion(finish_reason="stop", stop_reason="\n").finished()


def test_a_stop_reason_goes_with_a_stop_only():
    with pytest.raises(ValueError, match="stop_reason 7, but finish_reason 'length'"):
        completion(finish_reason="length", stop_reason=7)


def test_logprobs_are_one_per_token():
    entry = {5: Logprob(-0.1, rank=1, decoded_token="a")}
    assert len(completion(logprobs=[entry, entry]).logprobs) == 2
    with pytest.raises(ValueError, match="logprobs for 1 positions, but 2 tokens"):
        completion(logprobs=[entry])


def test_ranks_count_from_one():
    with pytest.raises(ValueError, match="rank counts from 1, got 0"):
        Logprob(-0.1, rank=0)


def test_routed_experts_are_integers_per_token_layer_and_choice():
    experts = np.zeros((2, 3, 4), np.int32)
    assert completion(routed_experts=experts).routed_experts.shape == (2, 3, 4)


def test_a_finished_request_has_only_finished_outputs():
    done, still_open = completion(finish_reason="abort"), completion(index=1)
    assert RequestOutput("r", None, [1], outputs=[done], finished=True).finished
    with pytest.raises(ValueError, match=r"request r is finished, but its outputs \[1\] are not"):
        RequestOutput("r", None, [1], outputs=[done, still_open], finished=True)


def test_metrics_derive_their_rates_and_totals():
    metrics = RequestMetrics(
        queue_s=1.0,
        prompt_s=2.0,
        decode_s=4.0,
        num_prompt_tokens=100,
        num_cached_tokens=60,
        num_generated_tokens=9,
    )
    assert (metrics.time_to_first_token_s, metrics.total_s) == (3.0, 7.0)
    assert (metrics.prompt_tok_per_s, metrics.decode_tok_per_s) == (20.0, 2.0)


def test_rates_of_nothing_are_zero():
    assert (RequestMetrics().prompt_tok_per_s, RequestMetrics().decode_tok_per_s) == (0.0, 0.0)


def test_impossible_metrics_are_rejected():
    with pytest.raises(ValueError, match="times must not be negative"):
        RequestMetrics(decode_s=-1.0)
    with pytest.raises(ValueError, match="3 cached tokens of 2 prompt tokens"):
        RequestMetrics(num_prompt_tokens=2, num_cached_tokens=3)
