from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.exec.copies import NOBODY, Group
from hmoe_jax.exec.groups import choose, guess, owned, tiles
from hmoe_jax.exec.passes import TILE_ROWS


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


@given(rows=st.integers(0, 5000))
def test_tiles_cover_the_busiest_expert_with_little_waste(rows: int) -> None:
    counts = np.array([rows, rows // 2])
    cover = tiles(counts, Group(0, np.array([[0, 1]], np.int32)), TILE_ROWS)
    position = 0
    for first, size in cover:
        assert first == position
        assert size in TILE_ROWS
        position += size
    assert rows <= position <= max(rows * 9 / 8, rows + TILE_ROWS[0] - 1)


def test_a_group_of_nobody_needs_no_rows() -> None:
    nobody = Group(0, np.full((2, 3), NOBODY, np.int32))
    assert tiles(np.array([4, 4]), nobody, TILE_ROWS) == []


@pytest.mark.parametrize("rows", [600, 1000, 1500])
def test_large_tiles_are_preferred(rows: int) -> None:
    cover = tiles(np.array([rows]), Group(0, np.array([[0]], np.int32)), TILE_ROWS)
    assert len(cover) <= rows // TILE_ROWS[-1] + 4
