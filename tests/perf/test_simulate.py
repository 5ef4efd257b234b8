"""Two servers and a prompt: by hand where that can be done, and what must hold whatever the durations are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.config import read_config
from hmoe_jax.perf.cost import decode_cost, prefill_cost
from hmoe_jax.perf.machines import sheet_rates
from hmoe_jax.perf.simulate import Prompt, Stages, beside, prompt_of, simulate, stages

DEEPSEEK_V3 = read_config(Path(__file__).parents[2] / "models" / "deepseek-v3")
SECONDS = st.floats(0.001, 1.0)
CONTENTION = st.floats(1.0, 2.0)
LAYERS = 20


def stage(
    front_s: float | int,
    experts_s: float | int,
    shared_s: float | int = 0,
    tail_s: float | int = 0,
    contention: float = 1.0,
) -> Stages:
    return Stages(LAYERS, float(front_s), float(shared_s), float(experts_s), float(tail_s), contention)


def test_one_part_takes_turns_but_for_the_shared_experts() -> None:
    assert simulate([stage(2, 5, tail_s=3)]).step_s == pytest.approx(LAYERS * 7 + 3)
    assert simulate([stage(2, 5, shared_s=4)]).step_s == pytest.approx(LAYERS * 7)
    assert simulate([stage(2, 5, shared_s=6)]).step_s == pytest.approx(LAYERS * 8)


def test_two_equal_sides_hide_each_other() -> None:
    overlapped = simulate([stage(1, 1)] * 2)
    assert overlapped.step_s == pytest.approx(2 * LAYERS + 1)
    assert overlapped.share("device") == overlapped.share("lane") > 0.97


def test_sides_slow_each_other_only_while_both_are_busy() -> None:
    """Per layer 4 beside 5: both for 4 * 1.5, then 1 of the experts. Two equal sides are both busy all the time but for
    a first and a last stage; two that each take twice as long at once gain nothing."""
    assert simulate([stage(2, 5, 4, contention=1.5)]).step_s == pytest.approx(LAYERS * (2 + 6 + 1))
    assert simulate([stage(1, 1, contention=1.5)] * 2).step_s == pytest.approx(1.5 * (2 * LAYERS - 1) + 2)
    assert simulate([stage(1, 1, contention=2.0)] * 2).step_s == pytest.approx(simulate([stage(2, 2)]).step_s)


@given(SECONDS, SECONDS, SECONDS, SECONDS)
def test_a_step_lies_between_its_busier_side_and_both_in_turn(
    front_s: float, experts_s: float, shared_s: float, tail_s: float
) -> None:
    outcome = simulate([stage(front_s, experts_s, shared_s, tail_s)] * 2, num_steps=1)
    device, lane = 2 * (LAYERS * (front_s + shared_s) + tail_s), 2 * LAYERS * experts_s
    assert max(device, lane) <= outcome.seconds * (1 + 1e-9)
    assert outcome.seconds <= (device + lane) * (1 + 1e-9)
    assert outcome.share("device") == pytest.approx(device / outcome.seconds)
    assert outcome.share("lane") == pytest.approx(lane / outcome.seconds)


def test_a_prompt_on_a_device_of_its_own_only_takes_bandwidth() -> None:
    prompt = Prompt(compute_s=1000.0, copy_s=900.0, quantum_s=1.0, stretch=1.1, has_device=True)
    result = beside([stage(1, 9)], prompt)
    assert result.slowdown == pytest.approx(0.09, rel=0.1)
    assert result.gain == pytest.approx(2 / 1.09 - 1, rel=0.1)


def test_quanta_that_fit_into_the_gaps_slow_nobody_and_more_are_begun_as_far_as_decoding_may_be_late() -> None:
    prompt = Prompt(compute_s=500.0, copy_s=1.0, quantum_s=2.9)
    gentle, allowed = (beside([stage(1, 9)], prompt, max_slowdown=limit) for limit in (1e-6, 0.15))
    assert gentle.slowdown == pytest.approx(0.0, abs=1e-6)
    assert gentle.together.share("prompt") > 0.8
    assert 0.05 < allowed.slowdown <= 0.15
    assert allowed.together.share("prompt") * allowed.together.seconds == pytest.approx(500)


@given(SECONDS, SECONDS, SECONDS, st.floats(0.01, 0.5), CONTENTION)
def test_decoding_is_never_slowed_more_than_it_may_be(
    front_s: float, experts_s: float, quantum_s: float, limit: float, contention: float
) -> None:
    prompt = Prompt(compute_s=20 * quantum_s, copy_s=0.001, quantum_s=quantum_s)
    result = beside([stage(front_s, experts_s, contention=contention)], prompt, max_slowdown=limit)
    assert result.slowdown <= limit * (1 + 1e-6)
    busy_s = result.together.share("prompt") * result.together.seconds
    assert 20 * quantum_s * (1 - 1e-9) <= busy_s <= 20 * quantum_s * contention * (1 + 1e-9)
    assert result.gain >= -1e-9


def test_a_quantum_waits_for_its_experts() -> None:
    slow_link = beside([stage(1, 9)], Prompt(compute_s=100.0, copy_s=1000.0, quantum_s=2.0))
    assert slow_link.together.seconds >= 1000


@pytest.mark.parametrize("contention", [1.0, 1.5])
def test_stages_of_the_model_of_costs_add_up_to_its_steps(contention: float) -> None:
    rates = replace(sheet_rates("h100", has_kernels=True), contention=contention)
    for num_parts in (1, 2):
        sizes = {"batch": 4, "context": 4096, "num_parts": num_parts}
        cost = decode_cost(DEEPSEEK_V3, rates, **sizes)
        outcome = simulate(stages(DEEPSEEK_V3, rates, **sizes))
        assert outcome.step_s == pytest.approx(cost.seconds, rel=0.05)


def test_copies_stretch_the_experts_where_memory_is_the_limit() -> None:
    rates = sheet_rates("rtx5090", has_kernels=True, dram_gbps=440.0)
    cost = prefill_cost(DEEPSEEK_V3, rates, 32768, pass_len=32768)
    assert prompt_of(cost, rates, quantum_s=0.01, dram_gbps=600.0).stretch == 1.0
    tight = prompt_of(cost, rates, quantum_s=0.01, dram_gbps=440.0).stretch
    assert 1.0 < tight <= 440 / (440 - 55)
