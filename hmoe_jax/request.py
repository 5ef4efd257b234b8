"""A request while it is being served: what came in, and what has been generated so far."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hmoe_jax.clock import Clock
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

TokenLatency = Literal["ttft", "itl"]


@dataclass(frozen=True)
class StopRules:
    """Which tokens end a sequence, and the longest it may become (prompt included)."""

    eos_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    max_len: int

    @property
    def all_ids(self) -> tuple[int, ...]:
        return tuple({*self.eos_ids, *self.stop_ids})


@dataclass(frozen=True)
class Terms:
    """What a request asks of the scheduler: a lower `priority` goes first; past `deadline_ns` of the engine's clock it
    ends; what it leaves in the prefix cache is found by requests of the same `cache_salt` only."""

    priority: int = 0
    deadline_ns: int | None = None
    cache_salt: str = ""


class Sequence:
    """One of a request's `n` continuations. Its length is `len(prompt_ids) + len(token_ids)`.

    A preempted sequence keeps its tokens, and loses what it has in the cache. Then its prompt is computed again, and
    its tokens are decoded again one after the other: so the cache gets the bits that it had, and the text goes on as if
    nothing had been.
    """

    def __init__(
        self,
        prompt_ids: Ids[int],
        params: SamplingParams,
        *,
        index: int,
        seed: int,
        rules: StopRules,
        tokenizer: Tokenizer | None,
        terms: Terms | None = None,
    ):
        self.prompt_ids, self.params, self.index, self.seed = prompt_ids, params, index, seed
        self.rules, self.terms = rules, terms or Terms()
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: Exception | None = None
        self.arrival = -1  # numbered by the scheduler
        self.page_keys: list[bytes] = []  # of the prompt's full pages
        self.num_computed = 0  # tokens whose latents are in the cache
        self.slot = -1
        self.pages: list[int] = []
        self.num_cached = 0  # prompt tokens that were found in the cache, when it was first admitted
        self.num_preemptions = 0
        self.num_failures = 0  # steps that failed with it since its last token
        self.last_token_s: float | None = None
        self.prompt_logprobs: list[PositionLogprobs | None] = [None]
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params) if tokenizer else None
        self._cumulative_logprob = 0.0
        self._logprobs: list[PositionLogprobs] = []
        self._routes: list[np.ndarray] = []
        self._num_routed = 0

    @property
    def max_len(self) -> int:
        """The most tokens that this sequence can come to hold, prompt included."""
        room = self.rules.max_len - len(self.prompt_ids)
        return len(self.prompt_ids) + min(self.params.max_tokens or room, room)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the lower one."""
        return self.terms.priority, self.arrival

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < len(self.prompt_ids)

    @property
    def draws_next(self) -> bool:
        """Whether the token after the one that is decoded next is a new one."""
        return self.num_computed + 1 == self.length

    @property
    def next_input(self) -> int:
        """The token that is decoded next."""
        return self.token_ids[self.num_computed - len(self.prompt_ids)]

    @property
    def finds_prefix(self) -> bool:
        """Whether tokens found in the cache serve it: not if it wants to know something of every token."""
        return self.params.prompt_logprobs is None and not self.params.return_routed_experts

    @property
    def is_admitted(self) -> bool:
        """Whether it has a slot, and so a part of the device's state."""
        return self.slot >= 0

    def append(self, token: int, sampled: Sampled, row: int) -> None:
        """Takes the token drawn in `row` of a step; decides whether the sequence ends with it."""
        # Another thread may make an output meanwhile: what belongs to a token is there before the token is.
        self.num_failures = 0
        self._cumulative_logprob += float(sampled.logprob[row])
        if self.params.logprobs is not None:
            self._logprobs.append(self._position(sampled, row, self.params.logprobs))
        stop_id = token in self.rules.all_ids
        if not stop_id or (self.params.include_stop_str_in_output and token in self.rules.stop_ids):
            self._push_text(token)
        self.token_ids.append(token)
        if stop_id:
            self.finish("stop", token if token in self.rules.stop_ids else None)
        elif self._detokenizer is not None and self._detokenizer.stop_reason is not None:
            self.finish("stop", self._detokenizer.stop_reason)
        elif len(self.prompt_ids) + len(self.token_ids) >= self.max_len:
            self.finish("length", None)

    def finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        """Ends the sequence and releases the text that was held back."""
        if not self.is_finished:
            self.text += self._detokenizer.finish() if self._detokenizer else ""
            self.stop_reason, self.finish_reason = stop_reason, reason

    def fail(self, error: Exception) -> None:
        """Ends the sequence because of an error, which whoever waits for it gets to see."""
        if not self.is_finished:
            self.error = error
            self.finish("error", None)

    def add_routes(self, routes: np.ndarray, *, start: int) -> None:
        """Takes the experts of tokens from position `start` on, `[layers, tokens, k]`; those it has are left out."""
        new = np.swapaxes(routes, 0, 1)[max(self._num_routed - start, 0) :]
        self._routes.append(new)
        self._num_routed += len(new)

    def add_prompt_logprobs(self, scored: Sampled, count: int, *, start: int) -> None:
        """Takes the scores of `count` prompt tokens after position `start`; those it has are left out."""
        wanted, known = self.params.prompt_logprobs or 0, len(self.prompt_logprobs) - 1 - start
        self.prompt_logprobs += [self._position(scored, row, wanted) for row in range(max(known, 0), count)]

    def output(self) -> CompletionOutput:
        wants_logprobs, wants_routes = self.params.logprobs is not None, self.params.return_routed_experts
        finish_reason = self.finish_reason  # before the tokens: one that is finished has them all
        token_ids = tuple(self.token_ids)
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=token_ids,
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            logprobs=self._logprobs[: len(token_ids)] if wants_logprobs else None,
            finish_reason=finish_reason,
            stop_reason=self.stop_reason if finish_reason else None,
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


