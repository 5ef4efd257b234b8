"""Which experts of a layer are copied and computed together, and in how many rows each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Tile:
    """A part of a group's product: rows `first .. first + rows - 1` of each of these experts of the group.

    `slots` are places in the group, one row for each device: some of them, or all in their order; `NOBODY` for padding.
    """

    first: int
    rows: int
    slots: Int32[np.ndarray, "n s"]


def tiles(
    counts: Int[np.ndarray, " e"], group: Group, *, rows: Sequence[int], widths: Sequence[int], unpack_rows: float | int
) -> list[Tile]:
    """All rows of a group, in few tiles of which little is padding. `rows` and `widths` are the sizes that there are.
    To unpack an expert costs as much as to multiply `unpack_rows` of its rows.

    Experts that have no rows left fall out. Every tile unpacks its experts anew: of all sizes the one is taken that
    costs the least for each row that belongs to a token.
    """
    loads = np.where(group.experts == NOBODY, 0, counts[group.experts])
    busiest_first = np.argsort(-loads, axis=1, kind="stable")
    first, cover = 0, []
    while (left := np.maximum(loads - first, 0)).any():
        busy = int((left > 0).sum(axis=1).max())
        width = next(width for width in widths if width >= busy)
        useful = {size: np.minimum(left, size).sum() for size in rows}
        size = min(rows, key=lambda size: (unpack_rows + size) / useful[size])
        places = busiest_first[:, :width] if width < left.shape[1] else np.indices(left.shape)[1]
        slots = np.where(np.take_along_axis(left, places, axis=1) > 0, places, NOBODY)
        cover.append(Tile(first, size, slots.astype(np.int32)))
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
