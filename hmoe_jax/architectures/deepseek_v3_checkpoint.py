"""How a DeepSeek-V3 family checkpoint spells its tensors: names, shapes and number formats, from the config alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import jax

from hmoe_jax.architectures.deepseek_v3 import Attention, Layer, Mlp, Moe, Weights
from hmoe_jax.checkpoint.header import DTYPE_NAMES
from hmoe_jax.checkpoint.specs import TensorSpec
from hmoe_jax.config import ModelConfig
from hmoe_jax.core import ConfigError
from hmoe_jax.nn.linear import Projection
from hmoe_jax.quant.formats import FORMATS, Format
from hmoe_jax.quant.published import Stored

Matrix = Literal["gate", "up", "down"]
MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")

_PLAIN = ("BF16", "F32")


@dataclass(frozen=True)
class ExpertSpec:
    """One matrix of one routed expert; `layer` counts MoE layers from 0."""

    layer: int
    expert: int
    matrix: Matrix
    projection: Projection


def describe(config: ModelConfig) -> Weights:
    """The tree of `TensorSpec`s that a checkpoint of this config must hold beside its routed experts."""
    d = config.hidden_size
    return Weights(
        embed=_plain("model.embed_tokens.weight", config.vocab_size, d),
        layers=tuple(_layer(config, index) for index in range(config.num_layers)),
        norm=_plain("model.norm.weight", d),
        head=None if config.tie_embeddings else _projection(config, "lm_head", config.vocab_size, d),
    )


def describe_experts(config: ModelConfig) -> Iterator[ExpertSpec]:
    """Every matrix of every routed expert, in checkpoint order."""
    for layer in range(config.num_moe_layers):
        for expert in range(config.num_experts):
            prefix = f"model.layers.{layer + config.num_dense_layers}.mlp.experts.{expert}"
            weights = _mlp(config, prefix, config.expert_ffn)
            for matrix in MATRICES:
                yield ExpertSpec(layer, expert, matrix, getattr(weights, matrix))


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """All tensors by name, routed experts included, multi-token-prediction layers not."""
    nodes = _leaves(config)
    shapes = [TensorSpec(name, (2,), ("I64", "I32")) for name in _shapes(config, nodes)]
    return {spec.name: spec for spec in (*jax.tree.leaves(nodes), *shapes)}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """By name, the tensors that repeat the shape of a matrix, and what they must hold. Packed formats have them."""
    return _shapes(config, _leaves(config))


def _leaves(config: ModelConfig) -> list[TensorSpec | Projection]:
    nodes = jax.tree.leaves(describe(config), is_leaf=lambda node: isinstance(node, Projection))
    return nodes + [spec.projection for spec in describe_experts(config)]


def _shapes(config: ModelConfig, nodes: list[TensorSpec | Projection]) -> dict[str, tuple[int, int]]:
    shapes = {}
    for node in nodes:
        if not isinstance(node, Projection) or node.scale is None:
            continue
        module, _, _ = node.weight.name.rpartition(".")
        stored = config.stored(module)
        if stored is not None and stored.shape_name is not None:
            rows, items = node.weight.shape
            shapes[f"{module}.{stored.shape_name}"] = rows, FORMATS[stored.codec].num_cols(items)
    return shapes


def is_ignored(config: ModelConfig) -> Callable[[str], bool]:
    """Tensors that a checkpoint may hold although `forward` has no use for them.

    They belong to the multi-token-prediction layers (stored as layers `num_layers`, `num_layers + 1`...), are the
    rotary frequencies that old writers saved, or scale activations that stay in BF16 here.
    """
    has_input_scales = config.quantization is not None and config.quantization.has_input_scales

    def ignored(name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        is_mtp = layer is not None and 0 <= int(layer[1]) - config.num_layers < config.num_mtp_layers
        return is_mtp or name.endswith(".rotary_emb.inv_freq") or (has_input_scales and name.endswith(".input_scale"))

    return ignored


def _layer(config: ModelConfig, index: int) -> Layer:
    prefix = f"model.layers.{index}"
    return Layer(
        attention_norm=_plain(f"{prefix}.input_layernorm.weight", config.hidden_size),
        attention=_attention(config, f"{prefix}.self_attn"),
        mlp_norm=_plain(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
        mlp=_moe(config, f"{prefix}.mlp") if config.is_moe(index) else _mlp(config, f"{prefix}.mlp", config.dense_ffn),
    )


def _attention(config: ModelConfig, prefix: str) -> Attention:
    d, heads, q_rank = config.hidden_size, config.num_heads, config.q_rank
    kv_width = heads * (config.nope_dim + config.v_dim)
    if q_rank is None:
        q_a = q_a_norm = None
        q_b = _projection(config, f"{prefix}.q_proj", heads * config.qk_dim, d)
    else:
        q_a = _projection(config, f"{prefix}.q_a_proj", q_rank, d)
        q_a_norm = _plain(f"{prefix}.q_a_layernorm.weight", q_rank)
        q_b = _projection(config, f"{prefix}.q_b_proj", heads * config.qk_dim, q_rank)
    return Attention(
        q_a=q_a,
        q_a_norm=q_a_norm,
        q_b=q_b,
        kv_a=_projection(config, f"{prefix}.kv_a_proj_with_mqa", config.latent_dim, d),
        kv_a_norm=_plain(f"{prefix}.kv_a_layernorm.weight", config.kv_rank),
        kv_b=_projection(config, f"{prefix}.kv_b_proj", kv_width, config.kv_rank),
        o=_projection(config, f"{prefix}.o_proj", d, heads * config.v_dim),
    )


def _moe(config: ModelConfig, prefix: str) -> Moe:
    return Moe(
        router=_plain(f"{prefix}.gate.weight", config.num_experts, config.hidden_size),
        router_bias=_plain(f"{prefix}.gate.e_score_correction_bias", config.num_experts),
        shared=_mlp(config, f"{prefix}.shared_experts", config.shared_ffn),
    )


def _mlp(config: ModelConfig, prefix: str, ffn: int) -> Mlp:
    return Mlp(
        gate=_projection(config, f"{prefix}.gate_proj", ffn, config.hidden_size),
        up=_projection(config, f"{prefix}.up_proj", ffn, config.hidden_size),
        down=_projection(config, f"{prefix}.down_proj", config.hidden_size, ffn),
    )


def _projection(config: ModelConfig, module: str, out: int, width: int) -> Projection:
    stored = config.stored(module)
    if stored is None:
        return Projection(_plain(f"{module}.weight", out, width))
    layout = FORMATS[stored.codec]
    try:
        weight_shape = layout.weight_shape(out, width)
    except ValueError as error:
        raise ConfigError(f"quantization_config: {module}: {error}") from None
    return Projection(
        TensorSpec(f"{module}.{stored.weight_name}", weight_shape, (DTYPE_NAMES[layout.encoding.dtype],)),
        _scale(layout, stored, module, out, width),
        codec=stored.codec,
    )


def _scale(layout: Format, stored: Stored, module: str, out: int, width: int) -> TensorSpec:
    shape, *other_shapes = stored.block.stored_shapes(out, width)
    dtypes = tuple(DTYPE_NAMES[dtype] for dtype in (*layout.scale_dtypes, *layout.widened_scale_dtypes))
    return TensorSpec(f"{module}.{stored.scale_name}", shape, dtypes, tuple(other_shapes))


def _plain(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtypes=_PLAIN)
