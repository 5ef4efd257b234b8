"""How long the next part of a prompt may take."""

from __future__ import annotations

import math

import pytest

from hmoe_jax.exec.quantum import NOWHERE, Quanta, Quantum, Room, run_out

CHOICES = [(0.4, "best"), (0.3, "good"), (0.1, "shortest"), (0.2, "poor")]


@pytest.mark.parametrize(
    ("room", "chosen"),
    [
        (Room(), "best"),
        (Room(0.35), "good"),
        (Room(0.1), "shortest"),
        (Room(0.05), None),
        (Room(0.05, late_s=0.04), None),
        (Room(0.05, late_s=0.05), "shortest"),
        (Room(0.05, late_s=0.4), "shortest"),  # nobody is late for more than the least
        (Room(-1.0, late_s=math.inf), "shortest"),
        (NOWHERE, None),
    ],
)
def test_what_is_preferred_is_taken_if_it_fits_and_else_the_shortest_if_it_may_be_late(
    room: Room, chosen: str | None
) -> None:
    fitting = room.choose(CHOICES)
    assert (None if fitting is None else fitting[1]) == chosen


def test_nothing_that_takes_nearly_as_long_as_more_would_is_taken_where_neither_fits() -> None:
    """A block of a quarter of the tokens that still has to look at all of the context."""
    blocks = [(0.8, "256"), (0.4, "64"), (0.3, "16")]
    late, early = Room(0.1, late_s=math.inf).choose(blocks), Room(0.3).choose(blocks)
    assert late == (0.4, "64")
    assert early == (0.3, "16")


def test_a_prefill_without_a_pause_has_all_the_room() -> None:
    rooms: list[Room | None] = []

    def quanta() -> Quanta:
        for part in range(3):
            rooms.append((yield Quantum("part", part, 3, 0.0)))
        return "value"

    assert run_out(quanta()) == "value"
    assert rooms == [None] * 3
