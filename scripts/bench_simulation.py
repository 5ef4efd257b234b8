"""Decode steps as `perf/simulate.py` has them, against the same steps on this machine.

XLA's device is pinned to one processor and the routed experts to another. The rates of the parts are measured first, by
the code that serves and at DeepSeek-V3's widths; then whole steps, in one part and in two. No rate is fitted to a step.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
from absl import flags
from flags import MODEL
from mains import make_folder, print_json, run_main, titled_table, write_atomically
from measuring.timing import Effort
from overlapping.sides import pinned_options, setting
from overlapping.timing import compare
from planning.measure import measure_decode_rates, open_bench

from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.kernels.pool import cpu_name
from hmoe_jax.perf.cost import Rates
from hmoe_jax.perf.machines import UNMEASURED_CPU
from hmoe_jax.perf.simulate import simulate, stages

_BATCH = flags.DEFINE_multi_integer("batch", [2, 4, 8], "Sequences that decode together; even.", lower_bound=2)
_CONTEXT = flags.DEFINE_multi_integer("context", [512, 4096], "Tokens that each looks back at.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Steps of each kind, in turn.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 3.0, "How long each rate is measured.", lower_bound=0.1)
_OUT = flags.DEFINE_string("out", "out/simulation", "Folder for the results; made if it is missing.")

NUM_EXPERTS = 32
"""To measure their rate: more than the caches hold."""


@dataclass(frozen=True)
class Case:
    """Median seconds of a step, measured and simulated."""

    batch: int
    context: int
    num_parts: int
    measured_s: float
    simulated_s: float

    @property
    def ratio(self) -> float:
        return self.simulated_s / self.measured_s


def main() -> None:
    if any(batch % 2 for batch in _BATCH.value):
        raise ValueError(f"--batch must be even, got {_BATCH.value}")
    out = make_folder(Path(_OUT.value))
    wishes = pinned_options(max_num_seqs=max(_BATCH.value), max_model_len=max(_CONTEXT.value) + 1)
    options = EngineOptions(**wishes)
    rates = _rates(options)
    executor, _ = open_executor(MODEL.value, options)
    with closing(executor):
        cases = []
        for batch in _BATCH.value:
            for context in _CONTEXT.value:
                found = compare(executor, batch=batch, context=context, num_rounds=_ROUNDS.value)
                measured = {1: found.one.seconds, 2: found.two.seconds}
                cases += [_case(executor.config, rates, batch, context, parts, s) for parts, s in measured.items()]
    where = setting(wishes)
    text = titled_table(where, [_cells(case) for case in cases])
    print(f"\n{text}")
    results = where | {"rates": asdict(rates), "cases": [asdict(case) | {"ratio": case.ratio} for case in cases]}
    write_atomically(out / "table.md", text)
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    print_json(results)


def _rates(options: EngineOptions) -> Rates:
    """Of the two sides, each with its own processors."""
    sides = {"num_threads": options.num_threads, "expert_cpus": options.expert_cpus}
    with open_bench(
        jax.local_devices()[0], **sides, num_experts=NUM_EXPERTS, effort=Effort(seconds=_SECONDS.value)
    ) as bench:
        return replace(UNMEASURED_CPU, name=cpu_name(), **measure_decode_rates(bench, variant="batched"))


def _case(config: ModelConfig, rates: Rates, batch: int, context: int, num_parts: int, measured_s: float) -> Case:
    parts = stages(config, rates, batch=batch, context=context, num_parts=num_parts)
    return Case(batch, context, num_parts, measured_s, simulate(parts).step_s)


def _cells(case: Case) -> dict[str, str]:
    return {
        "batch": f"{case.batch}",
        "context": f"{case.context:,}",
        "parts": f"{case.num_parts}",
        "measured ms": f"{case.measured_s * 1e3:.1f}",
        "simulated ms": f"{case.simulated_s * 1e3:.1f}",
        "ratio": f"{case.ratio:.2f}",
    }


if __name__ == "__main__":
    run_main(main)
