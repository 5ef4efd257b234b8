from __future__ import annotations

import numpy as np

from hmoe_jax.exec.batch import DecodeRow, decode_batch, prefill_batch
from hmoe_jax.kv.pages import SCRATCH_PAGE, CacheLayout

LAYOUT = CacheLayout(num_layers=1, num_pages=9, page_size=4, latent_dim=5, chunk_pages=2, max_len=21)


def test_a_prefill_is_padded_to_its_size() -> None:
    batch = prefill_batch([7, 8, 9], LAYOUT, size=5, targets=[8, 9], start=6, is_last=True, slot=2, pages=[4, 3])
    assert batch.tokens.tolist() == [7, 8, 9, 0, 0]
    assert batch.targets.tolist() == [8, 9, 0, 0, 0]
    assert (int(batch.start), int(batch.length), bool(batch.is_last), int(batch.slot)) == (6, 3, True, 2)
    assert batch.table.tolist() == [4, 3, *[SCRATCH_PAGE] * 4]


def test_padding_rows_of_a_decode_belong_to_nobody() -> None:
    rows = [DecodeRow(token=7, position=9, slot=1, pages=[5, 6, 2]), DecodeRow(token=8, position=0, slot=0, pages=[1])]
    batch = decode_batch(rows, LAYOUT, size=4, num_slots=3)
    assert batch.tokens.tolist() == [7, 8, 0, 0]
    assert batch.positions.tolist() == [9, 0, 0, 0]
    assert batch.valid.tolist() == [True, True, False, False]
    assert batch.slots.tolist() == [1, 0, 3, 3]
    assert batch.tables.shape == (4, LAYOUT.table_len)
    assert batch.tables[:2].tolist() == [[5, 6, 2, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert (batch.tables[2:] == SCRATCH_PAGE).all()


def test_batches_have_the_same_types_whatever_they_hold() -> None:
    """Else a program would be compiled again for each."""

    def types(batch: object) -> list[tuple[tuple[int, ...], np.dtype]]:
        return [(value.shape, value.dtype) for value in vars(batch).values()]

    assert types(prefill_batch([1], LAYOUT, size=4)) == types(prefill_batch([1, 2], LAYOUT, size=4, pages=[3], start=9))
    full = [DecodeRow(1, 2, 0, [1])] * 2
    assert types(decode_batch([], LAYOUT, size=2, num_slots=2)) == types(
        decode_batch(full, LAYOUT, size=2, num_slots=2)
    )
