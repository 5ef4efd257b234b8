"""Into how long quanta a streamed prompt can be cut, and what it costs to cut it finer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.durations import Durations
from hmoe_jax.exec.passes import StreamSizes
from hmoe_jax.perf.cost import PrefillCost, Rates, prefill_cost, used_share


@dataclass(frozen=True)
class Cut:
    """Blocks of so many tokens, tiles of so many rows of one expert. `quantum_s` is the longest part, `cost` the whole
    prompt's: every block makes keys and values of all its context, where these are not kept, and every tile unpacks
    its expert."""

    block_len: int
    rows: int
    quantum_s: float
    cost: PrefillCost


def cuts(config: ModelConfig, rates: Rates, sizes: StreamSizes, length: int) -> list[Cut]:
    """As the engine cuts a prompt where others decode, on one device: with each length of blocks the largest tiles that
    take no longer."""
    return [
        _cut(config, rates, sizes, length, block_len)
        for block_len in replace(sizes, fills_gaps=True).block_lens(length, 1)
    ]


def _cut(config: ModelConfig, rates: Rates, sizes: StreamSizes, length: int, block_len: int) -> Cut:
    durations = Durations(config, rates)
    block_s = durations.block("front", block_len, length - block_len, is_kept=sizes.keeps(length)) + rates.dispatch_s
    known = sorted({tile.rows for tile in sizes.tiles})
    rows = max([rows for rows in known if durations.tile(rows, 1) <= block_s] or known[:1])
    whole = prefill_cost(config, rates, length, **sizes.costs(1) | {"block_len": block_len})
    tokens = length / whole.num_passes
    used = config.num_experts * used_share(config, tokens)
    rows_each = tokens * config.top_k / used
    full, last = divmod(rows_each, rows)
    parts = [(full, rows), (1, last)] if last else [(full, rows)]
    one_expert_s = sum(count * durations.tile(own, 1) for count, own in parts)
    experts_s = whole.num_passes * config.num_moe_layers * used * one_expert_s
    front_s = whole.front_s + 2 * config.num_layers * math.ceil(length / block_len) * rates.dispatch_s
    seconds = max(whole.copy_s, front_s + experts_s)
    cost = replace(whole, front_s=front_s, experts_s=experts_s, seconds=seconds)
    return Cut(block_len, rows, max(block_s, durations.tile(rows, 1)), cost)
