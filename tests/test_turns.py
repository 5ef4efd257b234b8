"""Whose turn it is: prompts take no more of decoding's time than they may."""

from __future__ import annotations

import random

import pytest

from hmoe_jax.turns import Turns


def test_a_prompt_begins_at_once_and_goes_on_when_what_it_took_is_paid_off() -> None:
    turns = Turns(500)
    assert turns.is_prompts
    turns.prefilled(100)
    steps = 0
    while not turns.is_prompts:
        turns.decoded(20)
        steps += 1
    assert steps == 10


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
