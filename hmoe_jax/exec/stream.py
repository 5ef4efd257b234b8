"""The `stream` executor: prefill with experts that are copied to the devices group by group, while others compute.

A pass takes as many tokens as memory allows through all layers; of each layer `front` runs over blocks of the tokens,
then every group of experts over all tokens that chose them, then `back` over the blocks. Each of these is a *quantum*:
a small compiled program. Copies run ahead of the computation, across the layers' borders too. Decoding is that of
another executor, over the same weights.

Over several devices (mesh axis `ep`) each copies and computes its own experts for all tokens; a block's tokens are
divided for everything else. `x` and the caches are the same on all devices. These may be others than the one that
decodes: then a thread drives them, and what a prompt leaves in the cache is handed over in the end.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int32

from hmoe_jax.architectures.deepseek_v3 import Weights
from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.activity import Activity
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.batch import PrefillBatch
from hmoe_jax.exec.copies import AXIS, NOBODY, CopyLane, ExpertStream, Group, Records
from hmoe_jax.exec.durations import MAX_RUNNING, WAIT_S, BlockName, Durations, Pace
from hmoe_jax.exec.groups import GroupCover, Tile, choose, guess, owned
from hmoe_jax.exec.guard import FileGuard
from hmoe_jax.exec.passes import TileShape
from hmoe_jax.exec.plan import Plan
from hmoe_jax.exec.prefill_thread import PrefillThread
from hmoe_jax.exec.programs import Executor, StepFunction
from hmoe_jax.exec.progress import prefill_progress
from hmoe_jax.exec.quanta import DIVIDED, EVERYWHERE, Pass, QuantumPrograms
from hmoe_jax.exec.quantum import NOWHERE, Quanta, Quantum, Room, run_out
from hmoe_jax.exec.step import (
    PromptCache,
    layer_kinds,
    prefill,
    prefill_scored,
)
from hmoe_jax.exec.tails import TAILS
from hmoe_jax.kernels.grouped.routes import SortedRoutes
from hmoe_jax.kv.pages import copy_pages
from hmoe_jax.nn.expanded import Expanded, allocate
from hmoe_jax.perf.cost import prefill_cost, used_share
from hmoe_jax.perf.lanes import Recorder, Span

Value = TypeVar("Value")
Size = TypeVar("Size", bound=Hashable)
Part = Generator[Quantum, Room | None, Value]
"""A part of `Quanta`."""

PAGES_S = 0.01
"""Pages are copied for about so long at a time, where others wait: of DeepSeek-V3 some dozen layers of 32K tokens."""

LIKELY = 0.9
"""An expert is copied before its layer's router has chosen if it is at least so probable that some token chooses it."""


