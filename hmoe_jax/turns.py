"""Whose turn it is, where prompts and decoding share the same devices."""

from __future__ import annotations


class Turns:
    """A prompt owes the time that it takes from running sequences; it goes on when decoding has paid that off.

    For every millisecond that decoding computes, `slowdown_permille` microseconds are paid. So, over any longer time,
    tokens come at least 1 / (1 + slowdown) as fast as without prompts, and one token is delayed by one piece of a
    prompt at most, which is never cut. A prompt that delays nobody owes nothing. Integers only: times in nanoseconds.
    """

    def __init__(self, slowdown_permille: int):
        if slowdown_permille < 1:
            raise ValueError(f"slowdown_permille must be at least 1, got {slowdown_permille}")
        self._slowdown_permille = slowdown_permille
        self._owed = 0  # in thousandths of a nanosecond

    @property
    def is_prompts(self) -> bool:
        """Whether a prompt may compute now, though others wait for tokens."""
        return self._owed <= 0

    def prefilled(self, elapsed_ns: int) -> None:
        """A prompt computed while sequences waited for their next tokens."""
        self._owed += 1000 * elapsed_ns

    def decoded(self, elapsed_ns: int) -> None:
        """All sequences got a token. What is paid too much is not saved: a later prompt may not stop them for long."""
        self._owed = max(self._owed - self._slowdown_permille * elapsed_ns, 0)

    def idle(self) -> None:
        """Nobody waits for a token."""
        self._owed = 0
