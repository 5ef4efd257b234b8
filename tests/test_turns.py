"""Whose turn it is: prompts take no more of decoding's time than they may."""

from __future__ import annotations

import random

import pytest

from hmoe_jax.turns import MOST_TAKEN, PROBE_EVERY, Turns


def test_a_prompt_begins_at_once_and_goes_on_when_what_it_took_is_paid_off() -> None:
    turns = Turns(500)
    assert turns.is_prompts
    turns.prefilled(100)
    steps = 0
    while not turns.is_prompts:
        turns.decoded(20)
        steps += 1
    assert steps == 10


def test_a_prompt_that_stops_decoding_owes_by_a_rate_of_its_own() -> None:
    """At 100 permille beside, 1000 in turn: 500 ns are paid by 500 ns of decoding, or by 5000."""
    turns = Turns(100, in_turn_permille=1000)
    for in_turn, steps_to_pay in ((True, 2), (False, 13)):
        turns.prefilled(500, in_turn=in_turn)
        steps = 0
        while not turns.is_prompts:
            turns.begin_step(1, offers_gaps=False)
            turns.decoded(400)
            steps += 1
        assert steps == steps_to_pay


def test_nothing_is_saved_up_for_a_later_prompt() -> None:
    turns = Turns(1000)
    turns.decoded(10**12)
    turns.prefilled(1)
    assert not turns.is_prompts


def test_where_nobody_waits_nothing_is_owed() -> None:
    turns = Turns(1)
    turns.prefilled(10**12)
    turns.idle()
    assert turns.is_prompts


@pytest.mark.parametrize("slowdown_permille", [1, 150, 1000, 4000])
def test_over_a_long_time_tokens_take_so_much_longer_and_no_more(slowdown_permille: int) -> None:
    turns, draw = Turns(slowdown_permille), random.Random(0)
    decoded = prefilled = 0
    longest = 50_000
    while decoded < 400 * longest:
        if turns.is_prompts:
            elapsed = draw.randrange(longest)
            turns.prefilled(elapsed)
            prefilled += elapsed
        else:
            elapsed = draw.randrange(2_000)
            turns.decoded(elapsed)
            decoded += elapsed
    assert prefilled <= decoded * slowdown_permille / 1000 + longest
    assert prefilled >= 0.8 * decoded * slowdown_permille / 1000 - longest  # what is left over is not saved


@pytest.mark.parametrize("slowdown_permille", [0, -3])
def test_a_prompt_needs_some_time(slowdown_permille: int) -> None:
    with pytest.raises(ValueError, match=f"slowdown_permille must be at least 1, got {slowdown_permille}"):
        Turns(slowdown_permille)


def alone(turns: Turns, elapsed_ns: int, *, size: int = 4) -> None:
    turns.begin_step(size, offers_gaps=False)
    turns.decoded(elapsed_ns)


def test_the_gaps_of_a_step_are_a_prompts_once_it_is_known_how_long_it_takes_without() -> None:
    turns = Turns(150)
    assert not turns.begin_step(4, offers_gaps=True)
    turns.decoded(1000)
    assert turns.begin_step(4, offers_gaps=True)
    turns.decoded(1000)
    assert not turns.begin_step(8, offers_gaps=True)


def test_a_step_pays_for_what_it_took_longer_than_alone() -> None:
    turns = Turns(100)
    alone(turns, 1000)
    turns.begin_step(4, offers_gaps=True)
    assert turns.allowance_ns == 100
    turns.filled(30)
    assert turns.allowance_ns == 70
    turns.decoded(1350)  # 350 more, of which 100 are paid
    assert not turns.is_prompts
    assert not turns.begin_step(4, offers_gaps=True)
    turns.decoded(1000)
    assert turns.allowance_ns == -50
    alone(turns, 1000)
    assert turns.allowance_ns == 50
    assert turns.begin_step(4, offers_gaps=True)
    alone(turns, 1000)
    assert turns.is_prompts


def test_a_prompt_that_fits_no_gap_is_known_to() -> None:
    turns = Turns(100)
    alone(turns, 1000)
    assert not turns.is_unfilled
    turns.begin_step(4, offers_gaps=True)
    turns.decoded(1000)
    assert turns.is_unfilled
    turns.begin_step(4, offers_gaps=True)
    turns.filled(0)
    turns.decoded(1000)
    assert not turns.is_unfilled


def test_now_and_then_a_step_is_left_alone() -> None:
    turns = Turns(100)
    alone(turns, 1000)
    offered = []
    for _ in range(4 * PROBE_EVERY):
        offered.append(turns.begin_step(4, offers_gaps=True))
        if offered[-1]:
            turns.filled(0)
        turns.decoded(1000)
    assert offered.count(False) == 4


@pytest.mark.parametrize("slowdown_permille", [50, 150, 1000])
def test_tokens_beside_a_prompt_take_so_much_longer_and_no_more(slowdown_permille: int) -> None:
    """Whatever a prompt costs in a gap: steps that are filled take up to three times as long."""
    turns, draw = Turns(slowdown_permille), random.Random(0)
    total = count = 0
    alone(turns, 1000)
    while count < 5000:
        is_offered = turns.begin_step(4, offers_gaps=True)
        if is_offered:
            turns.filled(draw.randrange(100))
        elapsed = draw.randrange(1000, 3000) if is_offered else 1000
        turns.decoded(elapsed)
        total, count = total + elapsed, count + 1
    slowdown = total / (1000 * count) - 1
    assert 0.8 * min(slowdown_permille / 1000, 0.9) <= slowdown <= slowdown_permille / 1000 + 0.001


def test_what_is_no_prompts_fault_is_not_owed_for_ever() -> None:
    """A step of a thousand times its length: a disk, a machine that slept."""
    turns = Turns(1000)
    alone(turns, 1000)
    turns.begin_step(4, offers_gaps=True)
    turns.filled(0)
    turns.decoded(1_000_000)
    for _ in range(MOST_TAKEN - 1):
        assert not turns.is_prompts
        alone(turns, 1000)
    assert turns.is_prompts
