"""The clock and the limits that benchmarks and calibration share."""

from __future__ import annotations

import time
from functools import partial

import pytest
from measuring.experts import best_variant, variants_table
from measuring.timing import Effort, median_seconds_beside, medians_in_turn


def test_calls_are_timed_in_turn_after_a_round_that_compiles() -> None:
    called: list[str] = []
    medians = medians_in_turn([partial(called.append, "a"), partial(called.append, "b")], Effort(calls=2))
    assert called == ["a", "b"] * 3
    assert len(medians) == 2


def test_a_call_is_timed_while_another_is_made_over_and_over() -> None:
    made: list[int] = []
    at_each_call: list[int] = []

    def call() -> None:
        before = len(made)
        while len(made) == before:
            time.sleep(1e-4)
        at_each_call.append(len(made))

    assert median_seconds_beside(call, lambda: made.append(0), Effort(calls=5)) > 0
    assert len(set(at_each_call)) == 6
    with pytest.raises(ZeroDivisionError):
        median_seconds_beside(lambda: None, lambda: 1 // 0, Effort())


@pytest.mark.parametrize("calls", [1, 4])
def test_an_effort_is_the_least_of_calls_and_of_time(calls: int) -> None:
    called: list[None] = []
    medians_in_turn([lambda: called.append(None)], Effort(calls, seconds=0.02))
    assert len(called) > 1 + calls


def test_the_best_way_is_the_fastest_with_many_rows() -> None:
    rates = {"batched": {32: 0.3, 512: 0.5}, "looped": {32: 0.1, 512: 0.6}}
    assert best_variant(rates) == "looped"
    assert "| 512 | 0.5 (50%) | 0.6 (60%) |" in variants_table(rates, peak_tflops=1.0)
