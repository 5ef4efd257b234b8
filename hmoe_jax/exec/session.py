"""Drives an executor without an engine, for measurements: random prompts, no text, no queue."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from hmoe_jax.exec.batch import DecodeRow, PrefillBatch, decode_batch, prefill_batch
from hmoe_jax.exec.programs import Executor
from hmoe_jax.sampling import SamplerState, sampler_row
from hmoe_jax.sampling_params import SamplingParams


@dataclass
class DrivenSequence:
    """One prompt and how far it has come."""

    prompt: list[int]
    slot: int
    pages: range
    token: int = 0
    position: int = 0


class Session:
    """Drives an executor as the engine does: every step waits for its tokens, which the next one takes."""

    def __init__(self, executor: Executor, *, prompt_len: int, num_steps: int):
        self.executor = executor
        layout = executor.layout
        length = prompt_len + num_steps
        if length > layout.max_len:
            raise ValueError(
                f"prompt_len {prompt_len} and {num_steps} steps make {length} tokens, but the longest sequence has "
                f"{layout.max_len}: lower one of them"
            )
        pages_each = layout.pages_for(length)
        if executor.num_slots * pages_each >= layout.num_pages:
            raise ValueError(
                f"{executor.num_slots} sequences of {length} tokens need {executor.num_slots * pages_each} pages of "
                f"cache, but there are {layout.num_pages - 1}: lower the batch"
            )
        prompts = np.random.default_rng(0).integers(0, executor.config.vocab_size, (executor.num_slots, prompt_len))
        self.sequences = [
            DrivenSequence(prompt.tolist(), slot, range(1 + slot * pages_each, 1 + (slot + 1) * pages_each))
            for slot, prompt in enumerate(prompts)
        ]
        for sequence in self.sequences:
            executor.admit(sequence.slot, _sampler_row(executor, seed=sequence.slot))

    def prefill(self, sequence: DrivenSequence) -> None:
        """Runs a whole prompt, in pieces if it is longer than the largest bucket."""
        for piece in self.pieces(sequence):
            sampled = jax.device_get(self.executor.step(piece).sampled)
        sequence.token, sequence.position = int(sampled.tokens[0]), len(sequence.prompt)

    def decode(self) -> None:
        """One token further for every sequence."""
        rows = [DecodeRow(each.token, each.position, each.slot, each.pages) for each in self.sequences]
        size = self.executor.buckets.for_decode(len(rows))
        batch = decode_batch(rows, self.executor.layout, size=size, num_slots=self.executor.num_slots)
        sampled = jax.device_get(self.executor.step(batch).sampled)
        for sequence, token in zip(self.sequences, sampled.tokens, strict=False):
            sequence.token, sequence.position = int(token), sequence.position + 1

    def pieces(self, sequence: DrivenSequence) -> list[PrefillBatch]:
        """The batches that a prompt is run in."""
        buckets, start, pieces = self.executor.buckets, 0, []
        while start < len(sequence.prompt):
            end = start + buckets.piece_len(len(sequence.prompt) - start)
            ids = sequence.prompt[start:end]
            size, is_last = buckets.for_prefill(len(ids)), end == len(sequence.prompt)
            batch = prefill_batch(
                ids,
                self.executor.layout,
                size=size,
                start=start,
                is_last=is_last,
                slot=sequence.slot,
                pages=sequence.pages,
            )
            pieces.append(batch)
            start = end
        return pieces


def _sampler_row(executor: Executor, *, seed: int) -> SamplerState:
    params = SamplingParams(temperature=1.0)
    return sampler_row(params, executor.config.vocab_size, prompt_ids=(), stop_ids=(), seed=seed)
