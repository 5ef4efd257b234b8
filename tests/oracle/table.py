"""Compares every executor with the independent implementation, on every model, and writes the table.

    python -m tests.oracle.table --out=docs/parity.md

Ends with an error if any figure exceeds its bound; the table is then not written.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from absl import app, flags

from tests.oracle.golden import load_golden
from tests.oracle.hf import HfTruth
from tests.oracle.models import write_model
from tests.oracle.parity import ALL_CASES, MAX_MEAN_KL, Parity, measure
from tests.oracle.perplexity import (
    MAX_PERPLEXITY_ERROR,
    PERPLEXITY_CHARS,
    check_perplexity,
    load_perplexity,
    measure_perplexity,
)

_OUT = flags.DEFINE_string("out", "", "Markdown file to write, beside what is printed")

_TEXT = f"""# Parity with the independent implementation

Written by `make oracle`. The models are those of `tests/tiny.py`, seven small random checkpoints that cover every
branch of the mathematics, and the trained one of `models/embedded`, as it is and expanded to BF16. The oracle is
`DeepseekV3ForCausalLM` of `transformers` on PyTorch in FP32, with the stored weights expanded in FP32
(`tests/oracle/hf.py`). The default tests compare with its stored results (`tests/golden/`).

- **error**: of the tokens of a text (48, or 24 for the trained model), the largest ||ours - oracle|| / ||oracle|| of
  the logits, both with the same experts; **bound**: what the arithmetic allows (derived in `tests/oracle/bounds.py`).
  The bound is also checked at every token of eight prompts and their 64-token continuations, through prefill in pieces
  and batched cached decode.
- **KL**: KL(oracle || ours) in nats per token, mean over the text, with the same experts (at most {MAX_MEAN_KL:.0e});
  **free KL**: over the continuations too, with the oracle choosing its own experts (the same limit for the trained
  model). In BF16 a router meets near ties, and a random model's experts have nothing in common, so one flip changes a
  token's logits much more than in a trained model. Every flip is checked to be a near tie by the oracle's scores.
- **rerouted**: tokens of the text with another expert than the oracle's in some layer.
- **greedy**: tokens equal to the oracle's before the first difference of each of eight prompts. In FP32, and for the
  trained model, a first difference must be a near tie of the oracle's two best tokens.
- **perplexity**: of the trained model on the start of a text that it has never seen, {PERPLEXITY_CHARS:,} characters
  through `scripts/eval_perplexity.py`'s function, against the oracle's (at most {MAX_PERPLEXITY_ERROR:.1%} apart).

"""


def table(lines: Sequence[Parity]) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield "| model | executor | dtype | error | bound | KL | free KL | rerouted | greedy |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---:|"
    for p in lines:
        yield (
            f"| {p.case.name} | {p.case.executor} | {p.case.dtype} | {p.error:.1e} | {p.bound:.1e} | {p.kl:.1e} "
            f"| {p.free_kl:.1e} | {p.rerouted} / {p.routed} | {p.equal} / {p.greedy} |"
        )


def measure_all() -> Iterator[Parity]:
    for name, cases in groupby(ALL_CASES, key=lambda case: case.name):
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder), name)
            truth = HfTruth(model)
            for case in cases:
                yield measure(case, model, load_golden(name), truth)


def perplexity_line() -> str:
    ours, oracle = measure_perplexity(), load_perplexity()
    check_perplexity(ours, oracle)
    return (
        f"Perplexity of embedded-fp8 (fused, bfloat16) on {ours.num_tokens:,} tokens: {ours.perplexity:.4f}, the "
        f"oracle's {oracle.perplexity:.4f} ({ours.perplexity / oracle.perplexity - 1:+.4%})."
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.getLogger("hmoe_jax").setLevel(logging.WARNING)  # the plan of every executor is not asked for
    rows = "\n".join([*table(list(measure_all())), "", perplexity_line()])
    print(rows)
    if _OUT.value:
        Path(_OUT.value).write_text(f"{_TEXT}{rows}\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
