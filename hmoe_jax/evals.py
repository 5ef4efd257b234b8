"""Measures of a model's quality, through the engine's public interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hmoe_jax.engine import Engine
from hmoe_jax.sampling_params import SamplingParams


@dataclass(frozen=True)
class Perplexity:
    """`nats` summed over `num_tokens` predicted tokens, of a text of `num_chars` characters."""

    nats: float
    num_tokens: int
    num_chars: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2) / self.num_chars


def perplexity(engine: Engine, text: str, *, window: int | None = None, use_tqdm: bool = True) -> Perplexity:
    """Scores `text` in windows of `window` tokens (default: as long as the model allows), each on its own.

    Every token is predicted exactly once, from those before it in its window and from BOS if the tokenizer has one; the
    first of all is not, without BOS. Raises `ValueError` for a text or a window that leaves nothing to predict.
    """
    if engine.tokenizer is None:
        raise ValueError("perplexity of a text needs the model's tokenizer")
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    windows = split_windows(ids, bos_id=engine.tokenizer.bos_id, window=window or engine.max_model_len - 1)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = engine.generate(windows, params, use_tqdm=use_tqdm)
    scores = [
        position[token].logprob
        for output in outputs
        for token, position in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
        if position is not None
    ]
    return Perplexity(nats=-math.fsum(scores), num_tokens=len(scores), num_chars=len(text))


def split_windows(ids: Sequence[int], *, bos_id: int | None, window: int) -> list[list[int]]:
    """Pieces of at most `window` tokens, begun with `bos_id`, or without one with the token before the piece."""
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    if len(ids) < (1 if bos_id is not None else 2):
        raise ValueError(f"the text has {len(ids)} tokens: nothing to predict")
    step = window - 1
    if bos_id is not None:
        return [[bos_id, *ids[i : i + step]] for i in range(0, len(ids), step)]
    return [list(ids[i : i + window]) for i in range(0, len(ids) - 1, step)]
