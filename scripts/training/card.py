"""The embedded model's card: what it was trained on, for how long, and how well it does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Effort:
    """What went into the weights, over all runs."""

    steps: int = 0
    tokens: int = 0
    minutes: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.steps + other.steps, self.tokens + other.tokens, self.minutes + other.minutes)


@dataclass(frozen=True)
class Facts:
    """`load` is tokens per expert `[m, e]` over the last hundred steps; losses are nats per token on held-out text."""

    effort: Effort
    corpus_tokens: int
    held_out_loss: float
    fp8_loss: float
    bits_per_char: float
    load: np.ndarray


def text(facts: Facts) -> str:
    """The card, in Markdown."""
    return _TEXT.format(rows=_load_rows(facts.load), **vars(facts))


def _load_rows(load: np.ndarray) -> str:
    share = load / load.mean(axis=1, keepdims=True)
    return "\n".join(f"| {m + 1} | {row.min():.2f} | {row.max():.2f} |" for m, row in enumerate(share))


_TEXT = """\
# The embedded model

A small Mixture-of-Experts model of the DeepSeek-V3 architecture, trained from scratch by `scripts/train_embedded.py`,
so that the engine has something real to run on any machine. It continues English prose of the nineteenth century; it
knows nothing and follows no instructions.

| | |
|---|---|
| layers | 5: one dense, four with 16 routed experts (top-4 of 2 out of 4 groups) and one shared |
| attention | MLA: 4 heads, query rank 128, latent 128 + 32 |
| number format | E4M3 with an FP32 scale per 128x128 block; embedding (tied to the head), norms and router BF16 |
| tokenizer | byte-level BPE, 4,096 tokens, trained on the same text |
| text | 20 public-domain books (GITenberg); *Heidi* and the last tenth of every other book are held out |
| licence | Apache-2.0 (the weights); the text is in the public domain |
| training | {effort.steps:,} steps, {effort.minutes:.0f} minutes on two cores |
| tokens | {effort.tokens:,}, of a text of {corpus_tokens:,} |
| held-out loss | {held_out_loss:.4f} nats per token ({bits_per_char:.3f} bits per character) |
| the same after FP8 | {fp8_loss:.4f} nats per token |

Load of the experts over the last hundred training steps, relative to the mean (1 is perfect balance):

| MoE layer | least busy | busiest |
|---|---|---|
{rows}
"""
