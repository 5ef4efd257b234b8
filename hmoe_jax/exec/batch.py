"""The input of a step: NumPy on the host, traced inside the program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from hmoe_jax.core import AnyArray, record
from hmoe_jax.kv.pages import CacheLayout


@record
@dataclass(frozen=True)
class PrefillBatch:
    """Tokens `start .. start + length - 1` of one prompt, padded to t. `targets` are the tokens after each of them.

    `is_last` says that the prompt ends here: only then is the sampled token real, and the sampler's row moved on.
    """

    tokens: Int32[AnyArray, " t"]
    targets: Int32[AnyArray, " t"]
    start: Int32[AnyArray, ""]
    length: Int32[AnyArray, ""]
    is_last: Bool[AnyArray, ""]
    slot: Int32[AnyArray, ""]
    table: Int32[AnyArray, " p"]


@record
@dataclass(frozen=True)
class DecodeBatch:
    """One token of each of b sequences. Padding has `valid` False and an empty table.

    `draws` is False where the sampled token is not used and the sampler's row stays.
    """

    tokens: Int32[AnyArray, " b"]
    positions: Int32[AnyArray, " b"]
    valid: Bool[AnyArray, " b"]
    draws: Bool[AnyArray, " b"]
    slots: Int32[AnyArray, " b"]
    tables: Int32[AnyArray, "b p"]


@dataclass(frozen=True)
class DecodeRow:
    """One sequence of a decode step: a token, its position, its slot and its pages, and whether the next one is
    drawn.
    """

    token: int
    position: int
    slot: int
    pages: Sequence[int]
    draws: bool = True


def prefill_batch(
    token_ids: Sequence[int],
    layout: CacheLayout,
    *,
    size: int,
    targets: Sequence[int] = (),
    start: int = 0,
    is_last: bool = False,
    slot: int = 0,
    pages: Sequence[int] = (),
) -> PrefillBatch:
    """Pads to `size` tokens; `targets` may be shorter than `token_ids`. Without pages it writes to the scratch page."""
    return PrefillBatch(
        tokens=_padded(token_ids, size),
        targets=_padded(targets, size),
        start=np.array(start, np.int32),
        length=np.array(len(token_ids), np.int32),
        is_last=np.array(is_last),
        slot=np.array(slot, np.int32),
        table=_padded(pages, layout.table_len),
    )


def decode_batch(rows: Sequence[DecodeRow], layout: CacheLayout, *, size: int, num_slots: int) -> DecodeBatch:
    """Pads to `size` rows. Padding uses the sampler's last row, which no sequence has, and the scratch page."""
    padding = [DecodeRow(0, 0, num_slots, ())] * (size - len(rows))
    rows = [*rows, *padding]
    return DecodeBatch(
        tokens=np.array([row.token for row in rows], np.int32),
        positions=np.array([row.position for row in rows], np.int32),
        valid=np.array([row.slot < num_slots for row in rows]),
        draws=np.array([row.slot < num_slots and row.draws for row in rows]),
        slots=np.array([row.slot for row in rows], np.int32),
        tables=np.stack([_padded(row.pages, layout.table_len) for row in rows]),
    )


def _padded(values: Sequence[int], size: int) -> Int32[np.ndarray, " n"]:
    padded = np.zeros(size, np.int32)
    padded[: len(values)] = values
    return padded
