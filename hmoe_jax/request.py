"""A request while it is being served: what came in, and what has been generated so far."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import numpy as np

from hmoe_jax.detokenizer import Detokenizer
from hmoe_jax.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from hmoe_jax.sampling import Sampled
from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class StopRules:
    """Which tokens end a sequence, and the longest it may become (prompt included)."""

    eos_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    max_len: int

    @property
    def all_ids(self) -> tuple[int, ...]:
        return tuple({*self.eos_ids, *self.stop_ids})


class Sequence:
    """One of a request's `n` continuations. Its length is `len(prompt_ids) + len(token_ids)`."""

    def __init__(
        self,
        prompt_ids: Ids[int],
        params: SamplingParams,
        *,
        index: int,
        seed: int,
        rules: StopRules,
        tokenizer: Tokenizer | None,
    ):
        self.prompt_ids, self.params, self.index, self.seed, self.rules = (
            prompt_ids,
            params,
            index,
            seed,
            rules,
        )
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.num_computed = 0  # prompt tokens whose latents are in the cache
        self.slot = -1
        self.pages: list[int] = []
        self.prompt_logprobs: list[PositionLogprobs | None] = [None]
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params) if tokenizer else None
        self._cumulative_logprob = 0.0
        self._logprobs: list[PositionLogprobs] = []
        self._routes: list[np.ndarray] = []

    @property
    def max_len(self) -> int:
        """The most tokens that this sequence can come to hold, prompt included."""
        room = self.rules.max_len - len(self.prompt_ids)
        return len(self.prompt_ids) + min(self.params.max_tokens or room, room)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_admitted(self) -> bool:
        """Whether it has a slot, and so a part of the device's state."""
        return self.slot >= 0

    def append(self, token: int, sampled: Sampled, row: int) -> None:
        """Takes the token drawn in `row` of a step; decides whether the sequence ends with it."""
        self.token_ids.append(token)
        self._cumulative_logprob += float(sampled.logprob[row])
        if self.params.logprobs is not None:
            self._logprobs.append(self._position(sampled, row, self.params.logprobs))
        stop_id = token in self.rules.all_ids
        if not stop_id or (self.params.include_stop_str_in_output and token in self.rules.stop_ids):
            self._push_text(token)
        if stop_id:
            self.finish("stop", token if token in self.rules.stop_ids else None)
        elif self._detokenizer is not None and self._detokenizer.stop_reason is not None:
            self.finish("stop", self._detokenizer.stop_reason)
        elif len(self.prompt_ids) + len(self.token_ids) >= self.max_len:
            self.finish("length", None)

    def finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        """Ends the sequence and releases the text that was held back."""
        if not self.is_finished:
            self.finish_reason, self.stop_reason = reason, stop_reason
            self.text += self._detokenizer.finish() if self._detokenizer else ""

    def add_routes(self, routes: np.ndarray) -> None:
        """Takes the experts of tokens that went through the model, `[layers, tokens, k]`."""
        self._routes.append(np.swapaxes(routes, 0, 1))

    def add_prompt_logprobs(self, scored: Sampled, count: int) -> None:
        """Takes the scores of the next `count` prompt tokens."""
        wanted = self.params.prompt_logprobs or 0
        self.prompt_logprobs += [self._position(scored, row, wanted) for row in range(count)]

    def output(self) -> CompletionOutput:
        wants_logprobs, wants_routes = self.params.logprobs is not None, self.params.return_routed_experts
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            logprobs=list(self._logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            routed_experts=np.concatenate(self._routes) if wants_routes and self._routes else None,
        )

    def _push_text(self, token: int) -> None:
        if self._detokenizer is not None:
            self.text += self._detokenizer.push(token)

    def _position(self, sampled: Sampled, row: int, count: int) -> PositionLogprobs:
        """The `count` best tokens of a position, and the one that stands there."""
        token = int(sampled.tokens[row])
        best = enumerate(zip(sampled.top_ids[row, :count], sampled.top_logprobs[row, :count], strict=True), start=1)
        position = {int(i): self._logprob(int(i), float(value), rank) for rank, (i, value) in best}
        position.setdefault(token, self._logprob(token, float(sampled.logprob[row]), int(sampled.rank[row])))
        return position

    def _logprob(self, token: int, value: float, rank: int) -> Logprob:
        return Logprob(value, rank, self._tokenizer.token_text(token) if self._tokenizer else None)


@dataclass
class Request:
    """A prompt and its sequences, with the times at which things happened to it (seconds of a monotonic clock)."""

    request_id: str
    prompt: str | None
    sequences: list[Sequence]
    arrived_s: float = field(default_factory=time.perf_counter)
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    def mark_started(self) -> None:
        self.started_s = self.started_s or time.perf_counter()

    def mark_token(self) -> None:
        self.last_token_s = time.perf_counter()
        self.first_token_s = self.first_token_s or self.last_token_s

    def output(self) -> RequestOutput:
        first = self.sequences[0]
        wants_prompt = first.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=tuple(first.prompt_ids),
            prompt_logprobs=list(first.prompt_logprobs) if wants_prompt else None,
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.is_finished,
            metrics=self._metrics(),
        )

    def _metrics(self) -> RequestMetrics:
        started = self.started_s or time.perf_counter()
        first = self.first_token_s or started
        return RequestMetrics(
            queue_s=started - self.arrived_s,
            prompt_s=first - started,
            decode_s=(self.last_token_s or first) - first,
            num_prompt_tokens=len(self.sequences[0].prompt_ids),
            num_generated_tokens=sum(len(sequence.token_ids) for sequence in self.sequences),
        )
