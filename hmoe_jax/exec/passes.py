"""The sizes of a streaming prefill: tokens in a pass, experts in a group, from the memory that there is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax

from hmoe_jax.config import ModelConfig
from hmoe_jax.kernels.flash_attention import KEYS
from hmoe_jax.nn.attention import RUN_CHUNKS
from hmoe_jax.nn.expanded import CHUNK_LEN
from hmoe_jax.perf.cost import Rates, expanded_bytes, expert_bytes
from hmoe_jax.perf.machines import UNMEASURED_CPU

MIN_DEPTH = 3
"""Groups on a device: one is computed, one is copied, and one waits, so that neither side waits for the host.

With more of them copies go on while a layer's attention is computed."""

BLOCK_LEN = 1024
"""Tokens that go through attention together."""

MIN_BLOCK = 16
"""Tokens, where a prompt is cut finely to fill gaps."""

TILE_ROWS = (16, 2048)
"""The least and the most tokens of an expert that are multiplied together."""

TILE_TOKENS = 8192
"""Of all experts that are multiplied together, at most."""

MAX_GROUP = 16
"""Experts that are copied together: of DeepSeek-V3 0.7 GB, 13 ms of a fast link."""

GROUPS_PER_LAYER = 8
"""At least, if there are so many experts: beside the first copy and the last product the other side may be idle."""

MIN_PASS = 512

MAX_ELEMENTS = 2**31
"""Of an array of keys or values: a GPU's kernel counts in 32 bits."""


class TileShape(NamedTuple):
    """A product of several experts of a device: in each of so many `places` as many `rows` of one of them."""

    rows: int
    places: int


