"""The shapes that step programs are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """Shapes that programs are compiled for, ascending: tokens of a prefill, sequences of a decode step.

    Scored prefills (they need logits of every token) have one size, as they are rare, or those of all others (None).
    With `balances_prefill` a prompt that needs several prefills is cut evenly: where each costs the same, however long.
    """

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    scored: int | None = None
    balances_prefill: bool = False

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"{name} buckets must be ascending and positive, got {sizes}")

    def piece_len(self, remaining: int) -> int:
        """How many of the `remaining` tokens of a prompt the next prefill takes."""
        most = self.prefill[-1]
        if not self.balances_prefill:
            return min(remaining, most)
        return -(-remaining // -(-remaining // most))

    def for_prefill(self, num_tokens: int) -> int:
        """The smallest bucket that holds them, or the largest one."""
        return next((size for size in self.prefill if size >= num_tokens), self.prefill[-1])

    def for_scored(self, num_tokens: int) -> int:
        """As `for_prefill`, for prefills that need logits of every token."""
        return self.scored or self.for_prefill(num_tokens)

    def for_decode(self, num_sequences: int) -> int:
        return next(size for size in self.decode if size >= num_sequences)
