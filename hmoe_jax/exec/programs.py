"""The compiled step programs of one loaded model, one for each kind of step and shape bucket."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Int32

from hmoe_jax.architectures.deepseek_v3 import Weights
from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.plan import Plan
from hmoe_jax.exec.step import (
    DecodeBatch,
    DeviceState,
    PrefillBatch,
    StepModel,
    StepOutput,
    decode,
    prefill,
    prefill_scored,
)
from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.sampling import SamplerState, empty_state, set_row

StepFunction = Callable[[StepModel, DeviceState, Any], tuple[Any, DeviceState]]
Batch = TypeVar("Batch", PrefillBatch, DecodeBatch)


class Executor:
    """Runs steps of one model on its own device state. `step` is the one way to run it; not thread-safe."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        backend: ExpertBackend,
        *,
        plan: Plan,
        on_close: Callable[[], None],
    ):
        self.config, self.layout, self.buckets = config, plan.layout, plan.buckets
        self.num_slots = plan.buckets.decode[-1]
        self.expert_stats = backend.stats
        self._weights, self._backend, self._device, self._on_close = weights, backend, plan.device, on_close
        with jax.default_device(self._device):
            self._state = DeviceState(
                plan.layout.allocate(plan.dtype), empty_state(self.num_slots, config.vocab_size)
            )
            self._admit = jax.jit(set_row, donate_argnums=0)
        self._programs: dict[tuple[str, int], Callable[..., Any]] = {}

    def step(self, batch: PrefillBatch | DecodeBatch, *, scored: bool = False) -> StepOutput:
        """Runs a batch whose size is one of the buckets. `scored` asks for the log-probabilities of a prompt's tokens."""
        kind = "decode" if isinstance(batch, DecodeBatch) else "scored" if scored else "prefill"
        output, self._state = self._program(kind, batch)(self._weights, self._backend.operand, self._state, batch)
        return output

    def admit(self, slot: int, row: SamplerState) -> None:
        """Gives a slot to a new sequence."""
        with jax.default_device(self._device):
            sampler = self._admit(self._state.sampler, np.int32(slot), row)
        self._state = DeviceState(self._state.caches, sampler)

    def run(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Any:
        """Runs any step function on the state, compiled on demand: for tests and comparisons, not for serving."""
        output, self._state = self._compile(function, batch)(
            self._weights, self._backend.operand, self._state, batch
        )
        return output

    def warm_up(self, row: SamplerState) -> list[Callable[[], object]]:
        """One job for each program that serving can need; after all have run, nothing compiles any more."""
        jobs = [partial(self._program, "prefill", self.empty_prefill(size)) for size in self.buckets.prefill]
        jobs.append(partial(self._program, "scored", self.empty_prefill(self.buckets.scored)))
        jobs += [partial(self._program, "decode", self.empty_decode(size)) for size in self.buckets.decode]
        jobs.append(partial(self.admit, 0, row))
        return jobs

    @property
    def programs(self) -> dict[tuple[str, int], Callable[..., Any]]:
        """The compiled programs by kind and bucket, for inspection."""
        return dict(self._programs)

    def empty_prefill(self, size: int) -> PrefillBatch:
        zero = np.int32(0)
        tokens = np.zeros(size, np.int32)
        table = np.zeros(self.layout.table_len, np.int32)
        return PrefillBatch(tokens, tokens, zero, np.int32(1), np.bool_(False), zero, table)

    def empty_decode(self, size: int) -> DecodeBatch:
        """Padding only: writes to the scratch page and to the sampler's last row."""
        return DecodeBatch(
            tokens=np.zeros(size, np.int32),
            positions=np.zeros(size, np.int32),
            valid=np.zeros(size, np.bool_),
            slots=np.full(size, self.num_slots, np.int32),
            tables=np.zeros((size, self.layout.table_len), np.int32),
        )

    def close(self) -> None:
        self._on_close()

    def _program(self, kind: str, batch: PrefillBatch | DecodeBatch) -> Callable[..., Any]:
        key = (kind, batch.tokens.shape[0])
        if key not in self._programs:
            function: StepFunction = {"prefill": prefill, "scored": prefill_scored, "decode": decode}[kind]
            self._programs[key] = self._compile(function, batch)
        return self._programs[key]

    def _compile(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Callable[..., Any]:
        config, layout, bind = self.config, self.layout, self._backend.bind

        def program(weights: Weights, operand: Any, state: DeviceState, batch: Any):
            return function(StepModel(config, layout, weights, bind(operand)), state, batch)

        program.__name__ = f"{function.__name__}_{batch.tokens.shape[0]}"
        with jax.default_device(self._device):
            lowered = jax.jit(program, donate_argnums=2).lower(
                self._weights, self._backend.operand, self._state, batch
            )
            return lowered.compile()


def page_table(pages: list[int], layout: CacheLayout) -> Int32[np.ndarray, " p"]:
    """The pages of a sequence in order, padded to the table's length with the scratch page."""
    table = np.zeros(layout.table_len, np.int32)
    table[: len(pages)] = pages
    return table


