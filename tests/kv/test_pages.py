"""Pages: what is written at a position is read back at that position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.kv.pages import SCRATCH_PAGE, CacheLayout, read_chunk, write_latents

LAYOUT = CacheLayout(num_layers=3, num_pages=11, page_size=4, latent_dim=5, chunk_pages=2, max_len=21)


# --- sizes ---


def test_a_cache_needs_a_page_beside_the_one_for_padding() -> None:
    with pytest.raises(ValueError, match="num_pages must be at least 2, got 1"):
        CacheLayout(num_layers=1, num_pages=1, page_size=4, latent_dim=5, chunk_pages=2, max_len=3)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 200))
def test_a_table_is_whole_chunks_and_just_holds_the_longest_sequence(
    page_size: int, chunk_pages: int, max_len: int
) -> None:
    layout = CacheLayout(1, 2, page_size=page_size, latent_dim=1, chunk_pages=chunk_pages, max_len=max_len)
    assert layout.chunk_len == page_size * chunk_pages
    assert layout.table_len % chunk_pages == 0
    assert 0 <= layout.table_len * page_size - max_len < layout.chunk_len
    assert layout.pages_for(max_len) <= layout.table_len


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (21, 6)])
def test_tokens_take_whole_pages(num_tokens: int, pages: int) -> None:
    assert LAYOUT.pages_for(num_tokens) == pages


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", "uint16"), ("float32", "uint32")])
def test_there_is_one_zeroed_array_of_bits_per_layer(dtype: str, bits: str) -> None:
    caches = LAYOUT.allocate(dtype)
    assert [(cache.shape, cache.dtype) for cache in caches] == [((11, 4, 5), np.dtype(bits))] * 3
    assert not any(cache.any() for cache in caches)


# --- what lies in a page ---

WRITE, READ = jax.jit(write_latents), jax.jit(read_chunk, static_argnames=("chunk_pages", "dtype"))


def latents(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def table(*pages: int) -> np.ndarray:
    return np.array([*pages, *[SCRATCH_PAGE] * (LAYOUT.table_len - len(pages))], np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_read_back_at_their_positions_bit_for_bit(dtype: str) -> None:
    pages, values = table(7, 2, 9, 1), latents(16, 5, dtype=dtype)
    (cache, *_) = LAYOUT.allocate(dtype)
    order = np.random.default_rng(1).permutation(16).astype(np.int32)
    for part in (order[:8], order[8:]):
        cache = WRITE(cache, np.tile(pages, (8, 1)), part, np.ones(8, np.bool_), values[part])
    read = [READ(cache, pages, np.int32(chunk), chunk_pages=2, dtype=jnp.dtype(dtype)) for chunk in range(2)]
    np.testing.assert_array_equal(np.concatenate(read).view(np.uint8), values.view(np.uint8))


def test_padding_is_written_to_the_scratch_page_only() -> None:
    (cache, *_) = LAYOUT.allocate("float32")
    positions, valid = np.arange(8, dtype=np.int32), np.arange(8) < 3
    cache = np.asarray(WRITE(cache, np.tile(table(7, 2), (8, 1)), positions, valid, latents(8, 5)))
    touched = set(np.flatnonzero(cache.any(axis=(1, 2))).tolist())
    assert touched == {7, SCRATCH_PAGE}
    np.testing.assert_array_equal(cache[7, :3].view(np.float32), latents(8, 5)[:3])
    assert not cache[7, 3:].any()


def test_sequences_of_a_batch_read_their_own_pages() -> None:
    (cache, *_) = LAYOUT.allocate("float32")
    tables = np.stack([table(3, 8), table(10, 4)])
    values = latents(2, 8, 5)
    for position in range(8):
        at = np.full(2, position, np.int32)
        cache = WRITE(cache, tables, at, np.ones(2, np.bool_), values[:, position])
    read = READ(cache, tables, np.int32(0), chunk_pages=2, dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(read, values)
