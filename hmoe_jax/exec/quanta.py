"""The compiled programs of a streaming prefill: pure functions of a pass, divided over the devices of a mesh.

Each device has all tokens of a pass, and experts of its own. Of a block's tokens each device takes a share through
everything but the routed experts; `x` and the caches are the same on all devices afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from hmoe_jax.architectures import deepseek_v3
from hmoe_jax.architectures.deepseek_v3 import Attend, Layer, Tokens
from hmoe_jax.config import ModelConfig
from hmoe_jax.core import record, unchecked
from hmoe_jax.exec.batch import PrefillBatch
from hmoe_jax.exec.copies import AXIS, Records
from hmoe_jax.exec.durations import BlockName
from hmoe_jax.exec.step import PromptCache, block_attention, prefill_tokens
from hmoe_jax.experts.records import RecordLayout
from hmoe_jax.kernels.grouped.experts import VARIANTS
from hmoe_jax.kernels.grouped.routes import SortedRoutes, group_rows, sort_routes
from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.nn.attention import Pages, UpProjections
from hmoe_jax.nn.expanded import Expanded, expand

EVERYWHERE = PartitionSpec()
DIVIDED = PartitionSpec(AXIS)


@record
@dataclass(frozen=True)
class Pass:
    """The activations of a pass. `x` is a block's residual between the two parts of a layer.

    `routed` is what each device's own experts have given so far, one device after the other.
    """

    x: Float[Array, "t d"]
    hidden: Float[Array, "t d"]
    ids: Int32[Array, "t k"]
    weights: Float32[Array, "t k"]
    routed: Float32[Array, "nt d"]


@dataclass(frozen=True)
class _Form:
    """How a quantum's program is divided over the devices, and which arguments it takes over."""

    outputs: Any
    donated: tuple[int, ...] = ()


_PASS = unchecked(Pass, x=EVERYWHERE, hidden=EVERYWHERE, ids=EVERYWHERE, weights=EVERYWHERE, routed=DIVIDED)
_BEGIN = _Form(_PASS)
_ATTENDING = _Form((_PASS, EVERYWHERE), donated=(1, 2))
_AFTER = _Form(_PASS, donated=(1,))
_EXPAND = _Form(EVERYWHERE, donated=(1,))
_SORT = _Form((_PASS, EVERYWHERE, EVERYWHERE), donated=(0,))
_GROUP = _Form(DIVIDED, donated=(0,))


