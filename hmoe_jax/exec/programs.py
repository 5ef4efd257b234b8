"""The compiled step programs of one loaded model, one for each kind of step and shape bucket."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from hmoe_jax.architectures.deepseek_v3 import Weights
from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.batch import DecodeBatch, PrefillBatch, decode_batch, prefill_batch
from hmoe_jax.exec.beside import LaneExperts
from hmoe_jax.exec.guard import FileGuard
from hmoe_jax.exec.plan import Plan
from hmoe_jax.exec.step import (
    DeviceState,
    StepModel,
    StepOutput,
    decode,
    decode_in_one,
    decode_in_two,
    prefill,
    prefill_scored,
)
from hmoe_jax.experts.lane import ExpertLane
from hmoe_jax.sampling import SamplerState, empty_row, empty_state, set_row

StepFunction = Callable[[StepModel, DeviceState, Any], tuple[Any, DeviceState]]


@dataclass(frozen=True)
class Quantum:
    """A part of a prefill that has been started on the devices: what, of which layer, of how many layers, and how long
    it should compute. "copies": nothing could be started, as the next experts have not come yet. `done` is an array
    that is ready when it has been computed."""

    name: str
    layer: int
    num_layers: int
    predicted_s: float
    done: Any = None


Quanta = Generator[Quantum, None, Any]
"""A prefill in parts: it computes while it is advanced, and its value is what the step function returns.

Closing it between two parts cancels the prompt: what it left in the cache is nobody's, and everything else is freed.
"""


class Executor:
    """Runs steps of one model on its own device state: whole ones by `step`, prompts in parts by `prefill`.

    Between two parts of a prompt other steps may run. Not thread-safe.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        backend: ExpertBackend,
        *,
        plan: Plan,
        guard: FileGuard | None,
        on_close: Callable[[], None],
    ):
        self.config, self.layout, self.buckets = config, plan.layout, plan.buckets
        self.num_slots = plan.buckets.decode[-1]
        self.expert_stats = backend.stats
        self._weights, self._backend, self._device, self._on_close = weights, backend, plan.device, on_close
        self._dtype, self._guard, self._split_sizes = plan.dtype, guard, plan.split_sizes
        with jax.default_device(self._device):
            self._empty_state = jax.jit(self._make_state).lower().compile()
            self._state = self._empty_state()
            slot, row = np.array(0, np.int32), empty_row(config.vocab_size)
            self._admit = jax.jit(set_row, donate_argnums=0).lower(self._state.sampler, slot, row).compile()
        self._programs: dict[tuple[str, int], Callable[..., Any]] = {}

    def step(self, batch: PrefillBatch | DecodeBatch, *, scored: bool = False) -> StepOutput:
        """Runs a batch whose size is one of the buckets. `scored` asks for a prompt's log-probabilities."""
        if isinstance(batch, DecodeBatch):
            return self.run(self.decode_function(len(batch.tokens)), batch)
        return self.run(prefill_scored if scored else prefill, batch)

    def prefill(self, batch: PrefillBatch, *, scored: bool = False) -> Quanta:
        """The same of a prompt, part by part: the generator's value is the `StepOutput`."""
        return self.quanta(prefill_scored if scored else prefill, batch)

    def decode_function(self, size: int) -> StepFunction:
        """How a decode batch of this size is computed."""
        if self.lane is None:
            return decode
        return decode_in_two if size in self._split_sizes else decode_in_one

    def admit(self, slot: int, row: SamplerState) -> None:
        """Gives a slot to a new sequence."""
        sampler = self._admit(self._state.sampler, np.array(slot, np.int32), row)
        self._state = DeviceState(self._state.caches, sampler)

    def run(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Any:
        """Runs a step function on the state; compiles it if this size of batch is new."""
        if isinstance(batch, DecodeBatch):
            return self._run_program(function, batch)
        quanta = self.quanta(function, batch)
        while True:
            try:
                next(quanta)
            except StopIteration as end:
                return end.value

    def quanta(self, function: StepFunction, batch: PrefillBatch) -> Quanta:
        """Runs a step function on a prompt, or a piece of one. Here it has one part."""
        yield from ()
        return self._run_program(function, batch)

    def _run_program(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Any:
        output, self._state = self._program(function, batch)(self._weights, self._backend.operand, self._state, batch)
        return output

    def warm_up(self) -> list[Callable[[], object]]:
        """One job for each program that serving can need; after all have run, nothing compiles any more."""
        return self._compilations(self.buckets.prefill)

    @property
    def lane(self) -> ExpertLane | None:
        """What computes routed experts beside a decode step, if something does."""
        return self._backend.lane

    @property
    def programs(self) -> dict[tuple[str, int], Callable[..., Any]]:
        """The compiled programs by kind and bucket, for inspection."""
        return dict(self._programs)

    def empty_prefill(self, size: int) -> PrefillBatch:
        """One token of nobody's."""
        return prefill_batch([0], self.layout, size=size, slot=self.num_slots)

    def empty_decode(self, size: int) -> DecodeBatch:
        """Padding only."""
        return decode_batch([], self.layout, size=size, num_slots=self.num_slots)

    def reset(self) -> None:
        """Forgets all sequences: for a step that failed, after which the donated state is gone, or some of it."""
        for array in jax.tree.leaves(self._state):
            array.delete()
        self._state = self._empty_state()

    def check_intact(self) -> None:
        """Raises `CheckpointError` if a file that is still read was cut off: then no output can be trusted. Raises
        `ValueError` for routed experts that failed beside a program that could not say so."""
        if self._guard is not None:
            self._guard.check()
        if self.lane is not None:
            self.lane.check()

    def close(self) -> None:
        """Frees the arrays at once, whoever still refers to the executor, and what its backend owns."""
        for array in jax.tree.leaves((self._weights, self._backend.operand, self._state)):
            array.delete()
        self._guard = None
        self._on_close()

    def _compilations(self, prefill_sizes: Sequence[int]) -> list[Callable[[], object]]:
        """One job for each program of decoding, and of prefills of these sizes."""
        scored = sorted({self.buckets.for_scored(size) for size in prefill_sizes})
        programs: list[tuple[StepFunction, PrefillBatch | DecodeBatch]] = [
            *((prefill, self.empty_prefill(size)) for size in prefill_sizes),
            *((prefill_scored, self.empty_prefill(size)) for size in scored),
            *((self.decode_function(size), self.empty_decode(size)) for size in self.buckets.decode),
        ]
        return [partial(self._program, function, batch) for function, batch in programs]

    def _make_state(self) -> DeviceState:
        return DeviceState(self.layout.allocate(self._dtype), empty_state(self.num_slots, self.config.vocab_size))

    def _program(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Callable[..., Any]:
        key = (function.__name__, batch.tokens.shape[0])
        if key not in self._programs:
            self._programs[key] = self._compile(function, batch)
        return self._programs[key]

    def _compile(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Callable[..., Any]:
        with jax.default_device(self._device):
            return self._traced(function, batch).lower().compile()

    def _traced(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> jax.stages.Traced:
        config, layout, bind, lane = self.config, self.layout, self._backend.bind, self.lane

        def program(weights: Weights, operand: Any, state: DeviceState, batch: Any) -> tuple[Any, DeviceState]:
            beside = None if lane is None else LaneExperts(lane.id)
            return function(StepModel(config, layout, weights, bind(operand), beside), state, batch)

        program.__name__ = f"{function.__name__}_{batch.tokens.shape[0]}"
        return jax.jit(program, donate_argnums=2).trace(self._weights, self._backend.operand, self._state, batch)
