"""What a model needs and should reach on a machine that one may not have: memory, prefill, decode, and their limits.

`--gpu` takes its figures from data sheets: what is printed then is what our kernels cost at rates that none holds for
long; where calibration does not choose them, XLA's programs cost more. With `--gpu=measured` the rates are this
machine's own, as `calibrate.py` measured them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from absl import flags
from mains import print_json, run_main
from planning import paper

from hmoe_jax.config import ModelConfig, read_config
from hmoe_jax.exec.passes import StreamSizes, stream_sizes
from hmoe_jax.exec.plan import find_hardware, stream_bytes
from hmoe_jax.perf.cost import (
    DecodeCost,
    PrefillCost,
    Rates,
    decode_cost,
    expanded_bytes,
    expert_bytes,
    prefill_cost,
    resident_bytes,
    streams_from,
)
from hmoe_jax.perf.machines import GPUS, load_rates, sheet_rates
from hmoe_jax.perf.sizes import cache_bytes_per_token

MODELS = Path(__file__).resolve().parents[1] / "models"

_MODEL = flags.DEFINE_string("model", "deepseek-v3", "A name in models/, or a Hugging Face model folder.")
_GPU = flags.DEFINE_enum("gpu", paper.GPU, [*GPUS, "measured"], "The accelerator, or this machine.")
_NUM_GPUS = flags.DEFINE_integer("num_gpus", 1, "How many of them share a prompt.", lower_bound=1)
_DRAM = flags.DEFINE_float("dram_gbps", 460.0, "Host memory's read bandwidth, all sockets.", lower_bound=0.001)
_LINK = flags.DEFINE_float("link_gbps", None, "Host memory to one device; default the GPU's.", lower_bound=0.001)
_LENGTHS = flags.DEFINE_multi_integer("length", [512, 2048, 8192, 16384, 32768], "Prompt lengths.", lower_bound=1)
_BATCHES = flags.DEFINE_multi_integer("batch", [1, 4, 16], "Sequences that decode together.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 4096, "Tokens that a decode step looks back at.", lower_bound=1)


def main() -> None:
    named = MODELS / _MODEL.value
    config = read_config(named if named.is_dir() else Path(_MODEL.value))
    rates = _rates()
    memory_bytes, platform = _device()
    cache = max(_LENGTHS.value) * cache_bytes_per_token(config, itemsize=2)

    def sizes(num_devices: int) -> StreamSizes:
        left = stream_bytes(config, memory_bytes, platform=platform, cache_bytes=cache, num_devices=num_devices)
        return stream_sizes(config, num_devices, memory_bytes=left, max_len=max(_LENGTHS.value))

    def shape(num_devices: int) -> dict[str, int]:
        return sizes(num_devices).costs(num_devices)

    print(_memory(config, memory_bytes, cache, sizes(rates.num_devices)))
    prefills = [prefill_cost(config, rates, length, **shape(rates.num_devices)) for length in _LENGTHS.value]
    decodes = [decode_cost(config, rates, batch=batch, context=_CONTEXT.value) for batch in _BATCHES.value]
    print(f"\n{_prefill_table(prefills)}\n\n{_threshold(config, rates, shape(rates.num_devices))}")
    print(f"\nDecode at {_CONTEXT.value:,} tokens of context, the two sides in turn:\n\n{_decode_table(decodes)}")
    if _MODEL.value == "deepseek-v3" and _GPU.value == paper.GPU:
        print(f"\n{paper.compare(config, rates, shape)}")
    print_json(
        {
            "rates": asdict(rates),
            "sizes": asdict(sizes(rates.num_devices)),
            "prefill": [asdict(each) for each in prefills],
            "decode": [asdict(each) for each in decodes],
        }
    )


def _rates() -> Rates:
    if _GPU.value == "measured":
        for flag in (_NUM_GPUS, _DRAM, _LINK):
            if flag.present:
                raise ValueError(f"--{flag.name} is measured too: leave it out with --gpu=measured")
        return load_rates()
    return sheet_rates(
        _GPU.value, num_gpus=_NUM_GPUS.value, dram_gbps=_DRAM.value, link_gbps=_LINK.value, has_kernels=True
    )


def _device() -> tuple[int, str]:
    """Its memory in bytes, and its platform."""
    if _GPU.value == "measured":
        hardware = find_hardware("auto")
        return hardware.memory_bytes, hardware.platform
    return int(GPUS[_GPU.value].memory_gb * 1e9), "gpu"


def _threshold(config: ModelConfig, rates: Rates, costs: dict[str, int]) -> str:
    longest = max(_LENGTHS.value)
    shortest = streams_from(config, rates, max_len=longest, **costs)
    if shortest is None:
        return f"No prompt of up to {longest:,} tokens is streamed sooner than the CPU computes it in place."
    return f"Streamed sooner than the CPU computes them in place: prompts of {shortest:,} tokens and more."


def _memory(config: ModelConfig, memory_bytes: int, cache: int, sizes: StreamSizes) -> str:
    experts = config.num_moe_layers * config.num_experts * expert_bytes(config)
    records = sizes.depth * sizes.group_size * expert_bytes(config)
    expanded = sizes.expanded_len * expanded_bytes(config)
    return (
        f"Host memory: {experts / 1e9:,.1f} GB of routed experts, as stored.\n"
        f"Each device ({memory_bytes / 1e9:,.0f} GB): {resident_bytes(config) / 1e9:,.1f} GB of other weights, "
        f"{cache / 1e9:,.2f} GB of cache for the longest prompt, {records / 1e9:,.1f} GB for {sizes.depth} groups of "
        f"{sizes.group_size} experts, {expanded / 1e9:,.1f} GB for a layer's keys and values of {sizes.expanded_len:,} "
        f"tokens; passes of at most {sizes.pass_len:,} tokens."
    )


def _prefill_table(costs: Sequence[PrefillCost]) -> str:
    lines = ["| prompt | passes | TTFT s | tok/s | copies s | front s | experts s | limit |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|---|")
    lines += [
        f"| {each.num_tokens:,} | {each.num_passes} | {each.seconds:.2f} | {each.tok_per_s:,.0f} | {each.copy_s:.2f} "
        f"| {each.front_s:.2f} | {each.experts_s:.2f} | {each.limit} |"
        for each in costs
    ]
    return "\n".join(lines)


def _decode_table(costs: Sequence[DecodeCost]) -> str:
    lines = ["| batch | ms a step | tok/s | experts ms | device ms | limit |", "|---:|---:|---:|---:|---:|---|"]
    lines += [
        f"| {each.batch} | {each.seconds * 1e3:.1f} | {each.tok_per_s:.1f} | {each.experts_s * 1e3:.1f} "
        f"| {each.device_s * 1e3:.1f} | {each.limit} |"
        for each in costs
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
