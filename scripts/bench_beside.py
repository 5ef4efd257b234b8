"""A prompt beside decoding, on a machine without a GPU: XLA's device on one processor, the routed experts on another.

Token latency alone and while a long prompt is computed in the gaps of decode steps, and what that gains over computing
one after the other; beside it the gain if the prompt used every moment in which decoding leaves the device. Wants a
model whose experts take most of a decode step, as DeepSeek-V3's do (`write_synthetic.py --narrow --codec=bf16`).
"""

from __future__ import annotations

import json
import resource
from dataclasses import asdict
from pathlib import Path

from absl import flags
from companions.picture import draw
from companions.timing import Load, Measured, measure
from flags import MODEL
from mains import make_folder, print_json, run_main, titled_table, write_atomically
from overlapping.sides import pinned_options, setting
from serving.picture import draw_timeline

from hmoe_jax.engine import Engine
from hmoe_jax.perf.cost import expert_bytes

_BATCH = flags.DEFINE_multi_integer("batch", [4, 8], "Sequences that decode together.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 257, "Tokens that each looks back at, at least.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 1024, "Tokens of the prompt beside them.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Decoding alone, both, the prompt alone: so often.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 24, "Decode steps alone, before the prompt and after it.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "out/beside", "Folder for the results; made if it is missing.")


def main() -> None:
    out = make_folder(Path(_OUT.value))
    wishes = pinned_options(prefill="stream")
    asked_len = wishes.pop("max_model_len")
    rounds = {"num_rounds": _ROUNDS.value, "num_steps": _STEPS.value}
    measured = []
    for batch in _BATCH.value:
        load = Load(batch=batch, context=_CONTEXT.value, prompt_len=_PROMPT_LEN.value)
        lengths = {"max_num_seqs": batch + 1, "max_model_len": asked_len or load.max_len(**rounds)}
        with Engine(MODEL.value, **lengths, skip_tokenizer_init=True, **wishes) as engine:
            measured.append(measure(engine, load, **rounds))
            activity, plan, config = engine.activity(), engine.plan, engine.config
    where = setting(wishes) | {
        "max_decode_slowdown": plan.max_decode_slowdown,
        "experts_gb": round(config.num_moe_layers * config.num_experts * expert_bytes(config) / 1e9, 2),
        "peak_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    text = titled_table(where, [_cells(each) for each in measured])
    print(f"\n{text}")
    results = where | {"beside": [_record(each) for each in measured]}
    write_atomically(out / "table.md", text)
    write_atomically(out / "results.json", json.dumps(results) + "\n")
    write_atomically(out / "traffic.png", draw(measured[-1]))
    write_atomically(out / "timeline.png", draw_timeline(activity, title="Decode steps beside a prompt"))
    print_json(where | {"beside": [_figures(each) for each in measured]})


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
