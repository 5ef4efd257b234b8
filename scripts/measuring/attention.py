"""Attention of a block of tokens, or of one token of each sequence, to the whole context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hmoe_jax.kv.pages import read_chunk
from hmoe_jax.nn.attention import (
    Context,
    GpuAttention,
    Pages,
    Queries,
    UpProjections,
    attend_absorbed,
    attend_decompressed,
)
from hmoe_jax.nn.expanded import Expanded, allocate, attend_expanded, expand
from measuring.timing import Effort, median_seconds

NOPE, ROPE, VALUE, RANK = 128, 64, 128, 512
"""Widths of DeepSeek-V3's heads and of its latents."""

PAGE, CHUNK = 64, 256


def attention_tflops(*, effort: Effort, **case: Any) -> float:
    """Of an `attention_call`. Counted are the keys and values of the whole context, from latents, and the products with
    them."""
    heads, block_len, context_len = (case[name] for name in ("heads", "block_len", "context_len"))
    pairs = block_len * (context_len - block_len / 2)
    flops = 2 * heads * ((NOPE + ROPE + VALUE) * pairs + (NOPE + VALUE) * RANK * context_len)
    return flops / median_seconds(attention_call(**case), effort) / 1e12


def attention_call(
    *, heads: int, block_len: int, context_len: int, pool: int | None = None, on_gpu: GpuAttention = "xla"
) -> Callable[[], jax.Array]:
    """The last block of a prompt of `context_len` tokens, decompressed, on JAX's default device.

    `pool` is the native thread pool that attends on the CPU platform; None leaves it to XLA.
    """
    queries, up, cache = _operands(block_len, heads, context_len // PAGE, pool=pool, on_gpu=on_gpu)

    @jax.jit
    def attend(queries: Queries, up: UpProjections, cache: jax.Array) -> jax.Array:
        table = jnp.arange(context_len // PAGE, dtype=jnp.int32)
        context = Context(
            chunk=lambda i: read_chunk(cache, table, i, chunk_pages=CHUNK // PAGE, dtype=jnp.bfloat16),
            chunk_len=CHUNK,
            num_chunks=jnp.int32(context_len // CHUNK),
            positions=jnp.arange(context_len - block_len, context_len, dtype=jnp.int32),
            pages=Pages(cache, table),
        )
        return attend_decompressed(queries, up, context, scale=0.1)

    return lambda: attend(queries, up, cache)


def kept_call(
    *, heads: int, block_len: int, context_len: int, pool: int | None = None, on_gpu: GpuAttention = "xla"
) -> Callable[[], jax.Array]:
    """The same block, where keys and values of all that is before it are kept: it adds its own, and attends."""
    queries, up, cache = _operands(block_len, heads, context_len // PAGE, pool=pool, on_gpu=on_gpu)
    pages = Pages(cache, jnp.arange(context_len // PAGE, dtype=jnp.int32))

    @partial(jax.jit, donate_argnums=2)
    def step(queries: Queries, up: UpProjections, kept: Expanded, pages: Pages, first: int) -> tuple[Array, Expanded]:
        positions = first + jnp.arange(block_len, dtype=jnp.int32)
        kept = expand(up, kept, pages, positions)
        return attend_expanded(queries, up, kept, positions, scale=0.1), kept

    kept = allocate(up, rope_dim=ROPE, num_positions=context_len, dtype=jnp.bfloat16)
    for first in range(0, context_len, block_len):
        _, kept = step(queries, up, kept, pages, first)

    def call() -> Array:
        nonlocal kept
        out, kept = step(queries, up, kept, pages, context_len - block_len)
        return out

    return call


def decode_tflops(*, effort: Effort, **case: Any) -> float:
    """Of a `decode_call`. Counted are the products of queries and probabilities with latents."""
    heads, batch, context_len = (case[name] for name in ("heads", "batch", "context_len"))
    flops = 2 * heads * (2 * RANK + ROPE) * batch * context_len
    return flops / median_seconds(decode_call(**case), effort) / 1e12


def decode_call(*, heads: int, batch: int, context_len: int, pool: int | None = None) -> Callable[[], jax.Array]:
    """One token for each of `batch` sequences of `context_len` tokens, absorbed, on JAX's default device."""
    pages_each = context_len // PAGE
    queries, up, cache = _operands(batch, heads, batch * pages_each, pool=pool, on_gpu="xla")

    @jax.jit
    def attend(queries: Queries, up: UpProjections, cache: jax.Array) -> jax.Array:
        tables = jnp.arange(batch * pages_each, dtype=jnp.int32).reshape(batch, pages_each)
        context = Context(
            chunk=lambda i: read_chunk(cache, tables, i, chunk_pages=CHUNK // PAGE, dtype=jnp.bfloat16),
            chunk_len=CHUNK,
            num_chunks=jnp.int32(context_len // CHUNK),
            positions=jnp.full(batch, context_len - 1, jnp.int32),
            pages=Pages(cache, tables),
        )
        return attend_absorbed(queries, up, context, scale=0.1)

    return lambda: attend(queries, up, cache)


def _operands(
    tokens: int, heads: int, num_pages: int, *, pool: int | None, on_gpu: GpuAttention
) -> tuple[Queries, UpProjections, jax.Array]:
    """Random queries and cache."""
    keys = jax.random.split(jax.random.key(0), 3)
    queries = Queries(
        nope=jax.random.normal(keys[0], (tokens, heads, NOPE), jnp.bfloat16),
        rope=jax.random.normal(keys[1], (tokens, heads, ROPE), jnp.bfloat16),
    )
    up = UpProjections(
        key=jnp.full((heads, NOPE, RANK), 0.01, jnp.bfloat16),
        value=jnp.full((heads, VALUE, RANK), 0.01, jnp.bfloat16),
        pool=pool,
        on_gpu=on_gpu,
    )
    latents = jax.random.normal(keys[2], (num_pages, PAGE, RANK + ROPE), jnp.bfloat16)
    return queries, up, jax.lax.bitcast_convert_type(latents, jnp.uint16)
