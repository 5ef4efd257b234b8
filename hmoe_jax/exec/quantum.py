"""A prefill in parts: what each of them is, and how long the next one may take."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Choice = TypeVar("Choice")

WORTH_CUTTING = 0.6
"""A part that does not fit is cut shorter if that takes at most so much of its time. Blocks of few tokens read the same
weights, keys and values as long ones: they may take nearly as long, and there are more of them."""


@dataclass(frozen=True)
class Quantum:
    """A part of a prefill: what, of which layer, of how many layers, and how long it should compute.

    `has_begun` is False where nothing was started: the next experts have not come yet ("copies"), or no part is as
    short as the room that there was ("room"). `is_elsewhere`: nothing need be started here, as the prompt goes on by
    itself, on devices of its own, unless the room is `NOWHERE`.
    """

    name: str
    layer: int
    num_layers: int
    predicted_s: float
    has_begun: bool = True
    is_elsewhere: bool = False


@dataclass(frozen=True)
class Room:
    """Where others wait for the device: a part that should take at most `seconds`, or the shortest that there is (of
    those that are `WORTH_CUTTING`), if it ends at most `late_s` after that. It is over when the prefill yields."""

    seconds: float = math.inf
    late_s: float = 0.0

    def choose(self, choices: Sequence[tuple[float, Choice]]) -> tuple[float, Choice] | None:
        """Of parts with their seconds, the preferred ones first, one that fits; None if none does."""
        fitting = next((each for each in choices if each[0] <= self.seconds), None)
        if fitting is not None:
            return fitting
        shortest = _shortest(choices)
        return shortest if shortest[0] <= self.seconds + self.late_s else None


def _shortest(choices: Sequence[tuple[float, Choice]]) -> tuple[float, Choice]:
    """Of those that are `WORTH_CUTTING`."""
    shortest = choices[0]
    for each in sorted(choices, key=lambda each: -each[0]):
        if each[0] <= WORTH_CUTTING * shortest[0]:
            shortest = each
    return shortest


NOWHERE = Room(seconds=-math.inf)
"""No part fits."""

Quanta = Generator[Quantum, Room | None, Any]
"""A prefill in parts. The first `next` starts nothing; then it computes while it is advanced, and its value is what the
step function returns. `send` says what `Room` the next part has; None: nobody waits, and parts may overlap.

Closing it between two parts cancels the prompt: what it left in the cache is nobody's, and everything else is freed.
"""


def run_out(quanta: Quanta) -> Any:
    """The value, computed without a pause."""
    while True:
        try:
            next(quanta)
        except StopIteration as end:
            return end.value
