"""Attention to kept keys and values, expanded block by block, against plain attention."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.nn.attention import Pages, Queries, UpProjections
from hmoe_jax.nn.expanded import Expanded, KeysValues, allocate, attend_expanded, attend_expanded_flash, expand
from tests.nn.test_attention import FP32_TOLERANCE, ROPE, SCALE, Case, in_pages, random_case


def pages_of(case: Case, dtype: jnp.dtype = jnp.float32) -> Pages:
    """What lies behind the context is NaN."""
    pages, tables = in_pages(case.latents[None], table_len=-(-len(case.latents) // 4) + 2)
    bits = jax.lax.bitcast_convert_type(jnp.asarray(pages, dtype), jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}"))
    return Pages(bits, jnp.asarray(tables[0]))


def blank(case: Case, up: UpProjections, dtype: jnp.dtype = jnp.float32) -> Expanded:
    """Another prompt left NaN in it."""
    empty = allocate(up, rope_dim=ROPE, num_positions=len(case.latents), dtype=dtype)
    return jax.tree.map(lambda array: jnp.full_like(array, 0x7FC1 if array.dtype == jnp.uint16 else jnp.nan), empty)


def in_blocks(
    case: Case, up: UpProjections, sizes: list[int], dtype: jnp.dtype, *, interpret: bool = False
) -> np.ndarray:
    """What the tokens look back at is expanded first; then each block expands its own positions and attends."""
    pages, expanded, queries = pages_of(case, dtype), blank(case, up, dtype), case.queries(dtype)
    if case.positions[0] > 0:
        expanded = expand(up, expanded, pages, jnp.arange(case.positions[0], dtype=jnp.int32))
    rows, begin = [], 0
    for size in sizes:
        # A block is padded with the last position.
        index = np.minimum(np.arange(begin, begin + size), len(case.positions) - 1)
        positions, block = jnp.asarray(case.positions[index]), Queries(queries.nope[index], queries.rope[index])
        expanded = expand(up, expanded, pages, positions)
        if interpret:
            assert isinstance(expanded, KeysValues)
            out = attend_expanded_flash(block, expanded, positions, scale=SCALE, interpret=True)
        else:
            out = attend_expanded(block, up, expanded, positions, scale=SCALE)
        rows.append(np.asarray(out, np.float32)[: len(case.positions) - begin])
        begin += size
    return np.concatenate(rows)


CASES = {
    "from the start": (random_case(list(range(13)), 13), [1, 4, 8]),
    "a later piece": (random_case(list(range(70, 150)), 150, seed=1), [64, 64]),
    "over chunks": (random_case(list(range(120, 530)), 530, seed=2), [256, 96, 64]),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_expand_their_own_positions_attend_to_all(name: str) -> None:
    case, sizes = CASES[name]
    np.testing.assert_allclose(in_blocks(case, case.up(), sizes, jnp.float32), case.formula(), atol=FP32_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_pool_attends_to_them_as_xla_does(name: str) -> None:
    case, sizes = CASES[name]
    up = case.up(jnp.bfloat16)
    plain = in_blocks(case, up, sizes, jnp.bfloat16)
    with ThreadPool(1) as pool:
        native = in_blocks(case, replace(up, pool=pool.id), sizes, jnp.bfloat16)
    # Both round at the same places; FP32 sums of another order move some of the four roundings to the neighbour.
    assert np.abs(native - plain).max() <= 4 * 2.0**-8 * np.abs(plain).max()


@pytest.mark.parametrize(("begin", "sizes"), [(0, [16, 16]), (100, [16, 32]), (1, [64])])
def test_the_kernel_for_gpus_is_plain_attention(begin: int, sizes: list[int]) -> None:
    end = begin + sum(sizes)
    case = random_case(list(range(begin, end)), end, seed=3)
    actual = in_blocks(case, case.up(), sizes, jnp.float32, interpret=True)
    np.testing.assert_allclose(actual, case.formula(), atol=FP32_TOLERANCE)


def test_there_is_room_for_every_position() -> None:
    case = random_case([0], 1)
    for num_positions in (1, 256, 257):
        held = allocate(case.up(), rope_dim=ROPE, num_positions=num_positions, dtype=jnp.float32)
        assert isinstance(held, KeysValues)
        assert num_positions <= len(held.rope) < num_positions + 256


def test_on_a_gpu_the_kernel_takes_any_number_of_positions() -> None:
    def attend(queries: Queries, up: UpProjections, expanded: KeysValues, on_gpu: str) -> jax.Array:
        positions = jnp.arange(700, 716, dtype=jnp.int32)
        return attend_expanded(queries, replace(up, on_gpu=on_gpu), expanded, positions, scale=SCALE)

    queries = Queries(jnp.zeros((16, 2, 32), jnp.bfloat16), jnp.zeros((16, 2, 16), jnp.bfloat16))
    up = UpProjections(*(jnp.zeros((2, 32, 64), jnp.bfloat16),) * 2)
    expanded = allocate(up, rope_dim=16, num_positions=3 * 256, dtype=jnp.bfloat16)
    traced = jax.jit(attend, static_argnums=3)
    for on_gpu, has_kernel in (("flash", True), ("xla", False)):
        lowered = traced.trace(queries, up, expanded, on_gpu).lower(lowering_platforms=("cuda",)).as_text()
        assert ("triton" in lowered) == has_kernel
