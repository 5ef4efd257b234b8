"""Small random checkpoints of the DeepSeek-V3 family: one configuration for every branch of the mathematics.

Sizes are odd and unequal, so that a swapped axis cannot go unnoticed, and few are multiples of 64 or 128, so that FP8
blocks are ragged. Weights depend on the seed and on each tensor's name only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hmoe_jax.architectures.deepseek_v3_checkpoint import describe, describe_experts, expected_shapes
from hmoe_jax.checkpoint.specs import TensorSpec
from hmoe_jax.config import ModelConfig, parse_config
from hmoe_jax.nn.linear import Projection
from hmoe_jax.quant.formats import FORMATS
from hmoe_jax.quant.quantize import quantize
from tests.quant.configs import FP8, PUBLISHED

BOS_ID, EOS_ID = 0, 1


def _fields(**fields: Any) -> dict[str, Any]:
    """Adds what all configurations share: the fields that choose the family's formulas."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "num_key_value_heads": fields["num_attention_heads"],
        **fields,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    # No YaRN, no query rank, a tied head; plain BF16 files in transformers 4's spelling.
    "plain": _fields(
        vocab_size=259,
        hidden_size=72,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=104,
        moe_intermediate_size=40,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        num_attention_heads=3,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=6,
        v_head_dim=10,
        max_position_embeddings=256,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    ),
    # DeepSeek-V3 in small: groups, YaRN with equal mscales, block FP8, an MTP layer that has to be skipped.
    "deepseek": _fields(
        vocab_size=313,
        hidden_size=192,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=264,
        moe_intermediate_size=136,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_attention_heads=5,
        q_lora_rank=88,
        kv_lora_rank=56,
        qk_nope_head_dim=24,
        qk_rope_head_dim=10,
        v_head_dim=18,
        max_position_embeddings=640,
        rope_theta=10000,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
        },
        rope_interleave=True,
        tie_word_embeddings=False,
        num_nextn_predict_layers=1,
        quantization_config=FP8,
        torch_dtype="bfloat16",
    ),
    # Kimi-K2 in small: beta_fast == beta_slow (the ramp is a step), one group, another theta and factor.
    "kimi": _fields(
        vocab_size=307,
        hidden_size=136,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=200,
        moe_intermediate_size=72,
        n_routed_experts=12,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.827,
        num_attention_heads=4,
        q_lora_rank=60,
        kv_lora_rank=44,
        qk_nope_head_dim=20,
        qk_rope_head_dim=12,
        v_head_dim=14,
        max_position_embeddings=3072,
        rope_theta=50000.0,
        rope_scaling={
            "type": "yarn",
            "factor": 32.0,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 96,
        },
        tie_word_embeddings=False,
        num_nextn_predict_layers=0,
        quantization_config=FP8,
        torch_dtype="bfloat16",
    ),
    # transformers 5's spelling, unequal mscales, FP32 files, no dense layer, gates not normalised.
    "mscales": _fields(
        vocab_size=271,
        hidden_size=88,
        num_hidden_layers=2,
        first_k_dense_replace=0,
        intermediate_size=120,
        moe_intermediate_size=56,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=0.75,
        num_attention_heads=2,
        q_lora_rank=36,
        kv_lora_rank=28,
        qk_nope_head_dim=14,
        qk_rope_head_dim=16,
        v_head_dim=22,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 8000.0,
            "factor": 8.0,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "mscale": 0.707,
            "mscale_all_dim": 1.3,
            "original_max_position_embeddings": 32,
        },
        rope_interleave=True,
        tie_word_embeddings=False,
        dtype="float32",
    ),
    # mscale_all_dim absent, pairs rotated as halves, only the last layer has experts, more than one eligible group; and
    # a norm_eps large enough to show in the wrong place, as MLA's inner norms do not take it.
    "halves": _fields(
        vocab_size=283,
        hidden_size=104,
        num_hidden_layers=3,
        first_k_dense_replace=2,
        intermediate_size=152,
        moe_intermediate_size=24,
        n_routed_experts=10,
        n_shared_experts=1,
        num_experts_per_tok=5,
        n_group=5,
        topk_group=3,
        norm_topk_prob=True,
        routed_scaling_factor=1.7,
        num_attention_heads=6,
        q_lora_rank=52,
        kv_lora_rank=32,
        qk_nope_head_dim=8,
        qk_rope_head_dim=14,
        v_head_dim=12,
        max_position_embeddings=192,
        rope_theta=10000.0,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
        rope_interleave=False,
        rms_norm_eps=1e-3,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
    ),
    # mscale_all_dim 0, a stated attention factor, a ramp between fractions; FP8 with a tied head and kept modules.
    "factor": _fields(
        vocab_size=293,
        hidden_size=200,
        num_hidden_layers=2,
        first_k_dense_replace=0,
        intermediate_size=144,
        moe_intermediate_size=152,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=2.0,
        num_attention_heads=3,
        q_lora_rank=None,
        kv_lora_rank=76,
        qk_nope_head_dim=28,
        qk_rope_head_dim=18,
        v_head_dim=26,
        max_position_embeddings=320,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 10.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0,
            "attention_factor": 1.15,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
        rope_interleave=True,
        tie_word_embeddings=True,
        quantization_config={**FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"]},
        dtype="bfloat16",
    ),
    # Plain rotary embedding in transformers 5's spelling, FP32, and an MTP layer that is not quantised.
    "float32": _fields(
        vocab_size=263,
        hidden_size=80,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=96,
        moe_intermediate_size=48,
        n_routed_experts=9,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=3,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.3,
        num_attention_heads=7,
        q_lora_rank=44,
        kv_lora_rank=24,
        qk_nope_head_dim=10,
        qk_rope_head_dim=4,
        v_head_dim=6,
        max_position_embeddings=160,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
        num_nextn_predict_layers=1,
        dtype="float32",
    ),
}


