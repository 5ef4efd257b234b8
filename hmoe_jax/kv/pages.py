"""Paged storage of latents: the arrays, and how they are written and read. `kv.pool` hands out the pages' numbers.

Page 0 belongs to nobody: padding is written there, and unused places of a page table point at it.

The arrays hold the latents' bits as unsigned integers. XLA:CPU would update a BF16 array by widening all of it to FP32
and back, at every layer of every step, so that a step cost the size of the cache instead of the length of the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, UInt

SCRATCH_PAGE = 0

COPIED_PAGES = 16
"""That are copied from one device to another together: of DeepSeek-V3's 1.2 MB a layer."""


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of the cache. `chunk_pages` are read together by one step of attention."""

    num_layers: int
    num_pages: int
    page_size: int
    latent_dim: int
    chunk_pages: int
    max_len: int

    def __post_init__(self) -> None:
        if self.num_pages < 2:
            raise ValueError(f"num_pages must be at least 2, got {self.num_pages}")

    @property
    def chunk_len(self) -> int:
        return self.chunk_pages * self.page_size

    @property
    def table_len(self) -> int:
        """Pages in a sequence's table: enough for `max_len` tokens, rounded up to whole chunks."""
        return -(-self.max_len // self.chunk_len) * self.chunk_pages

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def num_bytes(self, dtype: DTypeLike) -> int:
        """Of all layers' pages, for latents of `dtype`."""
        slots = self.num_layers * self.num_pages * self.page_size
        return slots * self.latent_dim * jnp.dtype(dtype).itemsize

    def allocate(self, dtype: DTypeLike) -> tuple[UInt[Array, "pages slots w"], ...]:
        """One zeroed array per layer, for latents of `dtype`."""
        shape = (self.num_pages, self.page_size, self.latent_dim)
        return tuple(jnp.zeros(shape, _bits_dtype(dtype)) for _ in range(self.num_layers))


def write_latents(
    cache: UInt[Array, "pages slots w"],
    tables: Int32[Array, "t p"],
    positions: Int32[Array, " t"],
    valid: Bool[Array, " t"],
    latents: Float[Array, "t w"],
) -> UInt[Array, "pages slots w"]:
    """The cache with token i's latents at `positions[i]` of the sequence whose table is `tables[i]`."""
    page_size = cache.shape[1]
    pages = jnp.take_along_axis(tables, positions[:, None] // page_size, axis=1)[:, 0]
    bits = jax.lax.bitcast_convert_type(latents, cache.dtype)
    pages, slots = jnp.where(valid, pages, SCRATCH_PAGE), positions % page_size
    if len(bits) == 1:
        # A single row twice: else XLA makes an update of a slice of it, and XLA:CPU fuses that with copies of the whole
        # cache where a step writes to it again (a decode batch in two parts of one sequence each).
        pages, slots, bits = (jnp.repeat(each, 2, axis=0) for each in (pages, slots, bits))
    return cache.at[pages, slots].set(bits)


def read_chunk(
    cache: UInt[Array, "pages slots w"],
    tables: Int32[Array, "*b p"],
    index: Int32[Array, ""],
    *,
    chunk_pages: int,
    dtype: DTypeLike,
) -> Float[Array, "*b s w"]:
    """Chunk `index` of every sequence, as `dtype`: positions `index*s` to `index*s + s - 1`."""
    pages = jax.lax.dynamic_slice_in_dim(tables, index * chunk_pages, chunk_pages, axis=-1)
    latents = jax.lax.bitcast_convert_type(cache[pages], dtype)
    return latents.reshape(*tables.shape[:-1], chunk_pages * cache.shape[1], cache.shape[2])


def copy_pages(
    source: UInt[Array, "pages slots w"], target: UInt[Array, "pages slots w"], pages: Int32[np.ndarray, " p"]
) -> UInt[Array, "pages slots w"]:
    """`target`, which is donated, with these pages of `source`, a cache of another device. Waits for nothing."""
    for begin in range(0, len(pages), COPIED_PAGES):
        some: Int32[np.ndarray, " p"] = np.full(COPIED_PAGES, SCRATCH_PAGE, np.int32)
        some[: len(pages) - begin] = pages[begin : begin + COPIED_PAGES]
        target = _put_pages(target, some, jax.device_put(_take_pages(source, some), target.sharding))
    return target


@jax.jit
def _take_pages(cache: Array, pages: Array) -> Array:
    return cache[pages]


@partial(jax.jit, donate_argnums=0)
def _put_pages(cache: Array, pages: Array, rows: Array) -> Array:
    return cache.at[pages].set(rows)


def _bits_dtype(dtype: DTypeLike) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
