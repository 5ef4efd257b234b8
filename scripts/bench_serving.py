"""Many requests at once against the engine in this process: latencies, throughputs, goodput.

Open loop: requests come at `--request_rate` per second (Poisson, or in bursts with `--burstiness` below 1), whatever
becomes of those before them; several rates are several runs. Closed loop: at most `--max_concurrency` are served at a
time. Names and meanings are those of vLLM's serving benchmark. A recorded trace comes in its own rhythm, at the rate
that is asked for.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags
from flags import MODEL, engine_options
from mains import make_folder, print_json, run_main, write_atomically
from serving import report
from serving.drive import drive
from serving.picture import draw_load, draw_timeline
from serving.traces import at_rate, read_trace, trace_asks
from serving.workload import Ask, Lengths, agent_asks, arrive, random_asks, real_asks

from hmoe_jax.async_engine import AsyncEngine
from hmoe_jax.engine import Engine
from hmoe_jax.exec.activity import Activity
from hmoe_jax.kernels.pool import cpu_name
from hmoe_jax.meters import EngineMetrics
from hmoe_jax.sampling_params import SamplingParams

_DATASET = flags.DEFINE_enum(
    "dataset", "random", ["random", "agents", "prompts", "trace"], "Where the requests are from."
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "JSONL file, perhaps .gz, of --dataset=prompts: turns, prompt, question, instruction."
)
_TRACE = flags.DEFINE_string("trace", None, "File of --dataset=trace: Azure's CSV or Mooncake's JSONL; may be .gz.")
_SCALE = flags.DEFINE_float("trace_scale", 1.0, "A trace's lengths are divided by this.", lower_bound=1e-3)
_NUM = flags.DEFINE_integer("num_prompts", 50, "Requests of each run.", lower_bound=1)
_RATE = flags.DEFINE_multi_float("request_rate", [math.inf], "Requests per second; inf: all at once.", lower_bound=1e-6)
_BURSTINESS = flags.DEFINE_float("burstiness", 1.0, "Shape of the gaps' gamma distribution.", lower_bound=1e-3)
_CONCURRENCY = flags.DEFINE_integer("max_concurrency", None, "Requests that are served at a time.", lower_bound=1)
_INPUT = flags.DEFINE_integer("input_len", 128, "Tokens of a prompt; with agents, new ones of a turn.", lower_bound=1)
_OUTPUT = flags.DEFINE_integer("output_len", 64, "Tokens of an answer.", lower_bound=1)
_SPREAD = flags.DEFINE_float("spread", 0.5, "Random lengths: so far below and above.", lower_bound=0.0, upper_bound=1.0)
_SYSTEM = flags.DEFINE_integer("system_len", 256, "Tokens that all agents' prompts begin with.", lower_bound=1)
_AGENTS = flags.DEFINE_integer("num_agents", 4, "Agents that take turns.", lower_bound=1)
_GOODPUT = flags.DEFINE_string("goodput", "", "Limits in seconds that a good request meets, like ttft:30,tpot:0.05.")
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 8, "Sequences that decode together at most.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of lengths, tokens and arrivals.", lower_bound=0)
_CACHING = flags.DEFINE_bool("enable_prefix_caching", True, "Whether prompts find what earlier ones left in the cache.")
_OUT = flags.DEFINE_string("out", "out/serving", "Folder for the results; made if it is missing.")


def main() -> None:
    out, limits = make_folder(Path(_OUT.value)), report.parse_goodput(_GOODPUT.value)
    wishes = engine_options() | {"max_num_seqs": _MAX_NUM_SEQS.value, "enable_prefix_caching": _CACHING.value}
    engine = Engine(MODEL.value, **wishes)
    runs, activity = asyncio.run(_run_all(engine, _asks(engine), limits))
    title = f"{Path(MODEL.value).name}, {_DATASET.value}, executor {engine.plan.executor}"
    pictures = {"load.png": draw_load(runs, title=title)}
    if activity.device:
        pictures["timeline.png"] = draw_timeline(activity, title=title)
    for name, picture in pictures.items():
        write_atomically(out / name, picture)
    results = {"model": Path(MODEL.value).name, "cpu": cpu_name(), "dataset": _DATASET.value, "runs": runs}
    write_atomically(out / "results.json", json.dumps(results) + "\n")
    print(f"\nwritten to {out}: results.json, {', '.join(pictures)}")
    print_json(
        {**results, "runs": [{name: value for name, value in run.items() if name != "requests"} for run in runs]}
    )


async def _run_all(engine: Engine, asks: list[Ask], limits: dict[str, float]) -> tuple[list[dict[str, Any]], Activity]:
    """A record of each run, and what the engine did in the end."""
    runs = []
    async with AsyncEngine(engine) as served:
        for number, rate in enumerate(_RATE.value):
            before = served.metrics()
            sender = _sender(served, f"run {number}")
            results, seconds = await drive(_arriving(asks, rate), sender, max_concurrency=_CONCURRENCY.value)
            summary, counted = report.summarize(results, seconds, limits), _counted(before, served.metrics())
            print(f"\n{_DATASET.value}, {rate:g} requests/s, concurrency {_CONCURRENCY.value or 'unlimited'}")
            print(report.table(summary))
            print(", ".join(f"{name} {value:.3g}" for name, value in counted.items()))
            setting = {"request_rate": rate if math.isfinite(rate) else "inf", "max_concurrency": _CONCURRENCY.value}
            runs.append(setting | counted | report.record(summary, results))
        return runs, engine.activity()


def _sender(engine: AsyncEngine, salt: str) -> Any:
    """Runs find nothing of each other's in the prefix cache."""

    async def send(ask: Ask) -> AsyncIterator[int]:
        params = SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True, temperature=0.0)
        async for output in engine.generate({"prompt_token_ids": list(ask.prompt_ids), "cache_salt": salt}, params):
            if count := len(output.outputs[0].token_ids):
                yield count

    return send


