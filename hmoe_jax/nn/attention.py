"""Multi-head latent attention over a cache of latents, in its two forms.

A token leaves `latent = [normed kv latent (r), rotated key part (p)]` in the cache. *Decompressed* attention expands
the latents into keys and values of every head: fewer multiplications when many queries meet the same context (prefill).
*Absorbed* attention moves the expansion into the query and the output, so that a decode step reads 576 values per token
instead of 40,960 (arXiv 2405.04434, section 2.1). Both walk the context in chunks with an online softmax (arXiv
2205.14135), so memory does not grow with its length, and one program serves every length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt

from hmoe_jax.core import record
from hmoe_jax.kernels.flash_attention import KEYS, Softmax, attend_run, fits
from hmoe_jax.kernels.mla_attention import mla_attention
from hmoe_jax.kernels.mla_prefill import mla_prefill
from hmoe_jax.nn.einsum import einsum_f32

GpuAttention = Literal["xla", "flash"]
"""How a GPU attends to a prompt: by XLA's programs, or by a kernel of our own where the widths fit it."""

RUN_CHUNKS = 8
"""Chunks whose keys and values are expanded together for the kernel."""


@partial(jax.tree_util.register_dataclass, data_fields=("key", "value"), meta_fields=("pool", "on_gpu"))
@dataclass(frozen=True)
class UpProjections:
    """How latents become keys and values: `key [h, n, r]`, `value [h, v, r]`.

    `pool` names the native thread pool that attends with them on the CPU platform; None leaves it to XLA.
    """

    key: Any
    value: Any
    pool: int | None = None
    on_gpu: GpuAttention = "xla"


@record
@dataclass(frozen=True)
class Queries:
    """`nope [t, h, n]` meets the expanded latents, `rope [t, h, p]` (rotated) the shared key part."""

    nope: Float[Array, "t h n"]
    rope: Float[Array, "t h p"]


@record
@dataclass(frozen=True)
class Pages:
    """Where the latents lie: slot j of page `tables[t, i]` is position `i * slots + j` of sequence t, in bits.

    One table without the axis t is that of the sequence of all tokens.
    """

    cache: UInt[Array, "pages slots w"]
    tables: Int32[Array, "*t p"]


@dataclass(frozen=True)
class Context:
    """The cached latents that queries may look at.

    `chunk(i)` is chunk i: `[s, r+p]` shared by all queries, or `[t, s, r+p]` with a sequence of its own for each. Slot
    j of chunk i is position `i*s + j`; a query sees the slots up to its own position, itself included. Only the first
    `num_chunks` (a traced scalar) are read. `pages` tells native kernels where the same latents lie.
    """

    chunk: Callable[[Int32[Array, ""]], Float[Array, "*t s w"]]
    chunk_len: int
    num_chunks: Int32[Array, ""]
    positions: Int32[Array, " t"]
    pages: Pages | None = None


ScoresAndMix = tuple[Float[Array, "t h s"], Callable[[Array], Array]]
"""Unscaled scores of a chunk, and what turns their softmax into a mixture of values."""


def attend_decompressed(
    queries: Queries, up: UpProjections, context: Context, *, scale: float
) -> Float[Array, "t h v"]:
    """Attention of all `t` tokens of one sequence. Scores and sums in FP32; the result has the queries' dtype."""
    num_tokens, _, nope = queries.nope.shape
    widths = (nope, queries.rope.shape[-1], up.value.shape[1])
    plain = _attend_decompressed_xla
    if up.on_gpu == "flash" and fits(num_tokens, *widths) and context.chunk_len * RUN_CHUNKS % KEYS == 0:
        plain = _attend_decompressed_gpu
    return _native_or_xla(mla_prefill, plain, queries, up, context, scale=scale)


def attend_absorbed(queries: Queries, up: UpProjections, context: Context, *, scale: float) -> Float[Array, "t h v"]:
    """Attention of `t` sequences with one new token each. Dtypes as for `attend_decompressed`."""
    return _native_or_xla(mla_attention, _attend_absorbed_xla, queries, up, context, scale=scale)


def _native_or_xla(
    kernel: Callable[..., Array],
    plain: Callable[..., Array],
    queries: Queries,
    up: UpProjections,
    context: Context,
    *,
    scale: float,
) -> Float[Array, "t h v"]:
    pages, pool = context.pages, up.pool
    if pool is None or pages is None or queries.nope.dtype != jnp.bfloat16:
        return plain(queries, up, context, scale=scale)

    def native(queries: Queries, up: UpProjections) -> Array:
        operands = (queries.nope, queries.rope, up.key, up.value, pages.cache, pages.tables, context.positions)
        return kernel(*operands, scale=scale, pool=pool)

    return lax.platform_dependent(queries, up, cpu=native, default=partial(plain, context=context, scale=scale))


