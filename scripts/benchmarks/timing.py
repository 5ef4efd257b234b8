"""Calls, timed one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

MOST_CALLS = 1000


class Timer:
    """Times `call(0), call(1), ...`, visit after visit; a visit goes on where the last one ended."""

    def __init__(self, call: Callable[[int], Any]):
        self._call = call
        self._next = 0
        self._call_s: float | None = None

    def visit(self, *, seconds: float) -> list[float]:
        """Seconds of each call; at least one, and as many as begin within `seconds`.

        A call before them is not counted: it wakes the threads, and the first one of all compiles. Where one takes
        longer than a visit that would be waste, and it is left out but for the first visit.
        """
        if self._call_s is None or self._call_s < seconds:
            self._time_one()
        times = [self._time_one()]
        while sum(times) < seconds and len(times) < MOST_CALLS:
            times.append(self._time_one())
        self._call_s = statistics.median(times)
        return times

    def _time_one(self) -> float:
        begin = time.perf_counter()
        self._call(self._next)
        self._next += 1
        return time.perf_counter() - begin
