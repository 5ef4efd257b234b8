"""Keys of pages: equal if and only if the tokens of the page, all before them, and the salt are."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.kv.prefix import page_keys

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def test_only_full_pages_have_keys() -> None:
    assert [len(page_keys(range(n), page_size=4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


@given(TOKENS, TOKENS, st.sampled_from(["", "a"]), st.sampled_from(["", "a"]))
def test_keys_are_equal_as_far_as_everything_up_to_their_page_is(
    first: list[int], second: list[int], salt: str, other: str
) -> None:
    keys = page_keys(first, page_size=3, salt=salt), page_keys(second, page_size=3, salt=other)
    for index, (a, b) in enumerate(zip(*keys, strict=False)):
        end = 3 * (index + 1)
        assert (a == b) == (first[:end] == second[:end] and salt == other)


def test_a_key_is_the_sha256_of_the_key_before_it_and_its_tokens() -> None:
    tokens = [7, 2**31 - 1, 0, 1]
    first = sha256(sha256(b"me").digest() + np.array(tokens[:2], "<i4").tobytes()).digest()
    second = sha256(first + np.array(tokens[2:], "<i4").tobytes()).digest()
    assert page_keys(tokens, page_size=2, salt="me") == [first, second]
