"""Serves requests with one executor, step by step: what is computed, what comes of it, and what happens if it fails."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax

from hmoe_jax.clock import Clock
from hmoe_jax.core import EngineDeadError, HmoeError, QueueFullError
from hmoe_jax.exec.batch import DecodeBatch, DecodeRow, PrefillBatch, decode_batch, prefill_batch
from hmoe_jax.exec.buckets import Buckets
from hmoe_jax.exec.host_loop import Meanwhile
from hmoe_jax.exec.quantum import NOWHERE, Quanta, Room
from hmoe_jax.exec.step import StepOutput
from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.meters import Meters
from hmoe_jax.request import Request, Sequence
from hmoe_jax.sampling import SamplerState, sampler_row
from hmoe_jax.scheduler import Prefill, Scheduler
from hmoe_jax.turns import Turns

logger = logging.getLogger(__name__)


@runtime_checkable
class ServedExecutor(Protocol):
    """What a server, and the loop that drives it, need of an `Executor`."""

    config: Any
    layout: CacheLayout
    buckets: Buckets
    num_slots: int

    @property
    def has_gaps(self) -> bool: ...

    def admit(self, slot: int, row: SamplerState) -> None: ...
    def prefill(self, batch: PrefillBatch, *, scored: bool = False) -> Quanta: ...
    def step(self, batch: DecodeBatch, *, meanwhile: Meanwhile | None = None) -> StepOutput: ...
    def reset(self) -> None: ...
    def check_intact(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class _Prompt:
    """A piece of a prompt that is being computed."""

    work: Prefill
    quanta: Quanta
    end: int
    is_scored: bool
    fits_gaps: bool
    """Whether its parts can be computed while decode steps leave the device."""
    is_elsewhere: bool
    """Whether it goes on by itself, on devices of its own."""

    @property
    def is_beside(self) -> bool:
        """Whether others can decode meanwhile."""
        return self.fits_gaps or self.is_elsewhere


class Server:
    """Owns the queue of one executor. Any thread may `submit` and `abort` at any time; one at a time calls `step`.

    A step that fails leaves the device without its state: every running sequence starts again, without losing what it
    has generated; those that were in two such steps do so one at a time. One that fails again alone is the culprit, and
    ends with the error. If the device or the model's files are lost, all requests end with that one error.
    """

    def __init__(self, executor: ServedExecutor, scheduler: Scheduler, turns: Turns, *, max_waiting: int, clock: Clock):
        """At most `max_waiting` sequences wait. `clock` never goes back."""
        self._executor, self._scheduler, self._turns = executor, scheduler, turns
        self._max_waiting, self._clock = max_waiting, clock
        self._requests: dict[Sequence, Request] = {}
        self._inbox: deque[Request] = deque()
        self._num_incoming = 0  # sequences in it
        self._unwanted: deque[Sequence] = deque()
        self._lock = threading.RLock()  # the garbage collector may abort a stream inside any of its owner's lines
        self._prompt: _Prompt | None = None
        self._at_work: tuple[Sequence, ...] = ()
        self._changed: dict[Request, None] = {}
        self.dead: Exception | None = None
        """Why nothing can be served any more."""
        self.meters = Meters(executor.config.num_moe_layers, executor.config.num_experts)

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or self._requests)

    @property
    def num_waiting(self) -> int:
        return self._num_incoming + self._scheduler.num_waiting

    def has_room(self, num_sequences: int) -> bool:
        """Whether the queue takes so many more. An empty one takes any number, so that no request is too large for
        it.
        """
        waiting = self.num_waiting
        return not waiting or waiting + num_sequences <= self._max_waiting

    def submit(self, request: Request) -> None:
        """Raises `QueueFullError`; `ValueError` for what can never be served; the error of an engine that is lost."""
        self._scheduler.check_fits(request.sequences)
        with self._lock:
            if self.dead is not None:
                raise self.dead.with_traceback(None)  # else it grows with everybody who asks
            if not self.has_room(len(request.sequences)):
                self.meters.num_refused += 1
                raise QueueFullError(
                    f"the queue is full: {self.num_waiting} sequences wait, max_num_waiting is {self._max_waiting}"
                )
            self._inbox.append(request)
            self._num_incoming += len(request.sequences)
        self.meters.num_requests += 1

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Ends them before the next step, or the next part of a prompt outside one; ended ones stay as they are."""
        self._unwanted.extend(sequences)

    def step(self, is_interrupted: Callable[[], bool] = lambda: False) -> None:
        """A token for each sequence that decodes, and as much of a prompt as their latency allows.

        Where nobody decodes, a piece of a prompt as a whole, unless it `is_interrupted`: then it goes on next time.
        """
        try:
            self.tidy()
            self._step(is_interrupted)
        except Exception as error:
            self._recover(error)
        if not self._requests:
            self._scheduler.check()

    def take_changed(self) -> list[Request]:
        """The polled requests that got tokens or ended since the last call."""
        with self._lock:
            changed, self._changed = self._changed, {}
        return list(changed)

    def close(self) -> None:
        """Aborts all requests; none is accepted any more. Twice is fine."""
        with self._lock:
            self.dead = self.dead or ValueError("the engine is closed")
        self.tidy()
        for sequence in list(self._requests):
            self._end(sequence, "abort")

    def tidy(self) -> None:
        """Takes in what was submitted, and ends what nobody wants or has time for."""
        # First: who is submitted and aborted meanwhile is not in the inbox yet.
        unwanted = [self._unwanted.popleft() for _ in range(len(self._unwanted))]
        while self._inbox:
            self._take_in(self._inbox[0])
            self._inbox.popleft()
        for sequence in unwanted:
            self._end(sequence, "abort")
        for sequence in self._scheduler.expired(int(self._clock() * 1e9)):
            self._end(sequence, "timeout")

    def _kill(self, error: Exception) -> None:
        """Ends all requests with one error; none is accepted any more."""
        with self._lock:
            self.dead = error
        self.tidy()
        for sequence in list(self._requests):
            sequence.fail(error)
            self._retire(sequence)

    def _take_in(self, request: Request) -> None:
        self._requests.update(dict.fromkeys(request.sequences, request))
        with self._lock:
            self._num_incoming -= len(request.sequences)
            try:
                self._scheduler.add(request.sequences)
            except Exception as error:
                for sequence in request.sequences:
                    sequence.fail(error)
                    self._retire(sequence)

    def _step(self, is_interrupted: Callable[[], bool]) -> None:
        if self._prompt is None:
            work = self._scheduler.next_prefill()
            if work is not None:
                self._begin(work)
        decoding = self._scheduler.next_decode()
        if self._prompt is not None and not self._prompt.work.sequence.is_admitted:
            self._close_prompt()  # preempted
        if decoding:
            self._decode(decoding)
            self._take_turn(is_interrupted)
        else:
            self._turns.idle()
            while self._prompt is not None and not is_interrupted():
                self._advance(None)
                self.tidy()

    def _take_turn(self, is_interrupted: Callable[[], bool]) -> None:
        """Parts of the prompt, as many as the others' token latency allows."""
        while self._prompt is not None and self._turns.is_prompts and not is_interrupted():
            begin = self._clock()
            in_turn = not self._prompt.is_beside
            has_begun = self._advance(self._room_of_turn(self._prompt))
            self._turns.prefilled(self._since_ns(begin), in_turn=in_turn)
            self.tidy()
            if not has_begun:  # and decoding does not wait for it
                return

    def _room_of_turn(self, prompt: _Prompt) -> Room:
        """Where decode steps have gaps, no more than the step may be late; but a prompt that fits no gap goes on."""
        if not prompt.fits_gaps:
            return Room()
        return Room(self._turns.allowance_ns / 1e9, late_s=math.inf if self._turns.is_unfilled else 0.0)

    def _let_prompt_go_on(self, num_rows: int) -> Meanwhile | None:
        """Beside a step of so many sequences, if the others' token latency allows: what is called in its gaps."""
        prompt = self._prompt
        may_go_on = self._turns.begin_step(num_rows, offers_gaps=prompt is not None and prompt.is_beside)
        if prompt is not None and prompt.is_elsewhere:
            begin = self._clock()
            self._advance(Room() if may_go_on else NOWHERE)
            self._turns.prefilled(self._since_ns(begin))
            return None
        return self._fill if may_go_on else None

    def _fill(self, seconds: float) -> bool:
        """A part of the prompt in a gap of a decode step. False if none is so short, or may be late."""
        if self._prompt is None:
            return False
        begin = self._clock()
        has_begun = self._advance(Room(seconds, late_s=self._turns.allowance_ns / 1e9))
        if has_begun:
            self._turns.filled(max(self._since_ns(begin) - max(int(seconds * 1e9), 0), 0))
        return has_begun

    def _since_ns(self, begin: float) -> int:
        return int((self._clock() - begin) * 1e9)

    def _begin(self, work: Prefill) -> None:
        sequence = work.sequence
        self._at_work = (sequence,)
        if work.is_first:
            self._requests[sequence].mark_started()
            with self._blaming(sequence):
                row = self._sampler_row(sequence)
            if sequence.is_finished:
                self._at_work = ()
                return
            self._executor.admit(sequence.slot, row)
        scored = sequence.params.prompt_logprobs is not None
        buckets = self._executor.buckets
        size = buckets.for_scored(work.length) if scored else buckets.for_prefill(work.length)
        end = work.start + min(work.length, size)
        batch = prefill_batch(
            sequence.prompt_ids[work.start : end],
            self._executor.layout,
            size=size,
            targets=sequence.prompt_ids[work.start + 1 : end + 1],
            start=work.start,
            is_last=end == len(sequence.prompt_ids) and not sequence.token_ids,
            slot=sequence.slot,
            pages=sequence.pages,
        )
        quanta = self._executor.prefill(batch, scored=scored)
        first = next(quanta)
        fits_gaps = self._executor.has_gaps and first.predicted_s < math.inf and not first.is_elsewhere
        self._prompt = _Prompt(work, quanta, end, scored, fits_gaps, first.is_elsewhere)
        self._at_work = ()

    def _advance(self, room: Room | None) -> bool:
        """Computes the next part of the prompt; after the last one the prompt has its first token. False if there was
        nothing to compute yet, or no `room` for it."""
        prompt = self._prompt
        assert prompt is not None
        others, self._at_work = self._at_work, (prompt.work.sequence,)
        has_begun = True
        try:
            has_begun = prompt.quanta.send(room).has_begun
        except StopIteration as end:
            self._prompt = None
            self._finish(prompt, end.value)
        self._at_work = others
        return has_begun

    def _finish(self, prompt: _Prompt, output: Any) -> None:
        sequence, start, end = prompt.work.sequence, prompt.work.start, prompt.end
        sampled, routes = self._fetch(output)
        routes = routes[:, : end - start]
        self._scheduler.prefilled(sequence, end)
        self.meters.prefilled(end - start, routes)
        with self._blaming(sequence):
            if prompt.is_scored:
                num_targets = len(sequence.prompt_ids[start + 1 : end + 1])
                sequence.add_prompt_logprobs(jax.device_get(output.prompt), num_targets, start=start)
            if sequence.params.return_routed_experts:
                sequence.add_routes(routes, start=start)
            if end == len(sequence.prompt_ids) and not sequence.token_ids:
                self._append(sequence, sampled, 0)

    def _decode(self, sequences: tuple[Sequence, ...]) -> None:
        # Rows are dealt out to parts in turn: in this order each part looks back at about as much.
        sequences = tuple(sorted(sequences, key=lambda each: each.num_computed))
        self._at_work = sequences
        draws = [each.draws_next for each in sequences]
        rows = [
            DecodeRow(each.next_input, each.num_computed, each.slot, each.pages, draws_next)
            for each, draws_next in zip(sequences, draws, strict=True)
        ]
        size = self._executor.buckets.for_decode(len(rows))
        batch = decode_batch(rows, self._executor.layout, size=size, num_slots=self._executor.num_slots)
        meanwhile = self._let_prompt_go_on(len(rows))
        begin = self._clock()
        sampled, routes = self._fetch(self._executor.step(batch, meanwhile=meanwhile))
        elapsed_ns = self._since_ns(begin)
        self._turns.decoded(elapsed_ns)
        self.meters.decoded(elapsed_ns / 1e9, routes)
        for row, (sequence, draws_next) in enumerate(zip(sequences, draws, strict=True)):
            with self._blaming(sequence):
                if sequence.params.return_routed_experts:
                    sequence.add_routes(routes[:, row : row + 1], start=sequence.num_computed)
                sequence.num_computed += 1
                if draws_next:
                    self._append(sequence, sampled, row)
        self._at_work = ()

    def _fetch(self, output: StepOutput) -> tuple[Any, Any]:
        """Tokens and routes, on the host, once it is known that they can be trusted."""
        fetched = jax.device_get((output.sampled, output.routes))
        self._executor.check_intact()
        return fetched

    def _append(self, sequence: Sequence, sampled: Any, row: int) -> None:
        request = self._requests[sequence]
        sequence.append(int(sampled.tokens[row]), sampled, row)
        self.meters.token(*request.mark_token(sequence))
        self._note(request)
        if sequence.is_finished:
            self._retire(sequence)

    @contextmanager
    def _blaming(self, sequence: Sequence) -> Iterator[None]:
        """What fails while one sequence's input or output is made is its own error, and nobody else's."""
        try:
            yield
        except Exception as error:
            sequence.fail(error)
            self._retire(sequence)

    def _end(self, sequence: Sequence, reason: Any) -> None:
        if sequence in self._requests:
            sequence.finish(reason, None)
            self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Frees what an ended sequence holds."""
        if self._prompt is not None and self._prompt.work.sequence is sequence:
            self._close_prompt()
        self._scheduler.release(sequence)
        request = self._requests.pop(sequence, None)
        if request is None:
            return
        self._note(request)
        if request.is_finished:
            self.meters.finished(request)

    def _note(self, request: Request) -> None:
        if request.is_polled:
            with self._lock:
                self._changed[request] = None

    def _close_prompt(self) -> None:
        prompt, self._prompt = self._prompt, None
        if prompt is None:
            return
        try:
            prompt.quanta.close()
        except Exception as error:  # a part that failed after it was started: nobody wants it any more
            logger.warning("a prompt that was given up had failed: %s", error)

    def _recover(self, error: Exception) -> None:
        at_work, self._at_work = self._at_work, ()
        try:
            self._close_prompt()
            self._executor.reset()
            self._executor.check_intact()  # says more than what failed for want of a file
        except HmoeError as lost:
            self._kill(lost)
            return
        except Exception as lost:
            dead = EngineDeadError(f"the device is lost: {lost}")
            dead.__cause__ = error
            self._kill(dead)
            return
        if not at_work:
            self._kill(error)
            return
        self.meters.num_failed_steps += 1
        self._scheduler.forget_cache()
        for sequence in at_work:
            sequence.num_failures += 1
        (first, *others) = at_work
        if not others and first.num_failures > 1:
            first.fail(error)
            self._retire(first)
        else:
            logger.warning("a step of %d sequence(s) failed and is run again: %s", len(at_work), error)

    def _sampler_row(self, sequence: Sequence) -> SamplerState:
        return sampler_row(
            sequence.params,
            self._executor.config.vocab_size,
            prompt_ids=tuple(sequence.prompt_ids),
            stop_ids=sequence.rules.all_ids,
            seed=sequence.seed,
            drawn_ids=sequence.token_ids,
        )
