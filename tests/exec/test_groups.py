from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.exec.copies import NOBODY, Group
from hmoe_jax.exec.groups import GroupCover, Tile, choose, guess, owned
from hmoe_jax.exec.passes import TileShape, tile_shapes


def experts_of(groups: list[Group]) -> list[int]:
    return [int(e) for group in groups for e in group.experts.flat if e != NOBODY]


@given(num_experts=st.integers(1, 64), num_devices=st.integers(1, 5))
def test_every_expert_has_one_owner(num_experts: int, num_devices: int) -> None:
    owners = owned(num_experts, num_devices)
    assert [e for each in owners for e in each] == list(range(num_experts))
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


@given(
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=40),
    num_devices=st.integers(1, 3),
    size=st.integers(1, 8),
    ahead=st.integers(0, 2),
)
def test_every_used_expert_is_copied_once_to_its_owner(
    counts: list[int], num_devices: int, size: int, ahead: int
) -> None:
    owners = owned(len(counts), num_devices)
    first = guess(0, owners, size=size, count=ahead)
    rest = choose(0, np.array(counts), owners, size=size, ahead=first)
    copied = experts_of(first + rest)
    assert len(copied) == len(set(copied))
    assert set(experts_of(rest)) == {e for e, count in enumerate(counts) if count} - set(experts_of(first))
    for group in first + rest:
        assert group.experts.shape == (num_devices, size)
        for row, owner in zip(group.experts, owners, strict=True):
            assert set(row.tolist()) - {NOBODY} <= set(owner)
            is_unused = row == NOBODY
            assert (np.diff(is_unused.astype(int)) >= 0).all()  # padding comes last


def test_experts_are_copied_in_the_order_of_their_numbers() -> None:
    counts = np.array([5, 0, 90, 7, 80, 6])
    groups = choose(3, counts, owned(6, 1), size=2, ahead=guess(3, owned(6, 1), size=2, count=1))
    assert [group.experts.tolist() for group in groups] == [[[2, 3]], [[4, 5]]]
    assert {group.layer for group in groups} == {3}


SECONDS = {shape: shape.places * (256 + shape.rows) + 10.0 for shape in tile_shapes(16)}


def tiles(counts: Sequence[int], group: Group, hurry: Sequence[float] = (0.0,)) -> list[Tile]:
    """Each tile is the choice that is so far down the list: 0 is the best, 1 the last."""
    cover = GroupCover(np.array(counts), group, SECONDS)
    taken: list[Tile] = []
    while choices := cover.choices():
        assert len(choices) == len(SECONDS)
        shape = choices[round(hurry[len(taken) % len(hurry)] * (len(choices) - 1))]
        taken.append(cover.take(shape))
        assert (taken[-1].rows, taken[-1].slots.shape[1]) == shape
    return taken


@given(
    counts=st.lists(st.integers(0, 3000), min_size=12, max_size=12),
    num_unused=st.integers(0, 3),
    hurry=st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.0]), min_size=1, max_size=5),
)
def test_tiles_hold_every_row_once_one_expert_after_the_other(
    counts: list[int], num_unused: int, hurry: list[float]
) -> None:
    group = Group(0, np.arange(12, dtype=np.int32).reshape(2, 6))
    group.experts[1, 6 - num_unused :] = NOBODY
    covered: list[list[tuple[int, int]]] = [[], []]
    for tile in tiles(counts, group, hurry):
        for rows, slots, first, experts in zip(covered, tile.slots, tile.first, group.experts, strict=True):
            used = slots != NOBODY
            for expert, begin in zip(experts[slots[used]], first[used], strict=True):
                rows += [(int(expert), int(row)) for row in range(begin, min(begin + tile.rows, counts[expert]))]
    for rows, experts in zip(covered, group.experts, strict=True):
        assert rows == [(int(e), row) for e in experts if e != NOBODY for row in range(counts[e])]


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("num_tokens", [512, 4096, 32768])
def test_little_time_goes_into_padding(num_tokens: int, exponent: float) -> None:
    """However uneven 8 of 256 are chosen: at most 1.6 times that of each expert's rows at once."""
    share = np.arange(1, 257.0) ** -exponent
    counts = np.random.default_rng(0).multinomial(num_tokens * 8, share / share.sum())
    counts = np.random.default_rng(1).permutation(counts)
    groups = guess(0, owned(256, 1), size=16, count=16)
    taken = [tile for group in groups for tile in tiles(counts, group)]
    seconds = sum(SECONDS[TileShape(tile.rows, tile.slots.shape[1])] for tile in taken)
    assert seconds <= 1.6 * (256 * np.count_nonzero(counts) + counts.sum())


def test_a_group_of_nobody_needs_no_tiles() -> None:
    nobody = Group(0, np.full((2, 6), NOBODY, np.int32))
    assert tiles([4, 4], nobody) == []
