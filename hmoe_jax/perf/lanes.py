"""What the two sides of streaming did when: copies to the devices, and their computation."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Span:
    """Something that took time, in seconds of `time.perf_counter`; `num_bytes` is what it copied."""

    name: str
    begin: float
    end: float
    num_bytes: int = 0


def busy_seconds(spans: Iterable[Span]) -> float:
    """Time in which at least one of them was under way."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return total


class Recorder:
    """Collects spans of both lanes, and how long the calling thread was busy itself. A context manager.

    With `watches_computing` a thread waits for every computation, to know when it ended: they run in the order in which
    they are started, so that one begins when it was started or the one before it ended.
    """

    def __init__(self, *, watches_computing: bool = False):
        self.copies: list[Span] = []
        self.computed: list[Span] = []
        self.host_s = 0.0
        self.begin = self.end = time.perf_counter()
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="hmoe-watch") if watches_computing else None

    def copied(self, span: Span) -> None:
        self.copies.append(span)

    def computing(self, name: str, output: Any) -> None:
        """`output` becomes ready when a computation ends that was just started. Whoever waits for it anyhow adds to
        `computed`."""
        if self._watcher is not None:
            self._watcher.submit(self._watch, name, time.perf_counter(), output)

    @property
    def wall_s(self) -> float:
        return self.end - self.begin

    @property
    def overlap_efficiency(self) -> float:
        """The busier lane's time over all time: 1 where the other side is wholly hidden behind it."""
        return max(busy_seconds(self.copies), busy_seconds(self.computed)) / self.wall_s

    def __enter__(self) -> Recorder:
        self.begin, self.host_s = time.perf_counter(), -time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.shutdown()
        self.end = time.perf_counter()
        self.host_s += time.thread_time()

    def _watch(self, name: str, started: float, output: Any) -> None:
        output.block_until_ready()
        before = self.computed[-1].end if self.computed else started
        self.computed.append(Span(name, max(started, before), time.perf_counter()))
