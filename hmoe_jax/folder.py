"""The small text files that a checkpoint folder carries beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hmoe_jax.core import ConfigError


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file, or {} where there is no such file.

    Raises `ConfigError`, naming the file, where it cannot be read or holds anything but an object.
    """
    if not Path(path).exists():
        return {}
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_text(path: Path | str) -> str:
    """A file's text; raises `ConfigError`, naming the file, where it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def special_tokens(folder: Path | str) -> dict[str, str]:
    """Special tokens by role ("bos_token", "eos_token", ...), as text; a role that is null is left out.

    tokenizer_config.json decides; special_tokens_map.json adds the roles that it does not mention. A token is
    written either as text or as an object whose "content" is the text.
    """
    folder = Path(folder)
    roles = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    tokens = {role: _content(token) for role, token in roles.items() if role.endswith("_token")}
    return {role: text for role, text in tokens.items() if text is not None}


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None  # `add_bos_token` and its like are flags, not tokens
