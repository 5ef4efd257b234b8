"""Dual-batch overlap on a machine without a GPU: XLA's device on one processor, the routed experts on another.

Decode steps in which the two sides take turns against steps in two parts, each of which is computed on one side while
the other part is on the other: throughput, each side's share, and the ideal; and the same two by the loop on the host.
Wants a model whose sides take about equal time (`write_synthetic.py --narrow`), as a matrix is read once for each part:
where reading weights is most of the work, the device's side takes twice as long in two parts.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from absl import flags
from flags import MODEL
from mains import make_folder, print_json, run_main, titled_table, write_atomically
from overlapping.sides import pinned_options, setting
from overlapping.timing import Comparison, compare

from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions

_BATCH = flags.DEFINE_multi_integer("batch", [8, 16], "Sequences that decode together; even.", lower_bound=2)
_CONTEXT = flags.DEFINE_multi_integer("context", [2048, 4096], "Tokens that each looks back at.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Steps of each kind, in turn.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "out/overlap", "Folder for the results; made if it is missing.")


def main() -> None:
    out = make_folder(Path(_OUT.value))
    if any(batch % 2 for batch in _BATCH.value):
        raise ValueError(f"--batch must be even, got {_BATCH.value}")
    wishes = pinned_options(max_num_seqs=max(_BATCH.value), max_model_len=max(_CONTEXT.value) + 1)
    executor, _ = open_executor(MODEL.value, EngineOptions(**wishes))
    with closing(executor):
        compared = [
            compare(executor, batch=batch, context=context, num_rounds=_ROUNDS.value)
            for batch in _BATCH.value
            for context in _CONTEXT.value
        ]
    where = setting(wishes)
    text = titled_table(where, [_cells(each) for each in compared])
    print(f"\n{text}")
    results = where | {"overlap": [_record(each) for each in compared]}
    write_atomically(out / "table.md", text)
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    print_json(results)


def _cells(each: Comparison) -> dict[str, str]:
    return {
        "batch": f"{each.batch}",
        "context": f"{each.context:,}",
        "in turn ms": f"{each.one.seconds * 1e3:.0f}",
        "experts": f"{each.experts_share:.0%}",
        "overlapped ms": f"{each.two.seconds * 1e3:.0f}",
        "tok/s": f"{each.batch / each.one.seconds:.1f} -> {each.batch / each.two.seconds:.1f}",
        "speedup": f"{each.speedup:.2f}",
        "ideal": f"{each.ideal:.2f}",
        "of ideal": f"{each.speedup / each.ideal:.0%}",
        "by the host ms": f"{each.loop_one.seconds * 1e3:.0f} -> {each.loop_two.seconds * 1e3:.0f}",
        "host's share": f"{each.loop_one.host_share:.1%} -> {each.loop_two.host_share:.1%}",
    }


def _record(each: Comparison) -> dict[str, object]:
    return asdict(each) | {
        "speedup": each.speedup,
        "loop_s": each.loop_s,
        "experts_share": each.experts_share,
        "ideal": each.ideal,
    }


if __name__ == "__main__":
    run_main(main)
