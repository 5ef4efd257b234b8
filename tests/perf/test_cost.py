"""The model of costs: by hand for DeepSeek-V3, and what must hold whatever the rates are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.config import read_config
from hmoe_jax.perf.cost import (
    Rates,
    attention_s,
    decode_cost,
    expert_bytes,
    gains_by_parts,
    prefill_cost,
    resident_bytes,
    used_share,
)
from hmoe_jax.perf.sizes import count_parameters

DEEPSEEK_V3 = read_config(Path(__file__).parents[2] / "models" / "deepseek-v3")
FAST = Rates(
    name="fast",
    expert_gbps=400.0,
    expert_tflops=4.0,
    link_gbps=55.0,
    device_gbps=3000.0,
    decode_linear_tflops=500.0,
    decode_attention_tflops=1000.0,
    linear_tflops=500.0,
    grouped_tflops=250.0,
    attention_tflops=400.0,
    unpack_gbps=300.0,
    dispatch_s=2e-5,
)


def test_sizes_are_those_of_the_published_files() -> None:
    assert 58 * 256 * expert_bytes(DEEPSEEK_V3) == pytest.approx(654.1e9, rel=1e-3)
    assert resident_bytes(DEEPSEEK_V3) == pytest.approx(19.1e9, rel=0.01)
    embedding = 2 * 129280 * 7168
    assert resident_bytes(DEEPSEEK_V3) - resident_bytes(DEEPSEEK_V3, looked_up=True) == embedding


def test_a_block_takes_at_least_as_long_as_what_it_reads() -> None:
    """Few tokens: their projections' weights, and keys and values of the context."""
    fast = replace(FAST, linear_tflops=1e6, attention_tflops=1e6)
    count = count_parameters(DEEPSEEK_V3)
    share = count.attention / 61 / (count.active - count.chosen)
    weights = share * resident_bytes(DEEPSEEK_V3, looked_up=True)
    kept = 2 * (128 * (128 + 128) + 64)
    for tokens in (1, 16, 128):
        read_s = (weights + kept * (30000 + tokens)) / FAST.device_gbps / 1e9
        assert attention_s(DEEPSEEK_V3, fast, tokens, 30000, num_expanded=tokens) == pytest.approx(read_s, rel=0.01)


def test_kept_keys_and_values_are_made_once() -> None:
    """In passes of 4,096 tokens: each makes those before it once, and its own."""
    slow = replace(FAST, attention_tflops=1.0, link_gbps=1e6, linear_tflops=1e6, grouped_tflops=1e6, unpack_gbps=1e9)
    sizes = {"pass_len": 4096, "block_len": 512}
    anew, kept = (prefill_cost(DEEPSEEK_V3, slow, 8192, **sizes, expanded_len=each).front_s for each in (0, 8192))
    flops = 2 * 128 * 256 * 512
    made_anew, made_once = sum(range(512, 8193, 512)), 4096 + 8192
    assert anew - kept == pytest.approx(61 * flops * (made_anew - made_once) / 1e12, rel=0.01)


def test_a_middling_prompt_takes_as_long_as_its_experts_cross_the_link() -> None:
    cost = prefill_cost(DEEPSEEK_V3, FAST, 8192, pass_len=32768, ahead_experts=240)
    assert cost.copy_s == pytest.approx(654.1 / 55, rel=1e-3)
    assert cost.seconds == pytest.approx(cost.copy_s)
    assert cost.limit == "link"


def test_a_short_prompt_copies_what_it_uses() -> None:
    one = prefill_cost(DEEPSEEK_V3, FAST, 1, pass_len=32768)
    assert one.copy_s == pytest.approx(58 * 8 * expert_bytes(DEEPSEEK_V3) / 55e9, rel=1e-6)


def test_two_passes_copy_twice() -> None:
    once = prefill_cost(DEEPSEEK_V3, FAST, 16384, pass_len=16384)
    twice = prefill_cost(DEEPSEEK_V3, FAST, 16385, pass_len=16384)
    assert (once.num_passes, twice.num_passes) == (1, 2)
    assert twice.copy_s == pytest.approx(2 * once.copy_s)


def test_decoding_reads_the_experts_that_are_chosen() -> None:
    one = decode_cost(DEEPSEEK_V3, FAST, batch=1, context=1)
    assert one.experts_s == pytest.approx(58 * 8 * expert_bytes(DEEPSEEK_V3) / 400e9)
    assert one.limit == "host memory"
    four = decode_cost(DEEPSEEK_V3, FAST, batch=4, context=1)
    assert 3.8 < four.experts_s / one.experts_s < 4
    assert four.tok_per_s > one.tok_per_s


def test_two_parts_read_what_they_share_twice_and_hide_the_smaller_side() -> None:
    one = decode_cost(DEEPSEEK_V3, FAST, batch=8, context=4096)
    two = decode_cost(DEEPSEEK_V3, FAST, batch=8, context=4096, num_parts=2)
    assert one.experts_s < two.experts_s < 1.2 * one.experts_s
    assert one.device_s < two.device_s < 2 * one.device_s
    larger, smaller = max(two.experts_s, two.device_s), min(two.experts_s, two.device_s)
    assert larger < two.seconds < larger + smaller / 61
    slowed = decode_cost(DEEPSEEK_V3, replace(FAST, contention=1.3), batch=8, context=4096, num_parts=2)
    assert slowed.seconds == pytest.approx(two.seconds + 0.3 * smaller)


@pytest.mark.parametrize(
    ("batch", "device_gbps", "gains"),
    [(1, 3000.0, False), (2, 3000.0, True), (64, 3000.0, False), (2, 60.0, False), (8, 60.0, True)],
)
def test_a_batch_is_split_where_hiding_a_side_outweighs_reading_twice(
    batch: int, device_gbps: float, gains: bool
) -> None:
    """One cannot be split; of 64 most experts are chosen by both halves; a slow device reads its weights twice."""
    rates = replace(FAST, device_gbps=device_gbps)
    assert gains_by_parts(DEEPSEEK_V3, rates, batch=batch, context=4096) == gains


def test_shares_of_experts() -> None:
    assert used_share(DEEPSEEK_V3, 1) == 8 / 256
    assert used_share(DEEPSEEK_V3, 100_000) == pytest.approx(1)


@given(
    tokens=st.integers(1, 200_000),
    pass_len=st.integers(512, 40_000),
    ahead=st.integers(0, 256),
    link=st.floats(1, 500),
    speed=st.floats(0.01, 10),
)
def test_time_lies_between_the_busier_side_and_both_in_turn(
    tokens: int, pass_len: int, ahead: int, link: float, speed: float
) -> None:
    rates = replace(FAST, link_gbps=link, linear_tflops=500 * speed, grouped_tflops=250 * speed)
    cost = prefill_cost(DEEPSEEK_V3, rates, tokens, pass_len=pass_len, ahead_experts=ahead)
    compute = cost.front_s + cost.experts_s
    assert max(cost.copy_s, compute) * (1 - 1e-9) <= cost.seconds <= (cost.copy_s + compute) * (1 + 1e-9)
    deeper = prefill_cost(DEEPSEEK_V3, rates, tokens, pass_len=pass_len, ahead_experts=ahead + 64)
    assert deeper.seconds <= cost.seconds * (1 + 1e-9)
    halves = prefill_cost(DEEPSEEK_V3, replace(rates, num_devices=2), tokens, pass_len=pass_len, ahead_experts=ahead)
    # Both devices expand the latents of the whole context, for their own tokens.
    assert cost.seconds / 2 * (1 - 1e-9) <= halves.seconds <= cost.seconds
