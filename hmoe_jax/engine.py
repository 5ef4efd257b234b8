"""The engine: prompts in, text out. Names and meanings as in vLLM's `LLM`."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from hmoe_jax.chat import ChatTemplate
from hmoe_jax.clock import Clock, steady
from hmoe_jax.config import ModelConfig
from hmoe_jax.core import ConfigError
from hmoe_jax.exec.activity import Activity
from hmoe_jax.exec.cache import enable_compilation_cache
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import engine_options
from hmoe_jax.experts.store import StoreStats
from hmoe_jax.folder import read_json, special_tokens
from hmoe_jax.loop import ServingLoop
from hmoe_jax.meters import EngineMetrics
from hmoe_jax.outputs import RequestOutput
from hmoe_jax.prompts import Prompt, PromptIds, as_list, check_ids, salt_of, unwrap
from hmoe_jax.request import Request, StopRules, Terms
from hmoe_jax.request import Sequence as Running
from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.scheduler import Scheduler
from hmoe_jax.server import Server
from hmoe_jax.tokenizer import Tokenizer, eos_ids_of_folder
from hmoe_jax.turns import Turns

GENERATION_CONFIG = "generation_config.json"

FOREVER_S = 1e9
"""Timeouts are cut to thirty years, which a clock in nanoseconds holds."""


class Engine:
    """One loaded model. A context manager; `close` frees the weights and ends the threads.

    `model` is a Hugging Face folder. `options` are the fields of `EngineOptions`: dtype, max_model_len, max_num_seqs,
    num_threads, device, executor... `seed` decides the draws of requests that have no seed of their own. `verify`
    checks the folder's SHA256SUMS ("auto": where that is quick). `warm_up` compiles every step program before the first
    request (`compilation_cache` keeps them for the next start); without it they are compiled when first needed.
    `skip_tokenizer_init` serves token ids only. `clock` tells seconds, for deadlines and metrics.

    Several threads may use an engine; their requests run side by side, and none gets other tokens by it. Whoever waits
    runs the steps: for all requests, so that `generate` and `stream` need no thread in the background. `AsyncEngine`
    has one, for asyncio.

    Raises `ConfigError`, `CheckpointError`, or `ValueError` naming the option; then nothing is left open.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        seed: int = 0,
        verify: bool | Literal["auto"] = "auto",
        warm_up: bool = True,
        compilation_cache: str | Path | Literal["auto"] | None = "auto",
        skip_tokenizer_init: bool = False,
        use_tqdm: bool = True,
        clock: Clock = time.perf_counter,
        **options: Any,
    ):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
        wishes = engine_options(options)
        self.folder = Path(model)
        self._text_folder = Path(tokenizer or model)
        enable_compilation_cache(compilation_cache)
        self._executor, self.plan = open_executor(self.folder, wishes, verify=verify)
        try:
            self.tokenizer = None if skip_tokenizer_init else Tokenizer.from_folder(self._text_folder)
            self.default_sampling_params = default_sampling_params(self.folder)
            self._eos_ids = self._find_eos_ids()
            if warm_up:
                self._warm_up(use_tqdm)
        except BaseException:
            self._executor.close()
            raise
        self._clock = steady(clock)
        self._scheduler = Scheduler(
            self.plan.layout,
            num_slots=self._executor.num_slots,
            piece_len=self.plan.buckets.piece_len,
            finds_prefixes=self.plan.enable_prefix_caching,
        )
        beside, in_turn = (round(each * 1000) for each in (self.plan.max_decode_slowdown, self.plan.max_turn_slowdown))
        turns = Turns(beside, in_turn_permille=in_turn)
        limits: dict[str, Any] = {"max_waiting": self.plan.max_num_waiting, "clock": self._clock}
        self._loop = ServingLoop(Server(self._executor, self._scheduler, turns, **limits), self._executor)
        self._ids, self._seeds = itertools.count(), np.random.SeedSequence(seed)
        self._polled: dict[str, Request] = {}
        self._delivers = threading.Lock()

    @property
    def config(self) -> ModelConfig:
        return self._executor.config

    @property
    def max_model_len(self) -> int:
        return self.plan.layout.max_len

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt; the outputs come in the order of the prompts.

        `sampling_params` None means the checkpoint's recommendations. Nothing runs if any prompt is refused: an empty
        one, one longer than the model, ids outside the vocabulary (`ValueError`).
        """
        return self._complete([self._encode(prompt) for prompt in as_list(prompts)], sampling_params, use_tqdm=use_tqdm)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | int | None = None,
    ) -> None:
        """Queues a request, whose progress `step` returns. Never waits, and may be called from any thread.

        A lower `priority` number goes first. After `timeout_s` seconds the request ends, however far it is, with
        `finish_reason` "timeout". Raises `QueueFullError`, and `ValueError` as `generate` does, for an id in use, and
        for a request that is too large for the cache.
        """
        (params,) = self._params_for(1, sampling_params)
        if not isinstance(request_id, str):
            raise ValueError(f"request_id must be a text, got {request_id!r}")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        if timeout_s is not None and not timeout_s >= 0:
            raise ValueError(f"timeout_s must not be negative, got {timeout_s!r}")
        deadline_ns = None if timeout_s is None else int((self._clock() + min(timeout_s, FOREVER_S)) * 1e9)
        encoded = self._encode(prompt)
        terms = Terms(priority=priority, deadline_ns=deadline_ns, cache_salt=encoded.cache_salt)
        request = self._request(encoded, params, terms, request_id=request_id)
        request.is_polled = True
        if self._polled.setdefault(request_id, request) is not request:
            raise ValueError(f"request_id {request_id!r} is in use")
        try:
            self._loop.add(request)
        except BaseException:
            del self._polled[request_id]
            raise

    def step(self) -> list[RequestOutput]:
        """Computes one step for all requests, whoever sent them: a token for each that decodes, and a part of a prompt.

        Returns the outputs so far of those of `add_request` that got tokens or ended since the last call. A request
        that failed has `finish_reason` "error" and its `error`. Returns at once if there is nothing to do. The last
        outputs can also be had from an engine that was closed.
        """
        self._loop.step_if_open()
        outputs = []
        with self._delivers:
            for request in self._loop.server.take_changed():
                if self._polled.get(request.request_id) is not request:
                    continue  # its last output has been returned: another thread's step had changed it once more
                output = request.output()
                if output.finished:
                    del self._polled[request.request_id]
                outputs.append(output)
        return outputs

    def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests of `add_request`; their last outputs come with the next `step`. Unknown ids and such that have
        ended are nobody's mistake."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        requests = [self._polled.get(each) for each in ids]
        self._loop.abort([request for request in requests if request is not None])

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to compute or to return."""
        return self._loop.server.has_work or bool(self._polled)

    def metrics(self) -> EngineMetrics:
        """Counts since the engine was opened, and what it holds now; from any thread, without waiting for a step."""
        server, scheduler = self._loop.server, self._scheduler
        meters, stats, lane = server.meters, self.expert_stats(), self._executor.lane
        return EngineMetrics(
            num_running=scheduler.num_running,
            num_waiting=server.num_waiting,
            num_pages=self.plan.layout.num_pages - 1,
            num_free_pages=scheduler.num_free_pages,
            num_kept_pages=scheduler.num_kept_pages,
            num_preemptions=scheduler.num_preemptions,
            num_wanted_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            expert_bytes=stats.expert_bytes if stats else 0,
            expert_gbps=stats.gbps if stats else 0.0,
            copied_bytes=self._executor.copied_bytes,
            experts_busy_s=lane.busy_s if lane else 0.0,
            experts_waited_s=lane.waited_s if lane else 0.0,
            **meters.snapshot(),
        )

    def activity(self) -> Activity:
        """What device and CPU did when, in the last decode steps, and in the last prompt that was computed in their
        gaps. Nothing unless the executor is "overlap". From any thread."""
        return self._executor.activity()

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """The output so far after every step; the last one is finished. Closing the iterator aborts the request.

        A step is a token, unless other threads use the engine and run steps too. Refuses a prompt as `generate` does,
        and at once.
        """
        (params,) = self._params_for(1, sampling_params)
        request = self._request(self._encode(prompt), params)
        return (request.output() for _ in self._loop.run([request]))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several, put into words by a Jinja template (default the checkpoint's).

        `chat_template_kwargs` are further variables of the template. Raises `ValueError` for malformed messages.
        """
        if isinstance(messages, Mapping | str):
            raise ValueError(f"messages must be a list of messages, got {messages!r}")
        is_one = not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if is_one else list(messages)
        template = self.chat_template
        if chat_template is not None:
            template = ChatTemplate({"default": chat_template}, special_tokens(self._text_folder))
        variables = {"add_generation_prompt": add_generation_prompt, "tools": tools, **(chat_template_kwargs or {})}
        texts = [template.render(each, **variables) for each in conversations]
        tokenizer = self._need_tokenizer()
        prompts = [PromptIds(tokenizer.encode(text, add_special_tokens=False), text) for text in texts]
        return self._complete(prompts, sampling_params, use_tqdm=use_tqdm)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate.from_folder(self._text_folder)

    def expert_stats(self) -> StoreStats | None:
        """What the native kernels have read so far; None if XLA computes the experts."""
        return self._executor.expert_stats() if self._executor.expert_stats else None

    def close(self, *, drains: bool = False) -> None:
        """Ends the engine; no new request is accepted. With `drains` all that were accepted are served first; else they
        are aborted, and `generate` and `stream` raise where they run in other threads. Closing twice is fine."""
        self._loop.close(drains=drains)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _warm_up(self, use_tqdm: bool) -> None:
        jobs = self._executor.warm_up()
        for job in tqdm(jobs, desc="compiling", unit="program", disable=None if use_tqdm else True):
            job()

    def _find_eos_ids(self) -> tuple[int, ...]:
        """What ends a text: by the model's files, and by the tokenizer's. Raises `ConfigError`."""
        by_model = eos_ids_of_folder(self.folder)
        by_tokenizer = self.tokenizer.eos_ids if self.tokenizer else ()
        ids = tuple(dict.fromkeys([*by_model, *by_tokenizer]))
        if any(not 0 <= i < self.config.vocab_size for i in ids):
            raise ConfigError(f"{self.folder}: end-of-text ids {ids} exceed the {self.config.vocab_size} tokens")
        return ids

    def _complete(
        self,
        prompts: Sequence[PromptIds],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = self._params_for(len(prompts), sampling_params)
        requests = [self._request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        with tqdm(total=len(requests), desc="generating", disable=None if use_tqdm else True) as bar:
            for finished in self._loop.run(requests):
                bar.update(finished)
        return [request.output() for request in requests]

    def _encode(self, prompt: Prompt) -> PromptIds:
        content, salt = unwrap(prompt), salt_of(prompt)
        if not isinstance(content, str):
            return PromptIds(content, cache_salt=salt)
        # An empty text has a token where the tokenizer puts BOS in front; it is no prompt all the same.
        return PromptIds(self._need_tokenizer().encode(content) if content else [], content, salt)

    def _request(
        self, prompt: PromptIds, params: SamplingParams, terms: Terms | None = None, *, request_id: str | None = None
    ) -> Request:
        """A request for a prompt that can be served. Raises `ValueError`."""
        terms = terms or Terms(cache_salt=prompt.cache_salt)
        vocab_size = self.config.vocab_size
        check_ids(prompt.token_ids, vocab_size=vocab_size, max_model_len=self.max_model_len)
        for name in ("logit_bias", "stop_token_ids"):
            largest = max(getattr(params, name) or (), default=0)
            if largest >= vocab_size:
                raise ValueError(f"{name}: token id {largest} is outside the vocabulary of {vocab_size} tokens")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and skip_tokenizer_init was given: use stop_token_ids")
        rules = StopRules(
            eos_ids=() if params.ignore_eos else self._eos_ids,
            stop_ids=tuple(params.stop_token_ids or ()),
            max_len=self.max_model_len,
        )
        # Seeded: the request's own numbers, whatever ran before it. Unseeded: the engine's next ones.
        root = np.random.SeedSequence(params.seed % 2**64) if params.seed is not None else self._seeds.spawn(1)[0]
        sequences = [
            Running(
                prompt.token_ids,
                params,
                index=index,
                seed=int(seed),
                rules=rules,
                tokenizer=self.tokenizer,
                terms=terms,
            )
            for index, seed in enumerate(root.generate_state(params.n, np.uint64))
        ]
        return Request(str(next(self._ids)) if request_id is None else request_id, prompt.text, sequences, self._clock)

    def _params_for(
        self, num_prompts: int, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_sampling_params] * num_prompts
        if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
            raise ValueError(f"sampling_params must be SamplingParams, or a list of them, got {params!r}")
        if len(params) != num_prompts:
            raise ValueError(f"{num_prompts} prompts, but {len(params)} sampling_params")
        return list(params)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("text prompts need a tokenizer, and skip_tokenizer_init was given: pass token ids")
        return self.tokenizer


def default_sampling_params(folder: Path, **overrides: Any) -> SamplingParams:
    """What the checkpoint recommends. Raises `ConfigError` naming the file if it recommends nonsense."""
    fields = read_json(folder / GENERATION_CONFIG)
    try:
        recommended = SamplingParams.from_generation_config(fields)
    except ValueError as error:
        raise ConfigError(f"{folder / GENERATION_CONFIG}: {error}") from None
    return dataclasses.replace(recommended, **overrides)
