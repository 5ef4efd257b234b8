"""An executor without a device: a paged cache of tokens, and a "model" that mixes them all into the next one.

A token therefore depends on everything that a sequence finds in its pages, on its seed and on how many tokens it has
drawn: whoever shares a page wrongly, or comes back from a preemption with something missing, writes another text.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from hmoe_jax.core import unchecked
from hmoe_jax.exec.batch import DecodeBatch, PrefillBatch
from hmoe_jax.exec.buckets import Buckets
from hmoe_jax.exec.host_loop import Meanwhile
from hmoe_jax.exec.quantum import NOWHERE, Quanta, Quantum, Room
from hmoe_jax.exec.step import StepOutput
from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.sampling import Sampled, SamplerState

VOCAB_SIZE, NUM_SLOTS, NUM_PAGES, PAGE_SIZE, MAX_LEN = 50, 4, 17, 4, 40
PIECES_LEN, NUM_PARTS = 8, 2
PART_S = 0.01
"""What a part of a prompt should take."""


class FakeExecutor:
    """`on[stage]` is called with the slots at work, before each "admit", "begin", "part", "decode", "reset" and
    "intact"."""

    def __init__(
        self,
        *,
        seconds: Callable[[str], None] = lambda stage: None,
        idles: Callable[[float], None] = lambda seconds: None,
        gap_s: float | None = None,
        is_apart: bool = False,
    ):
        """`seconds` is told of every stage. With `gap_s` a decode step leaves the device for so long, before anything
        else; `idles` is told what nobody has filled. `is_apart`: prompts go on by themselves, a part whenever they are
        looked at."""
        self.config = SimpleNamespace(vocab_size=VOCAB_SIZE, num_moe_layers=1, num_experts=4)
        self.layout = CacheLayout(
            num_layers=1, num_pages=NUM_PAGES, page_size=PAGE_SIZE, latent_dim=1, chunk_pages=1, max_len=MAX_LEN
        )
        self.buckets = Buckets(prefill=(PIECES_LEN,), decode=(1, NUM_SLOTS))
        self.num_slots = NUM_SLOTS
        self.on: dict[str, Callable[[list[int]], None]] = {}
        self.num_open_prompts = 0
        self._filled_s = 0.0
        self._seconds, self._idles = seconds, idles
        self._gap_s, self.has_gaps, self._is_apart = gap_s or 0.0, gap_s is not None, is_apart
        self.reset()

    def admit(self, slot: int, row: SamplerState) -> None:
        self._enter("admit", [slot])
        self._seeds[slot], self._drawn[slot] = int(row.seed[1]), int(row.drawn)

    def prefill(self, batch: PrefillBatch, *, scored: bool = False) -> Quanta:
        slot, start, length = int(batch.slot), int(batch.start), int(batch.length)
        self._enter("begin", [slot])
        elsewhere = {"has_begun": False, "is_elsewhere": True} if self._is_apart else {}
        room = yield Quantum("begin", 0, NUM_PARTS, 0.0, **{"has_begun": False} | elsewhere)
        self.num_open_prompts += 1
        try:
            for part in range(NUM_PARTS):
                while room is not None and not self._fits(room):
                    room = yield Quantum("room", part, NUM_PARTS, 0.0, **{"has_begun": False} | elsewhere)
                self._enter("part", [slot])
                self._filled_s += PART_S
                room = yield Quantum("part", part, NUM_PARTS, PART_S, **elsewhere)
            for offset in range(length):
                self._write(batch.table, start + offset, int(batch.tokens[offset]))
            token = self._sample(slot, batch.table, start + length, draws=bool(batch.is_last))
            prompt = self._sampled([0] * length) if scored else None
            return self._output([token], np.zeros((1, PIECES_LEN, 1), np.int32), prompt)
        finally:
            self.num_open_prompts -= 1

    def step(self, batch: DecodeBatch, *, meanwhile: Meanwhile | None = None) -> StepOutput:
        left_s, self._filled_s = self._gap_s, 0.0
        while meanwhile is not None and left_s > 0 and meanwhile(left_s):
            left_s = self._gap_s - self._filled_s
        self._idles(max(left_s, 0.0))
        rows = np.flatnonzero(batch.valid)
        self._enter("decode", [int(slot) for slot in batch.slots[rows]])
        tokens = [0] * len(batch.tokens)
        for row in rows:
            table, position = batch.tables[row], int(batch.positions[row])
            self._write(table, position, int(batch.tokens[row]))
            tokens[row] = self._sample(int(batch.slots[row]), table, position + 1, draws=bool(batch.draws[row]))
        return self._output(tokens, np.where(batch.valid[None, :, None], 1, -1).astype(np.int32))

    def _fits(self, room: Room) -> bool:
        return room != NOWHERE if self._is_apart else room.choose([(PART_S, None)]) is not None

    def reset(self) -> None:
        self._enter("reset", [])
        self._cache: dict[tuple[int, int], int] = {}
        self._seeds, self._drawn = [0] * NUM_SLOTS, [0] * NUM_SLOTS

    def check_intact(self) -> None:
        self._enter("intact", [])

    def close(self) -> None: ...

    def _enter(self, stage: str, slots: list[int]) -> None:
        self._seconds(stage)
        self.on.get(stage, lambda slots: None)(slots)

    def _write(self, table: Any, position: int, token: int) -> None:
        self._cache[int(table[position // PAGE_SIZE]), position % PAGE_SIZE] = token

    def _sample(self, slot: int, table: Any, length: int, *, draws: bool) -> int:
        context = [self._cache[int(table[i // PAGE_SIZE]), i % PAGE_SIZE] for i in range(length)]
        token = next_token(context, seed=self._seeds[slot], num_drawn=self._drawn[slot])
        self._drawn[slot] += draws
        return token

    def _output(self, tokens: list[int], routes: np.ndarray, prompt: Sampled | None = None) -> StepOutput:
        return unchecked(StepOutput, sampled=self._sampled(tokens), routes=routes, prompt=prompt)

    def _sampled(self, tokens: list[int]) -> Sampled:
        zeros = np.zeros(len(tokens), np.float32)
        top = np.zeros((len(tokens), 20))
        return Sampled(
            tokens=np.array(tokens, np.int32),
            logprob=zeros,
            rank=np.ones(len(tokens), np.int32),
            top_ids=top.astype(np.int32),
            top_logprobs=top.astype(np.float32),
        )


def next_token(context: list[int], *, seed: int, num_drawn: int) -> int:
    return zlib.crc32(np.array([seed, num_drawn, *context], np.int64).tobytes()) % VOCAB_SIZE


def solo_run(prompt: list[int], *, seed: int, max_tokens: int) -> list[int]:
    """What a request gets if nobody else is there."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(next_token([*prompt, *tokens], seed=seed & 0xFFFFFFFF, num_drawn=len(tokens)))
    return tokens
