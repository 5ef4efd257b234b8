"""Configurations for tests of single blocks: a tiny model's, with some fields replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hmoe_jax.config import ModelConfig, parse_config
from tests.tiny import CONFIGS


def tiny(name: str, **changes: Any) -> ModelConfig:
    return replace(parse_config(CONFIGS[name]), **changes)
