"""Who runs next: first come, first served, over slots and cache pages. Integers only, no arrays.

A sequence is admitted when a slot is free and pages for the most it can hold; it keeps them until it ends, so a running
sequence never waits for memory. Prompts go before decoding, one piece at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hmoe_jax.kv.pages import CacheLayout, PagePool
from hmoe_jax.request import Sequence


@dataclass(frozen=True)
class Prefill:
    """Compute prompt tokens from `start` on, at most `length` of them."""

    sequence: Sequence
    start: int
    length: int

    @property
    def is_first(self) -> bool:
        """Whether the slot still holds the sampling state of the sequence before."""
        return self.start == 0


@dataclass(frozen=True)
class Decode:
    """One token further for each of these."""

    sequences: tuple[Sequence, ...]


class Scheduler:
    """Owns the queue, the slots and the pages. `next` says what to run; `release` takes back what a sequence held."""

    def __init__(self, layout: CacheLayout, *, num_slots: int, piece_len: Callable[[int], int]):
        """`piece_len` says how many of the tokens that are left of a prompt a step takes."""
        self._layout, self._piece_len = layout, piece_len
        self._pages = PagePool(layout.num_pages)
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def next(self) -> Prefill | Decode | None:
        """The next step, or None when nothing is left."""
        self._admit()
        for sequence in self._running:
            remaining = len(sequence.prompt_ids) - sequence.num_computed
            if remaining:
                return Prefill(sequence, sequence.num_computed, self._piece_len(remaining))
        return Decode(tuple(self._running)) if self._running else None

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence, waiting or running, that has ended."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._running.remove(sequence)
            self._pages.give_back(sequence.pages)
            self._free_slots.append(sequence.slot)
            sequence.pages, sequence.slot = [], -1

    def _admit(self) -> None:
        """Starts the first waiting sequence if there is room for it; nobody overtakes it."""
        if not self._waiting or not self._free_slots:
            return
        pages = self._layout.pages_for(self._waiting[0].max_len)
        if pages > self._pages.num_free:
            return
        sequence = self._waiting.popleft()
        sequence.pages, sequence.slot = self._pages.take(pages), self._free_slots.pop()
        self._running.append(sequence)