def _attend_decompressed_xla(
    queries: Queries, up: UpProjections, context: Context, *, scale: float
) -> Float[Array, "t h v"]:
    rank = up.key.shape[-1]

    def scores_and_values(latents: Float[Array, "s w"]) -> ScoresAndMix:
        c, k_pe = latents[:, :rank], latents[:, rank:]
        k = einsum_f32("sr,hnr->shn", c, up.key).astype(c.dtype)
        v = einsum_f32("sr,hvr->shv", c, up.value).astype(c.dtype)
        scores = einsum_f32("thn,shn->ths", queries.nope, k) + einsum_f32("thp,sp->ths", queries.rope, k_pe)
        return scores, lambda p: einsum_f32("ths,shv->thv", p, v)

    return _online_softmax(scores_and_values, queries, context, width=up.value.shape[1], scale=scale)


def _attend_decompressed_gpu(
    queries: Queries, up: UpProjections, context: Context, *, scale: float
) -> Float[Array, "t h v"]:
    def flash(queries: Queries, up: UpProjections) -> Float[Array, "t h v"]:
        return attend_decompressed_flash(queries, up, context, scale=scale)

    def xla(queries: Queries, up: UpProjections) -> Float[Array, "t h v"]:
        return _attend_decompressed_xla(queries, up, context, scale=scale)

    return lax.platform_dependent(queries, up, cuda=flash, default=xla)


def attend_decompressed_flash(
    queries: Queries, up: UpProjections, context: Context, *, scale: float, interpret: bool = False
) -> Float[Array, "t h v"]:
    """As `attend_decompressed`, by the kernel for GPUs."""
    nope, rope = (jnp.swapaxes(each, 0, 1) for each in (queries.nope, queries.rope))
    rank, run_len = up.key.shape[-1], RUN_CHUNKS * context.chunk_len

    def meet(i: Array, seen: Softmax) -> Softmax:
        first = i * run_len
        latents = jnp.concatenate([context.chunk(i * RUN_CHUNKS + j) for j in range(RUN_CHUNKS)])
        visible = (first + jnp.arange(run_len)) <= context.positions[:, None]
        latents = _without_unseen(latents, visible)
        c, k_pe = latents[:, :rank], latents[:, rank:]
        key = einsum_f32("sr,hnr->hsn", c, up.key).astype(c.dtype)
        value = einsum_f32("sr,hvr->hsv", c, up.value).astype(c.dtype)
        operands = (nope, rope, key, k_pe, value, context.positions, first)
        return attend_run(seen, *operands, scale=scale, interpret=interpret)

    start = Softmax.empty(nope.shape[0], nope.shape[1], up.value.shape[1])
    num_runs = -(-context.num_chunks // RUN_CHUNKS)
    seen = lax.fori_loop(0, num_runs, meet, start)
    return jnp.swapaxes(seen.mixed / seen.total[..., None], 0, 1).astype(queries.nope.dtype)


def _attend_absorbed_xla(
    queries: Queries, up: UpProjections, context: Context, *, scale: float
) -> Float[Array, "t h v"]:
    rank = up.key.shape[-1]
    absorbed = einsum_f32("thn,hnr->thr", queries.nope, up.key).astype(queries.nope.dtype)
    query = jnp.concatenate([absorbed, queries.rope], axis=-1)

    def scores_and_values(latents: Float[Array, "t s w"]) -> ScoresAndMix:
        scores = einsum_f32("thw,tsw->ths", query, latents)
        return scores, lambda p: einsum_f32("ths,tsr->thr", p, latents[..., :rank])

    mixed = _online_softmax(scores_and_values, queries, context, width=rank, scale=scale)
    return einsum_f32("thr,hvr->thv", mixed, up.value).astype(mixed.dtype)


def _online_softmax(
    scores_and_values: Callable[[Array], ScoresAndMix], queries: Queries, context: Context, *, width: int, scale: float
) -> Float[Array, "t h w"]:
    num_tokens, num_heads = queries.nope.shape[:2]
    dtype = queries.nope.dtype

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, mixed = state
        slots = i * context.chunk_len + jnp.arange(context.chunk_len)
        visible = slots <= context.positions[:, None]
        scores, mix = scores_and_values(_without_unseen(context.chunk(i), visible))
        scores = jnp.where(visible[:, None, :], scores * scale, -jnp.inf)
        # Slot 0 is visible to every query, so `best` is finite from the first chunk on.
        new_best = jnp.maximum(best, scores.max(axis=-1))
        shrink = jnp.exp(best - new_best)
        p = jnp.exp(scores - new_best[..., None])
        return new_best, total * shrink + p.sum(axis=-1), mixed * shrink[..., None] + mix(p.astype(dtype))

    start = (
        jnp.full((num_tokens, num_heads), -jnp.inf, jnp.float32),
        jnp.zeros((num_tokens, num_heads), jnp.float32),
        jnp.zeros((num_tokens, num_heads, width), jnp.float32),
    )
    _, total, mixed = lax.fori_loop(0, context.num_chunks, step, start)
    return (mixed / total[..., None]).astype(dtype)


def _without_unseen(latents: Float[Array, "*t s w"], visible: Bool[Array, "t s"]) -> Float[Array, "*t s w"]:
    """Zeros where nobody looks: an earlier sequence may have left NaN in a page, which a weight of 0 does not stop."""
    seen = visible if latents.ndim == 3 else visible.any(axis=0)
    return jnp.where(seen[..., None], latents, 0)
