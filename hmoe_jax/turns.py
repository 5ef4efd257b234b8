"""Whose turn it is, where prompts and decoding share the same devices."""

from __future__ import annotations

from collections import deque
from statistics import median

PROBE_EVERY = 16
"""Of so many steps that a prompt may fill, one is left alone: to know how long steps take without."""

NUM_KEPT = 9
"""Steps left alone whose median is taken."""

MOST_TAKEN = 4
"""Steps' lengths that a prompt may owe for one that it has filled: what takes longer has other reasons, such as experts
that are read from a disk for the first time."""


class Turns:
    """A prompt owes the time that it takes from running sequences; it goes on when decoding has paid that off.

    For every millisecond that decoding computes, `slowdown_permille` microseconds are paid. So, over any longer time,
    tokens come at least 1 / (1 + slowdown) as fast as without prompts, and one token is delayed by one piece of a
    prompt at most, which is never cut. A prompt that delays nobody owes nothing: computed in the gaps of decode steps,
    it owes what these take longer than steps that were left alone, up to `MOST_TAKEN` such steps. Integers only: times
    in nanoseconds.
    """

    def __init__(self, slowdown_permille: int, *, in_turn_permille: int | None = None):
        """`in_turn_permille` is that of prompts that stop decoding; default: the same."""
        in_turn_permille = slowdown_permille if in_turn_permille is None else in_turn_permille
        if min(slowdown_permille, in_turn_permille) < 1:
            raise ValueError(f"slowdown_permille must be at least 1, got {slowdown_permille} and {in_turn_permille}")
        self._slowdown_permille, self._in_turn_permille = slowdown_permille, in_turn_permille
        self._owed = 0  # in thousandths of a nanosecond
        self._alone_ns: dict[int, deque[int]] = {}
        self._size, self._late_ns, self._num_offered = 0, 0, 0
        self._is_offered = self._is_filled = False

    @property
    def is_prompts(self) -> bool:
        """Whether a prompt may compute now, though others wait for tokens."""
        return self._owed <= 0

    @property
    def allowance_ns(self) -> int:
        """How late a prompt may still make the step: what the step pays, without what was taken already."""
        pays = self._slowdown_permille * self._expected_ns(self._size)
        return (pays - self._owed) // 1000 - self._late_ns

    @property
    def is_unfilled(self) -> bool:
        """Whether the last step's gaps were a prompt's, and of no use to it."""
        return self._is_offered and not self._is_filled

    def begin_step(self, size: int, *, offers_gaps: bool) -> bool:
        """Decoding begins, of so many sequences. Whether a prompt may fill its gaps, if it `offers_gaps`."""
        self._size, self._late_ns, self._is_filled = size, 0, False
        self._is_offered = offers_gaps and size in self._alone_ns and self.allowance_ns >= 0
        self._num_offered += self._is_offered
        if self._num_offered == PROBE_EVERY:
            self._is_offered, self._num_offered = False, 0
        return self._is_offered

    def filled(self, late_ns: int) -> None:
        """A part of a prompt was computed in a gap, and ended so much later."""
        self._late_ns += late_ns
        self._is_filled = True

    def decoded(self, elapsed_ns: int) -> None:
        """All sequences got a token. What is paid too much is not saved: a later prompt may not stop them for long."""
        if not self._is_offered:
            self._alone_ns.setdefault(self._size, deque(maxlen=NUM_KEPT)).append(elapsed_ns)
        alone_ns = self._expected_ns(self._size)
        taken_ns = min(elapsed_ns - alone_ns, MOST_TAKEN * alone_ns) if self._is_offered else 0
        self._owed = max(self._owed + 1000 * taken_ns - self._slowdown_permille * alone_ns, 0)
        self._late_ns = 0

    def prefilled(self, elapsed_ns: int, *, in_turn: bool = False) -> None:
        """A prompt computed while sequences waited for tokens; `in_turn`: one that is never computed beside them."""
        permille = self._in_turn_permille if in_turn else self._slowdown_permille
        self._owed += 1000 * elapsed_ns * self._slowdown_permille // permille

    def idle(self) -> None:
        """Nobody waits for a token."""
        self._owed = 0

    def _expected_ns(self, size: int) -> int:
        """A step of this size that is left alone; 0 if there was none."""
        return int(median(self._alone_ns.get(size, (0,))))
