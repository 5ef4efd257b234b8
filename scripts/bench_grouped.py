"""Every way to multiply a group of experts on this device, in turn, against square products in the same run.

Tiles as a streamed prompt has them: block FP8, unpacked in every call, and each row is some token's, so that no way
has padding to save.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from mains import make_folder, print_json, run_main, write_atomically
from measuring.experts import CODEC, best_variant, measure_variants, random_store, variants_table
from measuring.limits import square_tflops
from measuring.timing import Effort

from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels.pool import ThreadPool, cpu_name

_GROUP = flags.DEFINE_integer("group_size", 4, "Experts of a group.", lower_bound=1)
_ROWS = flags.DEFINE_multi_integer("rows", [32, 128, 512], "Rows of each expert.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden", 7168, "Width of a token; by default DeepSeek-V3's.", lower_bound=1)
_FFN = flags.DEFINE_integer("ffn", 2048, "Width inside an expert; by default DeepSeek-V3's.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 5, "Calls of each case; medians are taken of them.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "out/bench_grouped", "Folder for table.md and results.json; made if it is missing.")


def main() -> None:
    out, device = make_folder(Path(_OUT.value)), jax.local_devices()[0]
    shape = StoreShape(1, _GROUP.value, _HIDDEN.value, _FFN.value)
    before_tflops = square_tflops([device])
    with ThreadPool(1) as pool, random_store(shape, pool) as store, jax.default_device(device):
        rates = measure_variants(
            store, group_size=_GROUP.value, rows=sorted(set(_ROWS.value)), effort=Effort(_CALLS.value)
        )
    peak_tflops = (before_tflops + square_tflops([device])) / 2
    setting = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "threads": len(os.sched_getaffinity(0)),
        "device": device.device_kind,
        "jax": jax.__version__,
        "codec": CODEC,
        "group_size": _GROUP.value,
        "hidden": _HIDDEN.value,
        "ffn": _FFN.value,
        "calls": _CALLS.value,
        "square_tflops": peak_tflops,
    }
    results = setting | {"variants": rates, "best_variant": best_variant(rates)}
    text = f"{_heading(setting)}\n\n{variants_table(rates, peak_tflops=peak_tflops)}\n"
    write_atomically(out / "table.md", text)
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"{text}\nwritten to {out}: table.md, results.json")
    print_json(results)


def _heading(setting: dict[str, Any]) -> str:
    return (
        f"# Groups of experts: {setting['cpu']}, device {setting['device']}\n\n"
        f"{setting['group_size']} experts in {setting['codec']}, hidden {setting['hidden']}, ffn {setting['ffn']}; "
        f"XLA of JAX {setting['jax']}, {setting['threads']} CPUs; medians of {setting['calls']} calls in turn.\n"
        f"TFLOP/s, and their share of square products ({setting['square_tflops']:.3g} TFLOP/s, before and after).\n\n"
        f"    {setting['command']}"
    )


if __name__ == "__main__":
    run_main(main)
