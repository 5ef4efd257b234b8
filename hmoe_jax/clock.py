"""Time as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since some moment."""


def steady(clock: Clock) -> Clock:
    """The same clock, which stands still where the other one jumps back."""
    latest = clock()

    def now_s() -> float:
        nonlocal latest
        latest = max(latest, clock())
        return latest

    return now_s
