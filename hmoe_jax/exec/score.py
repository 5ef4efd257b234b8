"""Whole logits of given tokens, through the same step functions that serve: for comparing implementations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from hmoe_jax.exec.batch import DecodeRow, decode_batch, prefill_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import engine_options
from hmoe_jax.exec.programs import Executor
from hmoe_jax.exec.step import decode_logits, decode_logits_beside, prefill_logits


class Scorer:
    """Runs one sequence at a time through an executor. A context manager. Slow: it may compile at every call."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self._pages = range(1, executor.layout.pages_for(executor.layout.max_len) + 1)

    def logits(self, token_ids: Sequence[int], *, start: int = 0, piece: int = 0) -> Float32[np.ndarray, "t v"]:
        """Logits after each token, by prefill in pieces of `piece` tokens (0: all at once).

        `start` is the position of the first; the cache must hold those before it.
        """
        piece = piece or len(token_ids)
        parts = [token_ids[i : i + piece] for i in range(0, len(token_ids), piece)]
        return np.concatenate([self._prefill(part, start + i * piece) for i, part in enumerate(parts)])

    def greedy(
        self, prompt_ids: Sequence[int], num_tokens: int
    ) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, "n v"]]:
        """The most probable continuation, by prefill and cached decode: (tokens, the logits that chose each)."""
        rows = [self.logits(prompt_ids)[-1]]
        tokens = [int(rows[0].argmax())]
        for position in range(len(prompt_ids), len(prompt_ids) + num_tokens - 1):
            rows.append(self.next_logits(tokens[-1], position))
            tokens.append(int(rows[-1].argmax()))
        return np.array(tokens), np.stack(rows)

    def next_logits(self, token: int, position: int) -> Float32[np.ndarray, " v"]:
        """Logits after one more token, by cached decode."""
        row = DecodeRow(token, position, slot=0, pages=self._pages)
        batch = decode_batch([row], self.executor.layout, size=1, num_slots=self.executor.num_slots)
        function = decode_logits if self.executor.lane is None else decode_logits_beside
        logits = np.asarray(self.executor.run(function, batch))[0]
        self.executor.check_intact()
        return logits

    def close(self) -> None:
        self.executor.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prefill(self, token_ids: Sequence[int], start: int) -> Float32[np.ndarray, "t v"]:
        batch = prefill_batch(token_ids, self.executor.layout, size=len(token_ids), start=start, pages=self._pages)
        return np.asarray(self.executor.run(prefill_logits, batch))


def load_for_scoring(folder: str | Path, **options: Any) -> Scorer:
    """Opens a model folder; `options` are those of `EngineOptions`. Raises what `Engine` raises."""
    return Scorer(open_executor(folder, engine_options({"max_num_seqs": 1, **options}))[0])
