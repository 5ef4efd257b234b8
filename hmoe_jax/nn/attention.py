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
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, UInt

from hmoe_jax.core import AnyArray, record
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
class KeysValues:
    """Expanded latents: `key` and `value` of every head, and the rotated part of keys, which heads share."""

    key: Float[AnyArray, "h s n"]
    rope: Float[AnyArray, "s p"]
    value: Float[AnyArray, "h s v"]


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
    is_whole = context.chunk_len * RUN_CHUNKS % KEYS == 0
    plain = _attend_decompressed_gpu if is_whole and uses_flash(queries, up) else _attend_decompressed_xla
    return _native_or_xla(mla_prefill, plain, queries, up, context, scale=scale)


def attend_absorbed(queries: Queries, up: UpProjections, context: Context, *, scale: float) -> Float[Array, "t h v"]:
    """Attention of `t` sequences with one new token each. Dtypes as for `attend_decompressed`."""
    return _native_or_xla(mla_attention, _attend_absorbed_xla, queries, up, context, scale=scale)


def is_native(up: UpProjections, dtype: DTypeLike) -> bool:
    """Whether the native kernels attend with activations of `dtype`, on the CPU platform."""
    return up.pool is not None and jnp.dtype(dtype) == jnp.bfloat16


def uses_flash(queries: Queries, up: UpProjections) -> bool:
    """Whether a GPU attends by the kernel of our own."""
    num_tokens, _, nope = queries.nope.shape
    return up.on_gpu == "flash" and fits(num_tokens, nope, queries.rope.shape[-1], up.value.shape[1])


def expand_latents(up: UpProjections, latents: Float[Array, "s w"]) -> KeysValues:
    """Keys and values of every head, rounded to the latents' dtype."""
    rank = up.key.shape[-1]
    c, k_pe = latents[:, :rank], latents[:, rank:]
    return KeysValues(
        key=einsum_f32("sr,hnr->hsn", c, up.key).astype(c.dtype),
        rope=k_pe,
        value=einsum_f32("sr,hvr->hsv", c, up.value).astype(c.dtype),
    )


def scores_and_mix(queries: Queries, seen: KeysValues) -> ScoresAndMix:
    """Of queries that meet these keys and values."""
    scores = einsum_f32("thn,hsn->ths", queries.nope, seen.key) + einsum_f32("thp,sp->ths", queries.rope, seen.rope)
    return scores, lambda p: einsum_f32("ths,hsv->thv", p, seen.value)


def online_softmax(
    meet: Callable[[Int32[Array, ""], Bool[Array, "t s"]], ScoresAndMix],
    queries: Queries,
    positions: Int32[Array, " t"],
    *,
    chunk_len: int,
    num_chunks: Int32[Array, ""],
    width: int,
    scale: float,
) -> Float[Array, "t h w"]:
    """Attention to chunks in turn. `meet` has a chunk's number, and which query sees which of its slots; what nobody
    sees must not be NaN, which a weight of 0 does not stop."""
    num_tokens, num_heads = queries.nope.shape[:2]
    dtype = queries.nope.dtype

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, mixed = state
        visible = i * chunk_len + jnp.arange(chunk_len) <= positions[:, None]
        scores, mix = meet(i, visible)
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
    _, total, mixed = lax.fori_loop(0, num_chunks, step, start)
    return (mixed / total[..., None]).astype(dtype)


def _native_or_xla(
    kernel: Callable[..., Array],
    plain: Callable[..., Array],
    queries: Queries,
    up: UpProjections,
    context: Context,
    *,
    scale: float,
) -> Float[Array, "t h v"]:
    pages = context.pages
    if pages is None or not is_native(up, queries.nope.dtype):
        return plain(queries, up, context, scale=scale)

    def native(queries: Queries, up: UpProjections) -> Array:
        operands = (queries.nope, queries.rope, up.key, up.value, pages.cache, pages.tables, context.positions)
        return kernel(*operands, scale=scale, pool=up.pool)

    return lax.platform_dependent(queries, up, cpu=native, default=partial(plain, context=context, scale=scale))


def _attend_decompressed_xla(
    queries: Queries, up: UpProjections, context: Context, *, scale: float
) -> Float[Array, "t h v"]:
    def meet(index: Array, visible: Array) -> ScoresAndMix:
        return scores_and_mix(queries, expand_latents(up, _without_unseen(context.chunk(index), visible)))

    return _over_chunks(meet, queries, context, width=up.value.shape[1], scale=scale)


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
    run_len = RUN_CHUNKS * context.chunk_len

    def meet(i: Array, seen: Softmax) -> Softmax:
        first = i * run_len
        latents = jnp.concatenate([context.chunk(i * RUN_CHUNKS + j) for j in range(RUN_CHUNKS)])
        visible = (first + jnp.arange(run_len)) <= context.positions[:, None]
        run = expand_latents(up, _without_unseen(latents, visible))
        operands = (nope, rope, run.key, run.rope, run.value, context.positions, first)
        return attend_run(seen, *operands, scale=scale, interpret=interpret)

    start = Softmax.empty(nope.shape[0], nope.shape[1], up.value.shape[1])
    num_runs = -(-context.num_chunks // RUN_CHUNKS)
    return lax.fori_loop(0, num_runs, meet, start).result(queries.nope.dtype)


def _attend_absorbed_xla(
    queries: Queries, up: UpProjections, context: Context, *, scale: float
) -> Float[Array, "t h v"]:
    rank = up.key.shape[-1]
    absorbed = einsum_f32("thn,hnr->thr", queries.nope, up.key).astype(queries.nope.dtype)
    query = jnp.concatenate([absorbed, queries.rope], axis=-1)

    def meet(index: Array, visible: Array) -> ScoresAndMix:
        latents = _without_unseen(context.chunk(index), visible)
        scores = einsum_f32("thw,tsw->ths", query, latents)
        return scores, lambda p: einsum_f32("ths,tsr->thr", p, latents[..., :rank])

    mixed = _over_chunks(meet, queries, context, width=rank, scale=scale)
    return einsum_f32("thr,hvr->thv", mixed, up.value).astype(mixed.dtype)


def _over_chunks(
    meet: Callable[[Array, Array], ScoresAndMix], queries: Queries, context: Context, *, width: int, scale: float
) -> Float[Array, "t h w"]:
    sizes: dict[str, Any] = {"chunk_len": context.chunk_len, "num_chunks": context.num_chunks, "width": width}
    return online_softmax(meet, queries, context.positions, **sizes, scale=scale)


def _without_unseen(latents: Float[Array, "*t s w"], visible: Bool[Array, "t s"]) -> Float[Array, "*t s w"]:
    """Zeros where nobody looks: an earlier sequence may have left NaN in a page, which a weight of 0 does not stop."""
    seen = visible if latents.ndim == 3 else visible.any(axis=0)
    return jnp.where(seen[..., None], latents, 0)