def _arriving(asks: list[Ask], rate: float) -> list[Ask]:
    if _DATASET.value == "trace":
        return at_rate(asks, rate=rate)
    return arrive(asks, rate=rate, burstiness=_BURSTINESS.value, seed=_SEED.value)


def _asks(engine: Engine) -> list[Ask]:
    """Raises `ValueError` for prompts that the model cannot hold."""
    lengths = Lengths(_INPUT.value, _OUTPUT.value, _SPREAD.value)
    common: dict[str, Any] = {"vocab_size": engine.config.vocab_size, "seed": _SEED.value}
    if _DATASET.value == "agents":
        longest = {"system_len": _SYSTEM.value, "num_agents": _AGENTS.value, "max_len": engine.max_model_len}
        asks = agent_asks(_NUM.value, lengths, **longest, **common)
    elif _DATASET.value == "prompts":
        if _PROMPTS.value is None or engine.tokenizer is None:
            raise ValueError("--dataset=prompts needs --prompts, a JSONL file")
        sizes = {"answer_len": _OUTPUT.value, "max_len": engine.max_model_len}
        asks = real_asks(_NUM.value, Path(_PROMPTS.value), engine.tokenizer, **sizes)
    elif _DATASET.value == "trace":
        if _TRACE.value is None:
            raise ValueError("--dataset=trace needs --trace, a file of recorded requests")
        sizes = {"scale": _SCALE.value, "max_len": engine.max_model_len}
        asks = trace_asks(read_trace(Path(_TRACE.value)), _NUM.value, **sizes, **common)
    else:
        asks = random_asks(_NUM.value, lengths, **common)
    longest_ask = max(len(ask.prompt_ids) + ask.max_tokens for ask in asks)
    if longest_ask > engine.max_model_len:
        raise ValueError(f"a request comes to {longest_ask} tokens, but max_model_len is {engine.max_model_len}")
    return asks


def _counted(before: EngineMetrics, after: EngineMetrics) -> dict[str, float]:
    """What the engine itself counted meanwhile."""
    wanted = after.num_wanted_tokens - before.num_wanted_tokens
    steps = after.num_decode_steps - before.num_decode_steps
    summed = ("decode_s", "experts_busy_s", "experts_waited_s")
    meanwhile = replace(after, **{name: getattr(after, name) - getattr(before, name) for name in summed})
    return {
        "prefix_hit_rate": (after.num_cached_tokens - before.num_cached_tokens) / max(wanted, 1),
        "preemptions": after.num_preemptions - before.num_preemptions,
        "sequences_per_step": (after.itl.num - before.itl.num) / max(steps, 1),
        "overlap_efficiency": meanwhile.overlap_efficiency,
    }


if __name__ == "__main__":
    run_main(main)
