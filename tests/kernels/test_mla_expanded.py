"""Attention to keys and values that were expanded before, piece by piece, against `mla_prefill`: the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.kernels.mla_expanded import expanded_shape, mla_attend_expanded, mla_expand
from hmoe_jax.kernels.pool import ThreadPool
from tests.kernels.expert_case import XLA_ERRORS
from tests.kernels.test_mla_prefill import CASES, PrefillCase

GARBAGE = 0x7FC1
"""The bits of a NaN."""


def blank(case: PrefillCase, num_positions: int) -> jax.Array:
    heads, nope = case.key.shape[:2]
    widths = {"nope": nope, "rope": case.rope.shape[2], "value": case.value.shape[1]}
    return jnp.full(expanded_shape(heads=heads, **widths, positions=num_positions), GARBAGE, jnp.uint16)


def expand(case: PrefillCase, expanded: jax.Array, positions: Sequence[int], pool: ThreadPool) -> jax.Array:
    operands = (case.key, case.value, case.latents.view(np.uint16), case.tables[0], np.array(positions, np.int32))
    return mla_expand(expanded, *map(jnp.asarray, operands), pool=pool.id)


def attend(case: PrefillCase, expanded: jax.Array, pool: ThreadPool, tokens: slice = slice(None)) -> np.ndarray:
    operands = (
        *map(jnp.asarray, (case.nope[tokens], case.rope[tokens])),
        expanded,
        jnp.asarray(case.positions[tokens]),
    )
    value_dim = case.value.shape[1]
    return np.asarray(mla_attend_expanded(*operands, value_dim=value_dim, scale=case.scale, pool=pool.id))


@pytest.mark.parametrize("name", CASES)
def test_expanded_in_one_piece_it_is_the_prefill(pool: ThreadPool, name: str) -> None:
    case = CASES[name]
    last = int(case.positions.max())
    expanded = expand(case, blank(case, last + 1), range(last + 1), pool)
    np.testing.assert_array_equal(attend(case, expanded, pool), case.run(pool))


@pytest.mark.parametrize("sizes", [(1, 15, 16, 40, 1000), (33, 600, 70), (512, 512)])
def test_blocks_that_expand_their_own_positions_give_the_same_bits(pool: ThreadPool, sizes: tuple[int, ...]) -> None:
    case = CASES["over chunks"]
    begin, end = int(case.positions.min()), int(case.positions.max()) + 1
    expanded = expand(case, blank(case, end), range(begin), pool)  # what was there before the prompt
    rows = []
    for size in sizes:
        block = range(begin, min(begin + size, end))
        expanded = expand(case, expanded, block, pool)
        tokens = slice(block.start - int(case.positions[0]), block.stop - int(case.positions[0]))
        rows.append(attend(case, expanded, pool, tokens))
        begin = block.stop
    np.testing.assert_array_equal(np.concatenate(rows), case.run(pool)[: sum(map(len, rows))])


def test_threads_do_not_change_the_bits(isa: str) -> None:
    case = CASES["over chunks"]
    with ThreadPool(1, isa=isa) as one, ThreadPool(2, isa=isa) as two:
        each = [expand(case, blank(case, 1100), range(1100), pool) for pool in (one, two)]
        np.testing.assert_array_equal(*each)


@pytest.mark.parametrize(("begin", "end", "num_written"), [(64, 96, 32), (70, 80, 32), (90, 97, 64), (511, 513, 64)])
def test_only_positions_that_share_a_step_of_32_are_written(
    pool: ThreadPool, begin: int, end: int, num_written: int
) -> None:
    case = CASES["over chunks"]
    expanded = np.asarray(expand(case, blank(case, 1100), range(begin, end), pool))
    words = expanded.shape[2] // 512  # of a position of a head
    np.testing.assert_array_equal((expanded != GARBAGE).sum(axis=(1, 2)), num_written * words)


def test_what_shares_a_step_with_new_positions_keeps_its_bits_before_and_is_zero_behind(pool: ThreadPool) -> None:
    case = CASES["over chunks"]
    whole = np.asarray(expand(case, blank(case, 1100), range(1100), pool))
    again = np.asarray(expand(case, jnp.asarray(whole), range(700, 702), pool))
    changed = again != whole
    assert 0 < changed.sum() <= 2 * case.key.shape[0] * (704 - 702) * whole.shape[2] // 512
    assert not again[changed].any()


@pytest.mark.parametrize(
    ("held", "positions", "sentence"),
    [
        (512, [511, 512], r"positions\[1\]: expected 0 <= position < 512, which the expanded context holds, got 512"),
        (1100, [-1], r"positions\[0\]: expected 0 <= position < 1216, which the table covers, got -1"),
    ],
)
def test_positions_without_a_place_are_errors(held: int, positions: list[int], sentence: str) -> None:
    case = CASES["over chunks"]
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match=sentence):
        expand(case, blank(case, held), positions, pool).block_until_ready()


def test_an_array_of_another_layout_is_an_error() -> None:
    case = CASES["one token"]
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match=r"expanded: expected shape \[3, any, 40960\]"):
        attend(case, jnp.zeros((3, 1, 40959), jnp.uint16), pool)
