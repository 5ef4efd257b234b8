"""Median times of calls that are waited for."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Effort:
    """How long to measure a call: at least so often, and for at least so many seconds."""

    calls: int = 3
    seconds: float = 0.0


def median_seconds(call: Callable[[], Any], effort: Effort) -> float:
    return medians_in_turn([call], effort)[0]


def medians_in_turn(calls: Sequence[Callable[[], Any]], effort: Effort) -> list[float]:
    """Of each call: one after the other, round after round, so that what slows one slows all.

    A round before them is not counted: it compiles.
    """
    rounds = [[_seconds(call) for call in calls]]
    end = time.perf_counter() + effort.seconds * len(calls)
    while len(rounds) <= effort.calls or time.perf_counter() < end:
        rounds.append([_seconds(call) for call in calls])
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def median_seconds_beside(call: Callable[[], Any], other: Callable[[], Any], effort: Effort) -> float:
    """Of a call, while a second thread makes the other over and over."""
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.is_set():
            _seconds(other)

    with ThreadPoolExecutor(1) as thread:
        repeated = thread.submit(repeat)
        try:
            return median_seconds(call, effort)
        finally:
            is_over.set()
            repeated.result()


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
