"""Whole CPU-only steps against the hardware's limits, measured in the same run: decode and DRAM, prefill and dot peak.

The bound of a decode step is all bytes that it has to read (each weight of the dense parts and of the chosen experts
once, and the cache) over the read bandwidth; that of a prefill is its multiply-adds over the peak. Run it on a folder
that `write_synthetic.py` wrote.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from absl import flags
from decoding import report
from decoding.timing import DecodeResult, PrefillResult, time_decode, time_prefill
from flags import MODEL, REPOSITORY, engine_options
from mains import JSON, print_json, read_text, run_main
from synthetic.shards import cut

from hmoe_jax.config import read_config
from hmoe_jax.kernels.pool import available_isas, cpu_name, resolve_num_threads
from hmoe_jax.tokenizer import Tokenizer

_TEXT = flags.DEFINE_string(
    "text", str(REPOSITORY / "tests" / "data" / "inaugural_sample.txt"), "A UTF-8 file: parts of it are the prompts."
)
_BATCH = flags.DEFINE_multi_integer("batch", [1, 4], "Sequences that decode together.", lower_bound=1)
_CONTEXT = flags.DEFINE_multi_integer("context", [512], "Tokens that a decode step looks back at.", lower_bound=1)
_PREFILL = flags.DEFINE_multi_integer("prefill", [512, 2048], "Prompt lengths to time; 0 for none.", lower_bound=0)
_LAYERS = flags.DEFINE_multi_integer(
    "layers", [], "Also decode with the model cut after so many layers: does a layer's time grow?", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements that the medians are taken of.", lower_bound=1)


def main() -> None:
    config = read_config(MODEL.value)
    text = Tokenizer.from_folder(Path(MODEL.value)).encode(read_text(_TEXT.value))
    options = engine_options()
    decoded = [
        time_decode(MODEL.value, options, text, batch=batch, context=context, num_rounds=_ROUNDS.value)
        for context in _CONTEXT.value
        for batch in _BATCH.value
    ]
    cuts = _time_cuts(options, text, config.num_layers) if _LAYERS.value else []
    lengths = [length for length in _PREFILL.value if length]
    prefilled = time_prefill(MODEL.value, options, text, lengths=lengths, num_rounds=_ROUNDS.value)
    setting = {
        "model": MODEL.value,
        "cpu": cpu_name(),
        "isa": options["isa"] if options["isa"] != "auto" else available_isas()[0],
        "num_threads": resolve_num_threads(options["num_threads"]),
    }
    _print(setting, decoded, cuts, prefilled)


def _time_cuts(options: dict[str, Any], text: list[int], num_layers: int) -> list[DecodeResult]:
    """One sequence on the model cut after each number of layers, and on the whole."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for count in sorted({*_LAYERS.value, num_layers}):
            folder = Path(scratch) / str(count)
            cut(Path(MODEL.value), folder, num_layers=count)
            folders.append(str(folder))
        context = _CONTEXT.value[0]
        return [
            time_decode(folder, options, text, batch=1, context=context, num_rounds=_ROUNDS.value) for folder in folders
        ]


def _print(
    setting: dict[str, Any], decoded: list[DecodeResult], cuts: list[DecodeResult], prefilled: list[PrefillResult]
) -> None:
    print(f"{setting['cpu']}, {setting['num_threads']} threads, {setting['isa']}")
    print(report.load_line(decoded[0].load))
    print(f"\n{report.decode_table([*decoded, *cuts])}")
    if len(cuts) > 1:
        print(f"\n{report.layer_table(cuts)}")
    if prefilled:
        print(f"\n{report.prefill_table(prefilled)}")
    if JSON.value:
        print_json(
            setting
            | {
                "decode": [report.decode_record(each) for each in decoded],
                "cuts": [report.decode_record(each) for each in cuts],
                "prefill": [report.prefill_record(each) for each in prefilled],
            }
        )


if __name__ == "__main__":
    run_main(main)
