"""The thread that computes routed experts while whoever asked for them goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt16

from hmoe_jax.experts.store import ExpertStore
from hmoe_jax.kernels import _native

PATIENCE_S = 60.0
"""A job that takes longer is taken for lost: a layer of the largest models takes milliseconds, a prompt's some
seconds.
"""


@dataclass(frozen=True)
class Job:
    """One that is over, in seconds of `time.perf_counter`: its result was awaited, by a device or by the host, and then
    fetched."""

    slot: int
    layer: int
    submitted_s: float
    begun_s: float
    done_s: float
    awaited_s: float
    fetched_s: float


class ExpertLane:
    """Computes jobs of one store in the order in which they come, with the threads of the store's pool and one of its
    own as their caller. A context manager; `close` ends the thread.

    A job has one of `num_slots` slots. Programs use a lane by its `id` (`kernels.expert_lane`); `submit` and `wait` do
    the same for the host, and let other Python threads run meanwhile. Raises `ValueError` if the thread does not start.
    """

    def __init__(self, store: ExpertStore, *, num_slots: int, patience_s: float = PATIENCE_S):
        self.native = _native.ExpertLane(store.native, num_slots, round(patience_s * 1e3))
        self._in_the_end: dict[str, Any] = {}

    @property
    def id(self) -> int:
        """What the FFI calls know this lane by."""
        return self.native.id

    def submit(
        self,
        slot: int,
        layer: int,
        hidden: UInt16[np.ndarray, "t d"],
        ids: Int32[np.ndarray, "t k"],
        weights: Float32[np.ndarray, "t k"],
    ) -> int:
        """Copies the operands of `moe_experts` (`hidden` as bits) and returns the job's ticket."""
        return self.native.submit(slot, layer, hidden, ids, weights)

    def wait(self, slot: int, ticket: int, out: Float32[np.ndarray, "t d"]) -> None:
        """Writes a job's result to `out`. Raises `ValueError` if it failed, or is not done within the patience."""
        self.native.wait(slot, ticket, out)

    def is_done(self, slot: int, ticket: int) -> bool:
        """Whether `wait` would return at once."""
        return self.native.is_done(slot, ticket)

    def check(self) -> None:
        """Raises `ValueError` for a job of a program on a GPU that failed since this was last asked."""
        self.native.check()

    @property
    def busy_s(self) -> float:
        """Seconds in which jobs were computed, so far."""
        return self._even_if_closed("busy_s", lambda: self.native.busy_s)

    @property
    def waited_s(self) -> float:
        """Seconds in which somebody waited for a job, so far."""
        return self._even_if_closed("waited_s", lambda: self.native.waited_s)

    def jobs(self) -> list[Job]:
        """Of the last 16,384 that were awaited, oldest first."""
        jobs = self._even_if_closed("jobs", self.native.jobs)
        return [Job(slot, layer, *(time * 1e-9 for time in times)) for slot, layer, *times in jobs]

    def close(self) -> None:
        """Refuses further jobs, and waits for the one that is under way. What was done can still be asked."""
        if not self._in_the_end:
            native = self.native
            self._in_the_end = {"busy_s": native.busy_s, "waited_s": native.waited_s, "jobs": native.jobs()}
        self.native.close()

    def _even_if_closed(self, name: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ValueError:
            if not self._in_the_end:
                raise
            return self._in_the_end[name]

    def __enter__(self) -> ExpertLane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
