"""From the times of a lane's jobs to what each side did when."""

from __future__ import annotations

import pytest

from hmoe_jax.exec.activity import BETWEEN, Activity, activity_of
from hmoe_jax.experts.lane import Job
from hmoe_jax.perf.lanes import Span


def job(slot: int, layer: int, **times: int) -> Job:
    return Job(slot, layer, **{f"{name}_s": float(seconds) for name, seconds in times.items()})


def span(name: str, begin: int, end: int) -> Span:
    return Span(name, float(begin), float(end))


def test_nothing_was_done() -> None:
    assert activity_of([]) == Activity()


def test_in_one_part_the_device_waits_for_every_layer() -> None:
    """Two steps of two layers: fronts of 2, shared experts of 1, experts of 5, 3 between the steps."""
    jobs = [
        job(0, 0, submitted=2, begun=2, done=7, awaited=3, fetched=7),
        job(0, 1, submitted=9, begun=9, done=14, awaited=10, fetched=14),
        job(0, 0, submitted=17, begun=17, done=22, awaited=18, fetched=22),
    ]
    activity = activity_of(jobs)
    assert activity.experts == (span("A", 2, 7), span("A", 9, 14), span("A", 17, 22))
    names = [(each.name, each.begin, each.end) for each in activity.device]
    assert names == [("A", 2, 3), ("A", 7, 9), ("A", 9, 10), (BETWEEN, 14, 17), ("A", 17, 18)]


def test_in_two_parts_the_device_works_for_one_while_the_other_is_with_the_experts() -> None:
    jobs = [
        job(0, 0, submitted=2, begun=2, done=6, awaited=5, fetched=6),
        job(1, 0, submitted=4, begun=6, done=10, awaited=9, fetched=10),
        job(0, 1, submitted=8, begun=10, done=14, awaited=13, fetched=14),
        job(1, 1, submitted=12, begun=14, done=18, awaited=14, fetched=18),
    ]
    activity = activity_of(jobs)
    assert [each.name for each in activity.experts] == ["A", "B", "A", "B"]
    names = [(each.name, each.begin, each.end) for each in activity.device]
    # After A's first submission comes B's front; after its experts, A's back, next front and shared experts.
    assert names == [("B", 2, 4), ("B", 4, 5), ("A", 6, 8), ("A", 8, 9), ("B", 10, 12), ("B", 12, 13)]


def test_a_job_that_is_fetched_as_the_next_is_awaited_leaves_no_span() -> None:
    jobs = [
        job(0, 0, submitted=0, begun=0, done=4, awaited=1, fetched=4),
        job(1, 0, submitted=1, begun=4, done=6, awaited=4, fetched=6),
    ]
    assert sum(each.end - each.begin for each in activity_of(jobs).device) == pytest.approx(1)
