"""The `stream` executor: prefill with experts that are copied to the devices group by group, while others compute.

A pass takes as many tokens as memory allows through all layers; of each layer `front` runs over blocks of the tokens,
then every group of experts over all tokens that chose them, then `back` over the blocks. Each of these is a *quantum*:
a small compiled program. Copies run ahead of the computation, across the layers' borders too. Decoding is that of
another executor, over the same weights.

Over several devices (mesh axis `ep`) each copies and computes its own experts for all tokens; a block's tokens are
divided for everything else. `x` and the caches are the same on all devices.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from hmoe_jax.architectures import deepseek_v3
from hmoe_jax.architectures.deepseek_v3 import Weights
from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.batch import DecodeBatch, PrefillBatch
from hmoe_jax.exec.copies import AXIS, NOBODY, CopyLane, ExpertStream, Group, Records
from hmoe_jax.exec.durations import MAX_RUNNING, WAIT_S, BlockName, Durations
from hmoe_jax.exec.groups import Tile, choose, guess, owned, tiles
from hmoe_jax.exec.guard import FileGuard
from hmoe_jax.exec.plan import Plan
from hmoe_jax.exec.programs import Executor, Quanta, Quantum, StepFunction
from hmoe_jax.exec.progress import prefill_progress
from hmoe_jax.exec.quanta import DIVIDED, EVERYWHERE, Pass, QuantumPrograms
from hmoe_jax.exec.step import (
    DeviceState,
    StepOutput,
    prefill,
    prefill_logits,
    prefill_scored,
    sample_row,
    score,
)
from hmoe_jax.kernels.grouped.routes import SortedRoutes
from hmoe_jax.nn.norm import rms_norm
from hmoe_jax.perf.cost import prefill_cost, unpack_rows, used_share
from hmoe_jax.perf.lanes import Recorder
from hmoe_jax.sampling import SamplerState

LIKELY = 0.9
"""An expert is copied before its layer's router has chosen if it is at least so probable that some token chooses it."""


@dataclass(frozen=True)
class _Prompt:
    """A piece of a prompt: its batch padded to whole blocks, on all devices."""

    everywhere: PrefillBatch
    start: int
    length: int
    block_len: int
    num_guessed: int