@dataclass(eq=False)
class Request:
    """A prompt and its sequences, with the times at which things happened to it (seconds of a clock that never goes
    back). `is_polled`: its progress is asked for by `Engine.step`."""

    request_id: str
    prompt: str | None
    sequences: list[Sequence]
    clock: Clock = time.perf_counter
    is_polled: bool = False
    arrived_s: float = field(init=False)
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.arrived_s = self.clock()

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def is_aborted(self) -> bool:
        return any(sequence.finish_reason == "abort" for sequence in self.sequences)

    @property
    def error(self) -> Exception | None:
        """Of the first sequence that failed."""
        return next((sequence.error for sequence in self.sequences if sequence.error is not None), None)

    def mark_started(self) -> None:
        self.started_s = self.clock() if self.started_s is None else self.started_s

    def mark_token(self, sequence: Sequence) -> tuple[TokenLatency | None, float]:
        """What a token that one of the sequences got tells of latency, in seconds: the first of all, since the request
        came; one that follows another, since that one; the first of another sequence nothing."""
        before, sequence.last_token_s = sequence.last_token_s, self.clock()
        self.last_token_s = sequence.last_token_s
        if before is not None:
            return "itl", self.last_token_s - before
        if self.first_token_s is not None:
            return None, 0.0
        self.first_token_s = self.last_token_s
        return "ttft", self.last_token_s - self.arrived_s

    def output(self) -> RequestOutput:
        first = self.sequences[0]
        wants_prompt = first.params.prompt_logprobs is not None
        outputs = [sequence.output() for sequence in self.sequences]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=tuple(first.prompt_ids),
            prompt_logprobs=list(first.prompt_logprobs) if wants_prompt else None,
            outputs=outputs,
            finished=all(output.finished() for output in outputs),
            metrics=self.metrics(),
            error=self.error,
        )

    def metrics(self) -> RequestMetrics:
        started = self.clock() if self.started_s is None else self.started_s
        first = started if self.first_token_s is None else self.first_token_s
        return RequestMetrics(
            queue_s=started - self.arrived_s,
            prompt_s=first - started,
            decode_s=(self.last_token_s or first) - first,
            num_prompt_tokens=len(self.sequences[0].prompt_ids),
            num_cached_tokens=self.sequences[0].num_cached,
            num_generated_tokens=sum(len(sequence.token_ids) for sequence in self.sequences),
            num_preemptions=sum(sequence.num_preemptions for sequence in self.sequences),
        )
