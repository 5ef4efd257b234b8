"""Attention of one sequence's queries to a run of expanded keys, for GPUs: scores never leave the chip.

The algorithm is that of arXiv 2307.08691: a block of queries walks the keys with an online softmax. Written in Pallas,
which compiles it by Triton; `interpret` runs the same code on any device, slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from hmoe_jax.core import record

MAX_QUERIES, KEYS = 128, 64
"""Queries of a block, at most, and keys that it meets together. A key's parts for two blocks of them, double-buffered,
take 80 KB of shared memory at DeepSeek-V3's widths."""

MIN_SIDE = 16
"""Of a tile that the matrix units take."""


@record
@dataclass(frozen=True)
class Softmax:
    """What queries have seen so far: the largest score, the sum of exponentials, and the mixture of values."""

    best: Float32[Array, "h t"]
    total: Float32[Array, "h t"]
    mixed: Float32[Array, "h t v"]

    @staticmethod
    def empty(num_heads: int, num_tokens: int, width: int) -> Softmax:
        nothing = jnp.full((num_heads, num_tokens), -jnp.inf, jnp.float32)
        return Softmax(nothing, jnp.zeros_like(nothing), jnp.zeros((num_heads, num_tokens, width), jnp.float32))

    def result(self, dtype: DTypeLike) -> Float[Array, "t h v"]:
        """Of queries that have seen something."""
        return jnp.swapaxes(self.mixed / self.total[..., None], 0, 1).astype(dtype)


def fits(num_tokens: int, *widths: int) -> bool:
    """Whether the kernel takes such queries, and heads of these widths: powers of two, in tiles."""
    return num_tokens % MIN_SIDE == 0 and all(width >= MIN_SIDE and width & (width - 1) == 0 for width in widths)


def attend_run(
    seen: Softmax,
    nope: Float[Array, "h t n"],
    rope: Float[Array, "h t p"],
    key: Float[Array, "h s n"],
    key_rope: Float[Array, "s p"],
    value: Float[Array, "h s v"],
    positions: Int32[Array, " t"],
    first: Int32[Array, ""],
    *,
    scale: float,
    interpret: bool = False,
) -> Softmax:
    """`seen` after the keys `first .. first + s - 1`, of which a query sees those up to its own position.

    Every query must see key 0 in the first run. `s` must be a multiple of `KEYS`, and `fits` must hold.
    """
    num_heads, num_tokens = nope.shape[:2]
    block = next(size for size in (MAX_QUERIES, 64, 32, MIN_SIDE) if num_tokens % size == 0)

    def queries(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, block, width), lambda head, i: (head, i, 0))

    def keys(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, key.shape[1], width), lambda head, i: (head, 0, 0))

    rows = pl.BlockSpec((1, block), lambda head, i: (head, i))
    softmax = (rows, rows, queries(value.shape[-1]))
    operands = (seen.best, seen.total, seen.mixed, nope, rope, key, key_rope, value, positions, first.reshape(1))
    call = pl.pallas_call(
        partial(_kernel, scale=scale),
        grid=(num_heads, num_tokens // block),
        in_specs=(
            *softmax,
            queries(nope.shape[-1]),
            queries(rope.shape[-1]),
            keys(nope.shape[-1]),
            pl.BlockSpec(key_rope.shape, lambda head, i: (0, 0)),
            keys(value.shape[-1]),
            pl.BlockSpec((block,), lambda head, i: (i,)),
            pl.BlockSpec((1,), lambda head, i: (0,)),
        ),
        out_specs=softmax,
        out_shape=[jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in operands[:3]],
        input_output_aliases={0: 0, 1: 1, 2: 2},
        compiler_params=triton.CompilerParams(num_warps=8 if block == MAX_QUERIES else 4, num_stages=2),
        interpret=interpret,
        name="flash_attention",
    )
    return Softmax(*call(*operands))


def _kernel(
    best: Any,
    total: Any,
    mixed: Any,
    nope: Any,
    rope: Any,
    key: Any,
    key_rope: Any,
    value: Any,
    positions: Any,
    first: Any,
    *outputs: Any,
    scale: float,
) -> None:
    places, begin = positions[...], first[0]
    q_nope, q_rope = nope[0], rope[0]

    def meet(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, mixed = state
        run = pl.ds(block * KEYS, KEYS)
        scores = _dot(q_nope, key[0, run].T) + _dot(q_rope, key_rope[run].T)
        slots = begin + block * KEYS + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(slots <= places[:, None], scores * scale, -jnp.inf)
        new_best = jnp.maximum(best, scores.max(axis=1))
        shrink = jnp.exp(best - new_best)
        weights = jnp.exp(scores - new_best[:, None])
        values = value[0, run]
        mixed = mixed * shrink[:, None] + _dot(weights.astype(values.dtype), values)
        return new_best, total * shrink + weights.sum(axis=1), mixed

    visible = jnp.clip(places.max() + 1 - begin, 0, key.shape[1])
    state = lax.fori_loop(0, pl.cdiv(visible, KEYS), meet, (best[0], total[0], mixed[0]))
    for output, array in zip(outputs, state, strict=True):
        output[0] = array


_dot: Callable[[Array, Array], Array] = partial(jnp.dot, preferred_element_type=jnp.float32)
