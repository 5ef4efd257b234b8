"""The tensor names, shapes and formats that published checkpoints must have."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import pytest

from hmoe_jax.architectures.deepseek_v3_checkpoint import (
    describe,
    describe_experts,
    expected_shapes,
    expected_tensors,
    is_ignored,
)
from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.checkpoint.specs import TensorSpec, check_tensors
from hmoe_jax.config import ModelConfig, parse_config, read_config
from hmoe_jax.core import CheckpointError, ConfigError
from tests.tiny import ALL_CONFIGS, CONFIGS, write_tiny

MODELS = Path(__file__).parents[2] / "models"

ATTENTION = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


@cache
def published(name: str) -> tuple[ModelConfig, dict[str, TensorSpec]]:
    config = read_config(MODELS / name)
    return config, expected_tensors(config)


def kinds(names: list[str]) -> Counter[str]:
    """How often each name occurs, layer and expert numbers left out."""
    return Counter(re.sub(r"\.\d+\.", ".N.", re.sub(r"\.experts\.\d+\.", ".experts.N.", name)) for name in names)


@pytest.mark.parametrize(
    ("name", "dense", "experts", "tensors"),
    [("deepseek-v3", 3, 256, 90_427), ("kimi-k2", 1, 384, 139_583)],
)
def test_published_checkpoints_have_so_many_tensors_of_each_kind(
    name: str, dense: int, experts: int, tensors: int
) -> None:
    _, expected = published(name)
    count, layer, layers, moe = kinds(list(expected)), "model.layers.N.", 61, 61 - dense
    want = {"model.embed_tokens.weight": 1, "model.norm.weight": 1, "lm_head.weight": 1}
    for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"):
        want[f"{layer}{norm}.weight"] = layers
    want |= {f"{layer}mlp.gate.{leaf}": moe for leaf in ("weight", "e_score_correction_bias")}
    for suffix in ("weight", "weight_scale_inv"):
        want |= {f"{layer}self_attn.{module}.{suffix}": layers for module in ATTENTION}
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            want[f"{layer}mlp.{matrix}.{suffix}"] = dense
            want[f"{layer}mlp.shared_experts.{matrix}.{suffix}"] = moe
            want[f"{layer}mlp.experts.N.{matrix}.{suffix}"] = moe * experts
    assert count == want
    assert len(expected) == tensors


def test_deepseek_r1_has_the_architecture_of_v3() -> None:
    assert read_config(MODELS / "deepseek-r1") == read_config(MODELS / "deepseek-v3")


def test_deepseek_v3_shapes_and_formats_are_the_published_ones() -> None:
    _, expected = published("deepseek-v3")
    prefix = "model.layers.60"
    shapes = {
        "self_attn.q_a_proj.weight": (1536, 7168),
        "self_attn.q_b_proj.weight": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        # 576 rows are four blocks and a half: the last scale of each column covers 64 rows.
        "self_attn.kv_a_proj_with_mqa.weight_scale_inv": (5, 56),
        "self_attn.kv_b_proj.weight": (32768, 512),
        "self_attn.o_proj.weight": (7168, 16384),
        "mlp.experts.255.down_proj.weight": (7168, 2048),
        "mlp.experts.255.down_proj.weight_scale_inv": (56, 16),
        "mlp.gate.weight": (256, 7168),
        "mlp.gate.e_score_correction_bias": (256,),
    }
    assert {name: expected[f"{prefix}.{name}"].shape for name in shapes} == shapes
    assert expected["model.embed_tokens.weight"].shape == (129280, 7168)
    assert expected[f"{prefix}.mlp.experts.0.up_proj.weight"].dtypes == ("F8_E4M3",)
    assert expected[f"{prefix}.mlp.experts.0.up_proj.weight_scale_inv"].dtypes == ("F32", "BF16")
    assert "F8_E4M3" not in expected[f"{prefix}.mlp.gate.weight"].dtypes


def test_routed_experts_of_deepseek_v3_are_653_9_gb_and_their_scales_159_mb() -> None:
    routed = [spec for name, spec in published("deepseek-v3")[1].items() if ".mlp.experts." in name]
    num_bytes: Counter[str] = Counter()
    for spec in routed:
        num_bytes[spec.dtypes[0]] += math.prod(spec.shape) * (4 if spec.dtypes[0] == "F32" else 1)
    assert num_bytes == {"F8_E4M3": 653_908_770_816, "F32": 159_645_696}


def test_tensors_of_multi_token_prediction_layers_only_are_ignored() -> None:
    ignored = is_ignored(published("deepseek-v3")[0])
    assert ignored("model.layers.61.eh_proj.weight")
    assert ignored("model.layers.61.mlp.experts.0.up_proj.weight_scale_inv")
    assert ignored("model.layers.5.self_attn.rotary_emb.inv_freq")
    assert not ignored("model.layers.60.self_attn.q_a_proj.bias")
    assert not ignored("model.layers.62.input_layernorm.weight")
    assert not is_ignored(published("kimi-k2")[0])("model.layers.61.eh_proj.weight")


def test_one_more_moe_layer_is_1558_tensors() -> None:
    # The prediction layer of DeepSeek-V3 is such a layer with six tensors of its own, which makes 91,991 in all.
    config = read_config(MODELS / "deepseek-v3")
    short, longer = (len(expected_tensors(replace(config, num_layers=layers))) for layers in (4, 5))
    assert longer - short == 1558


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_expected_names_do_not_repeat(name: str) -> None:
    config = parse_config(ALL_CONFIGS[name])
    leaves = jax.tree.leaves((describe(config), [spec.projection for spec in describe_experts(config)]))
    assert len({spec.name for spec in leaves}) == len(leaves)


def test_modules_not_to_convert_stay_plain() -> None:
    config = parse_config(CONFIGS["factor"])
    expected = expected_tensors(config)
    assert "model.layers.0.self_attn.o_proj.weight_scale_inv" not in expected
    assert "model.layers.1.self_attn.o_proj.weight_scale_inv" in expected


def test_kimi_k2_thinking_has_its_experts_packed_and_the_rest_in_bf16() -> None:
    whole = read_config(MODELS / "kimi-k2-thinking")
    config = replace(whole, num_layers=2)  # the dense layer, and one of 60 that are alike
    expected = expected_tensors(config)
    count, experts = kinds(list(expected)), 384
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            assert count[f"model.layers.N.mlp.experts.N.{matrix}.{suffix}"] == experts
    assert not [kind for kind in count if "experts.N" not in kind and not kind.endswith((".weight", "correction_bias"))]
    down = "model.layers.1.mlp.experts.383.down_proj"
    shapes = {
        name: (expected[f"{down}.{name}"].shape, expected[f"{down}.{name}"].dtypes)
        for name in ("weight_packed", "weight_scale", "weight_shape")
    }
    assert shapes == {
        "weight_packed": ((7168, 256), ("I32",)),
        "weight_scale": ((7168, 64), ("BF16",)),
        "weight_shape": ((2,), ("I64", "I32")),
    }
    assert expected_shapes(config)[f"{down}.weight_shape"] == (7168, 2048)
    routed = sum(
        math.prod(spec.shape) * {"I32": 4, "BF16": 2, "I64": 8}[spec.dtypes[0]]
        for name, spec in expected.items()
        if ".mlp.experts." in name
    )
    # Half a byte and a sixteenth for each weight, and the shapes: 570.8 GB in all layers.
    assert routed == 384 * 3 * (7168 * 2048 * 9 // 16 + 16)
    assert whole.num_moe_layers == 60


def test_a_group_that_does_not_divide_a_matrix_is_named_with_the_matrix() -> None:
    fields = {**ALL_CONFIGS["int4-group128"], "moe_intermediate_size": 96}
    sentence = "model.layers.1.mlp.shared_experts.down_proj: int4_group128 needs columns that 128 divides, got 96"
    with pytest.raises(ConfigError, match=sentence):
        expected_tensors(parse_config(fields))


def test_scales_of_static_activations_may_be_there_where_the_config_has_them() -> None:
    config = parse_config(ALL_CONFIGS["fp8-tensor"])
    name = "model.layers.0.self_attn.o_proj.input_scale"
    assert not is_ignored(config)(name)
    assert is_ignored(replace(config, quantization=replace(config.quantization, has_input_scales=True)))(name)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_tiny_checkpoints_are_accepted_whole_and_refused_without_one_tensor(name: str, tmp_path: Path) -> None:
    config = read_config(write_tiny(tmp_path, name))
    expected = expected_tensors(config)
    with open_checkpoint(tmp_path) as checkpoint:
        check_tensors(checkpoint, expected, ignore=is_ignored(config))
        del expected["model.norm.weight"]
        with pytest.raises(CheckpointError, match=re.escape("1 (model.norm.weight) unknown")):
            check_tensors(checkpoint, expected, ignore=is_ignored(config))
