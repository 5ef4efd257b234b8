"""Everything that only a GPU can tell, in one command: what runs there, how fast, and what copies and products reach.

On the CPU platform the same checks run on small sizes: then the figures mean nothing, but that all of it runs.
A check that fails is a line of the table and an exit status of 1; the others run all the same.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from mains import make_folder, print_json, run_main, write_atomically
from suite import checks, decoding, streaming
from suite.layers import DeepSeekLayers

EMBEDDED = Path(__file__).resolve().parents[1] / "models" / "embedded"

_OUT = flags.DEFINE_string("out", "out/gpu_suite", "Folder for the results; made if it is missing.")
_ONLY = flags.DEFINE_multi_string("only", [], "Run these checks alone.")

Check = Callable[[jax.Device, checks.Scale], checks.Figures]


def main() -> None:
    with closing(DeepSeekLayers()) as layers:
        _run_all(_checks(layers))


def _checks(layers: DeepSeekLayers) -> dict[str, Check]:
    models: dict[str, Any] = {"embedded": EMBEDDED, "layers": layers}
    return {
        "versions": checks.versions,
        "executors": partial(streaming.executors, embedded=EMBEDDED),
        "copies": checks.copies,
        "pinned": streaming.pinned,
        "overlap": checks.overlap,
        "grouped": checks.grouped,
        "attention": checks.attention,
        "stream": partial(streaming.stream, **models),
        "decode": partial(decoding.decode, **models),
        "beside": partial(decoding.beside, **models),
    }


def _run_all(known: dict[str, Check]) -> None:
    unknown = sorted(set(_ONLY.value) - set(known))
    if unknown:
        raise ValueError(f"--only={unknown[0]}: expected one of {', '.join(known)}")
    out, device = make_folder(Path(_OUT.value)), jax.local_devices()[0]
    scale = checks.SMALL if device.platform == "cpu" else checks.FULL
    results: dict[str, dict[str, Any]] = {}
    with jax.default_device(device):
        for name in _ONLY.value or known:
            begin = time.perf_counter()
            results[name] = _run(known[name], device, scale)
            results[name]["seconds"] = time.perf_counter() - begin
            print(f"{name}: {results[name]['seconds']:.1f} s", file=sys.stderr)
            write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    table = _table(results)
    write_atomically(out / "table.md", table)
    print(f"\n{table}")
    print_json(results)
    if any("error" in result for result in results.values()):
        sys.exit(1)


def _run(check: Check, device: jax.Device, scale: checks.Scale) -> dict[str, Any]:
    try:
        return dict(check(device, scale))
    except Exception as error:  # one check shall not cost the others
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| check | figure | |", "|---|---|---|"]
    for name, figures in results.items():
        for figure, value in figures.items():
            lines.append(f"| {name} | {figure} | {f'{value:.4g}' if isinstance(value, float) else value} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
