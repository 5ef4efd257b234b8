"""The compiled step programs of one loaded model, one for each kind of step and shape bucket."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import numpy as np

from hmoe_jax.architectures.deepseek_v3 import Weights
from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.activity import Activity, activity_of
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.batch import DecodeBatch, PrefillBatch, decode_batch, prefill_batch
from hmoe_jax.exec.beside import LaneExperts
from hmoe_jax.exec.guard import FileGuard
from hmoe_jax.exec.host_loop import HostLoop, Meanwhile
from hmoe_jax.exec.plan import Plan
from hmoe_jax.exec.quantum import Quanta, Quantum, run_out
from hmoe_jax.exec.state import DeviceState, LiveState
from hmoe_jax.exec.step import (
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
            self._state = LiveState(self._empty_state())
            slot, row = np.array(0, np.int32), empty_row(config.vocab_size)
            self._admit = jax.jit(set_row, donate_argnums=0).lower(self._state.sampler, slot, row).compile()
        self._loop = None if backend.lane is None else HostLoop(config, plan.layout, weights, backend.lane, plan.device)
        self._programs: dict[tuple[str, int], Callable[..., Any]] = {}

    def step(
        self, batch: PrefillBatch | DecodeBatch, *, scored: bool = False, meanwhile: Meanwhile | None = None
    ) -> StepOutput:
        """Runs a batch whose size is one of the buckets. `scored` asks for a prompt's log-probabilities.

        Where a decode step with a lane leaves the device idle, `meanwhile` may use it.
        """
        if isinstance(batch, PrefillBatch):
            return self.run(prefill_scored if scored else prefill, batch)
        if meanwhile is None or self._loop is None:
            return self.run(self.decode_function(len(batch.tokens)), batch)
        return self.loop(batch, meanwhile=meanwhile)

    def loop(
        self, batch: DecodeBatch, *, num_parts: int | None = None, meanwhile: Meanwhile = lambda _: False
    ) -> StepOutput:
        """A decode step by the loop on the host, with the bits of the compiled one, and in as many parts if `num_parts`
        is not given. There is a lane for it."""
        assert self._loop is not None
        parts = num_parts or (2 if len(batch.tokens) in self._split_sizes else 1)
        return self._loop.step(batch, self._state, num_parts=parts, meanwhile=meanwhile)

    def prefill(self, batch: PrefillBatch, *, scored: bool = False) -> Quanta:
        """The same of a prompt, part by part: the value is the `StepOutput`."""
        return self.quanta(prefill_scored if scored else prefill, batch)

    def decode_function(self, size: int) -> StepFunction:
        """How a decode batch of this size is computed."""
        if self.lane is None:
            return decode
        return decode_in_two if size in self._split_sizes else decode_in_one

    def admit(self, slot: int, row: SamplerState) -> None:
        """Gives a slot to a new sequence."""
        self._state.sampler = self._admit(self._state.sampler, np.array(slot, np.int32), row)

    def run(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Any:
        """Runs a step function on the state; compiles it if this size of batch is new."""
        if isinstance(batch, DecodeBatch):
            return self._run_program(function, batch)
        return run_out(self.quanta(function, batch))

    def quanta(self, function: StepFunction, batch: PrefillBatch) -> Quanta:
        """Runs a step function on a prompt, or a piece of one: here in one part, and nobody knows how long it takes."""
        room = yield Quantum("step", 0, self.config.num_layers, math.inf, has_begun=False)
        while room is not None and room.choose([(math.inf, None)]) is None:
            room = yield Quantum("room", 0, self.config.num_layers, math.inf, has_begun=False)
        return self._run_program(function, batch)

    def _run_program(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Any:
        program = self._program(function, batch)
        output, state = program(self._weights, self._backend.operand, self._state.taken, batch)
        self._state.put(state)
        return output

    def warm_up(self) -> list[Callable[[], object]]:
        """One job for each program that serving can need; after all have run, nothing compiles any more."""
        return self._compilations(self.buckets.prefill)

    @property
    def copied_bytes(self) -> int:
        """Of routed experts, to devices, so far."""
        return 0

    def activity(self) -> Activity:
        """What device and CPU did lately; nothing where no experts are computed beside the device's programs."""
        return Activity() if self.lane is None else activity_of(self.lane.jobs())

    @property
    def has_gaps(self) -> bool:
        """Whether prompts are computed while decode steps leave the device for routed experts on the CPU."""
        return False

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
        for array in jax.tree.leaves(self._state.taken):
            array.delete()
        self._state.put(self._empty_state())
        if self.lane is not None:
            with suppress(ValueError):  # of that step, if more than one of its jobs failed
                self.lane.check()

    def check_intact(self) -> None:
        """Raises `CheckpointError` if a file that is still read was cut off: then no output can be trusted. Raises
        `ValueError` for routed experts that failed beside a program that could not say so."""
        if self._guard is not None:
            self._guard.check()
        if self.lane is not None:
            self.lane.check()

    def close(self) -> None:
        """Frees the arrays at once, whoever still refers to the executor, and what its backend owns."""
        for array in jax.tree.leaves((self._weights, self._backend.operand, self._state.taken)):
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
        return jax.jit(program, donate_argnums=2).trace(self._weights, self._backend.operand, self._state.taken, batch)
