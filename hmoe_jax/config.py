"""A model's published `config.json`, read strictly into one frozen record.

Every field of the file is either interpreted, or on the list of fields known not to change the mathematics, or an
error: a reader that skips what it does not know returns wrong text without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hmoe_jax.config_fields import Fields
from hmoe_jax.core import CheckpointError, ConfigError
from hmoe_jax.quant.published import Quantization, Stored, read_quantization
from hmoe_jax.strict_json import parse_object

SUPPORTED_ARCHITECTURES = ("DeepseekV3ForCausalLM",)


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071), with DeepSeek's two `mscale` fields."""

    factor: float
    original_max_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_above_0(self, _PUBLISHED_YARN)
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be below 0, got {getattr(self, name)}")

    @property
    def rotary_scale(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_scale(self) -> float:
        """What the attention scores are multiplied by, beside 1/sqrt(width)."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The DeepSeek-V3 family: sizes, routing, rotary embedding and number format of one checkpoint."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_dense_layers: int
    dense_ffn: int
    expert_ffn: int
    num_experts: int
    num_shared_experts: int
    top_k: int
    num_groups: int
    top_groups: int
    norm_top_k: bool
    routed_scale: float
    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope_theta: float
    rope_interleave: bool
    yarn: YarnConfig | None
    max_len: int
    norm_eps: float
    tie_embeddings: bool
    dtype: str
    quantization: Quantization | None
    num_mtp_layers: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_above_0(self, _PUBLISHED)
        self._check_routing()
        if self.rope_dim % 2:
            raise ConfigError(f"qk_rope_head_dim must be even, got {self.rope_dim}")
        if self.rope_theta <= 1:
            raise ConfigError(f"rope_theta must be above 1, got {self.rope_theta}")
        if self.num_mtp_layers < 0:
            raise ConfigError(f"num_nextn_predict_layers must not be below 0, got {self.num_mtp_layers}")
        for name, ids in (("bos_token_id", (self.bos_id,)), ("eos_token_id", self.eos_ids)):
            for token in ids:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ConfigError(f"{name} {token} is outside the vocabulary of {self.vocab_size} tokens")

    def _check_routing(self) -> None:
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ConfigError(
                f"first_k_dense_replace must be between 0 and num_hidden_layers ({self.num_layers}), "
                f"got {self.num_dense_layers}"
            )
        if self.num_experts % self.num_groups:
            raise ConfigError(f"n_group ({self.num_groups}) must divide n_routed_experts ({self.num_experts})")
        if self.top_groups > self.num_groups:
            raise ConfigError(f"topk_group ({self.top_groups}) exceeds n_group ({self.num_groups})")
        if self.num_groups > 1 and self.experts_per_group < 2:
            raise ConfigError(f"n_group ({self.num_groups}) leaves fewer than two experts in a group")
        if self.top_k > self.top_groups * self.experts_per_group:
            raise ConfigError(
                f"num_experts_per_tok ({self.top_k}) exceeds the {self.top_groups * self.experts_per_group} experts "
                "that topk_group leaves"
            )

    @property
    def experts_per_group(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def shared_ffn(self) -> int:
        return self.expert_ffn * self.num_shared_experts

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def latent_dim(self) -> int:
        """Values that one token leaves in one layer's cache (576 for DeepSeek-V3)."""
        return self.kv_rank + self.rope_dim

    @property
    def softmax_scale(self) -> float:
        return self.qk_dim**-0.5 * (self.yarn.softmax_scale if self.yarn else 1.0)

    def stored(self, module: str) -> Stored | None:
        """How the linear module of that name is stored; None: as plain numbers."""
        return self.quantization.stored(module) if self.quantization else None

    def is_moe(self, layer: int) -> bool:
        return layer >= self.num_dense_layers


def _check_above_0(record: object, published: Mapping[str, str]) -> None:
    for name, published_name in published.items():
        value = getattr(record, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{published_name} must be above 0, got {value}")


def read_config(folder: str | Path) -> ModelConfig:
    """The config of the model in `folder`. Raises `ConfigError` for a missing, malformed or unsupported one."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder}: no such model folder")
    try:
        fields = parse_object(path.read_bytes(), file=str(path))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no config.json, so this is not a Hugging Face model folder") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    try:
        return parse_config(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Reads both spellings of a config: transformers 4's (`rope_theta`, `rope_scaling`) and 5's (`rope_parameters`)."""
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(f"architectures must list one name, got {architectures!r}")
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"unsupported architecture {architectures[0]}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    read = Fields(fields, harmless=_NOT_MATHEMATICS)
    for name, allowed in _FIXED.items():
        read.fixed(name, allowed)
    theta, yarn = _rope(read)
    num_heads = read.integer("num_attention_heads")
    if read.integer("num_key_value_heads", num_heads) != num_heads:
        raise ConfigError("num_key_value_heads must equal num_attention_heads: MLA has one latent for all heads")
    config = ModelConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        num_layers=read.integer("num_hidden_layers"),
        num_dense_layers=read.integer("first_k_dense_replace"),
        dense_ffn=read.integer("intermediate_size"),
        expert_ffn=read.integer("moe_intermediate_size"),
        num_experts=read.integer("n_routed_experts"),
        num_shared_experts=read.integer("n_shared_experts"),
        top_k=read.integer("num_experts_per_tok"),
        num_groups=read.integer("n_group"),
        top_groups=read.integer("topk_group"),
        norm_top_k=read.boolean("norm_topk_prob"),
        routed_scale=read.number("routed_scaling_factor"),
        num_heads=num_heads,
        q_rank=None if read.value("q_lora_rank") is None else read.integer("q_lora_rank"),
        kv_rank=read.integer("kv_lora_rank"),
        nope_dim=read.integer("qk_nope_head_dim"),
        rope_dim=read.integer("qk_rope_head_dim"),
        v_dim=read.integer("v_head_dim"),
        rope_theta=theta,
        rope_interleave=read.boolean("rope_interleave", True),
        yarn=yarn,
        max_len=read.integer("max_position_embeddings"),
        norm_eps=read.number("rms_norm_eps"),
        tie_embeddings=read.boolean("tie_word_embeddings", False),
        dtype=_dtype(read),
        quantization=read_quantization(read.nested("quantization_config")),
        num_mtp_layers=read.integer(read.spelling("num_nextn_predict_layers", "num_mtp_layers"), 0),
        bos_id=None if read.value("bos_token_id", None) is None else read.integer("bos_token_id"),
        eos_ids=_eos_ids(read.value("eos_token_id", None)),
    )
    read.finish()
    return config


def _rope(read: Fields) -> tuple[float, YarnConfig | None]:
    name = read.spelling("rope_scaling", "rope_parameters")
    rope = read.nested(name)
    if rope is None:
        return read.number("rope_theta"), None
    # transformers 4 keeps theta outside, 5 inside; when both are there they have to agree.
    theta = rope.number("rope_theta") if rope.value("rope_theta", None) is not None else read.number("rope_theta")
    if read.number("rope_theta", theta) != theta:
        raise ConfigError(f"rope_theta is {read.number('rope_theta')} outside and {theta} inside rope_parameters")
    kind = rope.value(rope.spelling("rope_type", "type"), "default")
    rope.fixed("partial_rotary_factor", (1.0, 1))
    if kind == "default":
        rope.finish()
        return theta, None
    if kind != "yarn":
        raise ConfigError(f"rope type {kind!r} is not implemented (only 'default' or 'yarn')")
    has_factor = rope.value("factor", None) is not None
    yarn = YarnConfig(
        factor=rope.number("factor") if has_factor else 1.0,
        original_max_len=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        attention_factor=None if rope.value("attention_factor", None) is None else rope.number("attention_factor"),
        truncate=rope.boolean("truncate", True),
    )
    rope.finish()
    if has_factor:
        return theta, yarn
    return theta, replace(yarn, factor=read.integer("max_position_embeddings") / yarn.original_max_len)


def _eos_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"eos_token_id must be an integer or a list of integers, got {value!r}")
    return tuple(ids)


