"""DeepSeek-V3's decoding and a long prompt side by side on machines that one may not have, event by event.

Token latency alone and beside the prompt, and what is gained over taking turns, for decode batches in one part and in
two, with the prompt in the gaps of the decoding GPU and on a second one. By the rates of data sheets and an assumed
bandwidth of host memory: `--dram_gbps` is what memory gives, `--expert_gbps` what the CPU's kernels take of it alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from absl import flags
from flags import REPOSITORY
from mains import print_json, run_main
from planning.cuts import Cut, cuts

from hmoe_jax.config import ModelConfig, read_config
from hmoe_jax.exec.passes import stream_sizes
from hmoe_jax.exec.plan import stream_bytes
from hmoe_jax.perf.cost import prefill_cost
from hmoe_jax.perf.machines import GPUS, sheet_rates
from hmoe_jax.perf.simulate import Beside, beside, prompt_of, stages
from hmoe_jax.perf.sizes import cache_bytes_per_token

PAPER = "paper: < 15 % added latency, + 50 % throughput"

_GPU = flags.DEFINE_multi_enum("gpu", ["rtx5090", "h100"], sorted(GPUS), "Whose data sheet.")
_DRAM = flags.DEFINE_float("dram_gbps", 500.0, "Host memory, read by CPU and links.", lower_bound=1.0)
_EXPERTS = flags.DEFINE_float("expert_gbps", 440.0, "Of it, the CPU's kernels alone.", lower_bound=1.0)
_BATCH = flags.DEFINE_multi_integer("batch", [1, 4, 16], "Sequences that decode together.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 4096, "Tokens that each looks back at.", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt_len", 32768, "Tokens of the prompt.", lower_bound=1)
_QUANTUM = flags.DEFINE_float(
    "quantum_ms",
    None,
    "The prompt's quanta, as if cutting it cost nothing; default: what the engine can.",
    lower_bound=1e-3,
)
_SLOWDOWN = flags.DEFINE_float("max_slowdown", 0.15, "Tokens may take so much longer.", lower_bound=0.0)


def main() -> None:
    config = read_config(REPOSITORY / "models" / "deepseek-v3")
    rows = [
        _row(config, gpu, batch, num_parts, num_gpus)
        for gpu in _GPU.value
        for num_gpus in (1, 2)
        for batch in _BATCH.value
        for num_parts in ((1, 2) if batch > 1 else (1,))
    ]
    names = (
        "gpu",
        "prompt on",
        "batch",
        "parts",
        "ms a token",
        "beside",
        "added",
        "prompt s",
        "beside",
        "gain",
        "blocks, tiles",
        "best",
    )
    print(f"DeepSeek-V3, a prompt of {_PROMPT.value:,} tokens beside decoding at {_CONTEXT.value:,} of context")
    print(f"({PAPER})\n")
    print(f"| {' | '.join(names)} |\n|---|---|{'---:|' * 9}---|")
    for row in rows:
        rivals = [each for each in rows if all(each[name] == row[name] for name in ("gpu", "num_gpus", "batch"))]
        best = "*" if row["rate"] == max(each["rate"] for each in rivals) and len(rivals) > 1 else ""
        print(_line(row, best))
    print_json({"rows": rows})


def _row(config: ModelConfig, gpu: str, batch: int, num_parts: int, num_gpus: int) -> dict[str, Any]:
    """With the cut of the prompt that gains most."""
    rates = replace(sheet_rates(gpu, has_kernels=True), expert_gbps=_EXPERTS.value)
    parts = stages(config, rates, batch=batch, context=_CONTEXT.value, num_parts=num_parts)
    length = _PROMPT.value
    cache = length * cache_bytes_per_token(config, itemsize=2)
    memory = stream_bytes(config, int(GPUS[gpu].memory_gb * 1e9), platform="gpu", cache_bytes=cache, num_devices=1)
    sizes = stream_sizes(config, 1, memory_bytes=memory, max_len=length)
    alone = prefill_cost(config, rates, length, **sizes.costs(1))
    if _QUANTUM.value is not None or num_gpus == 2:  # on a GPU of its own nobody waits for it
        rows = max(tile.rows for tile in sizes.tiles)
        known = [Cut(sizes.block_len, rows, (_QUANTUM.value or math.inf) / 1e3, alone)]
    else:
        known = cuts(config, rates, sizes, length)
    where = {"dram_gbps": _DRAM.value, "has_device": num_gpus == 2}
    results = [
        (
            cut,
            beside(
                parts,
                prompt_of(cut.cost, rates, quantum_s=cut.quantum_s, **where),
                alone_s=max(alone.copy_s, alone.front_s + alone.experts_s),
                max_slowdown=_SLOWDOWN.value,
            ),
        )
        for cut in known
    ]
    cut, result = max(results, key=lambda each: each[1].gain)
    setting = {"gpu": gpu, "num_gpus": num_gpus, "batch": batch, "num_parts": num_parts}
    return _record(result) | setting | {"block_len": cut.block_len, "rows": cut.rows}


def _record(result: Beside) -> dict[str, Any]:
    return {
        "alone_s": result.alone.step_s,
        "beside_s": result.together.step_s,
        "slowdown": result.slowdown,
        "prompt_alone_s": result.prompt_alone_s,
        "prompt_beside_s": result.together.seconds,
        "gain": result.gain,
        "rate": 1 / result.together.step_s,
        "prompt": asdict(result.prompt),
    }


def _line(row: dict[str, Any], best: str) -> str:
    cells = (
        row["gpu"],
        "a second GPU" if row["num_gpus"] == 2 else "the same GPU",
        f"{row['batch']}",
        f"{row['num_parts']}",
        f"{row['alone_s'] * 1e3:.1f}",
        f"{row['beside_s'] * 1e3:.1f}",
        f"{row['slowdown']:.1%}",
        f"{row['prompt_alone_s']:.1f}",
        f"{row['prompt_beside_s']:.1f}",
        f"{row['gain']:+.0%}",
        f"{row['block_len']}, {row['rows']}",
        best,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_main(main)
