"""Decode steps in one part and in two, in turn, on one executor whose two sides have processors of their own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import jax

from hmoe_jax.exec.batch import DecodeBatch, DecodeRow, decode_batch
from hmoe_jax.exec.programs import Executor
from hmoe_jax.exec.step import decode_in_one, decode_in_two

WAYS: dict[str, Callable[[Executor, DecodeBatch], Any]] = {
    "one": lambda executor, batch: executor.run(decode_in_one, batch),
    "two": lambda executor, batch: executor.run(decode_in_two, batch),
    "loop_one": lambda executor, batch: executor.loop(batch, num_parts=1),
    "loop_two": lambda executor, batch: executor.loop(batch, num_parts=2),
}
"""In one compiled program, or in a loop on the host; in one part, in which the two sides take turns, or in two."""


@dataclass(frozen=True)
class Step:
    """Seconds of a whole step, those of it in which routed experts were computed, and those in which the thread that
    drives it was busy: with Python, and with starting programs."""

    seconds: float
    experts_s: float
    host_s: float

    @property
    def host_share(self) -> float:
        return self.host_s / self.seconds


@dataclass(frozen=True)
class Comparison:
    """Medians of `num_rounds` steps of `batch` sequences that look back at `context` tokens, in each way."""

    batch: int
    context: int
    num_rounds: int
    one: Step
    two: Step
    loop_one: Step
    loop_two: Step

    @property
    def speedup(self) -> float:
        return self.one.seconds / self.two.seconds

    @property
    def loop_s(self) -> float:
        """What the loop on the host adds to a step in one part: dispatches, and the host's own work."""
        return self.loop_one.seconds - self.one.seconds

    @property
    def experts_share(self) -> float:
        """Of a step in which the two sides take turns."""
        return self.one.experts_s / self.one.seconds

    @property
    def ideal(self) -> float:
        """The speedup if the smaller side hid wholly behind the larger one, and splitting cost nothing."""
        return 1 / max(self.experts_share, 1 - self.experts_share)


def compare(executor: Executor, *, batch: int, context: int, num_rounds: int) -> Comparison:
    """The cache is empty: what stands in it changes no time. Every step has other tokens, so other experts."""
    pages_each = executor.layout.pages_for(context + 1)
    draw = iter(range(10**9))

    def rows() -> list[DecodeRow]:
        vocab_size = executor.config.vocab_size
        return [
            DecodeRow(
                (7919 * next(draw)) % vocab_size,
                context,
                slot,
                range(1 + slot * pages_each, 1 + (slot + 1) * pages_each),
            )
            for slot in range(batch)
        ]

    def step(name: str) -> Step:
        inputs = decode_batch(rows(), executor.layout, size=batch, num_slots=executor.num_slots)
        stats = executor.expert_stats
        assert stats is not None
        before, begin, host = stats().seconds, time.perf_counter(), time.thread_time()
        jax.block_until_ready(WAYS[name](executor, inputs))
        executor.check_intact()
        return Step(time.perf_counter() - begin, stats().seconds - before, time.thread_time() - host)

    for name in WAYS:
        step(name)  # compiles
    steps = [{name: step(name) for name in WAYS} for _ in range(num_rounds)]
    return Comparison(batch, context, num_rounds, **{name: _median([each[name] for each in steps]) for name in WAYS})


def _median(steps: list[Step]) -> Step:
    """Of each figure for itself."""
    return Step(*(statistics.median(each) for each in zip(*map(astuple, steps), strict=True)))
