"""`quantization_config`s as checkpoints publish them."""

from __future__ import annotations

from typing import Any

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(
    file_format: str, kind: str, bits: int, strategy: str, *, ignore: tuple[str, ...] = ("lm_head",), **weights: Any
) -> dict[str, Any]:
    """Of `quant_method` compressed-tensors: every linear module but those to `ignore`, activations as they are."""
    group = {
        "targets": ["Linear"],
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": bits,
            "type": kind,
            "strategy": strategy,
            "symmetric": True,
            "dynamic": False,
            "group_size": None,
            "block_structure": None,
            "actorder": None,
            "observer": "minmax",
            "observer_kwargs": {},
            **weights,
        },
    }
    return {
        "quant_method": "compressed-tensors",
        "format": file_format,
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


# Attention, shared experts, dense layers and head of Kimi-K2-Thinking stay in BF16.
_KIMI_IGNORE = ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")

INT4_KIMI = compressed("pack-quantized", "int", 4, "group", group_size=32, ignore=_KIMI_IGNORE)
INT4_GROUP64 = compressed("pack-quantized", "int", 4, "group", group_size=64)
INT4_GROUP128 = compressed("pack-quantized", "int", 4, "group", group_size=128, ignore=())
FP8_CHANNEL = compressed("float-quantized", "float", 8, "channel")
FP8_TENSOR = compressed("float-quantized", "float", 8, "tensor", ignore=())
FP8_BLOCKS = compressed("float-quantized", "float", 8, "block", block_structure=[128, 128])
FP8_ROW_BLOCKS = {**FP8, "weight_block_size": [1, 128]}
INT8_CHANNEL = compressed("int-quantized", "int", 8, "channel")

PUBLISHED = {
    "int4-kimi": INT4_KIMI,
    "int4-group64": INT4_GROUP64,
    "int4-group128": INT4_GROUP128,
    "fp8-channel": FP8_CHANNEL,
    "fp8-tensor": FP8_TENSOR,
    "fp8-blocks": FP8_BLOCKS,
    "fp8-row-blocks": FP8_ROW_BLOCKS,
    "int8-channel": INT8_CHANNEL,
}
"""One for each way in which `tests.tiny` stores a model, beside those of its other models. An empty `ignore` has the
head quantised too."""
