"""The two step programs, as pure functions: a piece of one prompt, or one token for each of many sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt

from hmoe_jax.architectures import deepseek_v3
from hmoe_jax.architectures.deepseek_v3 import Attend, ExpertsBeside, RoutedExperts, Tokens, Weights
from hmoe_jax.config import ModelConfig
from hmoe_jax.core import AnyArray, record
from hmoe_jax.exec.batch import DecodeBatch, PrefillBatch
from hmoe_jax.exec.state import DeviceState
from hmoe_jax.kv.pages import CacheLayout, read_chunk, write_latents
from hmoe_jax.nn.attention import Context, Pages, Queries, UpProjections, attend_absorbed, attend_decompressed
from hmoe_jax.nn.expanded import Expanded, attend_expanded, expand
from hmoe_jax.sampling import Sampled, SamplerState, report, sample

SCORED_ROWS = 128
"""Logits of so many tokens are held at a time, for the log-probabilities of a prompt."""


@record
@dataclass(frozen=True)
class StepOutput:
    """`routes` are expert ids per MoE layer and token, -1 for padding. `prompt` scores the `targets`, if asked."""

    sampled: Sampled
    routes: Int32[AnyArray, "m t k"]
    prompt: Sampled | None = None


@record
@dataclass(frozen=True)
class PromptCache:
    """Of a layer, for a prompt that is computed in blocks: the cache of latents, and keys and values that were expanded
    from the sequence's up to now, where these are kept."""

    latents: UInt[AnyArray, "pages slots w"]
    expanded: Expanded | None = None


Forward = tuple[Float[Array, "t w"], tuple[Array, ...], Int32[Array, "m t k"]]
"""(hidden states or logits, caches, routes)"""


@dataclass(frozen=True)
class StepModel:
    """What a step runs: the model, where its cache lies, and who computes its routed experts: inside the program, and
    beside it, where there is somebody."""

    config: ModelConfig
    layout: CacheLayout
    weights: Weights
    experts: RoutedExperts
    beside: ExpertsBeside | None = None


def prefill(model: StepModel, state: DeviceState, batch: PrefillBatch) -> tuple[StepOutput, DeviceState]:
    """Runs the tokens, fills the cache, samples after the last one."""
    hidden, caches, routes = _prefill_hidden(model, state, batch)
    sampled, sampler = sample_last(model.weights, state.sampler, batch, hidden)
    return StepOutput(sampled, routes), DeviceState(caches, sampler)


def prefill_scored(model: StepModel, state: DeviceState, batch: PrefillBatch) -> tuple[StepOutput, DeviceState]:
    """The same, with log-probabilities of the targets: the head runs on every token, not on one."""
    hidden, caches, routes = _prefill_hidden(model, state, batch)
    sampled, sampler = sample_last(model.weights, state.sampler, batch, hidden)
    return StepOutput(sampled, routes, score(model.weights, hidden, batch.targets)), DeviceState(caches, sampler)


def score(weights: Weights, hidden: Float[Array, "t d"], targets: Int32[Array, " t"]) -> Sampled:
    """Log-probabilities of each token's targets. Logits of `SCORED_ROWS` tokens are held at a time."""

    def in_blocks(rows: Array) -> Array:
        padded = jnp.pad(rows, ((0, -len(rows) % SCORED_ROWS), *(((0, 0),) * (rows.ndim - 1))))
        return padded.reshape(-1, SCORED_ROWS, *rows.shape[1:])

    blocks = jax.tree.map(in_blocks, (hidden, targets))
    scores = lax.map(lambda block: report(deepseek_v3.logits(weights, block[0]), block[1]), blocks)
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:])[: len(hidden)], scores)


def prefill_logits(
    model: StepModel, state: DeviceState, batch: PrefillBatch
) -> tuple[Float32[Array, "t v"], DeviceState]:
    """All logits themselves, for comparisons with other implementations."""
    hidden, caches, _ = _prefill_hidden(model, state, batch)
    return deepseek_v3.logits(model.weights, hidden), DeviceState(caches, state.sampler)


def decode(model: StepModel, state: DeviceState, batch: DecodeBatch) -> tuple[StepOutput, DeviceState]:
    """One token further for every sequence of the batch."""
    return _draw(state, batch, _decode_logits(model, state, batch))