@dataclass
class _Prompt:
    """A piece of a prompt: its batch padded to whole blocks, on all devices, and whether a layer's keys and values are
    kept. `room` is what its next quantum has."""

    everywhere: PrefillBatch
    start: int
    length: int
    block_lens: tuple[int, ...]
    keeps_expanded: bool
    room: Room | None = None

    def pages(self, begin: int, end: int, page_size: int) -> Int32[np.ndarray, " p"]:
        """Those that hold positions `begin .. end - 1`."""
        return np.asarray(self.everywhere.table.addressable_data(0))[begin // page_size : -(-end // page_size)]


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
        self.stream, self._durations, self._pace = stream, Durations(config, stream.rates), Pace()
        self.recorder = Recorder()
        """Of the last prefill."""
        self._in_gaps = self.recorder
        """Of the last one that was computed while others waited."""
        self.watches_computing = False
        """Whether recorders time computations too, which costs a thread that waits for each."""
        self._mesh = Mesh(np.array(stream.devices), (AXIS,))
        self._records = store.record_layout
        self._num_devices = len(stream.devices)
        costs = stream.costs(self._num_devices)
        self._cost = lru_cache(maxsize=16)(lambda length: prefill_cost(config, stream.rates, length, **costs))
        # With several processes (`jax.distributed`) each runs the same quanta on devices of its own.
        local = [i for i, device in enumerate(stream.devices) if device.process_index == jax.process_index()]
        self._others = [stream.devices[i] for i in local if stream.devices[i] != plan.device]
        self._is_apart = plan.device not in stream.devices
        self.lanes = {i: CopyLane(store, stream.devices[i], stream) for i in local}
        """By the places of this process's devices in the mesh."""
        self._everywhere = jax.tree.map(self._replicate, replace(weights, norm=None, head=None))
        self._kinds = layer_kinds(weights)
        self._blank = self._compiled_blank()
        self._mirrors, self._expanded = self._copy_caches(), self._blank()
        self.quantum_programs = QuantumPrograms(config, self.layout, self._records, self._mesh, variant=stream.variant)
        self._running: deque[Array] = deque()
        self._tails: dict[tuple[str, int], Callable[..., Any]] = {}

    def quanta(self, function: StepFunction, batch: PrefillBatch) -> Quanta:
        """A prompt that is worth streaming in many parts, with a progress bar if it is long; a short one as elsewhere.

        Of several processes all must close the generator after the same quantum, or none.
        """
        if len(batch.tokens) < self.stream.least_tokens:
            return (yield from super().quanta(function, batch))
        num_layers = self.config.num_layers
        room = yield Quantum("begin", 0, num_layers, 0.0, has_begun=False, is_elsewhere=self._is_apart)
        prompt = self._prompt(batch, room)
        yield from self._fetch_context(prompt)
        if self._is_apart:
            x, routes = yield from self._elsewhere(
                self._shown(self._streamed(replace(prompt, room=None)), batch), prompt
            )
            yield from self._hand_over(prompt)
        else:
            x, routes = yield from self._shown(self._streamed(prompt), batch)
        return self._finish(function, batch, *jax.device_put((x, routes), self._device))

    def _shown(self, quanta: Quanta, batch: PrefillBatch) -> Quanta:
        """With a progress bar."""
        with closing(quanta), self._progress(batch) as advance:
            room = None
            while True:
                try:
                    quantum = quanta.send(room)
                except StopIteration as end:
                    return end.value
                if quantum.has_begun:
                    advance(quantum.predicted_s)
                room = yield quantum

    def _elsewhere(self, quanta: Quanta, prompt: _Prompt) -> Quanta:
        """On a thread and devices of their own."""
        with closing(PrefillThread(quanta)) as thread:
            while not thread.is_done(WAIT_S if prompt.room is None else 0.0):
                thread.set_running(prompt.room != NOWHERE)  # it has a prompt's room of its own
                quantum = Quantum("elsewhere", 0, self.config.num_layers, 0.0, has_begun=False, is_elsewhere=True)
                prompt.room = yield quantum
            return thread.result()

    def _hand_over(self, prompt: _Prompt) -> Part[None]:
        """What the prompt left in the cache, to the device that decodes."""
        pages = prompt.pages(prompt.start, prompt.start + prompt.length, self.layout.page_size)

        def copy(index: int) -> Any:
            self._state.caches[index] = copy_pages(self._mirrors[index][0], self._state.caches[index], pages)
            return self._state.caches[index]

        yield from self._over_layers(copy, prompt)

    def _fetch_context(self, prompt: _Prompt) -> Part[None]:
        """What the prompt looks back at, to the other devices: they have not seen what was computed in place."""
        pages = prompt.pages(0, prompt.start, self.layout.page_size)

        def copy(index: int) -> Any:
            mirrors = self._mirrors[index]
            mirrors[:] = [copy_pages(self._state.caches[index], mirror, pages) for mirror in mirrors]
            return mirrors

        if len(pages) and self._others:
            yield from self._over_layers(copy, prompt)

    def _over_layers(self, copy: Callable[[int], Any], prompt: _Prompt) -> Part[None]:
        """Sends pages, layer by layer. Where others wait, they come in parts of `PAGES_S`."""
        index = 0
        while index < self.config.num_layers:
            yield from self._chosen("pages", index, prompt, [(0.0, None)])
            until = time.perf_counter() + PAGES_S
            while index < self.config.num_layers and time.perf_counter() < until:
                copied = copy(index)
                if prompt.room is not None:
                    jax.block_until_ready(copied)
                index += 1
            prompt.room = yield Quantum("pages", index - 1, self.config.num_layers, 0.0)

    def _streamed(self, prompt: _Prompt) -> Quanta:
        """Its value: the activations after the last layer, and the expert ids of every MoE layer."""
        with ExitStack() as owned:
            self.recorder = owned.enter_context(Recorder(watches_computing=self.watches_computing))
            experts = ExpertStream(self.lanes, self._mesh, depth=self.stream.depth, recorder=self.recorder)
            owned.callback(experts.close)
            owned.callback(self._running.clear)
            self._ask(experts, deque(self._guess(0, prompt)))
            state = self.quantum_programs.begin(self._everywhere.embed, prompt.everywhere)
            routes = []
            for index in range(self.config.num_layers):
                yield from self._expand_context(index, prompt)
                if index < self.config.num_dense_layers:
                    state = yield from self._over_blocks("attention", index, state, prompt)
                    state = yield from self._over_blocks("mlp", index, state, prompt)
                    continue
                state = yield from self._over_blocks("front", index, state, prompt)
                state, sorted_routes, ids = self.quantum_programs.sort(state)
                routes.append(_here(ids))
                state = yield from self._groups(index, state, sorted_routes, prompt, experts)
                state = yield from self._over_blocks("back", index, state, prompt)
            return _here(state.x), routes

    def warm_up(self) -> list[Callable[[], object]]:
        """One job for each size of batch; a streamed prompt's programs are compiled by running one, and so are those of
        decode steps whose gaps prompts fill."""
        in_place = [size for size in self.buckets.prefill if size < self.stream.least_tokens]
        streamed = self.buckets.prefill[len(in_place) :]
        filled = self.buckets.decode if self.stream.fills_gaps else ()
        return [
            *self._compilations(in_place),
            *(partial(self._warm_up_prefill, size) for size in streamed),
            *(partial(self.loop, self.empty_decode(size)) for size in filled),
        ]

    def activity(self) -> Activity:
        prompt, copies = tuple(self._in_gaps.computed), tuple(self._in_gaps.copies)
        return replace(super().activity(), prompt=prompt, copies=copies)

    @property
    def has_gaps(self) -> bool:
        return self.stream.fills_gaps

    @property
    def copied_bytes(self) -> int:
        return sum(lane.num_bytes for lane in self.lanes.values())

    def reset(self) -> None:
        for array in jax.tree.leaves((self._mirrors, self._expanded)):
            array.delete()
        super().reset()
        self._mirrors, self._expanded = self._copy_caches(), self._blank()

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()
        for array in jax.tree.leaves((self._everywhere, self._mirrors, self._expanded)):
            array.delete()
        super().close()

    def _expand_context(self, index: int, prompt: _Prompt) -> Part[None]:
        """Keys and values of what the prompt looks back at, where they are kept; blocks add their own."""
        if not prompt.keeps_expanded:
            return
        first, sizes = 0, [(self._durations.expand(size), size) for size in self.stream.expanded_lens]
        while first < prompt.start:
            predicted_s, size = yield from self._chosen("expand", index, prompt, sizes)
            with self._watch("expand", size, predicted_s, prompt):
                self._expand(index, prompt, first, size)
            prompt.room = yield Quantum("expand", index, self.config.num_layers, predicted_s)
            first += size

    def _expand(self, index: int, prompt: _Prompt, first: int, num_positions: int) -> None:
        positions = np.arange(first, first + num_positions, dtype=np.int32).clip(max=max(prompt.start - 1, 0))
        up, cache = self._everywhere.layers[index].attention.kv_b, self._cache(index, prompt)
        self._expanded = self.quantum_programs.expand(up, cache, prompt.everywhere, positions)

    def _over_blocks(self, name: BlockName, index: int, state: Pass, prompt: _Prompt) -> Part[Pass]:
        layer, kind = self._everywhere.layers[index], self._kinds[index]
        first = 0
        while first < prompt.length:
            blocks = [
                (self._durations.block(name, size, prompt.start + first, is_kept=prompt.keeps_expanded), size)
                for size in prompt.block_lens
                if first + size <= len(prompt.everywhere.tokens)
            ]
            predicted_s, size = yield from self._chosen(name, index, prompt, blocks)
            block: dict[str, Any] = {"first": first, "block_len": size, "kind": kind}
            with self._watch(name, size, predicted_s, prompt):
                if name in ("mlp", "back"):
                    state = self.quantum_programs.after(name, layer, state, **block)
                else:
                    operands = (layer, state, self._cache(index, prompt), prompt.everywhere)
                    state, cache = self.quantum_programs.attending(name, *operands, **block)
                    self._set_cache(index, cache)
            prompt.room = yield Quantum(name, index, self.config.num_layers, predicted_s)
            first += size
        return state

    def _groups(
        self, index: int, state: Pass, routes: SortedRoutes, prompt: _Prompt, experts: ExpertStream
    ) -> Part[Pass]:
        layer, ahead = index - self.config.num_dense_layers, experts.ahead
        counts = np.diff(np.asarray(_here(routes.offsets)))
        owners = owned(self.config.num_experts, self._num_devices)
        rest = choose(layer, counts, owners, size=self.stream.group_size, ahead=ahead)
        waiting = deque([*rest, *self._guess(layer + 1, prompt)])
        tile_s = {shape: self._durations.tile(*shape) for shape in self._tiles(len(state.x))}
        for _ in range(len(ahead) + len(rest)):
            # The next copy is asked for before this group computes: on a GPU it would wait for what began before it.
            self._ask(experts, waiting)
            while not experts.has_come(WAIT_S if prompt.room is None else 0.0):
                prompt.room = yield Quantum("copies", index, self.config.num_layers, 0.0, has_begun=False)
            group, records = experts.take()
            done: Any = records
            try:
                cover = GroupCover(counts, group, tile_s)
                while shapes := cover.choices():
                    timed = [(tile_s[shape], shape) for shape in shapes]
                    predicted_s, shape = yield from self._chosen("experts", index, prompt, timed)
                    with self._watch("experts", shape, predicted_s, prompt):
                        state = self._add_tile(cover.take(shape), group, state, routes, records)
                    done = self.quantum_programs.done
                    prompt.room = yield Quantum("experts", index, self.config.num_layers, predicted_s)
            finally:
                experts.computing(done)
        self._ask(experts, waiting)
        return state

    def _add_tile(self, tile: Tile, group: Group, state: Pass, routes: SortedRoutes, records: Records) -> Pass:
        places = np.maximum(tile.slots, 0)
        experts = np.where(tile.slots == NOBODY, NOBODY, np.take_along_axis(group.experts, places, axis=1))
        return self.quantum_programs.tile(state, routes, experts, places, records, first=tile.first, rows=tile.rows)

    def _chosen(
        self,
        name: str,
        index: int,
        prompt: _Prompt,
        sizes: list[tuple[float, Size]],
    ) -> Part[tuple[float, Size]]:
        """The first size where nobody waits; else, once there is one, what fits the room by what is known by now of
        the device's speed with such quanta."""
        while prompt.room is not None:
            expected = [(self._pace.expected(name, size, seconds), (seconds, size)) for seconds, size in sizes]
            fitting = prompt.room.choose(expected)
            if fitting is not None:
                return fitting[1]
            prompt.room = yield Quantum("room", index, self.config.num_layers, 0.0, has_begun=False)
        return sizes[0]

    @contextmanager
    def _watch(self, name: str, size: Hashable, predicted_s: float, prompt: _Prompt) -> Iterator[None]:
        """Around the start of a quantum. Waits until it is over where others wait; else until few enough are under way
        that cancelling leaves the devices little to finish."""
        if prompt.room is not None:
            jax.block_until_ready([self._running.popleft() for _ in range(len(self._running))])
        begin = time.perf_counter()
        yield
        done = self.quantum_programs.done
        if prompt.room is not None:
            done.block_until_ready()
            span = Span(name, begin, time.perf_counter())
            self.recorder.computed.append(span)
            self._in_gaps = self.recorder
            self._pace.learn(name, size, predicted_s, span.end - span.begin)
            return
        self.recorder.computing(name, done)
        self._running.append(done)
        if len(self._running) > MAX_RUNNING:
            self._running.popleft().block_until_ready()

    def _ask(self, experts: ExpertStream, waiting: deque[Group]) -> None:
        while waiting and len(experts.ahead) < self.stream.depth - 1:
            experts.ask(waiting.popleft())

    def _guess(self, layer: int, prompt: _Prompt) -> list[Group]:
        """What to copy of a layer before its router has chosen, as the link shall not rest: as much as the ring holds,
        or nothing if too much of it would be in vain."""
        if layer == self.config.num_moe_layers or used_share(self.config, prompt.length) < LIKELY:
            return []
        owners = owned(self.config.num_experts, self._num_devices)
        return guess(layer, owners, size=self.stream.group_size, count=self.stream.depth - 1)

    def _finish(self, function: StepFunction, batch: PrefillBatch, x: Array, routes: list[Array]) -> Any:
        """The output of `function` from the padded activations after the last layer, on the first device."""
        operands = (replace(self._weights, layers=()), self._state.sampler, batch, x, routes)
        key = (function.__name__, len(batch.tokens))
        if key not in self._tails:
            tail = partial(TAILS[function], self.config)
            self._tails[key] = jax.jit(tail, donate_argnums=1).lower(*operands).compile()
        output, self._state.sampler = self._tails[key](*operands)
        return output

    def _warm_up_prefill(self, size: int) -> None:
        """Runs a token of nobody's, and what it did not need: other blocks, a context before it, tiles."""
        for function in (prefill, prefill_scored):
            self.run(function, self.empty_prefill(size))
        prompt = self._prompt(self.empty_prefill(size))
        run_out(self._fetch_context(replace(prompt, start=1)))
        if prompt.keeps_expanded:
            for num_positions in self.stream.expanded_lens:
                self._expand(0, prompt, 0, num_positions)
        state = self.quantum_programs.begin(self._everywhere.embed, prompt.everywhere)
        forms = {prompt.keeps_expanded, self.stream.keeps(self.layout.max_len)}
        for index in {kind: index for index, kind in enumerate(self._kinds)}.values():
            is_dense = index < self.config.num_dense_layers
            names: tuple[BlockName, ...] = ("attention", "mlp") if is_dense else ("front", "back")
            for name, block_len, is_kept in itertools.product(names, prompt.block_lens, forms):
                other = replace(prompt, block_lens=(block_len,), keeps_expanded=is_kept)
                state = run_out(self._over_blocks(name, index, state, other))
        state, routes, _ = self.quantum_programs.sort(state)
        nobody = np.full((self._num_devices, self.stream.group_size), NOBODY, np.int32)
        part_rows = next(iter(self.lanes.values())).source.part_rows
        part = np.zeros((self._num_devices * part_rows, self._records.num_bytes), np.uint8)
        records = (jax.device_put(part, NamedSharding(self._mesh, DIVIDED)),) * (self.stream.group_size // part_rows)
        for rows, places in self._tiles(len(state.x)):
            slots = nobody[:, :places]
            tile = Tile(np.zeros_like(slots), rows, slots)
            state = self._add_tile(tile, Group(0, nobody), state, routes, records)

    def _tiles(self, num_tokens: int) -> list[TileShape]:
        """An expert has no more rows than there are tokens."""
        least = min(shape.rows for shape in self.stream.tiles)
        return [shape for shape in self.stream.tiles if shape.rows < max(2 * num_tokens, least + 1)]

    def _prompt(self, batch: PrefillBatch, room: Room | None = None) -> _Prompt:
        """Blocks have one of few lengths; the longest divides the padded batch: so some block always fits the rest."""
        block_lens = self.stream.block_lens(len(batch.tokens), self._num_devices)
        missing = -len(batch.tokens) % block_lens[0]
        tokens, targets = (np.pad(each, (0, missing)) for each in (batch.tokens, batch.targets))
        padded = replace(batch, tokens=tokens, targets=targets)
        everywhere = jax.device_put(padded, NamedSharding(self._mesh, EVERYWHERE))
        start, length = int(batch.start), int(batch.length)
        return _Prompt(everywhere, start, length, block_lens, self.stream.keeps(start + length), room)

    def _progress(self, batch: PrefillBatch) -> AbstractContextManager[Callable[[float], None]]:
        num_tokens = int(batch.length)
        cost = self._cost(num_tokens)
        return prefill_progress(cost.front_s + cost.experts_s, num_tokens=num_tokens, expected_s=cost.seconds)

    def _replicate(self, array: Array) -> Array:
        """On every device: the one that decodes keeps the array itself."""
        return self._join(self._own(array) + [jax.device_put(array, device) for device in self._others])

    def _own(self, array: Array) -> list[Array]:
        """The array of the device that decodes, if prompts are computed there too."""
        return [] if self._is_apart else [array]

    def _join(self, copies: list[Array]) -> Array:
        return jax.make_array_from_single_device_arrays(copies[0].shape, NamedSharding(self._mesh, EVERYWHERE), copies)

    def _copy_caches(self) -> list[list[Array]]:
        """The caches of the other devices. Decoding writes to the first one's alone."""
        return [[jax.device_put(cache, device) for device in self._others] for cache in self._state.caches]

    def _compiled_blank(self) -> Callable[[], Expanded | None]:
        """Gives room for keys and values of a layer, on each device, if there shall be some."""
        if self.stream.expanded_len == 0:
            return lambda: None
        up, dtype = self._everywhere.layers[0].attention.kv_b, self._everywhere.embed.dtype
        sizes = {"rope_dim": self.config.rope_dim, "num_positions": self.stream.expanded_len}
        everywhere = NamedSharding(self._mesh, EVERYWHERE)
        return jax.jit(partial(allocate, up, **sizes, dtype=dtype), out_shardings=everywhere).lower().compile()

    def _cache(self, index: int, prompt: _Prompt) -> PromptCache:
        latents = self._join(self._own(self._state.caches[index]) + self._mirrors[index])
        return PromptCache(latents, self._expanded if prompt.keeps_expanded else None)

    def _set_cache(self, index: int, cache: PromptCache) -> None:
        if cache.expanded is not None:
            self._expanded = cache.expanded
        shards = {shard.device: shard.data for shard in cache.latents.addressable_shards}
        self._mirrors[index] = [shards[device] for device in self._others]
        if not self._is_apart:
            self._state.caches[index] = shards[self._device]


def _here(array: Array) -> Array:
    """The copy of this process's first device."""
    return array.addressable_data(0)
