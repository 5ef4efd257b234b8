"""Random traffic at saturation for a long time: aborts, deadlines, priorities, preemptions, shared beginnings.

Every answer is compared with what the same request gets alone. Fails if one differs, if memory or threads grow, if
pages are lost, or if nobody gets a token for long.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import flags
from flags import MODEL, engine_options
from mains import make_folder, print_json, run_main, write_atomically
from soaking.traffic import Sample, Tally, Traffic, known_requests

from hmoe_jax.engine import Engine
from hmoe_jax.kernels.pool import cpu_name

_SECONDS = flags.DEFINE_float("seconds", 1800.0, "How long new requests come.", lower_bound=1.0)
_KNOWN = flags.DEFINE_integer("known", 40, "Different requests.", lower_bound=1)
_OUTSTANDING = flags.DEFINE_integer("outstanding", 24, "Requests that wait or run at a time.", lower_bound=1)
_CACHE = flags.DEFINE_integer("kv_cache_bytes", None, "Of the cache: little, to see preemptions.", lower_bound=1)
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 8, "Sequences that decode together at most.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of everything random.", lower_bound=0)
_GROWTH = flags.DEFINE_float("max_growth", 0.02, "Resident memory may grow by so much after the first quarter.")
_STALL = flags.DEFINE_float("max_stall_s", 30.0, "Nobody gets a token for so long at most.", lower_bound=0.0)
_OUT = flags.DEFINE_string("out", "out/soak", "Folder for the results; made if it is missing.")


def main() -> None:
    out = make_folder(Path(_OUT.value))
    wishes = engine_options() | {"max_num_seqs": _MAX_NUM_SEQS.value, "kv_cache_bytes": _CACHE.value}
    with Engine(MODEL.value, **wishes) as engine:
        known = known_requests(engine, _KNOWN.value, seed=_SEED.value)
        traffic = Traffic(engine, known, seed=_SEED.value, outstanding=_OUTSTANDING.value)
        tally = traffic.run(_SECONDS.value, sample_s=max(0.5, _SECONDS.value / 200), max_stall_s=_STALL.value)
        metrics = engine.metrics()
        growth = _growth(tally.samples)
        results: dict[str, Any] = {
            "model": Path(MODEL.value).name,
            "cpu": cpu_name(),
            "seconds": _SECONDS.value,
            "ends": dict(tally.ends),
            "wrong": len(tally.wrong),
            "longest_stall_s": tally.longest_stall_s,
            "memory_growth": growth,
            "threads": [min(each.num_threads for each in tally.samples), tally.samples[-1].num_threads],
            "pages": [metrics.num_free_pages, metrics.num_pages],
            "preemptions": metrics.num_preemptions,
            "prefix_hit_rate": metrics.prefix_hit_rate,
            "copied_bytes": metrics.copied_bytes,
            "tokens": metrics.num_generated_tokens,
            "tokens_per_step": metrics.tokens_per_step,
        }
    for name, value in results.items():
        print(f"{name}: {value}")
    samples = [asdict(each) for each in tally.samples]
    write_atomically(out / "results.json", json.dumps({**results, "samples": samples}, indent=1) + "\n")
    print_json(results)
    problems = _problems(tally, results)
    if problems:
        raise ValueError("; ".join(problems))


def _growth(samples: list[Sample]) -> float:
    """Of resident memory from the second quarter of the time to the last one."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    before, after = (statistics.median(each.rss_bytes for each in part) for part in (early, late))
    return after / before - 1


def _problems(tally: Tally, results: dict[str, Any]) -> list[str]:
    checks = {
        f"{len(tally.wrong)} wrong answers, the first: {next(iter(tally.wrong), '')}": bool(tally.wrong),
        f"memory grew by {results['memory_growth']:.1%}": results["memory_growth"] > _GROWTH.value,
        f"threads grew: {results['threads']}": results["threads"][1] > max(results["threads"][0], 1) + 2,
        f"pages are missing: {results['pages']}": results["pages"][0] != results["pages"][1],
        f"nobody got a token for {tally.longest_stall_s:.1f} s": tally.longest_stall_s > _STALL.value,
        f"requests failed: {tally.ends['error']}": tally.ends["error"] > 0,
    }
    return [problem for problem, is_there in checks.items() if is_there]


if __name__ == "__main__":
    run_main(main)
