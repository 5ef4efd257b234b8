"""The progress bar of a load: bytes done, GB/s, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from tqdm import tqdm


@contextmanager
def byte_progress(total_bytes: int, *, label: str) -> Iterator[Callable[[int], None]]:
    """Yields `advance(num_bytes)`, for any thread to call; the bar is closed at the end, errors included.

    Writes to standard error, and nothing at all where that is no terminal.
    """
    lock = Lock()  # tqdm adds to its count without one
    # disable=None is tqdm's way of asking whether standard error is a terminal.
    with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, disable=None) as bar:

        def advance(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        yield advance
