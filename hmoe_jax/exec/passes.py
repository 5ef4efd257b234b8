"""The sizes of a streaming prefill: tokens in a pass, experts in a group, from the memory that there is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES, describe_experts
from hmoe_jax.config import ModelConfig
from hmoe_jax.quant.formats import FORMATS

DEPTH = 3
"""Groups on a device: one is computed, one is copied, and one waits, so that neither side waits for the host."""

BLOCK_LEN = 1024
"""Tokens that go through attention together."""

TILE_ROWS = (16, 32, 64, 128, 256, 512)
"""Tokens of an expert that are multiplied together."""

MAX_GROUP = 16
"""Experts that are copied together: of DeepSeek-V3 0.7 GB, 13 ms of a fast link."""

MIN_PASS = 512


@dataclass(frozen=True)
class StreamPlan:
    """The sizes of a streaming prefill, for the experts that are divided over `devices`.

    `group_size` experts of each device are copied together, `depth` such groups lie on it at most. A pass has at most
    `pass_len` tokens, of which `block_len` go through attention together. `tile_rows` are the numbers of tokens per
    expert that programs are compiled for. `link_gbps` slows copies down to such a link, for tests.
    """

    devices: tuple[jax.Device, ...]
    group_size: int
    pass_len: int
    depth: int = DEPTH
    block_len: int = BLOCK_LEN
    tile_rows: tuple[int, ...] = TILE_ROWS
    variant: str = "batched"
    link_gbps: float | None = None


def group_bytes(config: ModelConfig, group_size: int, *, depth: int = DEPTH, rows: int = TILE_ROWS[-1]) -> int:
    """Of a device's memory that copies and the product of a group take.

    The records of `depth` groups; of one the largest matrix in FP32 and as two BF16 numbers; and for `rows` tokens of
    each expert their inputs, the two inner activations (and their product) and their outputs.
    """
    d, f = config.hidden_size, config.expert_ffn
    dequantised = f * d * (4 + 2 + 2)
    activations = rows * (d * (4 + 4) + f * 4 * 3)
    return group_size * (depth * record_bytes(config) + dequantised + activations)


def token_bytes(config: ModelConfig) -> int:
    """Of a device's memory for each token of a pass: `x` and `hidden` in BF16, the sums in FP32, the routes."""
    return config.hidden_size * (2 + 2 + 4) + config.top_k * 4 * 6


def record_bytes(config: ModelConfig) -> int:
    """Of one expert: weights and scales."""
    specs = itertools.islice(describe_experts(config), len(MATRICES))
    total = 0
    for spec in specs:
        rows, items = spec.projection.weight.shape
        layout = FORMATS[spec.projection.codec]
        total += layout.num_bytes(rows, layout.num_cols(items))
    return total


def plan_stream(
    config: ModelConfig,
    devices: tuple[jax.Device, ...],
    *,
    memory_bytes: int,
    max_len: int,
    link_gbps: float | None = None,
) -> StreamPlan:
    """The largest groups that a quarter of `memory_bytes` (per device) holds, then the longest passes of the rest.

    Raises `ValueError` with the numbers if not even single experts and the shortest pass fit.
    """
    most = -(-config.num_experts // len(devices))
    group_size = min(MAX_GROUP, most)
    while group_size > 1 and group_bytes(config, group_size) > memory_bytes // 4:
        group_size //= 2
    left = memory_bytes - group_bytes(config, group_size)
    pass_len = min(left // token_bytes(config), max_len)
    if pass_len < min(MIN_PASS, max_len):
        raise ValueError(
            f"streaming needs {group_bytes(config, group_size):,} bytes of a device's memory for groups of "
            f"{group_size} experts and {token_bytes(config):,} for each of {min(MIN_PASS, max_len)} tokens, but "
            f"{memory_bytes:,} bytes are left for it"
        )
    return StreamPlan(devices=devices, group_size=group_size, pass_len=pass_len, link_gbps=link_gbps)
