"""Which experts of a layer are copied and computed together, and in how many rows each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from hmoe_jax.exec.copies import NOBODY, Group
from hmoe_jax.exec.passes import TileShape


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
    """Groups of all experts that some token chose and that are not in the groups `ahead`, which come first."""
    copied = {int(expert) for group in ahead for expert in group.experts.flat}
    waiting = [[e for e in experts if counts[e] and e not in copied] for experts in owners]
    return _cut(layer, waiting, size)


@dataclass(frozen=True)
class Tile:
    """A part of a group's product: `rows` rows of one expert in each place, from its row `first` on.

    `slots` say which of the group's experts, one row for each device, in ascending order; `NOBODY` for padding.
    """

    first: Int32[np.ndarray, "n s"]
    rows: int
    slots: Int32[np.ndarray, "n s"]


class GroupCover:
    """Covers all rows of a group, in few tiles of which little is padding: one expert after the other.

    So a token's experts are added in the order of their numbers, whatever tiles there were room for, and whoever else
    is in the pass: no bit of its sum depends on either. `seconds` are of each shape that there is.
    """

    def __init__(self, counts: Int[np.ndarray, " e"], group: Group, seconds: Mapping[TileShape, float]):
        self._left: Int[np.ndarray, "n g"] = np.where(group.experts == NOBODY, 0, counts[group.experts])
        self._first: Int32[np.ndarray, "n g"] = np.zeros_like(group.experts)
        self._shapes, self._seconds = list(seconds), np.array(list(seconds.values()))
        self._rows, self._places = np.array(self._shapes).T

    def choices(self) -> list[TileShape]:
        """All shapes, those first that take the least time for each row of a token; [] when all are covered."""
        if not self._left.any():
            return []
        useful = self._next(self._rows[:, None, None], self._places[:, None, None]).sum(axis=(1, 2))
        return [self._shapes[i] for i in np.argsort(self._seconds / useful, kind="stable")]

    def take(self, shape: TileShape) -> Tile:
        """The next rows. An expert with more of them than a place holds has several."""
        covered = self._next(*shape)
        slots: Int32[np.ndarray, "n s"] = np.full((len(covered), shape.places), NOBODY, np.int32)
        first = np.zeros_like(slots)
        for own, row, begins, counts in zip(slots, first, self._first, covered, strict=True):
            parts = [
                (slot, begin)
                for slot, (done, count) in enumerate(zip(begins, counts, strict=True))
                for begin in range(done, done + count, shape.rows)
            ]
            for place, part in enumerate(parts):
                own[place], row[place] = part
        self._first += covered
        self._left -= covered
        return Tile(first, shape.rows, slots)

    def _next(self, rows: int | np.ndarray, places: int | np.ndarray) -> Int[np.ndarray, "*s n g"]:
        """How many rows of each expert a tile of the next ones holds."""
        needed = -(-self._left // rows)  # places
        before = np.cumsum(needed, axis=-1) - needed
        return np.minimum(self._left, np.clip(places - before, 0, needed) * rows)


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
