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
    """A part of a group's product: `rows` rows of each of these experts of the group, from their rows `first` on.

    `slots` are places in the group, one row for each device: some of them, or all in their order; `NOBODY` for padding.
    """

    first: Int32[np.ndarray, "n s"]
    rows: int
    slots: Int32[np.ndarray, "n s"]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, experts of a device)"""
        return self.rows, self.slots.shape[1]


class GroupCover:
    """Covers all rows of a group with few tiles of which little is padding, one after the other.

    `rows` and `widths` (of which the last is the group's) are the sizes that there are. To unpack an expert costs as
    much as to multiply `unpack_rows` of its rows, and every tile unpacks its experts anew.
    """

    def __init__(
        self,
        counts: Int[np.ndarray, " e"],
        group: Group,
        *,
        rows: Sequence[int],
        widths: Sequence[int],
        unpack_rows: float | int,
    ):
        self._rows, self._widths, self._unpack_rows = rows, widths, unpack_rows
        self._left: Int[np.ndarray, "n g"] = np.where(group.experts == NOBODY, 0, counts[group.experts])
        self._first: Int32[np.ndarray, "n g"] = np.zeros_like(group.experts)

    def choices(self, *, is_hurried: bool) -> list[Tile]:
        """Tiles that may be next, the best first; [] when all rows are covered.

        The best has all experts that have rows left, and of all sizes the one that costs the least for each row that
        belongs to a token. Narrower ones, down to the shortest, are for who `is_hurried`.
        """
        busy = int((self._left > 0).sum(axis=1).max())
        if not busy:
            return []
        widest = next(width for width in self._widths if width >= busy)
        widths = [width for width in reversed(self._widths) if width <= widest] if is_hurried else [widest]
        return [tile for width in widths for tile in self._of_width(width)]

    def cover(self, tile: Tile) -> None:
        devices = np.arange(len(tile.slots))[:, None]
        used = tile.slots != NOBODY
        places = np.where(used, tile.slots, 0)
        np.add.at(self._first, (devices, places), np.where(used, tile.rows, 0))
        np.subtract.at(self._left, (devices, places), np.where(used, tile.rows, 0))
        np.maximum(self._left, 0, out=self._left)

    def _of_width(self, width: int) -> list[Tile]:
        """Of the experts that have the most rows left; the best first."""
        all_places = np.indices(self._left.shape)[1]
        busiest = np.argsort(-self._left, axis=1, kind="stable")[:, :width]
        places = busiest if width < self._left.shape[1] else all_places
        left = np.take_along_axis(self._left, places, axis=1)
        slots = np.where(left > 0, places, NOBODY).astype(np.int32)
        first = np.where(left > 0, np.take_along_axis(self._first, places, axis=1), 0).astype(np.int32)
        useful = {size: np.minimum(left, size).sum() for size in self._rows}
        sizes = sorted(self._rows, key=lambda size: (self._unpack_rows + size) / useful[size])
        return [Tile(first, size, slots) for size in sizes]


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
