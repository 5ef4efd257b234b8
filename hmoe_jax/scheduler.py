"""Which tokens are computed next. Integers only: no arrays, no device, no clock of its own."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.kv.pool import PagePool
from hmoe_jax.kv.prefix import page_keys
from hmoe_jax.request import Sequence


@dataclass(frozen=True)
class Prefill:
    """Compute prompt tokens from `start` on, at most `length` of them. `is_first`: the slot still holds the sampling
    state of the sequence before."""

    sequence: Sequence
    start: int
    length: int
    is_first: bool


class Scheduler:
    """Owns the queue, the slots and the pages.

    - A lower priority number goes first; among equals, first come, first served. Nobody overtakes a sequence that waits
      for room, and one prompt is computed at a time.
    - A waiting sequence starts when there is a slot, pages for what it has, and one for each running sequence that may
      need another.
    - Running sequences take pages as they grow. When none is left, the one that goes last of all (the youngest of the
      lowest priority) is preempted: it gives up its pages and waits again, where it stood. So the first one always
      finishes, and then the next becomes the first.
    - Full pages of prompts can be found by later prompts until their place is needed. Only what a prefill computed is
      found: prefill and decoding round differently, and an answer shall not depend on who asked before.
    - A sequence that was in two steps that failed decodes alone until it has a token, so that it harms nobody else.
      After one, all go on together: most failures do not come back.
    """

    def __init__(
        self,
        layout: CacheLayout,
        *,
        num_slots: int,
        piece_len: Callable[[int], int],
        finds_prefixes: bool = True,
    ):
        """`piece_len` says how many of the tokens that are left of a prompt a step takes."""
        self._layout, self._piece_len, self._num_slots = layout, piece_len, num_slots
        self._finds_prefixes = finds_prefixes
        self._pool = PagePool(layout.num_pages)
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._waiting: list[Sequence] = []  # both by rank
        self._running: list[Sequence] = []
        self._deadlines: list[tuple[int, int]] = []  # with the number of who arrived
        self._timed: dict[int, Sequence] = {}
        self._num_arrived = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0
        """Of all admissions: tokens that were needed in the cache, and those that were found there."""

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> Items[Sequence]:
        return tuple(self._waiting)

    @property
    def running(self) -> Items[Sequence]:
        return tuple(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    @property
    def num_kept_pages(self) -> int:
        return self._pool.num_kept

    def check_fits(self, sequences: Items[Sequence]) -> None:
        """Raises `ValueError` for a sequence that could never be finished."""
        most = (self._layout.num_pages - 1) * self._layout.page_size
        longest = max(sequence.max_len for sequence in sequences)
        if longest > most:
            raise ValueError(f"a sequence may come to {longest} tokens, but the cache holds {most}: lower max_tokens")

    def add(self, sequences: Items[Sequence]) -> None:
        """Queues sequences that fit."""
        for sequence in sequences:
            sequence.arrival = self._num_arrived
            self._num_arrived += 1
            if self._finds_prefixes:
                size, salt = self._layout.page_size, sequence.terms.cache_salt
                sequence.page_keys = page_keys(sequence.prompt_ids, page_size=size, salt=salt)
            self._wait(sequence)
            if sequence.terms.deadline_ns is not None:
                heapq.heappush(self._deadlines, (sequence.terms.deadline_ns, sequence.arrival))
                self._timed[sequence.arrival] = sequence

    def next_prefill(self) -> Prefill | None:
        """A piece of the prompt that was begun, or of the first that waits if there is room for it."""
        sequence = next((each for each in self._running if each.is_prefilling), None)
        is_first = sequence is None
        if sequence is None:
            sequence = self._admit()
        if sequence is None:
            return None
        start = sequence.num_computed
        return Prefill(sequence, start, self._piece_len(len(sequence.prompt_ids) - start), is_first)

    def prefilled(self, sequence: Sequence, end: int) -> None:
        """The prompt is in the cache up to `end`."""
        size = self._layout.page_size
        for index in range(sequence.num_computed // size, min(end // size, len(sequence.page_keys))):
            self._pool.name(sequence.pages[index], sequence.page_keys[index])
        sequence.num_computed = end

    def next_decode(self) -> tuple[Sequence, ...]:
        """Those that get a token each now, first come first, each with a page for it. Preempts who has to make room."""
        ready = [each for each in self._running if not each.is_prefilling]
        ready = [each for each in ready if each.num_failures > 1][:1] or ready
        for sequence in ready:
            while sequence.is_admitted and len(sequence.pages) < self._layout.pages_for(sequence.num_computed + 1):
                if self._pool.num_free:
                    sequence.pages += self._pool.take(1)
                else:
                    self.preempt(self._running[-1])
        return tuple(each for each in ready if each.is_admitted)

    def preempt(self, sequence: Sequence) -> None:
        """Takes away slot and pages of a running sequence, which waits again."""
        self._leave(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence, waiting or running, that has ended."""
        if self._timed.pop(sequence.arrival, None) is not None and len(self._deadlines) > 2 * len(self._timed):
            self._deadlines = [each for each in self._deadlines if each[1] in self._timed]
            heapq.heapify(self._deadlines)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._leave(sequence)

    def expired(self, now_ns: int) -> list[Sequence]:
        """Those that have not ended and whose deadline has passed, once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            late.append(self._timed.pop(heapq.heappop(self._deadlines)[1], None))
        return [sequence for sequence in late if sequence is not None]

    def forget_cache(self) -> None:
        """For a cache whose contents are lost: all running sequences wait again, and nothing is found any more."""
        for sequence in list(self._running):
            self.preempt(sequence)
        self._pool.forget_keys()

    def check(self) -> None:
        """Adds up slots and pages. Raises `AssertionError` saying what is lost or shared wrongly."""
        self._pool.check(Counter(page for each in self._running for page in each.pages))
        slots = [*self._free_slots, *(each.slot for each in self._running)]
        assert sorted(slots) == list(range(self._num_slots)), f"slots lost or shared: {sorted(slots)}"

    def _admit(self) -> Sequence | None:
        """Starts the first waiting sequence if there is room for it; nobody overtakes it."""
        if not self._waiting or not self._free_slots:
            return None
        sequence = self._waiting[0]
        found = self._find_prefix(sequence)
        self._pool.hold(found)
        missing = self._layout.pages_for(sequence.length + 1) - len(found)
        growing = sum(self._layout.pages_for(each.max_len) > len(each.pages) for each in self._running)
        if missing + growing > self._pool.num_free:
            self._pool.give_back(found)
            return None
        del self._waiting[0]
        sequence.pages, sequence.slot = [*found, *self._pool.take(missing)], self._free_slots.pop()
        sequence.num_computed = len(found) * self._layout.page_size
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.num_computed
        self.num_prompt_tokens += len(sequence.prompt_ids)
        self.num_cached_tokens += sequence.num_computed
        insort(self._running, sequence, key=lambda each: each.rank)
        return sequence

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the prompt's beginning; its last token is always computed, for what comes after it."""
        if not sequence.finds_prefix:
            return []
        most = (len(sequence.prompt_ids) - 1) // self._layout.page_size
        return self._pool.find(sequence.page_keys[:most])

    def _wait(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda each: each.rank)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.give_back(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], -1
