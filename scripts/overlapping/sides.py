"""XLA's device and the routed experts, each with processors of its own: the flags of benchmarks that pin both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from absl import flags
from flags import MODEL, engine_options

from hmoe_jax.kernels.pool import cpu_name

_DEVICE_CPUS = flags.DEFINE_multi_integer("device_cpu", [0], "Processors of XLA's side.", lower_bound=0)


def pinned_options(**wishes: Any) -> dict[str, Any]:
    """Engine options with executor "overlap", `wishes` among them, whose experts have --expert_cpus or the processor
    after XLA's. Pins this thread, so JAX must not have started its own yet."""
    os.sched_setaffinity(0, _DEVICE_CPUS.value)
    options = engine_options() | {"executor": "overlap"} | wishes
    if options["expert_cpus"] == "auto":
        options["expert_cpus"] = str(max(_DEVICE_CPUS.value) + 1)
    return options


def setting(options: dict[str, Any]) -> dict[str, Any]:
    """What a result says of where it was measured."""
    return {
        "model": Path(MODEL.value).name,
        "cpu": cpu_name(),
        "device_cpus": _DEVICE_CPUS.value,
        "expert_cpus": options["expert_cpus"],
    }