def decode_logits(
    model: StepModel, state: DeviceState, batch: DecodeBatch
) -> tuple[Float32[Array, "b v"], DeviceState]:
    """The logits themselves, for comparisons with other implementations."""
    logits, caches, _ = _decode_logits(model, state, batch)
    return logits, DeviceState(caches, state.sampler)


def decode_in_one(model: StepModel, state: DeviceState, batch: DecodeBatch) -> tuple[StepOutput, DeviceState]:
    """As `decode`, with the routed experts beside the program, which computes the shared experts meanwhile."""
    return _draw(state, batch, _decode_beside(model, state, batch, num_parts=1))


def decode_in_two(model: StepModel, state: DeviceState, batch: DecodeBatch) -> tuple[StepOutput, DeviceState]:
    """As `decode`, the batch's halves in turn: while one half's routed experts are computed beside the program, it
    computes everything else of the other half."""
    return _draw(state, batch, _decode_beside(model, state, batch, num_parts=2))


def decode_logits_beside(
    model: StepModel, state: DeviceState, batch: DecodeBatch
) -> tuple[Float32[Array, "b v"], DeviceState]:
    """The logits of `decode_in_two`, or of `decode_in_one` where there is one sequence."""
    logits, caches, _ = _decode_beside(model, state, batch, num_parts=min(2, len(batch.tokens)))
    return logits, DeviceState(caches, state.sampler)


def sample_last(
    weights: Weights, sampler: SamplerState, batch: PrefillBatch, hidden: Float[Array, "t d"]
) -> tuple[Sampled, SamplerState]:
    """The token after the batch's last one."""
    return sample_row(weights, sampler, batch, jax.lax.dynamic_slice_in_dim(hidden, batch.length - 1, 1))


def sample_row(
    weights: Weights, sampler: SamplerState, batch: PrefillBatch, last: Float[Array, "1 d"]
) -> tuple[Sampled, SamplerState]:
    """The same from the last one's row alone. The sampler's row moves on if the prompt ends there."""
    return sample(sampler, batch.slot[None], deepseek_v3.logits(weights, last), batch.is_last[None])


def prefill_tokens(batch: PrefillBatch, begin: int | Int32[Array, ""], size: int) -> Tokens:
    """Rows `begin .. begin + size - 1` of the batch."""
    offsets = begin + jnp.arange(size, dtype=jnp.int32)
    # Padding keeps the last real position, so that it adds no chunk to the loop over the context.
    positions = batch.start + jnp.minimum(offsets, batch.length - 1)
    ids = jax.lax.dynamic_slice_in_dim(batch.tokens, begin, size)
    return Tokens(ids=ids, positions=positions, valid=offsets < batch.length)


def prefill_attention(config: ModelConfig, layout: CacheLayout, batch: PrefillBatch, tokens: Tokens) -> Attend[Array]:
    """Attention of these tokens to their sequence."""

    def attend(cache: Array, queries: Queries, up: UpProjections, latents: Array) -> tuple[Array, Array]:
        cache = _with_latents(cache, batch, tokens.positions, tokens.valid, latents)
        context = _context(layout, cache, batch.table, tokens.positions, latents.dtype)
        return attend_decompressed(queries, up, context, scale=config.softmax_scale), cache

    return attend


def block_attention(
    config: ModelConfig, layout: CacheLayout, batch: PrefillBatch, tokens: Tokens, *, gather: Callable[[Array], Array]
) -> Attend[PromptCache]:
    """The same of a prompt in blocks, each of which adds its own keys and values where these are kept. `gather`
    collects rows of the devices that share a block's tokens."""
    positions, valid = gather(tokens.positions), gather(tokens.valid)

    def attend(cache: PromptCache, queries: Queries, up: UpProjections, latents: Array) -> tuple[Array, PromptCache]:
        pages = _with_latents(cache.latents, batch, positions, valid, gather(latents))
        if cache.expanded is None:
            context = _context(layout, pages, batch.table, tokens.positions, latents.dtype)
            return attend_decompressed(queries, up, context, scale=config.softmax_scale), PromptCache(pages)
        expanded = expand(up, cache.expanded, Pages(pages, batch.table), positions)
        mixed = attend_expanded(queries, up, expanded, tokens.positions, scale=config.softmax_scale)
        return mixed, PromptCache(pages, expanded)

    return attend