class QuantumPrograms:
    """Starts programs, and compiles them when a size is new. `done` becomes ready when the last one ends."""

    def __init__(self, config: ModelConfig, layout: CacheLayout, records: RecordLayout, mesh: Mesh, *, variant: str):
        self._config, self._layout, self._records, self._mesh, self._variant = config, layout, records, mesh, variant
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.done = jnp.zeros(1)

    def begin(self, embed: Array, batch: PrefillBatch) -> Pass:
        """The embedded tokens."""
        return self._run(_BEGIN, ("begin", len(batch.tokens)), self._begin, embed, batch)

    def attending(
        self,
        name: BlockName,
        layer: Layer,
        state: Pass,
        cache: PromptCache,
        batch: PrefillBatch,
        *,
        first: int,
        block_len: int,
        kind: str,
    ) -> tuple[Pass, PromptCache]:
        """The part of a layer with its attention ("attention" or "front"), for the tokens `first .. first + block_len -
        1`, and its cache with what they leave there.

        Layers of the same `kind` differ in nothing but their numbers: they share programs.
        """
        function = {"attention": self._attention, "front": self._front}[name]
        key = (name, len(state.x), block_len, kind, cache.expanded is not None)
        operands = (layer, state, cache, batch, np.int32(first))
        return self._run(_ATTENDING, key, partial(function, block_len=block_len), *operands)

    def after(self, name: BlockName, layer: Layer, state: Pass, *, first: int, block_len: int, kind: str) -> Pass:
        """The part after it ("mlp", or "back" after the experts), for such tokens."""
        function, key = {"mlp": self._mlp, "back": self._back}[name], (name, len(state.x), block_len, kind)
        return self._run(_AFTER, key, partial(function, block_len=block_len), layer, state, np.int32(first))

    def expand(
        self, up: UpProjections, cache: PromptCache, batch: PrefillBatch, positions: Int32[np.ndarray, " s"]
    ) -> Expanded:
        """What is kept of a layer, with keys and values of `positions` (`nn.expanded.expand`) before the batch."""
        operands = (up, cache.expanded, cache.latents, batch.table, positions)
        return self._run(_EXPAND, ("expand", len(positions)), self._expand, *operands)

    def sort(self, state: Pass) -> tuple[Pass, SortedRoutes, Array]:
        """No sums yet; the routes by expert; and the expert ids, which stay when the pass goes on."""
        return self._run(_SORT, ("sort", len(state.x)), self._sort, state)

    def tile(
        self,
        state: Pass,
        routes: SortedRoutes,
        experts: Int32[np.ndarray, "n s"],
        places: Int32[np.ndarray, "n s"],
        records: Records,
        *,
        first: Int32[np.ndarray, "n s"],
        rows: int,
    ) -> Pass:
        """The sums with `rows` rows of some experts added, from their rows `first` on.

        For each device: the experts (-1 for none) and their places among its records; all of them must be in order.
        """
        are_picked = len(records) > 1 and len(places) == 1  # they came one by one, to one device
        if are_picked:
            records = tuple(records[place] for place in places[0])
        # In one array: every operand that comes from the host costs as much as the program's dispatch.
        choice = np.stack([experts, places, first], axis=1)
        program = partial(self._group, rows=rows, are_picked=are_picked)
        key = ("group", len(state.x), rows, experts.shape[1])
        routed = self._run(_GROUP, key, program, state.routed, state.hidden, routes, choice, records)
        return replace(state, routed=routed)

    def _run(self, form: _Form, key: tuple[Any, ...], function: Callable[..., Any], *operands: Any) -> Any:
        if key not in self.compiled:
            self.compiled[key] = self._traced(form, key[0], function, *operands).lower().compile()
        result, self.done = self.compiled[key](*operands)
        return result

    def _traced(self, form: _Form, name: str, function: Callable[..., Any], *operands: Any) -> Any:
        def with_token(*operands: Any) -> tuple[Any, Array]:
            outputs = function(*operands)
            return outputs, jax.tree.leaves(outputs)[0].ravel()[:1]

        specs, outputs = tuple(jax.tree.map(_spec, operand) for operand in operands), (form.outputs, EVERYWHERE)
        divided = jax.shard_map(with_token, mesh=self._mesh, in_specs=specs, out_specs=outputs, check_vma=False)
        divided.__name__ = name
        return jax.jit(divided, donate_argnums=form.donated, keep_unused=True).trace(*operands)

    # What follows is traced.

    def _begin(self, embed: Array, batch: PrefillBatch) -> Pass:
        with jax.named_scope("embed"):
            x = embed[batch.tokens]
        slots = (len(x), self._config.top_k)
        return Pass(
            x=x,
            hidden=jnp.zeros_like(x),
            ids=jnp.full(slots, -1, jnp.int32),
            weights=jnp.zeros(slots, jnp.float32),
            routed=jnp.zeros(x.shape, jnp.float32),
        )

    def _attention(
        self, layer: Layer, state: Pass, cache: PromptCache, batch: PrefillBatch, first: Array, *, block_len: int
    ) -> tuple[Pass, PromptCache]:
        begin, own = _own_rows(first, block_len)
        tokens = prefill_tokens(batch, begin, own)
        x, cache = deepseek_v3.attention_block(
            self._config, layer, _rows(state.x, begin, own), tokens, cache, self._attend(batch, tokens)
        )
        return replace(state, x=_set_rows(state.x, first, _gather(x))), cache

    def _mlp(self, layer: Layer, state: Pass, first: Array, *, block_len: int) -> Pass:
        begin, own = _own_rows(first, block_len)
        x = deepseek_v3.dense_mlp(self._config, layer, _rows(state.x, begin, own))
        return replace(state, x=_set_rows(state.x, first, _gather(x)))

    def _front(
        self, layer: Layer, state: Pass, cache: PromptCache, batch: PrefillBatch, first: Array, *, block_len: int
    ) -> tuple[Pass, PromptCache]:
        begin, own = _own_rows(first, block_len)
        tokens = prefill_tokens(batch, begin, own)
        seam, cache = deepseek_v3.front(
            self._config, layer, _rows(state.x, begin, own), tokens, cache, self._attend(batch, tokens)
        )
        found = {"x": seam.residual, "hidden": seam.hidden, "ids": seam.ids, "weights": seam.weights}
        return replace(
            state, **{name: _set_rows(getattr(state, name), first, _gather(rows)) for name, rows in found.items()}
        ), cache

    def _expand(
        self, up: UpProjections, expanded: Expanded, latents: Array, table: Array, positions: Int32[Array, " s"]
    ) -> Expanded:
        return expand(up, expanded, Pages(latents, table), positions)

    def _sort(self, state: Pass) -> tuple[Pass, SortedRoutes, Array]:
        routes = sort_routes(state.ids, state.weights, num_experts=self._config.num_experts)
        # The ids for the caller, who keeps them; `state` is reused.
        return replace(state, routed=jnp.zeros_like(state.routed)), routes, state.ids + 0

    def _group(
        self,
        routed: Float32[Array, "t d"],
        hidden: Float[Array, "t d"],
        routes: SortedRoutes,
        choice: Int32[Array, "n 3 s"],
        records: Records,
        *,
        rows: int,
        are_picked: bool,
    ) -> Float32[Array, "t d"]:
        """`choice` is, for each device, experts, their places among the records unless they `are_picked` already, and
        their first rows."""
        experts, places, first = choice[lax.axis_index(AXIS)]
        stack = jnp.concatenate(records)
        if not are_picked:
            stack = stack[places]
        chosen = group_rows(routes, experts, first, capacity=rows, num_tokens=hidden.shape[0])
        return VARIANTS[self._variant](routed, hidden, chosen, self._records.unpack(stack))

    def _back(self, layer: Layer, state: Pass, first: Array, *, block_len: int) -> Pass:
        begin, own = _own_rows(first, block_len)
        residual, hidden = _rows(state.x, begin, own), _rows(state.hidden, begin, own)
        routed = lax.psum_scatter(_rows(state.routed, first, block_len), AXIS, scatter_dimension=0, tiled=True)
        x = deepseek_v3.back(residual, deepseek_v3.shared_experts(layer, hidden), routed)
        return replace(state, x=_set_rows(state.x, first, _gather(x)))

    def _attend(self, batch: PrefillBatch, tokens: Tokens) -> Attend[PromptCache]:
        return block_attention(self._config, self._layout, batch, tokens, gather=_gather)


def _own_rows(first: Array, block_len: int) -> tuple[Array, int]:
    """Of a block that begins at row `first`: where this device's share begins, and how many rows it is."""
    own = block_len // lax.axis_size(AXIS)
    return first + lax.axis_index(AXIS) * own, own


def _gather(rows: Array) -> Array:
    """All devices' rows, on each of them."""
    return lax.all_gather(rows, AXIS, tiled=True)


def _rows(array: Array, begin: Array, count: int) -> Array:
    return lax.dynamic_slice_in_dim(array, begin, count)


def _set_rows(array: Array, begin: Array, rows: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), begin, axis=0)


def _spec(operand: Any) -> PartitionSpec:
    sharding = getattr(operand, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else EVERYWHERE
