"""JSON without the liberties of Python's parser: one meaning per document, or an error."""

from __future__ import annotations

import json
import reprlib
from typing import Any, NoReturn

from hmoe_jax.core import CheckpointError


def parse_object(text: bytes, *, file: str) -> dict[str, Any]:
    """The JSON object in `text`: UTF-8, no duplicate keys at any level, no `NaN` or `Infinity`.

    Raises `CheckpointError` naming `file`, and nothing else, however deep the nesting or long the numbers.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_reject_constant)
    except RecursionError:
        raise CheckpointError("not valid JSON (nested too deeply)", file=file) from None
    except ValueError as error:  # bad UTF-8 and integers of thousands of digits too
        raise CheckpointError(f"not valid JSON ({error})", file=file) from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", file=file, expected="{...}", actual=reprlib.repr(value))
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python keeps the last of two equal keys, others the first: one file would be two models."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"duplicate key {reprlib.repr(key)}")
        fields[key] = value
    return fields


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
