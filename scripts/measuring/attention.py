"""Attention of a block of tokens to its whole context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hmoe_jax.kv.pages import read_chunk
from hmoe_jax.nn.attention import Context, GpuAttention, Pages, Queries, UpProjections, attend_decompressed
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
    keys = jax.random.split(jax.random.key(0), 3)
    queries = Queries(
        nope=jax.random.normal(keys[0], (block_len, heads, NOPE), jnp.bfloat16),
        rope=jax.random.normal(keys[1], (block_len, heads, ROPE), jnp.bfloat16),
    )
    up = UpProjections(
        key=jnp.full((heads, NOPE, RANK), 0.01, jnp.bfloat16),
        value=jnp.full((heads, VALUE, RANK), 0.01, jnp.bfloat16),
        pool=pool,
        on_gpu=on_gpu,
    )
    latents = jax.random.normal(keys[2], (context_len // PAGE, PAGE, RANK + ROPE), jnp.bfloat16)
    cache = jax.lax.bitcast_convert_type(latents, jnp.uint16)

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