_GROUPED = _fields(
    vocab_size=311,
    hidden_size=256,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=384,
    moe_intermediate_size=128,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    num_attention_heads=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=28,
    qk_rope_head_dim=12,
    v_head_dim=64,
    max_position_embeddings=256,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)
"""Every matrix has columns that 128 divides, as the largest group wants."""

FORMAT_CONFIGS = {name: {**_GROUPED, "quantization_config": published} for name, published in PUBLISHED.items()}
"""The same model in every format in which an architecture like this is published."""

ALL_CONFIGS = CONFIGS | FORMAT_CONFIGS


def write_tiny(folder: Path, name: str, *, seed: int = 0, num_shards: int = 1, with_tokenizer: bool = False) -> Path:
    """Writes the model `name` of `ALL_CONFIGS` as a Hugging Face folder and returns it.

    With more than one shard there is an index. The tokenizer maps bytes to ids, without merges: every text has ids
    that every configuration's vocabulary holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = ALL_CONFIGS[name]
    _write_json(folder / "config.json", fields)
    _write_shards(folder, dict(_tensors(parse_config(fields), seed=seed)), num_shards=num_shards)
    if with_tokenizer:
        _write_tokenizer(folder)
    return folder


def random_ids(name: str, length: int, *, seed: int = 0) -> np.ndarray:
    """`length` token ids of the model `name`, special tokens excluded."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.integers(EOS_ID + 1, ALL_CONFIGS[name]["vocab_size"], length).astype(np.int32)


def _tensors(config: ModelConfig, *, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of the checkpoint by name, those of multi-token-prediction layers included."""

    def is_projection(node: object) -> bool:
        return isinstance(node, Projection)

    whole = replace(config, num_layers=config.num_layers + config.num_mtp_layers)
    nodes = jax.tree.leaves(describe(whole), is_leaf=is_projection)
    nodes += [spec.projection for spec in describe_experts(whole)]
    nodes += [spec for layer in range(config.num_layers, whole.num_layers) for spec in _mtp_extras(config, layer)]
    for node in nodes:
        if is_projection(node):
            yield from _projection(config, node, seed=seed)
        else:
            yield node.name, _values(node, seed=seed).astype(_plain_dtype(config, node.name))
    yield from ((name, np.array(shape, np.int64)) for name, shape in expected_shapes(whole).items())


def _mtp_extras(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """What a multi-token-prediction layer has beside a transformer layer."""
    d, v = config.hidden_size, config.vocab_size
    shapes = {
        "embed_tokens": (v, d),
        "enorm": (d,),
        "hnorm": (d,),
        "eh_proj": (d, 2 * d),
        "shared_head.norm": (d,),
        "shared_head.head": (v, d),
    }
    return [
        TensorSpec(f"model.layers.{layer}.{module}.weight", shape, ("BF16", "F32")) for module, shape in shapes.items()
    ]


def _projection(config: ModelConfig, spec: Projection, *, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    module, _, _ = spec.weight.name.rpartition(".")
    stored = config.stored(module)
    if stored is None:
        yield spec.weight.name, _values(spec.weight, seed=seed).astype(_plain_dtype(config, spec.weight.name))
        return
    layout = FORMATS[spec.codec]
    rows, items = spec.weight.shape
    wide = replace(spec.weight, shape=(rows, layout.num_cols(items)))
    codes, scale = quantize(spec.codec, _values(wide, seed=seed), block=stored.block)
    yield spec.weight.name, codes
    # In BF16, as compressed-tensors does for a BF16 model; but per tensor in FP32.
    if stored.scale_name == "weight_scale" and stored.block.rows is not None:
        scale = scale.astype(ml_dtypes.bfloat16)
    shapes = (spec.scale.shape, *spec.scale.other_shapes)
    yield spec.scale.name, scale.reshape(shapes[zlib.crc32(spec.scale.name.encode()) % len(shapes)])


def _values(spec: TensorSpec, *, seed: int) -> np.ndarray:
    """Normal values, scaled so that activations stay near 1: matrices by 1/sqrt(width), norms around 1.

    That holds for the embedding too: a larger one, tied to the head, would answer every token with itself. Routing
    biases are as large as the spread of the scores they compete with.
    """
    normal = np.random.default_rng([seed, zlib.crc32(spec.name.encode())]).standard_normal(spec.shape, np.float32)
    if spec.name.endswith("e_score_correction_bias"):
        return normal * np.float32(0.2)
    if len(spec.shape) == 1:
        return 1 + normal * np.float32(0.2)
    return normal * np.float32(spec.shape[1] ** -0.5)


def _plain_dtype(config: ModelConfig, name: str) -> np.dtype:
    # Published checkpoints keep the routing bias in FP32 whatever the rest is.
    is_float32 = config.dtype == "float32" or name.endswith("e_score_correction_bias")
    return np.dtype(np.float32) if is_float32 else np.dtype(ml_dtypes.bfloat16)


def _write_shards(folder: Path, tensors: dict[str, np.ndarray], *, num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    shard_of: dict[str, str] = {}
    for index in range(num_shards):
        shard = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::num_shards])
        save_file(part, folder / shard, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(part, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": shard_of})


def _write_tokenizer(folder: Path) -> None:
    pieces = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True})


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
