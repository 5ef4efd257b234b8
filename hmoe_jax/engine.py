"""The engine: prompts in, text out. Names and meanings as in vLLM's `LLM`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from hmoe_jax.chat import ChatTemplate
from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.batch import DecodeRow, decode_batch, prefill_batch
from hmoe_jax.exec.cache import enable_compilation_cache
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import engine_options
from hmoe_jax.experts.store import StoreStats
from hmoe_jax.folder import read_json
from hmoe_jax.outputs import RequestOutput
from hmoe_jax.request import Request, StopRules
from hmoe_jax.request import Sequence as Running
from hmoe_jax.sampling import SamplerState, sampler_row
from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.scheduler import Decode, Prefill, Scheduler
from hmoe_jax.tokenizer import Tokenizer

Prompt = str | Sequence[int | np.integer]
"""Text, or token ids."""


class Engine:
    """One loaded model. A context manager; `close` frees the weights and ends the threads.

    `model` is a Hugging Face folder. `options` are the fields of `EngineOptions`: dtype, max_model_len, max_num_seqs,
    num_threads, device, executor... `seed` decides the draws of requests that have no seed of their own. `verify`
    checks the folder's SHA256SUMS ("auto": where that is quick). `warm_up` compiles every step program before the first
    request (`compilation_cache` keeps them for the next start); without it they are compiled when first needed.
    `skip_tokenizer_init` serves token ids only. Several threads may use an engine; their requests run side by side.

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
        **options: Any,
    ):
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self.folder = Path(model)
        wishes = engine_options(options)
        enable_compilation_cache(compilation_cache)
        self._executor, self.plan = open_executor(self.folder, wishes, verify=verify)
        try:
            self.tokenizer = None if skip_tokenizer_init else Tokenizer.from_folder(tokenizer or self.folder)
            self.default_sampling_params = SamplingParams.from_generation_config(
                read_json(self.folder / "generation_config.json")
            )
            if warm_up:
                self._warm_up(use_tqdm)
        except BaseException:
            self._executor.close()
            raise
        self._scheduler = Scheduler(
            self.plan.layout, num_slots=self._executor.num_slots, prefill_len=self.plan.buckets.prefill[-1]
        )
        self._requests: dict[Running, Request] = {}
        self._ids, self._seeds = itertools.count(), np.random.SeedSequence(seed)
        self._lock = threading.Lock()
        self._stepper = ThreadPoolExecutor(1, thread_name_prefix="hmoe-step")
        self._is_closed = False

    @property
    def config(self) -> ModelConfig:
        return self._executor.config

    @property
    def max_model_len(self) -> int:
        return self.plan.layout.max_len

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt; the outputs come in the order of the prompts.

        `sampling_params` None means the checkpoint's recommendations. Nothing runs if any prompt is refused: an empty
        one, one longer than the model, ids outside the vocabulary (`ValueError`).
        """
        prompt_list = _as_prompts(prompts)
        params = self._params_for(prompt_list, sampling_params)
        requests = [self._request(prompt, p) for prompt, p in zip(prompt_list, params, strict=True)]
        with tqdm(total=len(requests), desc="generating", disable=None if use_tqdm else True) as bar:
            for finished in self._run(requests):
                bar.update(finished)
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """The output so far after every token; the last one is finished. Closing the iterator aborts the request."""
        request = self._request(prompt, sampling_params or self.default_sampling_params)
        for _ in self._run([request]):
            yield request.output()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several, put into words by the checkpoint's chat template."""
        is_one = not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if is_one else list(messages)
        tokenizer = self._need_tokenizer()
        texts = [self.chat_template.render(each, **template_variables) for each in conversations]
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate.from_folder(self.folder)

    def expert_stats(self) -> StoreStats | None:
        """What the native kernels have read so far; None if XLA computes the experts."""
        return self._executor.expert_stats() if self._executor.expert_stats else None

    def close(self) -> None:
        """Ends the engine; requests that still run in other threads fail. Closing twice is fine."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._stepper.shutdown()
                self._executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _warm_up(self, use_tqdm: bool) -> None:
        jobs = self._executor.warm_up()
        for job in tqdm(jobs, desc="compiling", unit="program", disable=None if use_tqdm else True):
            job()

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Checks a prompt and makes it a request. Raises `ValueError`."""
        text = prompt if isinstance(prompt, str) else None
        ids = self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else _as_ids(prompt)
        if not ids or text == "":
            raise ValueError("the prompt is empty")
        vocab_size = self.config.vocab_size
        strange = next((i for i in ids if not 0 <= i < vocab_size), None)
        if strange is not None:
            raise ValueError(f"token id {strange} is outside the vocabulary of {vocab_size} tokens")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but max_model_len is {self.max_model_len} and at least one token "
                "has to be generated"
            )
        for name, named in (
            ("logit_bias", params.logit_bias or {}),
            ("stop_token_ids", params.stop_token_ids or ()),
        ):
            if any(token >= vocab_size for token in named):
                raise ValueError(f"{name}: token id {max(named)} is outside the vocabulary of {vocab_size} tokens")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and skip_tokenizer_init was given: use stop_token_ids")
        eos_ids = self.tokenizer.eos_ids if self.tokenizer else self.config.eos_ids
        rules = StopRules(
            eos_ids=() if params.ignore_eos else eos_ids,
            stop_ids=tuple(params.stop_token_ids or ()),
            max_len=self.max_model_len,
        )
        # Seeded: the request's own numbers, whatever ran before it. Unseeded: the engine's next ones.
        root = np.random.SeedSequence(params.seed % 2**64) if params.seed is not None else self._seeds.spawn(1)[0]
        seeds = root.generate_state(params.n, np.uint64)
        sequences = [
            Running(ids, params, index=index, seed=int(seed), rules=rules, tokenizer=self.tokenizer)
            for index, seed in enumerate(seeds)
        ]
        return Request(str(next(self._ids)), text, sequences)

    def _run(self, requests: Sequence[Request]) -> Iterator[int]:
        """Steps the engine until all `requests` are done; yields how many of them each step finished."""
        open_requests = list(requests)
        try:
            with self._lock:
                self._check_open()
                for request in requests:
                    for sequence in request.sequences:
                        self._requests[sequence] = request
                        self._scheduler.add(sequence)
            while open_requests:
                with self._lock:
                    self._check_open()
                    self._whole_step()
                still_open = [request for request in open_requests if not request.is_finished]
                yield len(open_requests) - len(still_open)
                open_requests = still_open
        finally:
            # Ctrl-C, an error, or a stream that nobody reads on: give back what is held.
            with self._lock:
                for request in requests:
                    for sequence in request.sequences:
                        sequence.finish("abort", None)
                        self._retire(sequence)

    def _whole_step(self) -> None:
        """One step on a thread of its own: Ctrl-C reaches the caller after it, never the middle of it.

        A step donates the device state: cut off before the new state is stored, it would leave the engine without one.
        """
        step = self._stepper.submit(self._step)
        try:
            step.result()
        finally:
            wait([step])

    def _step(self) -> None:
        work = self._scheduler.next()
        if isinstance(work, Prefill):
            self._prefill(work)
        elif isinstance(work, Decode):
            self._decode(work)

    def _prefill(self, work: Prefill) -> None:
        sequence, request = work.sequence, self._requests[work.sequence]
        if work.is_first:
            request.mark_started()
            self._executor.admit(sequence.slot, self._sampler_row(sequence))
        scored = sequence.params.prompt_logprobs is not None
        buckets = self.plan.buckets
        size = buckets.scored if scored else buckets.for_prefill(work.length)
        length = min(work.length, size)
        end = work.start + length
        following = sequence.prompt_ids[work.start + 1 : end + 1]
        is_last = end == len(sequence.prompt_ids)
        batch = prefill_batch(
            sequence.prompt_ids[work.start : end],
            self.plan.layout,
            size=size,
            targets=following,
            start=work.start,
            is_last=is_last,
            slot=sequence.slot,
            pages=sequence.pages,
        )
        output = self._executor.step(batch, scored=scored)
        sequence.num_computed = end
        if scored:
            sequence.add_prompt_logprobs(jax.device_get(output.prompt), len(following))
        if sequence.params.return_routed_experts:
            sequence.add_routes(np.asarray(output.routes)[:, :length])
        if is_last:
            self._append(sequence, jax.device_get(output.sampled), 0)

    def _decode(self, work: Decode) -> None:
        sequences = work.sequences
        rows = [
            DecodeRow(
                token=sequence.token_ids[-1],
                position=len(sequence.prompt_ids) + len(sequence.token_ids) - 1,
                slot=sequence.slot,
                pages=sequence.pages,
            )
            for sequence in sequences
        ]
        size = self.plan.buckets.for_decode(len(rows))
        output = self._executor.step(
            decode_batch(rows, self.plan.layout, size=size, num_slots=self._executor.num_slots)
        )
        sampled = jax.device_get(output.sampled)
        for row, sequence in enumerate(sequences):
            if sequence.params.return_routed_experts:
                sequence.add_routes(np.asarray(output.routes)[:, row : row + 1])
            self._append(sequence, sampled, row)

    def _append(self, sequence: Running, sampled: Any, row: int) -> None:
        sequence.append(int(sampled.tokens[row]), sampled, row)
        self._requests[sequence].mark_token()
        if sequence.is_finished:
            self._retire(sequence)

    def _retire(self, sequence: Running) -> None:
        self._scheduler.release(sequence)
        self._requests.pop(sequence, None)

    def _sampler_row(self, sequence: Running) -> SamplerState:
        return sampler_row(
            sequence.params,
            self.config.vocab_size,
            prompt_ids=tuple(sequence.prompt_ids),
            stop_ids=sequence.rules.all_ids,
            seed=sequence.seed,
        )

    def _params_for(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling_params")
        return list(params)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("text prompts need a tokenizer, and skip_tokenizer_init was given: pass token ids")
        return self.tokenizer

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the engine is closed")


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, also from a single one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_ids(prompt: Sequence[int | np.integer]) -> list[int]:
    is_bytes = isinstance(prompt, bytes | bytearray)  # text of some encoding, though it looks like integers
    if is_bytes or any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in prompt):
        raise ValueError(f"a prompt is text or a list of token ids, got {prompt!r}")
    return [int(i) for i in prompt]
