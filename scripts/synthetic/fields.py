"""The config of a model with DeepSeek-V3's true layers, but few of them, and few experts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CODECS = ("fp8_block", "bf16")


NARROW = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "moe_intermediate_size": 512,
    "intermediate_size": 4096,
}
"""Small weights beside the same cache: attention over long contexts costs as much as the experts."""


@dataclass(frozen=True)
class Size:
    """What is chosen; all widths, heads, ranks and groups stay those of DeepSeek-V3, or become those of `NARROW`."""

    num_dense_layers: int = 1
    num_moe_layers: int = 2
    num_experts: int = 32
    top_k: int = 8
    is_narrow: bool = False
    vocab_size: int = 4096
    max_len: int = 16384
    codec: str = "fp8_block"

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")


def synthetic_fields(published: Path, size: Size) -> dict[str, Any]:
    """The fields of `config.json`, from those of the published model in the folder `published`."""
    fields = json.loads((published / "config.json").read_text(encoding="utf-8"))
    if size.codec != "fp8_block":
        del fields["quantization_config"]
    widths = NARROW if size.is_narrow else {}
    return (
        fields
        | widths
        | {
            "num_hidden_layers": size.num_dense_layers + size.num_moe_layers,
            "first_k_dense_replace": size.num_dense_layers,
            "n_routed_experts": size.num_experts,
            "num_experts_per_tok": size.top_k,
            "num_nextn_predict_layers": 0,
            "vocab_size": size.vocab_size,
            "max_position_embeddings": size.max_len,
        }
    )
