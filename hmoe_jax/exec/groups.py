"""Which experts of a layer are copied and computed together, and in how many rows each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from hmoe_jax.exec.copies import NOBODY, Group


def owned(num_experts: int, num_devices: int) -> list[range]:
    """The experts of each device: consecutive ones, as evenly as they divide."""
    edges = [device * num_experts // num_devices for device in range(num_devices + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(edges)]


def guess(layer: int, owners: Sequence[range], *, size: int, count: int) -> list[Group]:
    """The first `count` groups by number, for copies that begin before it is known who is chosen."""
    return _cut(layer, [experts[: count * size] for experts in owners], size)


def choose(
    layer: int, counts: Int[np.ndarray, " e"], owners: Sequence[range], *, size: int, ahead: Sequence[Group]
) -> list[Group]:
    """Groups of all experts that some token chose and that are not in the groups `ahead`, which come first.

    Experts with about as many tokens are grouped together, the busiest first: a group has as many rows for each of its
    experts as its busiest one needs.
    """
    copied = {int(expert) for group in ahead for expert in group.experts.flat}
    waiting = [
        sorted((e for e in experts if counts[e] and e not in copied), key=lambda e: -counts[e]) for experts in owners
    ]
    return _cut(layer, waiting, size)


def tiles(counts: Int[np.ndarray, " e"], group: Group, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(first row, number of rows) that cover the busiest expert of a group, largest first, of the given sizes.

    `sizes` ascend by factors of two; at most an eighth of the rows, or the smallest size, is too much.
    """
    chosen = group.experts[group.experts != NOBODY]
    rows, first, cover = int(counts[chosen].max(initial=0)), 0, []
    slack = max(rows // 8, sizes[0] - 1)
    while first < rows:
        left = rows - first
        fitting = [size for size in sizes if size <= left + slack]
        size = next((size for size in fitting if size >= left), fitting[-1])
        cover.append((first, size))
        first += size
    return cover


def _cut(layer: int, experts: Sequence[Sequence[int]], size: int) -> list[Group]:
    """The lists of all devices in slices of `size`, padded."""
    longest = max(len(each) for each in experts)
    groups = []
    for begin in range(0, longest, size):
        rows: Int32[np.ndarray, "n g"] = np.full((len(experts), size), NOBODY, np.int32)
        for row, each in zip(rows, experts, strict=True):
            part = each[begin : begin + size]
            row[: len(part)] = part
        groups.append(Group(layer, rows))
    return groups