@dataclass(frozen=True)
class StreamSizes:
    """The sizes of a streaming prefill over devices that divide the experts.

    `group_size` experts of each device are copied together, `depth` such groups lie on it at most. A pass has at most
    `pass_len` tokens, of which `block_len` go through attention together; fewer, where a prompt `fills_gaps` of decode
    steps. Programs are compiled for the `tiles`. Keys and values of a layer are kept for at most `expanded_len` of the
    `max_len` positions of a context.
    """

    group_size: int
    pass_len: int
    depth: int
    tiles: tuple[TileShape, ...]
    max_len: int
    block_len: int = BLOCK_LEN
    variant: str = "batched"
    fills_gaps: bool = False
    expanded_len: int = 0

    def keeps(self, num_positions: int) -> bool:
        """Whether keys and values are kept of a prompt that ends there; else each block makes those of all its context
        anew."""
        return num_positions <= self.expanded_len

    @property
    def expanded_lens(self) -> tuple[int, ...]:
        """Positions before a prompt whose keys and values are made together, the longest first."""
        return tuple(max(self.block_len // part, 1) for part in (1, 4, 16))

    def block_lens(self, num_tokens: int, num_devices: int) -> tuple[int, ...]:
        """For a prompt of so many tokens, the longest first: each divides the ones before it, the devices all."""
        longest = min(self.block_len, num_tokens)
        parts = [part for part in (1, 4, 16, 32, 64) if part == 1 or (self.fills_gaps and longest >= part * MIN_BLOCK)]
        shortest = -(-longest // (parts[-1] * num_devices)) * num_devices
        return tuple(shortest * parts[-1] // part for part in parts)

    def num_bytes(self, config: ModelConfig) -> int:
        """Of each GPU's memory, beside weights and caches: the most that streaming takes."""
        work = work_bytes(config, self.group_size, self.block_len, keeps_all=self.keeps(self.max_len))
        records = self.depth * self.group_size * expert_bytes(config)
        expanded = self.expanded_len * expanded_bytes(config)
        return work + records + expanded + self.pass_len * token_bytes(config)

    def costs(self, num_devices: int) -> dict[str, int]:
        """What `perf.cost.prefill_cost` wants to know of passes and of the ring."""
        ahead = (self.depth - 1) * self.group_size * num_devices
        sizes = {"pass_len": self.pass_len, "block_len": self.block_len, "expanded_len": self.expanded_len}
        return sizes | {"ahead_experts": ahead}


@dataclass(frozen=True)
class StreamPlan(StreamSizes):
    """And where, and from how many tokens on: shorter prompts are computed in place. `rates` predict durations.
    `link_gbps` slows copies down to such a link, for measurements."""

    rates: Rates = UNMEASURED_CPU
    devices: tuple[jax.Device, ...] = ()
    least_tokens: int = 1
    link_gbps: float | None = None


def tile_shapes(group_size: int) -> tuple[TileShape, ...]:
    """Of a whole group, and of few of its experts."""
    few = itertools.takewhile(lambda places: places < group_size, (1, 4))
    return tuple(TileShape(rows, places) for places in (*few, group_size) for rows in _tile_rows(places))


def _tile_rows(places: int) -> list[int]:
    """Powers of two, and the middle between those that are not small."""
    least, most = TILE_ROWS
    powers = [least << i for i in range((min(TILE_TOKENS // places, most) // least).bit_length())]
    middles = [power * 3 // 2 for power in powers[:-1] if power >= 4 * least]
    return sorted([*powers, *middles])


def tile_bytes(config: ModelConfig, tile: TileShape) -> int:
    """Of a device's memory that a product takes, beside the records themselves.

    The records side by side, if they came one by one; the largest matrix of each expert in FP32 and as two BF16
    numbers; and for each row its inputs, the inner activations (gate, up, their product) and the outputs.
    """
    d, f = config.hidden_size, config.expert_ffn
    dequantised = f * d * (4 + 2 + 2)
    activations = tile.rows * (d * (4 + 4) + f * 4 * 3)
    return tile.places * (expert_bytes(config) + dequantised + activations)


def group_bytes(config: ModelConfig, group_size: int) -> int:
    """Of a device's memory that products of a group's experts take at most, beside the records themselves."""
    return max(tile_bytes(config, tile) for tile in tile_shapes(group_size))


def block_bytes(config: ModelConfig, block_len: int, *, keeps_all: bool) -> int:
    """Of a device's memory that `front`, `back` or a dense layer takes for a block of tokens.

    The largest dense matrix in FP32 and as two BF16 numbers, and another one in the making; in FP32 and BF16 keys and
    values of a run of the context, or, if all are kept, those that are added; queries, keys and values of all heads in
    FP32 and BF16; scores of a chunk of the context, twice in FP32 and once in BF16; the inner activations of an MLP;
    and the residual, its norm and its update.
    """
    num_expanded = block_len + 2 * KEYS if keeps_all else CHUNK_LEN * RUN_CHUNKS
    run = num_expanded * config.num_heads * (config.nope_dim + config.v_dim) * (4 + 2)
    attention = config.num_heads * ((config.qk_dim + config.v_dim) * (4 + 2) + CHUNK_LEN * (4 + 4 + 2))
    inner = max(config.dense_ffn, config.num_shared_experts * config.expert_ffn) * (4 * 3 + 2)
    widest = max(config.num_heads * config.v_dim, config.dense_ffn, config.num_shared_experts * config.expert_ffn)
    return config.hidden_size * widest * 12 + run + block_len * (attention + inner + config.hidden_size * 4 * 4)


def work_bytes(config: ModelConfig, group_size: int, block_len: int, *, keeps_all: bool) -> int:
    """Of a device's memory for programs at work: blocks and groups are computed in turn."""
    return max(group_bytes(config, group_size), block_bytes(config, block_len, keeps_all=keeps_all))


def token_bytes(config: ModelConfig) -> int:
    """Of a device's memory for each token of a pass: `x` and `hidden` in BF16, the sums in FP32, the routes."""
    return config.hidden_size * (2 + 2 + 4) + config.top_k * 4 * 6


def stream_sizes(config: ModelConfig, num_devices: int, *, memory_bytes: int, max_len: int) -> StreamSizes:
    """Groups of which a few take a quarter of `memory_bytes` (per device), the longest passes, keys and values of as
    many positions, then the deepest ring. Blocks are shorter than `BLOCK_LEN` where only then all of these fit.

    Raises `ValueError` with the numbers if not even single experts and the shortest pass fit.
    """
    longest = min(BLOCK_LEN, max_len)
    fit = partial(_fit, config, num_devices, memory_bytes, max_len)
    keeping = [fit(max(longest // part, 1), keeps_all=True) for part in (1, 2, 4)]
    sizes = next((each for each in keeping if each.keeps(max_len)), fit(longest, keeps_all=False))
    if sizes.pass_len < min(MIN_PASS, max_len):
        needed = replace(sizes, pass_len=0, expanded_len=0).num_bytes(config)
        raise ValueError(
            f"streaming needs {needed:,} bytes of a device's memory for groups of {sizes.group_size} experts and "
            f"{token_bytes(config):,} for each of {min(MIN_PASS, max_len)} tokens, but {memory_bytes:,} bytes are left "
            "for it"
        )
    return sizes


def _fit(
    config: ModelConfig, num_devices: int, memory_bytes: int, max_len: int, block_len: int, *, keeps_all: bool
) -> StreamSizes:
    """With blocks of so many tokens. If nothing fits, no token does."""
    per_device, record = -(-config.num_experts // num_devices), expert_bytes(config)
    group_size = max(1, min(MAX_GROUP, per_device // GROUPS_PER_LAYER))
    while group_size > 1 and group_bytes(config, group_size) + MIN_DEPTH * group_size * record > memory_bytes // 4:
        group_size //= 2
    left = memory_bytes - work_bytes(config, group_size, block_len, keeps_all=keeps_all)
    left = max(left - MIN_DEPTH * group_size * record, 0)
    pass_len = left // token_bytes(config)
    pass_len = min(pass_len // block_len * block_len if pass_len > block_len else pass_len, max_len)
    left -= pass_len * token_bytes(config)
    most = MAX_ELEMENTS // (config.num_heads * max(config.nope_dim, config.v_dim)) - CHUNK_LEN
    expanded_len = min(left // expanded_bytes(config), max_len, most)
    left -= expanded_len * expanded_bytes(config)
    return StreamSizes(
        group_size=group_size,
        pass_len=pass_len,
        depth=MIN_DEPTH + min(left // (group_size * record), -(-per_device // group_size)),
        tiles=tile_shapes(group_size),
        max_len=max_len,
        block_len=block_len,
        expanded_len=expanded_len,
    )
