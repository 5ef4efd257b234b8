"""What an engine counts while it serves, and the snapshot of it that `Engine.metrics` gives."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from hmoe_jax.request import Request, TokenLatency

BUCKETS_PER_DECADE = 16
"""Quantiles are exact to a seventh."""

BOUNDS_S = tuple(10 ** (i / BUCKETS_PER_DECADE) for i in range(-4 * BUCKETS_PER_DECADE, 4 * BUCKETS_PER_DECADE + 1))
"""Upper ends of the buckets, from 0.1 ms to nearly three hours."""


@dataclass(frozen=True)
class Histogram:
    """How often something took how long: `counts[i]` times at most `BOUNDS_S[i]`, the last one longer than all."""

    counts: tuple[int, ...]
    total_s: float

    @property
    def num(self) -> int:
        return sum(self.counts)

    @property
    def mean_s(self) -> float:
        """0.0 if nothing was observed."""
        return self.total_s / self.num if self.num else 0.0

    def quantile_s(self, q: float | int) -> float:
        """At most so long it took in a part `q` of all cases, by the middle of a bucket. 0.0 if nothing was
        observed.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        wanted, seen = q * self.num, 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                last = min(index, len(BOUNDS_S) - 1)
                return math.sqrt(BOUNDS_S[last] * BOUNDS_S[max(last - 1, 0)])
        return 0.0


class _Durations:
    """A histogram that grows."""

    def __init__(self) -> None:
        self._counts, self._total_s = [0] * (len(BOUNDS_S) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._total_s += seconds

    def snapshot(self) -> Histogram:
        return Histogram(tuple(self._counts), self._total_s)


@dataclass(frozen=True)
class EngineMetrics:
    """An engine's counts since it was opened, and what it holds now.

    `num_cached_tokens` of `num_wanted_tokens` prompt tokens were found in the prefix cache. `ttft`: from arrival to the
    first token; `tpot`: mean time of a request's later tokens; `itl`: from each token of a sequence to its next; `e2e`:
    from arrival to the last token; `queue`: from arrival until the prompt was begun. `routing_counts[l, e]`: how many
    tokens MoE layer l sent to expert e. `expert_bytes` were read by the CPU's kernels, at `expert_gbps` while they
    computed; 0 where XLA computes the experts. `copied_bytes` of experts were sent to devices, for prompts. `decode_s`
    is the time of `num_decode_steps` steps, in which executor "overlap" computed routed experts beside the device's
    programs for `experts_busy_s`, and these waited for `experts_waited_s`.
    """

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_kept_pages: int
    num_requests: int
    num_refused: int
    num_preemptions: int
    num_failed_steps: int
    num_finished: Mapping[str, int]
    num_prompt_tokens: int
    num_generated_tokens: int
    num_wanted_tokens: int
    num_cached_tokens: int
    num_decode_steps: int
    decode_s: float
    ttft: Histogram
    tpot: Histogram
    itl: Histogram
    e2e: Histogram
    queue: Histogram
    routing_counts: Int64[np.ndarray, "layers experts"] = field(repr=False)
    expert_bytes: int = 0
    expert_gbps: float = 0.0
    copied_bytes: int = 0
    experts_busy_s: float = 0.0
    experts_waited_s: float = 0.0

    @property
    def overlap_efficiency(self) -> float:
        """Of decode steps: how much of the less busy side's time is hidden behind the other one's: 0 where the two take
        turns, 1 where one of them never stops.

        0.0 where experts are computed inside the device's programs (other executors than "overlap").
        """
        less_s = min(self.experts_busy_s, self.decode_s - self.experts_waited_s)
        if less_s <= 0:
            return 0.0
        return min(max(self.experts_busy_s - self.experts_waited_s, 0.0) / less_s, 1.0)

    @property
    def prefix_hit_rate(self) -> float:
        return self.num_cached_tokens / self.num_wanted_tokens if self.num_wanted_tokens else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Sequences that decoded together, on the average."""
        return self.itl.num / self.num_decode_steps if self.num_decode_steps else 0.0


class Meters:
    """Written by the thread that steps, read by any."""

    def __init__(self, num_layers: int, num_experts: int):
        self.num_requests = self.num_refused = self.num_failed_steps = 0
        self.num_prompt_tokens = self.num_generated_tokens = self.num_decode_steps = 0
        self.decode_s = 0.0
        self.num_finished: Counter[str] = Counter()
        self.durations = {name: _Durations() for name in ("ttft", "tpot", "itl", "e2e", "queue")}
        self._num_layers, self._num_experts = num_layers, num_experts
        self._routing = np.zeros(num_layers * num_experts, np.int64)

    def prefilled(self, num_tokens: int, routes: Int32[np.ndarray, "m t k"]) -> None:
        self.num_prompt_tokens += num_tokens
        self._routed(routes)

    def decoded(self, elapsed_s: float, routes: Int32[np.ndarray, "m t k"]) -> None:
        self.num_decode_steps += 1
        self.decode_s += elapsed_s
        self._routed(routes)

    def token(self, latency: TokenLatency | None, waited_s: float) -> None:
        """A request has one token more (`Request.mark_token`)."""
        self.num_generated_tokens += 1
        if latency is not None:
            self.durations[latency].add(waited_s)

    def finished(self, request: Request) -> None:
        for sequence in request.sequences:
            self.num_finished[str(sequence.finish_reason)] += 1
        metrics = request.metrics()
        if request.first_token_s is None:
            return
        self.durations["queue"].add(metrics.queue_s)
        self.durations["e2e"].add(metrics.total_s)
        if metrics.num_generated_tokens > len(request.sequences):
            num_later = metrics.num_generated_tokens - len(request.sequences)
            self.durations["tpot"].add(metrics.decode_s * len(request.sequences) / num_later)

    def snapshot(self) -> dict[str, Any]:
        """What `EngineMetrics` takes of it."""
        return {
            "num_requests": self.num_requests,
            "num_refused": self.num_refused,
            "num_failed_steps": self.num_failed_steps,
            "num_finished": dict(self.num_finished),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated_tokens": self.num_generated_tokens,
            "num_decode_steps": self.num_decode_steps,
            "decode_s": self.decode_s,
            "routing_counts": self._routing.reshape(self._num_layers, self._num_experts).copy(),
            **{name: durations.snapshot() for name, durations in self.durations.items()},
        }

    def _routed(self, routes: Int32[np.ndarray, "m t k"]) -> None:
        """Ids of -1 are padding."""
        layers = np.arange(len(routes), dtype=np.int64)[:, None, None] * self._num_experts
        used = (routes + layers)[routes >= 0]
        self._routing += np.bincount(used, minlength=len(self._routing))
