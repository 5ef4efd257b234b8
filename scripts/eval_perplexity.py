"""Perplexity of a model on a text, the whole text in windows, through the engine."""

from __future__ import annotations

import dataclasses
import time

from absl import flags
from flags import MODEL, REPOSITORY, engine_options
from mains import print_json, read_text, run_main

from hmoe_jax.engine import Engine
from hmoe_jax.evals import perplexity

_TEXT = flags.DEFINE_string(
    "text", str(REPOSITORY / "tests" / "data" / "inaugural_sample.txt"), "A UTF-8 file; by default three speeches."
)
_WINDOW = flags.DEFINE_integer("window", None, "Tokens per window; default as many as the model takes.", lower_bound=2)
_MAX_CHARS = flags.DEFINE_integer("max_chars", None, "Use only this many characters from the start.", lower_bound=1)


def main() -> None:
    text = read_text(_TEXT.value)[: _MAX_CHARS.value]
    with Engine(MODEL.value, max_num_seqs=1, warm_up=False, **engine_options()) as engine:
        begin = time.perf_counter()
        result = perplexity(engine, text, window=_WINDOW.value)
        seconds = time.perf_counter() - begin
    print(
        f"perplexity {result.perplexity:.4f} ({result.loss:.5f} nats per token, {result.bits_per_char:.4f} bits per "
        f"character) on {result.num_tokens:,} tokens in {seconds:.1f} s"
    )
    derived = {"perplexity": result.perplexity, "loss": result.loss, "bits_per_char": result.bits_per_char}
    print_json({**dataclasses.asdict(result), **derived, "seconds": seconds})


if __name__ == "__main__":
    run_main(main)
