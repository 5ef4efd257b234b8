"""The shapes that step programs are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """Shapes that programs are compiled for, ascending: tokens of a prefill, sequences of a decode step.

    Scored prefills (they need logits of every token) have one size, as they are rare.
    """

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    scored: int

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"{name} buckets must be ascending and positive, got {sizes}")

    def for_prefill(self, num_tokens: int) -> int:
        """The smallest bucket that holds them, or the largest one."""
        return next((size for size in self.prefill if size >= num_tokens), self.prefill[-1])

    def for_decode(self, num_sequences: int) -> int:
        return next(size for size in self.decode if size >= num_sequences)
