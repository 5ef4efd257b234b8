"""Compares every executor with the independent implementation on the tiny models, and writes the table.

    PYTHONPATH=. python scripts/parity.py --output docs/parity.md

Ends with an error if any figure exceeds its bound; the table is then not written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from absl import app, flags

from tests.oracle.golden import load_golden
from tests.oracle.parity import ALL_CASES, MAX_MEAN_KL, Parity, load_truth, measure
from tests.tiny import write_tiny

_OUTPUT = flags.DEFINE_string("output", "", "Markdown file to write, beside what is printed")

_TEXT = f"""# Parity with the independent implementation

Written by `scripts/parity.py`. The models are those of `tests/tiny.py`, seven small random checkpoints that cover
every branch of the mathematics. The oracle is `DeepseekV3ForCausalLM` of `transformers` on PyTorch in FP32, with the
stored weights expanded in FP32 (`tests/oracle/hf.py`); its results are stored in `tests/golden/`.

- **error**: of the 48 tokens of a text, the largest ||ours - oracle|| / ||oracle|| of the logits, both with the same
  experts; **bound**: what the arithmetic allows (derived in `tests/oracle/bounds.py`). The bound is also checked at
  every token of eight prompts and their 64-token continuations, through prefill in pieces and batched cached decode.
- **KL**: mean KL(oracle || ours) in nats per token, with the same experts (at most {MAX_MEAN_KL:.0e}); **free KL**:
  with the oracle choosing its own experts. In BF16 a router meets near ties, and a random model's experts have
  nothing in common, so one flip changes a token's logits much more than in a trained model. Every flip is checked to
  be a near tie by the oracle's scores.
- **rerouted**: tokens of the text with another expert than the oracle's in some layer.
- **greedy**: tokens equal to the oracle's before the first difference of each prompt. In FP32 a first difference must
  be a near tie of the oracle's two best tokens.

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
            write_tiny(Path(folder), name)
            truth = load_truth(Path(folder))
            for case in cases:
                yield measure(case, Path(folder), load_golden(name), truth)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    rows = "\n".join(table(list(measure_all())))
    print(rows)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(f"{_TEXT}{rows}\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
