"""The operating points that arXiv 2606.10493 publishes for DeepSeek-V3, beside what the model of costs says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hmoe_jax.config import ModelConfig
from hmoe_jax.perf.cost import Rates, decode_cost, expert_bytes, prefill_cost

GPU = "rtx5090"
PROMPT = 32768
PREFILL_TOK_S = {1: 1200.0, 2: 1800.0}
DECODE_TOK_S = {"FP8": 21.5, "INT4": 28.0}
INT4_BYTES = 0.5 + 2 / 32
"""Of a weight in groups of 32 with BF16 scales, against 1 in FP8."""


def compare(config: ModelConfig, rates: Rates, shape: Callable[[int], dict[str, int]]) -> str:
    """A table, and why each line differs. Nothing is fitted to the paper's figures.

    `shape` gives, for a number of devices, what `prefill_cost` wants to know of passes and of the ring.
    """
    lines = ["Beside the paper's figures (one prompt of 32,768 tokens; decode at batch 1):", ""]
    lines += ["| | paper | ours, predicted | paper / ours | what limits ours |", "|---|---:|---:|---:|---|"]
    for count, published in PREFILL_TOK_S.items():
        machine = replace(rates, num_devices=count)
        cost = prefill_cost(config, machine, PROMPT, **shape(count))
        lines.append(_line(f"prefill tok/s, {count} GPU(s)", published, cost.tok_per_s, cost.limit))
    scale = {"FP8": 1.0, "INT4": INT4_BYTES}
    for name, published in DECODE_TOK_S.items():
        machine = replace(rates, expert_gbps=rates.expert_gbps / scale[name])
        step = decode_cost(config, machine, batch=1, context=4096)
        lines.append(_line(f"decode tok/s, {name}", published, step.tok_per_s, step.limit))
    per_token = config.num_moe_layers * config.top_k * expert_bytes(config) / 1e9
    needed = per_token * DECODE_TOK_S["FP8"]
    lines += [
        "",
        f"A token at batch 1 reads {per_token:.1f} GB of experts: FP8 in the paper is {needed:.0f} GB/s of them alone,",
        f"where {rates.expert_gbps:.0f} GB/s are assumed here (--dram_gbps). The paper overlaps the two sides.",
        "INT4 halves the experts' bytes, not the device's share.",
        "Prefill is predicted from the data sheet's BF16 rate, which no program holds for long, for kernels that keep",
        "scores and unpacked weights on the chip: they were never run on a GPU. XLA's programs alone take longer: they",
        "write both to memory, and multiply every weight twice to keep its bits.",
        "On two devices link, projections and experts are halved alike; keys and values of the context are expanded on",
        "both. The prediction has no collective in it, the paper's factor of 1.5 does: ours are a reduction and",
        "gathers of the activations in every layer.",
    ]
    return "\n".join(lines)


def _line(what: str, published: float, predicted: float, limit: str) -> str:
    return f"| {what} | {published:,g} | {predicted:,.4g} | {published / predicted:.2f} | {limit} |"
