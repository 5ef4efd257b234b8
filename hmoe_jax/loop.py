"""The serving loop: requests of any number of threads through one executor, step by step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from hmoe_jax.exec.batch import DecodeRow, decode_batch, prefill_batch
from hmoe_jax.exec.programs import Executor, StepCancelledError
from hmoe_jax.request import Request, Sequence
from hmoe_jax.sampling import SamplerState, sampler_row
from hmoe_jax.scheduler import Decode, Prefill, Scheduler


class ServingLoop:
    """Owns the queue and drives the executor, which it closes in the end.

    Whoever waits for a request runs the steps, for all requests; a lock keeps it one step at a time.
    """

    def __init__(self, executor: Executor):
        self._executor = executor
        self._scheduler = Scheduler(executor.layout, num_slots=executor.num_slots, piece_len=executor.buckets.piece_len)
        self._requests: dict[Sequence, Request] = {}
        self._abandoned: deque[Sequence] = deque()
        self._lock = threading.Lock()
        self._is_interrupted = False
        self._stepper = ThreadPoolExecutor(1, thread_name_prefix="hmoe-step")
        self._is_closed = False

    def run(self, requests: list[Request]) -> Iterator[int]:
        """Serves until all `requests` are done; yields how many of them each step finished.

        Closing the iterator early aborts those that are left.
        """
        open_requests = requests
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
                    self._drop_abandoned()
                    self._whole_step()
                still_open = [request for request in open_requests if not request.is_finished]
                yield len(open_requests) - len(still_open)
                open_requests = still_open
        finally:
            # Ctrl-C, an error, or a stream that nobody reads on. This may run inside a step, if the garbage collector
            # finds the stream there: then the lock is taken, and its holder drops the sequences before the next step.
            self._abandoned.extend(sequence for request in requests for sequence in request.sequences)
            if self._lock.acquire(blocking=False):
                try:
                    self._drop_abandoned()
                finally:
                    self._lock.release()

    def close(self) -> None:
        """Waits for the step that is under way; requests that still run in other threads fail. Twice is fine."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._stepper.shutdown()
                self._executor.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the engine is closed")

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            self._abort(self._abandoned.popleft())

    def _whole_step(self) -> None:
        """One step on a thread of its own: Ctrl-C reaches the caller after it, never the middle of it.

        A step donates the device state: cut off before the new one is stored, it would leave the executor without.
        A long one ends early, between two of its parts.
        If the step itself fails, the state is gone: the sequences that were in it are aborted, and a new one is made.
        """
        interrupt, self._is_interrupted = None, False
        step = self._stepper.submit(self._step)
        while not step.done():
            try:
                wait([step])
            except KeyboardInterrupt as error:
                interrupt, self._is_interrupted = error, True
        if step.exception() is not None:
            for sequence in [each for each in self._requests if each.is_admitted]:
                self._abort(sequence)
            self._executor.reset()
            if interrupt is None:
                self._executor.check_intact()  # says more than what failed for want of a file
        if interrupt is not None:
            raise interrupt
        step.result()

    def _step(self) -> None:
        work = self._scheduler.next()
        if isinstance(work, Prefill):
            self._prefill(work)
        elif isinstance(work, Decode):
            self._decode(work)
        self._executor.check_intact()

    def _prefill(self, work: Prefill) -> None:
        sequence, request = work.sequence, self._requests[work.sequence]
        if work.is_first:
            request.mark_started()
            self._executor.admit(sequence.slot, self._sampler_row(sequence))
        scored = sequence.params.prompt_logprobs is not None
        buckets = self._executor.buckets
        size = buckets.for_scored(work.length) if scored else buckets.for_prefill(work.length)
        length = min(work.length, size)
        end = work.start + length
        following = sequence.prompt_ids[work.start + 1 : end + 1]
        is_last = end == len(sequence.prompt_ids)
        batch = prefill_batch(
            sequence.prompt_ids[work.start : end],
            self._executor.layout,
            size=size,
            targets=following,
            start=work.start,
            is_last=is_last,
            slot=sequence.slot,
            pages=sequence.pages,
        )
        try:
            output = self._executor.step(batch, scored=scored, is_cancelled=lambda: self._is_cancelled(sequence))
        except StepCancelledError:
            return  # who abandoned it drops it; else it starts again
        sequence.num_computed = end
        if scored:
            sequence.add_prompt_logprobs(jax.device_get(output.prompt), len(following))
        if sequence.params.return_routed_experts:
            sequence.add_routes(np.asarray(output.routes)[:, :length])
        if is_last:
            self._append(sequence, jax.device_get(output.sampled), 0)

    def _is_cancelled(self, sequence: Sequence) -> bool:
        return self._is_interrupted or sequence in self._abandoned

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
        size = self._executor.buckets.for_decode(len(rows))
        output = self._executor.step(
            decode_batch(rows, self._executor.layout, size=size, num_slots=self._executor.num_slots)
        )
        sampled = jax.device_get(output.sampled)
        for row, sequence in enumerate(sequences):
            if sequence.params.return_routed_experts:
                sequence.add_routes(np.asarray(output.routes)[:, row : row + 1])
            self._append(sequence, sampled, row)

    def _append(self, sequence: Sequence, sampled: Any, row: int) -> None:
        sequence.append(int(sampled.tokens[row]), sampled, row)
        self._requests[sequence].mark_token()
        if sequence.is_finished:
            self._retire(sequence)

    def _abort(self, sequence: Sequence) -> None:
        sequence.finish("abort", None)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self._scheduler.release(sequence)
        self._requests.pop(sequence, None)

    def _sampler_row(self, sequence: Sequence) -> SamplerState:
        return sampler_row(
            sequence.params,
            self._executor.config.vocab_size,
            prompt_ids=tuple(sequence.prompt_ids),
            stop_ids=sequence.rules.all_ids,
            seed=sequence.seed,
        )
