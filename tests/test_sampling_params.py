import dataclasses
import math

import numpy as np
import pytest

from hmoe_jax.sampling_params import FLOATS, FP32_MAX, FP32_SMALLEST, SamplingParams


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert params.skip_special_tokens
    assert not params.include_stop_str_in_output


def test_params_are_frozen_and_can_be_replaced():
    params = SamplingParams(stop="x", top_k=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    assert dataclasses.replace(params, seed=1) == SamplingParams(stop=["x"], seed=1)


@pytest.mark.parametrize(
    ("given", "kept"), [(None, ()), ("ab", ("ab",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())]
)
def test_stop_becomes_a_tuple(given, kept):
    assert SamplingParams(stop=given).stop == kept


def test_numbers_get_their_declared_type():
    params = SamplingParams(temperature=1, logit_bias={3: 5}, stop_token_ids=[7])
    assert type(params.temperature) is float
    assert type(params.logit_bias[3]) is float
    assert params.stop_token_ids == (7,)


def test_later_changes_of_the_given_bias_do_not_reach_the_params():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}


def test_minus_one_means_all_tokens_for_top_k_and_a_fresh_seed():
    params = SamplingParams(top_k=-1, seed=-1)
    assert (params.top_k, params.seed) == (0, None)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (1.0, False)])
def test_temperatures_below_1e_5_are_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).is_greedy is greedy


def test_the_bounds_are_those_of_fp32():
    assert np.finfo(np.float32).max == FP32_MAX
    assert np.finfo(np.float32).smallest_normal == FP32_SMALLEST


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_accepted_stays_finite_in_fp32(name):
    span = FLOATS[name]
    assert np.isfinite(np.float32([span.low, span.high])).all()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, 10**400, -3.0])
def test_a_bad_number_is_rejected_by_name_range_and_value(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number in [\[(].*, .*[\])], got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, r"temperature must be a finite number in \[0.0, 3.4028234663852886e\+38\], got -0.1"),
        ("temperature", 1e39, r"temperature must be a finite number in \[0.0, 3.4.*e\+38\], got 1e\+39"),
        ("top_p", 0.0, r"top_p must be a finite number in \(0.0, 1.0\], got 0.0"),
        ("top_p", 1.1, r"in \(0.0, 1.0\], got 1.1"),
        ("min_p", 1.1, r"in \[0.0, 1.0\], got 1.1"),
        ("presence_penalty", 2.1, r"in \[-2.0, 2.0\], got 2.1"),
        ("repetition_penalty", 0.0, r"in \[1.1754943508222875e-38, 3.4028234663852886e\+38\], got 0.0"),
        ("repetition_penalty", 1e-39, r"in \[1.17.*e-38, 3.4.*e\+38\], got 1e-39"),
        ("repetition_penalty", 1e39, r"in \[1.17.*e-38, 3.4.*e\+38\], got 1e\+39"),
        ("n", 0, r"n must be an integer in \[1, inf\), got 0"),
        ("n", True, r"n must be an integer in .*, got True"),
        ("n", 1.0, r"got 1.0"),
        ("top_k", -2, r"top_k must be an integer in \[-1, 2147483647\], got -2"),
        ("min_tokens", -1, r"min_tokens must be an integer in \[0, 2147483647\], got -1"),
        ("min_tokens", 2**31, r"min_tokens must be an integer in \[0, 2147483647\], got 2147483648"),
        ("max_tokens", 0, r"max_tokens must be None or an integer in \[1, inf\), got 0"),
        ("logprobs", 21, r"logprobs must be None or an integer in \[0, 20\], got 21"),
        ("prompt_logprobs", -1, r"prompt_logprobs must be None or an integer in \[0, 20\], got -1"),
        ("seed", 2**63, r"seed must be None or an integer in \[-9223372036854775808, 9223372036854775807\]"),
        ("stop", "", r"stop must hold non-empty strings, got ''"),
        ("stop", ["a", 1], r"stop must hold non-empty strings, got 1"),
        ("stop", 3, r"stop must be a string, a sequence of strings or None, got 3"),
        ("stop_token_ids", 3, r"stop_token_ids must be a sequence of token ids or None, got 3"),
        ("stop_token_ids", [-1], r"each of stop_token_ids must be an integer in \[0, 2147483647\], got -1"),
        ("logit_bias", [1], r"logit_bias must map token ids to numbers in \[-100.0, 100.0\], or be None"),
        ("logit_bias", {1: 101}, r"logit_bias\[1\] must be a finite number in \[-100.0, 100.0\], got 101"),
        ("logit_bias", {"1": 1}, r"each key of logit_bias must be an integer in .*, got '1'"),
        ("ignore_eos", 1, r"ignore_eos must be True or False, got 1"),
    ],
)
def test_a_bad_value_is_rejected_by_name_range_and_value(name, value, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{name: value})


def test_values_that_contradict_each_other_are_rejected():
    with pytest.raises(ValueError, match=r"min_tokens must be at most max_tokens=4, got 5"):
        SamplingParams(max_tokens=4, min_tokens=5)
    with pytest.raises(ValueError, match=r"n must be 1 with temperature=0.0 .*, got 2"):
        SamplingParams(temperature=0.0, n=2)
    assert SamplingParams(max_tokens=None, min_tokens=5).min_tokens == 5


def test_a_generation_config_gives_defaults_and_overrides_beat_it():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [1, 2]}
    assert SamplingParams.from_generation_config(config, top_p=0.5, max_tokens=9) == SamplingParams(
        temperature=0.6, top_p=0.5, top_k=20, max_tokens=9
    )


def test_a_generation_config_without_sampling_is_greedy_unless_overridden():
    config = {"do_sample": False, "temperature": 0.6}
    assert SamplingParams.from_generation_config(config).is_greedy
    assert SamplingParams.from_generation_config(config, temperature=0.3).temperature == 0.3


def test_a_generation_config_may_be_empty_or_hold_null_but_no_bad_value():
    assert SamplingParams.from_generation_config({}) == SamplingParams()
    assert SamplingParams.from_generation_config({"top_k": None, "max_new_tokens": 7}).max_tokens == 7
    with pytest.raises(ValueError, match="top_p must be"):
        SamplingParams.from_generation_config({"top_p": 2.0})
