"""The plan of streaming: what fits, what is refused, and whether the programs keep to the bytes that it counts."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hmoe_jax.config import parse_config, read_config
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.passes import (
    MIN_DEPTH,
    StreamSizes,
    TileShape,
    block_bytes,
    stream_sizes,
    tile_bytes,
    tile_shapes,
    token_bytes,
)
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.perf.cost import expert_bytes
from tests.tiny import CONFIGS, write_tiny

DEEPSEEK_V3 = read_config(Path(__file__).parents[2] / "models" / "deepseek-v3")
GIB = 2**30


def test_deepseek_v3_on_a_large_device_keeps_most_of_a_layer_ahead() -> None:
    plan = stream_sizes(DEEPSEEK_V3, 1, memory_bytes=40 * GIB, max_len=32768)
    assert (plan.group_size, plan.pass_len) == (16, 32768)
    assert plan.depth >= 16
    assert plan.keeps(32768)
    assert {tile.places for tile in plan.tiles} == {1, 4, 16}


def test_smaller_devices_get_smaller_groups_then_shorter_passes() -> None:
    sizes = [40, 20, 12, 8, 6]
    plans = [stream_sizes(DEEPSEEK_V3, 1, memory_bytes=size * GIB, max_len=163840) for size in sizes]
    for name in ("group_size", "pass_len"):
        values = [getattr(plan, name) for plan in plans]
        assert values == sorted(values, reverse=True)
    assert plans[-1].group_size < plans[0].group_size
    for plan, size in zip(plans, sizes, strict=True):
        assert plan.num_bytes(DEEPSEEK_V3) <= size * GIB


def test_blocks_are_shorter_where_only_then_all_keys_and_values_are_kept() -> None:
    """As on an RTX 5090, whose 32 GB hold little beside the other weights."""
    memory = (20.0, 6.7, 6.4, 6.0)
    sizes = [stream_sizes(DEEPSEEK_V3, 1, memory_bytes=int(size * 1e9), max_len=32768) for size in memory]
    assert [each.pass_len for each in sizes] == [32768] * 4
    assert [each.block_len for each in sizes] == [1024, 512, 256, 1024]
    assert [each.keeps(32768) for each in sizes] == [True, True, True, False]
    assert 0 < sizes[-1].expanded_len < 32768


def test_a_gpu_counts_keys_in_32_bits() -> None:
    plan = stream_sizes(DEEPSEEK_V3, 1, memory_bytes=200 * GIB, max_len=163840)
    assert plan.pass_len == 163840
    assert 2**17 - 512 <= plan.expanded_len < 2**31 // (128 * 128)


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"streaming needs [\d,]+ bytes .* groups of 1 experts and 57,\d+ for each of 512"
    ):
        stream_sizes(DEEPSEEK_V3, 1, memory_bytes=GIB, max_len=4096)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
def test_a_layer_has_several_groups(num_devices: int) -> None:
    config = parse_config(CONFIGS["deepseek"])
    plan = stream_sizes(config, num_devices, memory_bytes=GIB, max_len=500)
    assert plan.group_size * num_devices * 4 <= config.num_experts
    assert plan.depth >= MIN_DEPTH


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_tiles_of_fewer_experts_are_longer(group_size: int) -> None:
    tiles = tile_shapes(group_size)
    assert max(tile.places for tile in tiles) == group_size
    for places in {tile.places for tile in tiles}:
        rows = [tile.rows for tile in tiles if tile.places == places]
        assert rows[0] == 16
        assert rows[-1] == min(8192 // places, 2048)
        assert all(1 < b / a <= 2 for a, b in itertools.pairwise(rows))


@pytest.mark.parametrize("fills_gaps", [False, True])
@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize(("block_len", "num_tokens"), [(1000, 512), (640, 640), (1024, 600), (16, 5), (1, 1)])
def test_blocks_of_any_lengths_cover_a_prompt(
    block_len: int, num_tokens: int, num_devices: int, fills_gaps: bool
) -> None:
    ring: dict[str, Any] = {"group_size": 1, "pass_len": 1024, "depth": 3, "tiles": (), "max_len": 1024}
    sizes = StreamSizes(**ring, block_len=block_len, fills_gaps=fills_gaps)
    lens = sizes.block_lens(num_tokens, num_devices)
    assert all(longer % shorter == 0 for longer, shorter in itertools.pairwise(lens))
    assert all(each % num_devices == 0 for each in lens)
    longest = min(block_len, num_tokens)
    assert longest <= lens[0] < longest + lens[0] // lens[-1] * num_devices
    if not fills_gaps or longest < 4 * 16:
        assert len(lens) == 1
    else:
        assert 16 <= lens[-1] < 4 * 16


def test_programs_keep_to_the_bytes_that_the_plan_counts(tmp_path: Path) -> None:
    """Of the compiled programs: what they hold beside their operands, and the operands that a pass is."""
    folder = write_tiny(tmp_path / "kimi", "kimi")
    wishes = EngineOptions(prefill="stream", max_num_seqs=1, max_model_len=2048)
    executor, plan = open_executor(folder, wishes)
    try:
        assert isinstance(executor, StreamExecutor)
        tiles = tuple(TileShape(rows, executor.stream.group_size) for rows in (1024, 2048))
        executor.stream = replace(executor.stream, tiles=tiles)
        size = plan.buckets.prefill[-1]
        executor._warm_up_prefill(size)
        config, programs = executor.config, executor.quantum_programs.compiled
        temporary = {key: program.memory_analysis().temp_size_in_bytes for key, program in programs.items()}
        for key, num_bytes in temporary.items():
            if key[0] in ("attention", "mlp", "front", "back"):
                assert num_bytes <= block_bytes(config, executor.stream.block_len, keeps_all=key[-1] is True), key
            if key[0] == "group":
                assert num_bytes <= tile_bytes(config, TileShape(key[2], key[3])), key
        largest = max(num_bytes for key, num_bytes in temporary.items() if key[0] == "group")
        assert largest > tile_bytes(config, tiles[-1]) / 4
        for key, program in programs.items():
            if key[0] in ("attention", "front", "expand"):  # they write keys and values in place
                assert program.memory_analysis().alias_size_in_bytes >= executor._expanded.nbytes, key
                assert not re.search(r"u16\[\d+,\d+,\d{4,}\]\S* copy\(", program.as_text()), key
        begin = programs["begin", size].memory_analysis()
        sort = programs["sort", size].memory_analysis()
        ids = size * config.top_k * 4
        of_routes = sort.output_size_in_bytes - sort.alias_size_in_bytes + sort.temp_size_in_bytes - ids
        assert begin.output_size_in_bytes + of_routes <= size * token_bytes(config) + 4096  # offsets of experts
        assert executor._records.num_bytes <= expert_bytes(config) + 6 * 64
    finally:
        executor.close()
