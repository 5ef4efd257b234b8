"""A prompt beside decoding, on a machine without a GPU: XLA's device on one processor, the routed experts on another.

Token latency alone and while a long prompt is computed in the gaps of decode steps, and what that gains over computing
one after the other; beside it the gain if the prompt used every moment in which decoding leaves the device. Wants a
model whose experts take most of a decode step, as DeepSeek-V3's do (`write_synthetic.py --narrow --codec=bf16`).
"""

from __future__ import annotations

import json
import os
import resource
from dataclasses import asdict
from pathlib import Path

from absl import flags
from companions.picture import draw
from companions.timing import Load, Measured, measure
from flags import MODEL, engine_options
from mains import make_folder, print_json, run_main, titled_table, write_atomically
from serving.picture import draw_timeline

from hmoe_jax.engine import Engine
from hmoe_jax.kernels.pool import cpu_name
from hmoe_jax.perf.cost import expert_bytes

_BATCH = flags.DEFINE_multi_integer("batch", [4, 8], "Sequences that decode together.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 257, "Tokens that each looks back at, at least.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 1024, "Tokens of the prompt beside them.", lower_bound=1)
_SLOWDOWN = flags.DEFINE_float("max_decode_slowdown", 0.15, "How much longer tokens may take.", lower_bound=0.001)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Decoding alone, both, the prompt alone: so often.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 24, "Decode steps alone, before the prompt and after it.", lower_bound=1)
_DEVICE_CPUS = flags.DEFINE_multi_integer("device_cpu", [0], "Processors of XLA's side.", lower_bound=0)
_OUT = flags.DEFINE_string("out", "out/beside", "Folder for the results; made if it is missing.")


def main() -> None:
    out = make_folder(Path(_OUT.value))
    os.sched_setaffinity(0, _DEVICE_CPUS.value)  # before JAX starts its threads
    wishes = engine_options() | {"executor": "overlap", "prefill": "stream", "microbatches": 1}
    if wishes["expert_cpus"] == "auto":
        wishes["expert_cpus"] = str(max(_DEVICE_CPUS.value) + 1)
    wishes["max_decode_slowdown"] = _SLOWDOWN.value
    rounds = {"num_rounds": _ROUNDS.value, "num_steps": _STEPS.value}
    measured = []
    for batch in _BATCH.value:
        load = Load(batch=batch, context=_CONTEXT.value, prompt_len=_PROMPT_LEN.value)
        wishes["max_model_len"] = engine_options()["max_model_len"] or load.max_len(**rounds)
        with Engine(MODEL.value, max_num_seqs=batch + 1, skip_tokenizer_init=True, **wishes) as engine:
            measured.append(measure(engine, load, **rounds))
            activity, config = engine.activity(), engine.config
    setting = {
        "model": Path(MODEL.value).name,
        "cpu": cpu_name(),
        "device_cpus": _DEVICE_CPUS.value,
        "expert_cpus": wishes["expert_cpus"],
        "max_decode_slowdown": _SLOWDOWN.value,
        "experts_gb": round(config.num_moe_layers * config.num_experts * expert_bytes(config) / 1e9, 2),
        "peak_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    text = titled_table(setting, [_cells(each) for each in measured])
    print(f"\n{text}")
    results = setting | {"beside": [_record(each) for each in measured]}
    write_atomically(out / "table.md", text)
    write_atomically(out / "results.json", json.dumps(results) + "\n")
    write_atomically(out / "traffic.png", draw(measured[-1]))
    write_atomically(out / "timeline.png", draw_timeline(activity, title="Decode steps beside a prompt"))
    print_json(setting | {"beside": [_figures(each) for each in measured]})


def _cells(each: Measured) -> dict[str, str]:
    return {
        "batch": f"{each.load.batch}",
        "context": f"{each.load.context:,}",
        "prompt": f"{each.load.prompt_len:,}",
        "experts": f"{each.experts_share:.0%}",
        "alone ms": f"{each.alone_s * 1e3:.0f}",
        "beside ms": f"{each.beside_s * 1e3:.0f}",
        "slower": f"{each.slowdown:+.0%}",
        "mean slower": f"{each.mean_slowdown:+.0%}",
        "prompt alone s": f"{each.prompt_alone_s:.1f}",
        "beside s": f"{each.prompt_beside_s:.1f}",
        "gain": f"{each.gain:+.0%}",
        "ideal": f"{each.ideal_gain:+.0%}",
    }


def _figures(each: Measured) -> dict[str, object]:
    names = ("experts_share", "alone_s", "beside_s", "slowdown", "mean_slowdown", "prompt_alone_s", "prompt_beside_s")
    return asdict(each.load) | {name: getattr(each, name) for name in (*names, "gain", "ideal_gain")}


def _record(each: Measured) -> dict[str, object]:
    return _figures(each) | {"rounds": [asdict(one) for one in each.rounds]}


if __name__ == "__main__":
    run_main(main)
