"""The expert kernels against the hardware's limits, a naive loop and a peer: one layer's experts, many batch sizes.

Per format, ISA, threads and tokens: time of a call, bandwidth over the bytes that it touches, and its share of the read
bandwidth and dot peak that are measured in the same rounds with the same threads. Weights come from memory, not
from a cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from absl import flags
from benchmarks import kt_kernel_peer
from benchmarks.cases import Layer, Result
from benchmarks.formats import ExpertMemory, expert_bytes, native_formats
from benchmarks.kt_kernel_peer import KtKernel
from benchmarks.machine import available_bytes, last_level_cache_bytes
from benchmarks.measure import Effort, Group, measure
from benchmarks.overhead import Overhead, measure_overhead
from benchmarks.report import Report
from benchmarks.routing import KINDS
from benchmarks.sides import Naive, Ours, Side
from mains import make_folder, print_json, run_main, write_atomically
from tqdm import tqdm

from hmoe_jax.experts.store import ExpertStore, StoreShape
from hmoe_jax.kernels.pool import ThreadPool, available_isas, cpu_name, resolve_num_threads
from hmoe_jax.quant.formats import FORMATS, Format

_FORMATS = flags.DEFINE_list("formats", ["all"], "Weight formats, or all that this build knows.")
_ISAS = flags.DEFINE_list("isas", ["auto"], "Instruction sets: names, auto for the best, or all that this CPU offers.")
_THREADS = flags.DEFINE_list("threads", ["1", "all"], "Numbers of threads; all is one per physical core.")
_TOKENS = flags.DEFINE_list("tokens", ["1", "2", "4", "8", "32", "128", "512"], "Tokens of a call.")
_ROUTING = flags.DEFINE_enum("routing", "skewed", KINDS, "Which experts the tokens choose.")
_NAIVE = flags.DEFINE_bool("naive", False, "Also time the loop that dequantises to FP32, then multiplies (fp8_block).")
_PEER = flags.DEFINE_enum("peer", None, [kt_kernel_peer.NAME], "Also time this project's kernels, if installed.")
_OUT = flags.DEFINE_string("out", "out/bench_kernels", "Folder for table.md, results.json and roofline.png.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds over all cases; medians are taken of them.", lower_bound=1)
_VISIT_S = flags.DEFINE_float("visit_s", 0.25, "Seconds of each case in each round; one call at least.", lower_bound=0)
_MAX_CALL_S = flags.DEFINE_float(
    "max_call_s", 20, "A side whose call takes longer is not timed with more tokens.", lower_bound=0
)
_READ_MB = flags.DEFINE_integer("read_mb", 1024, "Size of the buffer of the read bandwidth.", lower_bound=1)
_EXPERTS = flags.DEFINE_integer("experts", 64, "Experts of the layer.", lower_bound=1)
_TOP_K = flags.DEFINE_integer("top_k", 8, "Experts of a token.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden", 7168, "Width of a token; by default DeepSeek-V3's.", lower_bound=1)
_FFN = flags.DEFINE_integer("ffn", 2048, "Width inside an expert; by default DeepSeek-V3's.", lower_bound=1)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    threads, tokens, isas = _threads(), _numbers("tokens", _TOKENS.value), _isas()
    formats = _formats()
    layer = Layer(StoreShape(1, _EXPERTS.value, _HIDDEN.value, _FFN.value), _TOP_K.value, _ROUTING.value)
    if _PEER.value:
        kt_kernel_peer.check_installed()
    if _NAIVE.value and FORMATS["fp8_block"] not in formats:
        raise ValueError(f"--naive is for format fp8_block, which is not in --formats={','.join(_FORMATS.value)}")
    _check_memory(formats, layer)
    batches = [layer.batch(count) for count in tokens]
    out = make_folder(Path(_OUT.value))

    effort = Effort(_ROUNDS.value, _VISIT_S.value, _MAX_CALL_S.value, _READ_MB.value)
    results: list[Result] = []
    overheads: list[Overhead] = []
    for format_ in formats:
        memory = ExpertMemory(format_, layer.shape)
        for count in threads:
            with _group(memory, layer, batches, threads=count, isas=isas) as (group, store):
                total = effort.rounds * len(batches) * len(group.sides)
                with tqdm(total=total, unit="visit", disable=None) as bar:
                    results += measure(group, effort, tick=lambda what: (bar.set_description(what), bar.update()))
                if format_ is formats[0]:
                    overheads.append(measure_overhead(store, layer, threads=count, isa=isas[0]))
    _write(out, Report(_setting(layer), results, overheads, last_level_cache_bytes()))


@contextmanager
def _group(
    memory: ExpertMemory, layer: Layer, batches: Sequence[Any], *, threads: int, isas: Sequence[str]
) -> Iterator[tuple[Group, ExpertStore]]:
    """All sides with their threads and experts, and the store of the first; closed at the end."""
    name = memory.format.codec
    with ExitStack() as stack:
        pools = {isa: stack.enter_context(ThreadPool(threads, isa=isa)) for isa in isas}
        stores = [
            stack.enter_context(ExpertStore(memory.tensors(), shape=layer.shape, codec=name, pool=pool))
            for pool in pools.values()
        ]
        sides: list[Side] = [Ours(store, isa=isa) for store, isa in zip(stores, isas, strict=True)]
        if _NAIVE.value and name == "fp8_block":
            sides.append(Naive(stores[0]))
        if _PEER.value and kt_kernel_peer.can_run(name):
            peer = KtKernel(name, layer, threads=threads)
            stack.callback(peer.close)
            sides.append(peer)
        yield Group(memory.format, threads, pools, sides, batches), stores[0]


def _formats() -> list[Format]:
    known = native_formats()
    names = known if _FORMATS.value == ["all"] else _FORMATS.value
    for name in names:
        if name not in known:
            raise ValueError(f"--formats: this build knows {', '.join(known)}, got {name!r}")
    return [FORMATS[name] for name in names]


def _isas() -> list[str]:
    offered = available_isas()
    if _ISAS.value == ["all"]:
        return offered
    names = [offered[0] if name == "auto" else name for name in _ISAS.value]
    for name in names:
        if name not in offered:
            raise ValueError(f"--isas: this machine offers {', '.join(offered)}, got {name!r}")
    return list(dict.fromkeys(names))


def _threads() -> list[int]:
    counts = [resolve_num_threads("auto") if each == "all" else _number("threads", each) for each in _THREADS.value]
    return list(dict.fromkeys(map(resolve_num_threads, counts)))


def _numbers(flag: str, texts: Sequence[str]) -> list[int]:
    """Ascending: a side that is too slow for a number is not asked for a larger one."""
    return sorted({_number(flag, text) for text in texts})


def _number(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--{flag}: expected positive numbers, got {text!r}")
    return int(text)


def _check_memory(formats: Sequence[Format], layer: Layer) -> None:
    copies = 2 if _PEER.value else 1  # A peer has its own.
    largest = max(formats, key=lambda each: expert_bytes(each, layer.shape))
    needed = copies * layer.shape.num_experts * expert_bytes(largest, layer.shape) + (_READ_MB.value << 20)
    if needed > available_bytes():
        raise ValueError(
            f"--experts={layer.shape.num_experts} in {largest.codec} need {needed / 1e9:.1f} GB of memory, "
            f"{available_bytes() / 1e9:.1f} GB are available"
        )


def _setting(layer: Layer) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "hidden": layer.shape.hidden,
        "ffn": layer.shape.ffn,
        "num_experts": layer.shape.num_experts,
        "top_k": layer.top_k,
        "routing": layer.routing,
        "rounds": _ROUNDS.value,
        "visit_s": _VISIT_S.value,
        "peer": kt_kernel_peer.version() if _PEER.value else None,
    }


def _write(out: Path, report: Report) -> None:
    text, summary = report.text(), report.summary()
    write_atomically(out / "table.md", text)
    write_atomically(out / "results.json", json.dumps(summary, indent=2) + "\n")
    print(text)
    _write_picture(out, report)
    print(f"written to {out}: table.md, results.json")
    print_json(summary)


def _write_picture(out: Path, report: Report) -> None:
    try:
        from benchmarks import picture  # noqa: PLC0415 (matplotlib is optional: see the `plot` extra)
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is not installed (pip install 'hmoe-jax[plot]')")
        return
    title = f"{report.setting['cpu']}: {report.setting['routing']} routing"
    write_atomically(out / "roofline.png", picture.draw(report.results, title=title))


if __name__ == "__main__":
    run_main(main)
