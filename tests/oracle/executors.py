"""Runs an executor on given tokens through its public step functions, and records logits and chosen experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmoe_jax.exec.batch import DecodeBatch, DecodeRow, PrefillBatch, decode_batch, prefill_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.step import DeviceState, StepModel, decode_logits, prefill_logits


@dataclass(frozen=True)
class Trace:
    """What one sequence's tokens led to: `logits [t, v]` after each, and the chosen `experts [m, t, k]`."""

    tokens: np.ndarray
    logits: np.ndarray
    experts: np.ndarray

    def followed_by(self, other: Trace) -> Trace:
        return Trace(
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.logits, other.logits]),
            np.concatenate([self.experts, other.experts], axis=1),
        )


class Traced:
    """An open executor with room for `num_sequences`, each in pages of its own. A context manager."""

    def __init__(self, folder: Path, *, num_sequences: int, piece: int, max_tokens: int, **options: Any):
        """`piece` is how many tokens a prefill takes at once; `options` are those of `EngineOptions`."""
        self._executor, _ = open_executor(
            folder, EngineOptions(max_num_seqs=num_sequences, max_model_len=max_tokens, **options)
        )
        num_pages = self._executor.layout.pages_for(max_tokens)
        # Taken from the back, so that no sequence's pages are in order.
        last = num_sequences * num_pages
        self._pages = [range(last - i * num_pages, last - (i + 1) * num_pages, -1) for i in range(num_sequences)]
        self._piece = piece

    def prefill(self, token_ids: Sequence[int] | np.ndarray, *, sequence: int = 0) -> Trace:
        """Runs a sequence from its start, piece by piece; the last one is padded."""
        pieces = [
            self._prefill(np.asarray(token_ids[start : start + self._piece]), start, sequence)
            for start in range(0, len(token_ids), self._piece)
        ]
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = whole.followed_by(piece)
        return whole

    def greedy(self, prompts: Sequence[np.ndarray], num_tokens: int) -> list[Trace]:
        """Continues all prompts at once, one token a step, with the most probable one. The last is not run itself.

        There must be one prompt for each sequence.
        """
        traces = [self.prefill(prompt, sequence=i) for i, prompt in enumerate(prompts)]
        for _ in range(num_tokens - 1):
            steps = self._decode(traces)
            traces = [trace.followed_by(step) for trace, step in zip(traces, steps, strict=True)]
        return traces

    def close(self) -> None:
        self._executor.close()

    def __enter__(self) -> Traced:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prefill(self, tokens: np.ndarray, start: int, sequence: int) -> Trace:
        batch = prefill_batch(
            tokens.tolist(), self._executor.layout, size=self._piece, start=start, pages=self._pages[sequence]
        )
        logits, experts = self._executor.run(prefill_traced, batch)
        return Trace(tokens, np.asarray(logits)[: len(tokens)], np.asarray(experts)[:, : len(tokens)])

    def _decode(self, traces: list[Trace]) -> list[Trace]:
        """Every sequence's most probable next token, run."""
        rows = [
            DecodeRow(int(trace.logits[-1].argmax()), len(trace.tokens), slot=i, pages=self._pages[i])
            for i, trace in enumerate(traces)
        ]
        batch = decode_batch(rows, self._executor.layout, size=len(rows), num_slots=self._executor.num_slots)
        logits, experts = map(np.asarray, self._executor.run(decode_traced, batch))
        return [Trace(batch.tokens[i : i + 1], logits[i : i + 1], experts[:, i : i + 1]) for i in range(len(rows))]


def prefill_traced(model: StepModel, state: DeviceState, batch: PrefillBatch) -> tuple[Any, DeviceState]:
    """The step function `prefill_logits`, with the experts it chose."""
    return _traced(prefill_logits, model, state, batch)


def decode_traced(model: StepModel, state: DeviceState, batch: DecodeBatch) -> tuple[Any, DeviceState]:
    """The step function `decode_logits`, with the experts it chose."""
    return _traced(decode_logits, model, state, batch)


def _traced(step: Any, model: StepModel, state: DeviceState, batch: Any) -> tuple[Any, DeviceState]:
    chosen: list[jax.Array] = []

    def experts(layer: int, hidden: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        chosen.append(ids)
        return model.experts(layer, hidden, ids, weights)

    logits, state = step(replace(model, experts=experts), state, batch)
    return (logits, jnp.stack(chosen)), state
