"""How long the quanta of a streaming prefill should compute, by the model of costs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, get_args

from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.passes import StreamSizes
from hmoe_jax.perf.cost import Rates, attention_s, expand_s, expert_bytes, mlp_s, tile_s

MAX_RUNNING = 2
"""Quanta that are started before the first of them has ended: enough that a device never waits for the host."""

MAX_COPYING = 2
"""Groups that are on their way to a device at once: one alone would leave the link idle between two."""

WAIT_S = 0.02
"""How long a prompt waits for a copy before it can be cancelled."""

KEPT = 0.8
"""Of what is known of a speed, when it is measured again."""

BlockName = Literal["attention", "mlp", "front", "back"]
"""The two parts of a dense layer, and what comes before and after an MoE layer's routed experts."""


@dataclass(frozen=True)
class Durations:
    """In seconds, of one device of `rates.num_devices`."""

    config: ModelConfig
    rates: Rates

    def block(self, name: BlockName, tokens: int, context: int, *, is_kept: bool) -> float:
        """A part of a layer, for `tokens` after `context` others, whose keys and values are kept or not."""
        config, own = self.config, -(-tokens // self.rates.num_devices)
        if name in ("mlp", "back"):
            inner = config.dense_ffn if name == "mlp" else config.num_shared_experts * config.expert_ffn
            return mlp_s(config, self.rates, own, inner)
        before, expanded = context + tokens - own, tokens if is_kept else None  # of the device with the longest
        return attention_s(config, self.rates, own, before, num_expanded=expanded)

    def expand(self, tokens: int) -> float:
        """Keys and values of so many positions of a layer."""
        return expand_s(self.config, self.rates, tokens)

    def tile(self, rows: float | int, experts: int) -> float:
        """`rows` tokens of each of so many experts of one device, and to start it."""
        return tile_s(self.config, self.rates, rows, experts) + self.rates.dispatch_s

    def group_copy(self, group_size: int) -> float:
        """So many experts to one device."""
        return group_size * expert_bytes(self.config) / self.rates.link_gbps / 1e9

    def cancelling(self, sizes: StreamSizes) -> float:
        """The longest from when a prompt is cancelled until nothing of it runs: what has been started is finished."""
        before, is_kept = max(sizes.max_len - sizes.block_len, 0), sizes.keeps(sizes.max_len)
        blocks = [self.block(name, sizes.block_len, before, is_kept=is_kept) for name in get_args(BlockName)]
        expanding = self.expand(sizes.expanded_lens[0])
        computing = (MAX_RUNNING + 1) * max(*blocks, expanding, *(self.tile(*shape) for shape in sizes.tiles))
        return WAIT_S + max(computing, MAX_COPYING * self.group_copy(sizes.group_size))


class Pace:
    """How much longer quanta take than predicted, as measured: each of a kind and size, and by their kind where a size
    is new."""

    def __init__(self) -> None:
        self._factors: dict[tuple[Hashable, ...], float] = {}

    def expected(self, name: str, size: Hashable, predicted_s: float) -> float:
        return predicted_s * self._factors.get((name, size), self._factors.get((name,), 1.0))

    def learn(self, name: str, size: Hashable, predicted_s: float, elapsed_s: float) -> None:
        """One that took far longer than known had other reasons, and counts as twice as long."""
        for key in ((name, size), (name,)):
            known = self._factors.get(key, elapsed_s / predicted_s)
            self._factors[key] = averaged(known, min(elapsed_s / predicted_s, 2 * known))


def averaged(known: float, measured: float) -> float:
    """What is known of a speed, now that it was measured again."""
    return KEPT * known + (1 - KEPT) * measured
