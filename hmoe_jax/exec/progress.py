"""The progress bar of a long prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LONG_S = 2.0
"""Predicted to take less, a prompt gets no bar."""


@contextmanager
def prefill_progress(work: float, *, num_tokens: int, expected_s: float) -> Iterator[Callable[[float], None]]:
    """Yields `advance(part)` of all the `work`, in any unit; the bar vanishes at the end.

    Writes to standard error, and nothing at all where that is no terminal.
    """
    hides = True if expected_s < LONG_S else None  # None: unless standard error is a terminal
    looks = "{desc}: {percentage:.0f}% {bar} {remaining}"
    with tqdm(total=work, desc=f"prefill of {num_tokens} tokens", disable=hides, leave=False, bar_format=looks) as bar:
        yield bar.update
