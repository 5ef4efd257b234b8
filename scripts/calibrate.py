"""Measures this machine's rates for the model of costs, in about a minute, and keeps them for `plan.py --gpu=measured`.

Each rate is that of the code that serves, at DeepSeek-V3's widths: the expert kernels from memory, copies of records to
the device, dense projections, a group of experts, attention of a block. Beside them every way to multiply a group.
"""

from __future__ import annotations

from dataclasses import asdict

import jax
from absl import flags
from mains import print_json, run_main
from measuring.experts import variants_table
from measuring.limits import square_tflops
from measuring.timing import Effort
from planning.measure import measure_group, measure_rates, open_bench

from hmoe_jax.perf.machines import save_rates

_THREADS = flags.DEFINE_string("num_threads", "auto", "Threads of the native kernels: a number, or auto.")
_EXPERT_CPUS = flags.DEFINE_string(
    "expert_cpus", "auto", "CPUs of the experts' threads; then what experts and device cost each other is measured too."
)
_EXPERTS = flags.DEFINE_integer("experts", 32, "Experts to read: more than the caches hold.", lower_bound=8)
_SECONDS = flags.DEFINE_float("seconds", 4.0, "How long each rate is measured.", lower_bound=0.1)


def main() -> None:
    threads = _THREADS.value
    if threads != "auto" and not threads.isdecimal():
        raise ValueError(f"--num_threads must be a number or auto, got {threads!r}")
    device = jax.local_devices()[0]
    with open_bench(
        device,
        num_threads=threads if threads == "auto" else int(threads),
        expert_cpus=_EXPERT_CPUS.value,
        num_experts=_EXPERTS.value,
        effort=Effort(seconds=_SECONDS.value),
    ) as bench:
        variants, peak_tflops = measure_group(bench), square_tflops([device])
        rates = measure_rates(bench, variants)
    for name, value in asdict(rates).items():
        print(f"{name:<18}{value:>12.4g}" if isinstance(value, float) else f"{name:<18}{value:>12}")
    print(f"\nGroups of {bench.group_size} experts, TFLOP/s (of square products), the fastest {rates.variant}:\n")
    print(f"{variants_table(variants, peak_tflops=peak_tflops)}\n\nwritten to {save_rates(rates)}")
    print_json(asdict(rates) | {"variants": variants})


if __name__ == "__main__":
    run_main(main)
