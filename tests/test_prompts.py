"""The forms of prompts: what each becomes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hmoe_jax.prompts import as_list, check_ids, unwrap


@pytest.mark.parametrize(
    ("prompts", "want"),
    [
        ("a text", ["a text"]),
        ([1, 2], [[1, 2]]),
        (["a", [1, 2]], ["a", [1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ([{"prompt_token_ids": [1]}], [{"prompt_token_ids": [1]}]),
        ([], []),
    ],
)
def test_one_prompt_or_many_make_a_list(prompts: Any, want: list) -> None:
    assert as_list(prompts) == want


def test_a_generator_of_prompts_is_a_list_of_them() -> None:
    assert as_list(text for text in ("a", "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("a", "a"),
        ([1, np.int64(2)], [1, 2]),
        (np.array([3, 4]), [3, 4]),
        ((5,), [5]),
        ({"prompt": "a"}, "a"),
        ({"prompt_token_ids": [1, 2]}, [1, 2]),
    ],
)
def test_every_form_is_text_or_plain_ids(prompt: Any, want: Any) -> None:
    assert unwrap(prompt) == want


@pytest.mark.parametrize("prompt", [[True], [1.5], ["a"], None, 3, b"bytes", [None]])
def test_what_is_neither_text_nor_ids_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="a prompt is text or a list of token ids, got"):
        unwrap(prompt)


@pytest.mark.parametrize("prompt", [{}, {"text": "a"}, {"prompt": "a", "multi_modal_data": 1}, {"prompt": None}])
def test_a_mapping_with_anything_else_is_refused_by_its_keys(prompt: dict) -> None:
    with pytest.raises(ValueError, match="either 'prompt' or 'prompt_token_ids', and may have a 'cache_salt', got"):
        unwrap(prompt)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ([5, 10], "token id 10 is outside the vocabulary of 10 tokens"),
        ([-1], "token id -1 is outside the vocabulary of 10 tokens"),
        ([1] * 4, "the prompt has 4 tokens, but max_model_len is 4"),
    ],
)
def test_ids_that_cannot_be_served_are_refused(ids: list[int], message: str) -> None:
    check_ids([1] * 3, vocab_size=10, max_model_len=4)
    with pytest.raises(ValueError, match=message):
        check_ids(ids, vocab_size=10, max_model_len=4)
