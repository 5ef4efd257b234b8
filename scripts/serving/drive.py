"""Sends requests at their times, and notes when which token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from serving.workload import Ask

Send = Callable[[Ask], AsyncIterator[int]]
"""Yields how many tokens there are, whenever there are more. Raises what a request fails with."""


@dataclass
class Served:
    """One request as its sender saw it: seconds from the start of all. `came`: when, and how many tokens there were."""

    ask: Ask
    sent_s: float = 0.0
    came: list[tuple[float, int]] = field(default_factory=list)
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return self.came[-1][1] if self.came else 0

    @property
    def ttft_s(self) -> float:
        return self.came[0][0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.came[-1][0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None where there is none."""
        later = self.num_tokens - 1
        return (self.e2e_s - self.ttft_s) / later if later > 0 else None

    @property
    def itl_s(self) -> list[float]:
        return [after[0] - before[0] for before, after in zip(self.came, self.came[1:], strict=False)]


async def drive(asks: Sequence[Ask], send: Send, *, max_concurrency: int | None) -> tuple[list[Served], float]:
    """Every request as it was served, and the seconds of all.

    A request whose time has come waits while `max_concurrency` others are being served; it is sent, and its times
    count, when it may (closed loop). Without a limit requests are sent whatever becomes of those before them (open
    loop).
    """
    begin = time.perf_counter()
    places = asyncio.Semaphore(max_concurrency or len(asks))

    async def serve(ask: Ask) -> Served:
        served = Served(ask)
        await asyncio.sleep(max(0.0, ask.arrival_s - (time.perf_counter() - begin)))
        async with places:
            served.sent_s = time.perf_counter() - begin
            try:
                async for count in send(ask):
                    served.came.append((time.perf_counter() - begin, count))
            except Exception as error:
                served.error = f"{type(error).__name__}: {error}"
        return served

    results = await asyncio.gather(*(serve(ask) for ask in asks))
    return results, time.perf_counter() - begin