def decode_tokens(batch: DecodeBatch) -> Tokens:
    return Tokens(ids=batch.tokens, positions=batch.positions, valid=batch.valid)


def decode_attention(config: ModelConfig, layout: CacheLayout, batch: DecodeBatch) -> Attend[Array]:
    """Attention of each row's token to its own sequence."""

    def attend(cache: Array, queries: Queries, up: UpProjections, latents: Array) -> tuple[Array, Array]:
        cache = write_latents(cache, batch.tables, batch.positions, batch.valid, latents)
        context = _context(layout, cache, batch.tables, batch.positions, latents.dtype)
        context = replace(context, pages=Pages(cache, batch.tables))
        return attend_absorbed(queries, up, context, scale=config.softmax_scale), cache

    return attend


def in_parts(batch: DecodeBatch, num_parts: int) -> list[DecodeBatch]:
    """Of equal size, as `num_parts` divides the batch; its rows are dealt out in turn, so that each part has as much of
    the padding, which stands at the end."""
    return [jax.tree.map(lambda rows, part=part: rows[part::num_parts], batch) for part in range(num_parts)]


def layer_kinds(weights: Weights) -> list[str]:
    """Layers of the same kind differ in nothing but their numbers: they can share programs."""
    return [str(jax.tree.map(jax.typeof, layer)) for layer in weights.layers]


def _prefill_hidden(model: StepModel, state: DeviceState, batch: PrefillBatch) -> Forward:
    tokens = prefill_tokens(batch, 0, batch.tokens.shape[0])
    attend = prefill_attention(model.config, model.layout, batch, tokens)
    return deepseek_v3.forward(model.config, model.weights, tokens, state.caches, attend, model.experts)


def _decode_logits(model: StepModel, state: DeviceState, batch: DecodeBatch) -> Forward:
    tokens, attend = _tokens_and_attention(model, batch)
    hidden, caches, routes = deepseek_v3.forward(
        model.config, model.weights, tokens, state.caches, attend, model.experts
    )
    return deepseek_v3.logits(model.weights, hidden), caches, routes


def _decode_beside(model: StepModel, state: DeviceState, batch: DecodeBatch, *, num_parts: int) -> Forward:
    """`num_parts` divides the batch."""
    assert model.beside is not None
    parts = [_tokens_and_attention(model, part) for part in in_parts(batch, num_parts)]
    hidden, caches, routes = deepseek_v3.forward_in_parts(
        model.config, model.weights, parts, state.caches, model.beside
    )
    return deepseek_v3.logits(model.weights, hidden), caches, routes


def _draw(state: DeviceState, batch: DecodeBatch, computed: Forward) -> tuple[StepOutput, DeviceState]:
    """The next token of every row, from its logits."""
    logits, caches, routes = computed
    sampled, sampler = sample(state.sampler, batch.slots, logits, batch.draws)
    return StepOutput(sampled, routes), DeviceState(caches, sampler)


def _tokens_and_attention(model: StepModel, batch: DecodeBatch) -> tuple[Tokens, Attend[Array]]:
    return decode_tokens(batch), decode_attention(model.config, model.layout, batch)


def _with_latents(
    cache: Array, batch: PrefillBatch, positions: Int32[Array, " t"], valid: Bool[Array, " t"], latents: Array
) -> Array:
    tables = jnp.broadcast_to(batch.table, (positions.shape[0], batch.table.shape[0]))
    return write_latents(cache, tables, positions, valid, latents)


def _context(
    layout: CacheLayout, cache: Array, tables: Int32[Array, "*b p"], positions: Int32[Array, " t"], dtype: DTypeLike
) -> Context:
    return Context(
        chunk=lambda index: read_chunk(cache, tables, index, chunk_pages=layout.chunk_pages, dtype=dtype),
        chunk_len=layout.chunk_len,
        num_chunks=positions.max() // layout.chunk_len + 1,
        positions=positions,
        pages=Pages(cache, tables),
    )