def _dtype(read: Fields) -> str:
    value = read.value(read.spelling("torch_dtype", "dtype"), None)
    dtype = "bfloat16" if value is None else value
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype {dtype!r} is not implemented (only 'bfloat16' or 'float32')")
    return dtype


_PUBLISHED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "dense_ffn": "intermediate_size",
    "expert_ffn": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "num_groups": "n_group",
    "top_groups": "topk_group",
    "routed_scale": "routed_scaling_factor",
    "num_heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
_PUBLISHED_YARN = {
    "original_max_len": "original_max_position_embeddings",
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
"""Fields of the two records that must be above 0 (or None), with the names that `config.json` has for them."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
}
"""Fields that choose between formulas of which one is implemented; the first value is the family's default."""

# fmt: off
_NOT_MATHEMATICS = frozenset(
    (
        "architectures", "model_type", "auto_map", "transformers_version", "_name_or_path", "use_cache",
        "initializer_range", "attention_dropout", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp",
        "pad_token_id", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict",
        "torchscript", "router_aux_loss_coef", "head_dim", "qk_head_dim", "is_encoder_decoder",
        "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "num_labels", "tokenizer_class",
    )
)
# fmt: on
"""Fields of training, of other runtimes, or derived from fields read above (`head_dim` is `qk_rope_head_dim`)."""
