"""The forms in which prompts come, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Prompt = str | Sequence[int | np.integer] | np.ndarray | Mapping[str, Any]
"""Text, token ids, or vLLM's `{"prompt": text}` or `{"prompt_token_ids": ids}`, both with or without a `cache_salt`:
only prompts of the same salt find each other's beginnings in the prefix cache."""


@dataclass(frozen=True)
class PromptIds:
    """A prompt as the model takes it, and as text where it came as text."""

    token_ids: list[int]
    text: str | None = None
    cache_salt: str = ""


def as_list(prompts: Any) -> list[Prompt]:
    """A list of prompts, also from a single one. Raises `ValueError` for what is no prompt at all."""
    if isinstance(prompts, str | Mapping | bytes | bytearray):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"a prompt is text or a list of token ids, got {prompts!r}")
    items = list(prompts)
    is_ids = bool(items) and isinstance(items[0], int | np.integer) and not isinstance(items[0], bool)
    return [items] if is_ids else items


def unwrap(prompt: Any) -> str | list[int]:
    """The text or the ids of a prompt in any form. Raises `ValueError` saying which forms there are."""
    if isinstance(prompt, Mapping):
        known = [name for name in ("prompt", "prompt_token_ids") if prompt.get(name) is not None]
        if len(known) != 1 or set(prompt) - {"cache_salt"} != set(known):
            raise ValueError(
                "a prompt's mapping has either 'prompt' or 'prompt_token_ids', and may have a 'cache_salt', got "
                f"{sorted(prompt)}"
            )
        return unwrap(prompt[known[0]])
    if isinstance(prompt, str):
        return prompt
    # Bytes are text of some encoding, though they look like integers.
    is_sequence = isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes | bytearray)
    if not is_sequence or any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in prompt):
        raise ValueError(f"a prompt is text or a list of token ids, got {prompt!r}")
    return [int(i) for i in prompt]


def salt_of(prompt: Any) -> str:
    """Raises `ValueError` for a salt that is no text."""
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is not None and (not isinstance(salt, str) or not salt or not salt.isprintable()):
        raise ValueError(f"cache_salt must be a printable text that is not empty, got {salt!r}")
    return salt or ""


def check_ids(ids: Sequence[int], *, vocab_size: int, max_model_len: int) -> None:
    """Raises `ValueError` for an empty prompt, ids outside the vocabulary, and one that leaves no room for a token."""
    if not ids:
        raise ValueError("the prompt is empty")
    strange = next((i for i in ids if not 0 <= i < vocab_size), None)
    if strange is not None:
        raise ValueError(f"token id {strange} is outside the vocabulary of {vocab_size} tokens")
    if len(ids) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but max_model_len is {max_model_len} and at least one token has to be "
            "generated"
        )