class StreamExecutor(Executor):
    """Prefills by streaming, and decodes as `Executor` does. Closing it ends the copy lanes as well."""

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
        super().__init__(config, weights, backend, plan=plan, guard=guard, on_close=on_close)
        stream, store = plan.stream, backend.store
        assert stream is not None
        assert store is not None
        self.stream, self._durations = stream, Durations(config, stream.rates)
        self.recorder = Recorder()
        """Of the last prefill."""
        self.watches_computing = False
        """Whether recorders time computations too, which costs a thread that waits for each."""
        self._tile_sizes: dict[str, Any] = {
            "rows": stream.tile_rows,
            "widths": stream.widths,
            "unpack_rows": unpack_rows(config, stream.rates),
        }
        self._mesh = Mesh(np.array(stream.devices), (AXIS,))
        self._records = store.record_layout
        self._num_devices = len(stream.devices)
        costs = stream.costs(self._num_devices)
        self._cost = lru_cache(maxsize=16)(lambda length: prefill_cost(config, stream.rates, length, **costs))
        # With several processes (`jax.distributed`) each runs the same quanta on devices of its own.
        local = [i for i, device in enumerate(stream.devices) if device.process_index == jax.process_index()]
        self._others = [stream.devices[i] for i in local if stream.devices[i] != plan.device]
        self.lanes = {i: CopyLane(store, stream.devices[i], stream) for i in local}
        """By the places of this process's devices in the mesh."""
        self._everywhere = jax.tree.map(self._replicate, replace(weights, norm=None, head=None))
        # Layers that differ in nothing but their numbers share programs.
        self._kinds = [str(jax.tree.map(jax.typeof, layer)) for layer in weights.layers]
        self._mirrors = self._copy_caches()
        self.quantum_programs = QuantumPrograms(config, self.layout, self._records, self._mesh, variant=stream.variant)
        self._running: deque[Array] = deque()
        self._tails: dict[tuple[str, int], Callable[..., Any]] = {}

    def quanta(self, function: StepFunction, batch: PrefillBatch) -> Quanta:
        """A prompt that is worth streaming in many parts, with a progress bar if it is long; a short one as elsewhere.

        Of several processes all must close the generator after the same quantum, or none.
        """
        if len(batch.tokens) < self.stream.least_tokens:
            return (yield from super().quanta(function, batch))
        with closing(self._streamed(function, batch)) as quanta, self._progress(batch) as advance:
            while True:
                try:
                    quantum = next(quanta)
                except StopIteration as end:
                    return end.value
                advance(quantum.predicted_s)
                yield quantum

    def _run_program(self, function: StepFunction, batch: PrefillBatch | DecodeBatch) -> Any:
        self._mirrors_are_stale = True
        return super()._run_program(function, batch)

    def _streamed(self, function: StepFunction, batch: PrefillBatch) -> Quanta:
        prompt = self._prompt(batch)
        if self._mirrors_are_stale and int(batch.start) > 0:  # it attends to what decoding may have written
            self._mirrors = self._copy_caches()
        with ExitStack() as owned:
            self.recorder = owned.enter_context(Recorder(watches_computing=self.watches_computing))
            experts = ExpertStream(self.lanes, self._mesh, depth=self.stream.depth, recorder=self.recorder)
            owned.callback(experts.close)
            owned.callback(self._running.clear)
            self._ask(experts, deque(self._guess(0, prompt)))
            state = self.quantum_programs.begin(self._everywhere.embed, prompt.everywhere)
            routes = []
            for index in range(self.config.num_layers):
                if index < self.config.num_dense_layers:
                    state = yield from self._over_blocks("dense", index, state, prompt)
                    continue
                state = yield from self._over_blocks("front", index, state, prompt)
                state, sorted_routes, ids = self.quantum_programs.sort(state)
                routes.append(_here(ids))
                state = yield from self._groups(index, state, sorted_routes, prompt, experts)
                state = yield from self._over_blocks("back", index, state, prompt)
            return self._finish(function, batch, _here(state.x), routes)

    def warm_up(self) -> list[Callable[[], object]]:
        """One job for each size of batch; a streamed prompt's programs are compiled by running one."""
        in_place = [size for size in self.buckets.prefill if size < self.stream.least_tokens]
        streamed = self.buckets.prefill[len(in_place) :]
        return [*self._compilations(in_place), *(partial(self._warm_up_prefill, size) for size in streamed)]

    def reset(self) -> None:
        for array in jax.tree.leaves(self._mirrors):
            array.delete()
        super().reset()
        self._mirrors = self._copy_caches()

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()
        for array in jax.tree.leaves((self._everywhere, self._mirrors)):
            array.delete()
        super().close()

    def _over_blocks(self, name: BlockName, index: int, state: Pass, prompt: _Prompt) -> Generator[Quantum, None, Pass]:
        layer, kind = self._everywhere.layers[index], self._kinds[index]
        for first in range(0, prompt.length, prompt.block_len):
            operands = (layer, state, self._cache(index), prompt.everywhere)
            state, cache = self.quantum_programs.block(
                name, *operands, first=first, block_len=prompt.block_len, kind=kind
            )
            self._set_cache(index, cache)
            context = prompt.start + first
            yield self._started(name, index, self._durations.block(name, prompt.block_len, context))
        return state

    def _groups(
        self, index: int, state: Pass, routes: SortedRoutes, prompt: _Prompt, experts: ExpertStream
    ) -> Generator[Quantum, None, Pass]:
        layer, ahead = index - self.config.num_dense_layers, experts.ahead
        counts = np.diff(np.asarray(_here(routes.offsets)))
        owners = owned(self.config.num_experts, self._num_devices)
        rest = choose(layer, counts, owners, size=self.stream.group_size, ahead=ahead)
        waiting = deque([*rest, *self._guess(layer + 1, prompt)])
        for _ in range(len(ahead) + len(rest)):
            # The next copy is asked for before this group computes: on a GPU it would wait for what began before it.
            self._ask(experts, waiting)
            while not experts.has_come(WAIT_S):
                yield Quantum("copies", index, self.config.num_layers, 0.0)
            group, records = experts.take()
            done: Any = records
            try:
                for tile in tiles(counts, group, **self._tile_sizes):
                    state = self._add_tile(tile, group, state, routes, records)
                    done = self.quantum_programs.done
                    yield self._started("experts", index, self._durations.tile(tile.rows, tile.slots.shape[1]))
            finally:
                experts.computing(done)
        self._ask(experts, waiting)
        return state

    def _add_tile(self, tile: Tile, group: Group, state: Pass, routes: SortedRoutes, records: Records) -> Pass:
        places = np.maximum(tile.slots, 0)
        experts = np.where(tile.slots == NOBODY, NOBODY, np.take_along_axis(group.experts, places, axis=1))
        return self.quantum_programs.tile(state, routes, experts, places, records, first=tile.first, rows=tile.rows)

    def _started(self, name: str, index: int, predicted_s: float) -> Quantum:
        """Waits until few enough quanta are under way that cancelling leaves the devices little to finish."""
        self.recorder.computing(name, self.quantum_programs.done)
        self._running.append(self.quantum_programs.done)
        if len(self._running) > MAX_RUNNING:
            self._running.popleft().block_until_ready()
        return Quantum(name, index, self.config.num_layers, predicted_s, self.quantum_programs.done)

    def _ask(self, experts: ExpertStream, waiting: deque[Group]) -> None:
        while waiting and len(experts.ahead) < self.stream.depth - 1:
            experts.ask(waiting.popleft())

    def _guess(self, layer: int, prompt: _Prompt) -> list[Group]:
        """What to copy of a layer before its router has chosen: nothing, if most of it would be in vain."""
        if layer == self.config.num_moe_layers or used_share(self.config, prompt.length) < LIKELY:
            return []
        owners = owned(self.config.num_experts, self._num_devices)
        return guess(layer, owners, size=self.stream.group_size, count=prompt.num_guessed)

    def _finish(self, function: StepFunction, batch: PrefillBatch, x: Array, routes: list[Array]) -> Any:
        """The output of `function` from the padded activations after the last layer, on the first device."""
        operands = (replace(self._weights, layers=()), self._state.sampler, batch, x, routes)
        key = (function.__name__, len(batch.tokens))
        if key not in self._tails:
            tail = partial(_TAILS[function], self.config)
            self._tails[key] = jax.jit(tail, donate_argnums=1).lower(*operands).compile()
        output, sampler = self._tails[key](*operands)
        self._state = DeviceState(self._state.caches, sampler)
        return output

    def _warm_up_prefill(self, size: int) -> None:
        """Runs a token of nobody's, and the tiles that it did not need."""
        for function in (prefill, prefill_scored):
            self.run(function, self.empty_prefill(size))
        prompt = self._prompt(self.empty_prefill(size))
        state = self.quantum_programs.begin(self._everywhere.embed, prompt.everywhere)
        state, routes, _ = self.quantum_programs.sort(state)
        nobody = np.full((self._num_devices, self.stream.group_size), NOBODY, np.int32)
        part_rows = next(iter(self.lanes.values())).source.part_rows
        part = np.zeros((self._num_devices * part_rows, self._records.num_bytes), np.uint8)
        records = (jax.device_put(part, NamedSharding(self._mesh, DIVIDED)),) * (self.stream.group_size // part_rows)
        for rows, width in itertools.product(self.stream.tile_rows, self.stream.widths):
            if rows < 2 * len(state.x) or rows == self.stream.tile_rows[0]:  # an expert has no more rows
                tile = Tile(0, rows, nobody[:, :width])
                state = self._add_tile(tile, Group(0, nobody), state, routes, records)

    def _prompt(self, batch: PrefillBatch) -> _Prompt:
        """Blocks are of equal length, which the devices divide."""
        block_len = min(self.stream.block_len, len(batch.tokens))
        block_len = -(-block_len // self._num_devices) * self._num_devices
        missing = -len(batch.tokens) % block_len
        tokens, targets = (np.pad(each, (0, missing)) for each in (batch.tokens, batch.targets))
        padded = replace(batch, tokens=tokens, targets=targets)
        everywhere = jax.device_put(padded, NamedSharding(self._mesh, EVERYWHERE))
        start, length = int(batch.start), int(batch.length)
        return _Prompt(everywhere, start, length, block_len, self._num_guessed(start, length))

    def _num_guessed(self, start: int, length: int) -> int:
        """Groups of a layer that are copied by number, before its router has chosen.

        Where the link is the limit, as many as the ring holds: it shall never rest. Else no more than come beside the
        layer's front, as groups by load are multiplied in fewer rows.
        """
        cost = self._cost(length)
        if cost.copy_s >= cost.front_s + cost.experts_s:
            return self.stream.depth - 1
        return min(self._durations.groups_beside_front(length, start, self.stream.group_size), self.stream.depth - 1)

    def _progress(self, batch: PrefillBatch) -> AbstractContextManager[Callable[[float], None]]:
        num_tokens = int(batch.length)
        cost = self._cost(num_tokens)
        return prefill_progress(cost.front_s + cost.experts_s, num_tokens=num_tokens, expected_s=cost.seconds)

    def _replicate(self, array: Array) -> Array:
        """On every device: this process's first one keeps the array itself."""
        return self._join([array, *(jax.device_put(array, device) for device in self._others)])

    def _join(self, copies: list[Array]) -> Array:
        return jax.make_array_from_single_device_arrays(copies[0].shape, NamedSharding(self._mesh, EVERYWHERE), copies)

    def _copy_caches(self) -> list[list[Array]]:
        """The caches of the other devices. Decoding writes to the first one's alone."""
        self._mirrors_are_stale = False
        return [[jax.device_put(cache, device) for device in self._others] for cache in self._state.caches]

    def _cache(self, index: int) -> Array:
        return self._join([self._state.caches[index], *self._mirrors[index]])

    def _set_cache(self, index: int, cache: Array) -> None:
        shards = {shard.device: shard.data for shard in cache.addressable_shards}
        first, self._mirrors[index] = shards[self._device], [shards[device] for device in self._others]
        caches = self._state.caches
        self._state = DeviceState((*caches[:index], first, *caches[index + 1 :]), self._state.sampler)


def _here(array: Array) -> Array:
    """The copy of this process's first device."""
    return array.addressable_data(0)


def _sampled(
    config: ModelConfig, weights: Weights, sampler: SamplerState, batch: PrefillBatch, x: Array, routes: list[Array]
) -> tuple[StepOutput, SamplerState]:
    last = lax.dynamic_slice_in_dim(x, batch.length - 1, 1)
    sampled, sampler = sample_row(weights, sampler, batch, rms_norm(last, weights.norm, config.norm_eps))
    length = len(batch.tokens)
    chosen = deepseek_v3.stack_routes(config, [ids[:length] for ids in routes], num_tokens=length)
    return StepOutput(sampled, chosen), sampler


def _scored(
    config: ModelConfig, weights: Weights, sampler: SamplerState, batch: PrefillBatch, x: Array, routes: list[Array]
) -> tuple[StepOutput, SamplerState]:
    output, sampler = _sampled(config, weights, sampler, batch, x, routes)
    hidden = rms_norm(x[: len(batch.tokens)], weights.norm, config.norm_eps)
    return replace(output, prompt=score(weights, hidden, batch.targets)), sampler


def _logits(
    config: ModelConfig, weights: Weights, sampler: SamplerState, batch: PrefillBatch, x: Array, routes: list[Array]
) -> tuple[Array, SamplerState]:
    hidden = rms_norm(x[: len(batch.tokens)], weights.norm, config.norm_eps)
    return deepseek_v3.logits(weights, hidden), sampler


_TAILS: dict[Any, Callable[..., Any]] = {prefill: _sampled, prefill_scored: _scored, prefill_logits: _logits}
"""What follows the last layer, by the step function that does the same in one program."""
