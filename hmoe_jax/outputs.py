"""What a request returns: vLLM's output records, names and meanings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Integer

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
"""A stop token or stop string; `max_tokens` or the model's length; the caller's abort; its deadline; a failure."""


@dataclass(frozen=True)
class Logprob:
    """One token's log probability; `rank` is 1 for the most probable, `decoded_token` the token's text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank counts from 1, got {self.rank}")


PositionLogprobs = dict[int, Logprob]
"""Token id to log probability at one position: the most probable tokens and the one that stands there."""


@dataclass(frozen=True)
class CompletionOutput:
    """One generated sequence, whole or so far.

    `finish_reason` is None while it is being generated. `stop_reason` is the stop string or the id out of
    `stop_token_ids` that ended it, None for EOS and for every other end. `logprobs` has one entry per token.
    `routed_experts` are the experts chosen for each token that went through the model, prompt first.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    routed_experts: Integer[np.ndarray, "tokens layers top_k"] | None = None

    def __post_init__(self) -> None:
        if self.stop_reason is not None and self.finish_reason != "stop":
            raise ValueError(f"stop_reason {self.stop_reason!r}, but finish_reason {self.finish_reason!r}")
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"logprobs for {len(self.logprobs)} positions, but {len(self.token_ids)} tokens")

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """Where a request's time went, from its arrival; tokens are summed over its sequences.

    `queue_s` until its prefill began, `prompt_s` until its first token, `decode_s` from there to its last.
    `num_cached_tokens` of the prompt were found in the prefix cache. `num_preemptions`: how often it had to give its
    pages to an older request, and start again.
    """

    queue_s: float = 0.0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        if min(self.queue_s, self.prompt_s, self.decode_s) < 0:
            raise ValueError(f"times must not be negative, got {self}")
        if not 0 <= self.num_cached_tokens <= self.num_prompt_tokens:
            raise ValueError(f"{self.num_cached_tokens} cached tokens of {self.num_prompt_tokens} prompt tokens")

    @property
    def time_to_first_token_s(self) -> float:
        return self.queue_s + self.prompt_s

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prompt_s + self.decode_s

    @property
    def prompt_tok_per_s(self) -> float:
        """Computed prompt tokens per second; those found in the prefix cache do not count. 0.0 where none."""
        computed = self.num_prompt_tokens - self.num_cached_tokens
        return computed / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens per second after the first token, which is the prefill's. 0.0 where there are none."""
        decoded = max(self.num_generated_tokens - 1, 0)
        return decoded / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class RequestOutput:
    """One request's prompt and what came of it. `outputs` has one entry per sequence (`SamplingParams.n`).

    `prompt` is None where the request came as token ids. The first entry of `prompt_logprobs` is None:
    nothing stands before the first token. `error` is what ended a sequence with `finish_reason` "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        open_outputs = [output.index for output in self.outputs if not output.finished()]
        if self.finished and open_outputs:
            raise ValueError(f"request {self.request_id} is finished, but its outputs {open_outputs} are not")
