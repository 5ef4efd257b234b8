"""Predicted durations of quanta: they add up to a prompt's, and keep cancelling short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hmoe_jax.config import read_config
from hmoe_jax.exec.durations import BlockName, Durations, Pace
from hmoe_jax.exec.passes import stream_sizes
from hmoe_jax.perf.cost import prefill_cost
from hmoe_jax.perf.machines import GPUS, sheet_rates

DEEPSEEK_V3 = read_config(Path(__file__).parents[2] / "models" / "deepseek-v3")


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_quanta_add_up_to_the_prompt(num_devices: int, is_kept: bool) -> None:
    config, length, block = DEEPSEEK_V3, 8192, 1024
    rates = sheet_rates("h100", num_gpus=num_devices, has_kernels=True)
    durations = Durations(config, rates)
    blocks = range(0, length, block)
    dense, moe = config.num_dense_layers, config.num_moe_layers
    layers: dict[BlockName, int] = {"attention": dense, "mlp": dense, "front": moe, "back": moe}
    front = sum(
        count * durations.block(name, block, first, is_kept=is_kept)
        for name, count in layers.items()
        for first in blocks
    )
    rows = length * config.top_k // config.num_experts
    tiles = config.num_moe_layers * 16 * durations.tile(rows, config.num_experts // num_devices // 16)
    cost = prefill_cost(config, rates, length, pass_len=length, expanded_len=length if is_kept else 0)
    assert front == pytest.approx(cost.front_s, rel=0.05)
    assert tiles < cost.experts_s < 1.5 * tiles  # which has uneven routing in it


@pytest.mark.parametrize(("gpu", "part"), [("h100", 0.5), ("h200", 0.5), ("rtxpro6000", 1.0), ("rtx5090", 1.0)])
def test_a_prompt_of_deepseek_v3_is_cancelled_in_a_tenth_of_a_second(gpu: str, part: float) -> None:
    """At that part of the data sheet's rates."""
    sizes = stream_sizes(DEEPSEEK_V3, 1, memory_bytes=int(GPUS[gpu].memory_gb * 0.9e9) - 20 * 10**9, max_len=32768)
    sheet = sheet_rates(gpu, has_kernels=True)
    slower = {name: part * getattr(sheet, name) for name in ("linear_tflops", "grouped_tflops", "attention_tflops")}
    rates = replace(sheet, **slower, unpack_gbps=part * sheet.unpack_gbps)
    assert Durations(DEEPSEEK_V3, rates).cancelling(sizes) < 0.1


def test_the_pace_is_what_was_measured_of_a_size_and_else_of_its_kind() -> None:
    pace = Pace()
    assert pace.expected("front", 64, 2.0) == 2.0
    pace.learn("front", 64, 2.0, 6.0)
    assert pace.expected("front", 64, 1.0) == pytest.approx(3.0)
    assert pace.expected("front", 256, 4.0) == pytest.approx(12.0)
    assert pace.expected("experts", (16, 4), 1.0) == 1.0
    for _ in range(100):
        pace.learn("front", 256, 4.0, 4.0)
    assert pace.expected("front", 256, 4.0) == pytest.approx(4.0, rel=1e-3)
    assert pace.expected("front", 64, 1.0) == pytest.approx(3.0)
