from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.exec.copies import NOBODY, Group
from hmoe_jax.exec.groups import GroupCover, Tile, choose, guess, owned
from hmoe_jax.exec.passes import tile_rows


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


def test_the_busiest_are_grouped_together() -> None:
    counts = np.array([5, 0, 90, 7, 80, 6])
    groups = choose(3, counts, owned(6, 1), size=2, ahead=[])
    assert [group.experts.tolist() for group in groups] == [[[2, 4]], [[3, 5]], [[0, NOBODY]]]
    assert {group.layer for group in groups} == {3}


ROWS, WIDTHS = tile_rows(16), (1, 4, 6)


def padded_rows(cover: list[Tile]) -> int:
    return sum(tile.rows * tile.slots.size for tile in cover)


def tiles(
    counts: Sequence[int], group: Group, hurry: Sequence[float] = (0.0,), *, widths: tuple[int, ...] = WIDTHS
) -> list[Tile]:
    """Each tile is the choice that is so far down the list: 0 is the best, 1 the last."""
    cover = GroupCover(np.array(counts), group, rows=ROWS, widths=widths, unpack_rows=256)
    taken: list[Tile] = []
    while choices := cover.choices(is_hurried=any(hurry)):
        taken.append(choices[round(hurry[len(taken) % len(hurry)] * (len(choices) - 1))])
        cover.cover(taken[-1])
    return taken


@given(
    counts=st.lists(st.integers(0, 3000), min_size=12, max_size=12),
    num_unused=st.integers(0, 3),
    hurry=st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.0]), min_size=1, max_size=5),
)
def test_tiles_hold_every_row_once(counts: list[int], num_unused: int, hurry: list[float]) -> None:
    group = Group(0, np.arange(12, dtype=np.int32).reshape(2, 6))
    group.experts[1, 6 - num_unused :] = NOBODY
    seen = np.zeros(12, int)
    for tile in tiles(counts, group, hurry):
        assert tile.rows in ROWS
        assert tile.slots.shape[1] in WIDTHS
        for slots, first, experts in zip(tile.slots, tile.first, group.experts, strict=True):
            used = slots[slots != NOBODY]
            assert len(set(used.tolist())) == len(used)
            if len(slots) == 6:  # the whole group, in place
                assert (used == np.flatnonzero(slots != NOBODY)).all()
            for expert, row in zip(experts[used], first[slots != NOBODY], strict=True):
                assert seen[expert] == row  # rows follow each other
                seen[expert] += tile.rows
    present = [e for e in group.experts.flat if e != NOBODY]
    assert all(seen[e] >= counts[e] for e in present)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.6])
def test_padding_is_a_small_part_of_skewed_routing(exponent: float) -> None:
    """16,384 tokens, 8 of 256 experts each: groups by load hold at most 1.3 times the rows that there are."""
    share = np.arange(1, 257.0) ** -exponent
    counts = np.random.default_rng(0).multinomial(16384 * 8, share / share.sum())
    groups = choose(0, counts, owned(256, 1), size=16, ahead=[])
    widths = (1, 4, 16)
    total = sum(padded_rows(tiles(counts, group, widths=widths)) for group in groups)
    assert counts.sum() <= total <= 1.3 * counts.sum()
    # Groups by number, which are copied before the routing is known, hold busy and idle experts together.
    by_number = guess(0, owned(256, 1), size=16, count=16)
    shuffled = np.random.default_rng(1).permutation(counts)
    total = sum(padded_rows(tiles(shuffled, group, widths=widths)) for group in by_number)
    assert total <= 2 * counts.sum()


def test_a_group_of_nobody_needs_no_tiles() -> None:
    nobody = Group(0, np.full((2, 6), NOBODY, np.int32))
    assert tiles([4, 4], nobody) == []
