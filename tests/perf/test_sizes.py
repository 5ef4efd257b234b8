"""Parameter counts against published figures, and against the checkpoints' own tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hmoe_jax.architectures.deepseek_v3_checkpoint import expected_tensors
from hmoe_jax.config import parse_config, read_config
from hmoe_jax.perf.sizes import cache_bytes_per_token, count_parameters
from tests.tiny import CONFIGS

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize(
    ("name", "total", "active", "routed"),
    [
        # Published: 671 B and 36.6 B with the head, without the embedding (README_WEIGHTS.md of DeepSeek-V3).
        ("deepseek-v3", 671_026_419_200, 36_625_618_432, 653_908_770_816),
        ("deepseek-r1", 671_026_419_200, 36_625_618_432, 653_908_770_816),
        # Published: 1.03 T (or "1 T") and 32 B.
        ("kimi-k2", 1_026_408_232_448, 31_687_095_808, 1_014_686_023_680),
    ],
)
def test_published_models_have_their_published_sizes(name: str, total: int, active: int, routed: int) -> None:
    count = count_parameters(read_config(MODELS / name))
    assert (count.total, count.active, count.routed) == (total, active, routed)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_total_is_that_of_the_checkpoint_without_scales(name: str) -> None:
    config = parse_config(CONFIGS[name])
    weights = [spec for spec in expected_tensors(config).values() if not spec.name.endswith("_scale_inv")]
    assert count_parameters(config).total == sum(math.prod(spec.shape) for spec in weights)


def test_a_tied_embedding_is_counted_once_and_is_active() -> None:
    count = count_parameters(parse_config(CONFIGS["plain"]))
    untied = count_parameters(parse_config({**CONFIGS["plain"], "tie_word_embeddings": False}))
    assert untied.total - count.total == count.embedding
    assert untied.active == count.active


def test_deepseek_v3_leaves_70_kb_per_token_in_bfloat16() -> None:
    assert cache_bytes_per_token(read_config(MODELS / "deepseek-v3"), itemsize=2) == 61 * 576 * 2
