from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.exec.buckets import Buckets

BUCKETS = Buckets(prefill=(4, 16, 50), decode=(1, 4, 6), scored=16)


@pytest.mark.parametrize(
    ("num_tokens", "size"), [(1, 4), (4, 4), (5, 16), (16, 16), (17, 50), (50, 50), (51, 50), (999, 50)]
)
def test_a_prefill_takes_the_smallest_bucket_that_holds_it_or_the_largest(num_tokens: int, size: int) -> None:
    assert BUCKETS.for_prefill(num_tokens) == size


@given(st.integers(1, 6))
def test_a_decode_step_always_fits_its_bucket(num_sequences: int) -> None:
    size = BUCKETS.for_decode(num_sequences)
    assert size >= num_sequences
    assert not [smaller for smaller in BUCKETS.decode if num_sequences <= smaller < size]


@pytest.mark.parametrize("sizes", [(), (4, 4), (4, 2), (0, 4), (-1,)], ids=str)
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_sizes_must_ascend_from_one(name: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} buckets must be ascending and positive, got "):
        Buckets(**{"prefill": (1,), "decode": (1,), "scored": 1, name: sizes})


def test_a_long_prompt_is_cut_evenly_where_every_prefill_costs_the_same() -> None:
    streamed = Buckets(prefill=(8, 64), decode=(1,), balances_prefill=True)
    assert [streamed.piece_len(remaining) for remaining in (1, 64, 65, 130)] == [1, 64, 33, 44]
    stepped = Buckets(prefill=(8, 64), decode=(1,), scored=8)
    assert [stepped.piece_len(remaining) for remaining in (1, 64, 65, 130)] == [1, 64, 64, 64]
