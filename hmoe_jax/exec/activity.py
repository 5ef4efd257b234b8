"""What device and CPU did when, while a batch was decoded with its routed experts beside the device's programs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hmoe_jax.experts.lane import Job
from hmoe_jax.perf.lanes import Span

PARTS = "AB"
"""Names of a batch's parts, by their slots in the lane."""

BETWEEN = "between steps"


@dataclass(frozen=True)
class Activity:
    """`experts`: the CPU computes those of a part. `device`: it computes something else of that part, or what stands
    `BETWEEN` two steps; else it waits for the CPU. `prompt`: meanwhile it computes a part of the last prompt that came
    while others decoded. `copies`: of that prompt's experts to the device."""

    device: tuple[Span, ...] = ()
    experts: tuple[Span, ...] = ()
    prompt: tuple[Span, ...] = ()
    copies: tuple[Span, ...] = ()


def activity_of(jobs: Sequence[Job]) -> Activity:
    """Of all steps in which these jobs of a lane were computed."""
    experts = tuple(Span(PARTS[job.slot], job.begun_s, job.done_s) for job in jobs)
    return Activity(device=tuple(_device_spans(jobs)), experts=experts)


class _Event(NamedTuple):
    seconds: float
    name: str
    job: Job


def _device_spans(jobs: Sequence[Job]) -> list[Span]:
    """All time but that in which a result was awaited. Until a job is submitted the device works for that job; then for
    the same part, until it waits for another."""
    events = [
        *(_Event(job.fetched_s, "fetched", job) for job in jobs),
        *(_Event(job.submitted_s, "submitted", job) for job in jobs),
        *(_Event(job.awaited_s, "awaited", job) for job in jobs),
    ]
    events.sort(key=lambda event: event.seconds)  # of one moment: in this order
    return [
        Span(_worked_for(before, after), before.seconds, after.seconds)
        for before, after in itertools.pairwise(events)
        if before.name != "awaited" and before.seconds < after.seconds
    ]


def _worked_for(before: _Event, after: _Event) -> str:
    if before.name == "fetched" and after.name == "submitted" and after.job.layer <= before.job.layer:
        return BETWEEN
    return PARTS[(after if after.name == "submitted" else before).job.slot]
