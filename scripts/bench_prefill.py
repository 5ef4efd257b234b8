"""Stream-loading prefill against the limits of both its lanes, measured in the same run: the link and the products.

For every prompt length: time to the first token, what was copied and how fast, and how well copies and computation hide
each other. `--link_gbps` makes the copies as slow as a link of that bandwidth, as on a machine with another device.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flags import MODEL, engine_options
from mains import make_folder, print_json, run_main, write_atomically
from prefilling import report
from prefilling.timing import measure_limits, median_round, run

from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.session import Session
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.kernels.pool import cpu_name

_LENGTHS = flags.DEFINE_multi_integer("length", [512, 2048, 8192], "Prompt lengths.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Prefills of each length; the median one is shown.", lower_bound=1)
_LINK = flags.DEFINE_float("link_gbps", None, "Copy no faster than this.", lower_bound=1e-6)
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 1, "Devices that JAX's CPU platform has.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "out/prefill", "Folder for the results; made if it is missing.")


def main() -> None:
    out = make_folder(Path(_OUT.value))
    jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    lengths = sorted(set(_LENGTHS.value))
    wishes = engine_options() | {"prefill": "stream", "link_gbps": _LINK.value, "max_num_seqs": 1}
    wishes["max_model_len"] = max(wishes["max_model_len"] or 0, lengths[-1] + 1)
    executor, plan = open_executor(MODEL.value, EngineOptions(**wishes))
    assert isinstance(executor, StreamExecutor)
    with closing(executor):
        executor.watches_computing = True
        limits = measure_limits(executor)
        rounds = []
        for length in lengths:
            session = Session(executor, prompt_len=length, num_steps=1)
            run(session)  # compiles
            rounds.append(median_round([run(session) for _ in range(_ROUNDS.value)]))
    setting = {
        "model": Path(MODEL.value).name,
        "cpu": cpu_name(),
        "device": plan.device.device_kind,
        "devices": len(executor.stream.devices),
        "group_size": executor.stream.group_size,
        "pass_len": executor.stream.pass_len,
        "link_gbps": _LINK.value,
    }
    results = setting | {"prefill": [report.record(each, limits) for each in rounds]}
    _write(out, setting, report.table(rounds, limits), results)
    _draw(out, rounds, setting)
    print_json(results)


def _write(out: Path, setting: dict[str, Any], table: str, results: dict[str, Any]) -> None:
    text = f"{', '.join(f'{name} {value}' for name, value in setting.items())}\n\n{table}\n"
    print(f"\n{text}")
    print(
        "GB/s: copied bytes over the copies' time. Of link: against the same copies with nothing beside them.\n"
        "Of peak: against square products. Overlap: the busier lane's time over the wall. Host: the wall that the\n"
        "thread which starts everything was busy itself."
    )
    write_atomically(out / "table.md", text)
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")


def _draw(out: Path, rounds: list[Any], setting: dict[str, Any]) -> None:
    try:
        from prefilling.picture import draw  # noqa: PLC0415 - the plot extra is optional
    except ImportError:
        print(f"\nwritten to {out}: table.md, results.json (a picture needs matplotlib)")
        return
    title = f"{setting['model']} on {setting['devices']} x {setting['device']}"
    write_atomically(out / "lanes.png", draw(rounds, title=title))
    print(f"\nwritten to {out}: table.md, results.json, lanes.png")


if __name__ == "__main__":
    run_main(main)
