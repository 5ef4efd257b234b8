"""Writes a model folder with DeepSeek-V3's true layer shapes, few layers and experts, and random weights.

For benchmarks: it says nothing, but reads from memory what the real model reads in as many layers, and its experts
are as unequally busy as a real model's. The tokenizer is the embedded model's, so that every script runs on the folder.
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags
from mains import run_main
from synthetic.fields import CODECS, Size
from synthetic.folder import write_model

_OUT = flags.DEFINE_string("out", None, "The folder to write; one that exists is replaced.", required=True)
_DENSE_LAYERS = flags.DEFINE_integer("dense_layers", 1, "Layers without experts, at the start.", lower_bound=0)
_MOE_LAYERS = flags.DEFINE_integer("moe_layers", 2, "Layers with routed experts.", lower_bound=1)
_EXPERTS = flags.DEFINE_integer("experts", 32, "Routed experts per layer, in 8 groups.", lower_bound=16)
_TOP_K = flags.DEFINE_integer("top_k", 8, "Experts that a token chooses.", lower_bound=1, upper_bound=8)
_NARROW = flags.DEFINE_bool("narrow", False, "Small matrices and half the heads, beside a cache of the true size.")
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 4096, "Rows of embedding and head; the tokenizer knows the first 4,096.", lower_bound=4096
)
_MAX_LEN = flags.DEFINE_integer("max_len", 16384, "Longest sequence that the config allows.", lower_bound=1)
_CODEC = flags.DEFINE_enum("codec", "fp8_block", CODECS, "Number format of the projections and experts.")
_SKEW = flags.DEFINE_float(
    "skew", 0.5, "The r-th busiest expert is chosen in proportion to r to the power of minus this.", lower_bound=0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all weights.", lower_bound=0)


def main() -> None:
    size = Size(
        num_dense_layers=_DENSE_LAYERS.value,
        num_moe_layers=_MOE_LAYERS.value,
        num_experts=_EXPERTS.value,
        top_k=_TOP_K.value,
        is_narrow=_NARROW.value,
        vocab_size=_VOCAB_SIZE.value,
        max_len=_MAX_LEN.value,
        codec=_CODEC.value,
    )
    begin = time.perf_counter()
    total = write_model(Path(_OUT.value), size, seed=_SEED.value, skew=_SKEW.value)
    seconds = time.perf_counter() - begin
    print(f"{_OUT.value}: {total / 1e9:.2f} GB of {_CODEC.value} in {seconds:.1f} s, {total / seconds / 1e9:.2f} GB/s")


if __name__ == "__main__":
    run_main(main)
