"""`quantization_config`: which module is stored in which format, and an error for what is not understood."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hmoe_jax.config_fields import Fields
from hmoe_jax.core import ConfigError
from hmoe_jax.quant.formats import PER_CHANNEL, PER_TENSOR, ScaleBlock
from hmoe_jax.quant.published import Quantization, Stored, read_quantization
from tests.quant.configs import FP8, FP8_CHANNEL, INT4_KIMI, INT8_CHANNEL, compressed


def int4(group: int) -> Stored:
    block = ScaleBlock(1, group)
    return Stored(f"int4_group{group}", block, weight_name="weight_packed", shape_name="weight_shape")


INT4 = int4(32)
EXPERT = "model.layers.5.mlp.experts.383.down_proj"
DENSE = "model.layers.0.mlp.gate_proj"
SHARED = "model.layers.7.mlp.shared_experts.up_proj"
ATTENTION = "model.layers.7.self_attn.kv_b_proj"


def read(config: dict[str, Any]) -> Quantization:
    quantization = read_quantization(Fields(config, "quantization_config."))
    assert quantization is not None
    return quantization


def with_weights(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    group = config["config_groups"]["group_0"]
    return {**config, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


def with_group(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, "config_groups": {"group_0": {**config["config_groups"]["group_0"], **changes}}}


def test_nothing_is_quantised_without_a_config() -> None:
    assert read_quantization(None) is None


def test_deepseeks_fp8_is_everything_but_the_head_and_named_modules_with_all_below_them() -> None:
    quantization = read({**FP8, "modules_to_not_convert": ["model.layers.7.self_attn", "model.layers.1"]})
    fp8 = Stored("fp8_block", ScaleBlock(128, 128), scale_name="weight_scale_inv")
    assert [quantization.stored(module) for module in (EXPERT, DENSE, SHARED)] == [fp8] * 3
    assert quantization.stored(ATTENTION) is None
    assert quantization.stored("model.layers.1.mlp.gate_proj") is None
    assert quantization.stored("model.layers.10.mlp.gate_proj") == fp8
    assert quantization.stored("lm_head") is None
    assert quantization.smallest_bits == 8


def test_fp8_may_have_a_scale_for_each_row_of_128_columns() -> None:
    quantization = read({**FP8, "weight_block_size": [1, 128]})
    assert quantization.stored(EXPERT).block == ScaleBlock(1, 128)


def test_kimi_k2_thinking_has_experts_in_int4_and_nothing_else() -> None:
    quantization = read(INT4_KIMI)
    assert quantization.stored(EXPERT) == INT4
    assert quantization.stored("model.layers.1.mlp.experts.0.gate_proj") == INT4
    assert [quantization.stored(module) for module in (DENSE, SHARED, ATTENTION, "lm_head")] == [None] * 4
    assert quantization.smallest_bits == 4


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        (
            compressed("pack-quantized", "int", 4, "group", group_size=64),
            int4(64),
        ),
        (
            compressed("pack-quantized", "int", 4, "group", group_size=128, actorder="weight"),
            int4(128),
        ),
        (compressed("float-quantized", "float", 8, "channel"), Stored("fp8_channel", PER_CHANNEL)),
        (compressed("float-quantized", "float", 8, "tensor"), Stored("fp8_channel", PER_TENSOR)),
        (compressed("naive-quantized", "float", 8, "tensor"), Stored("fp8_channel", PER_TENSOR)),
        (
            compressed("float-quantized", "float", 8, "block", block_structure=[128, 128]),
            Stored("fp8_block", ScaleBlock(128, 128)),
        ),
        (compressed("int-quantized", "int", 8, "channel"), Stored("int8_channel", PER_CHANNEL)),
        (compressed("int-quantized", "int", 8, "tensor"), Stored("int8_channel", PER_TENSOR)),
    ],
)
def test_compressed_tensors_formats_are_known(config: dict[str, Any], stored: Stored) -> None:
    assert read(config).stored(EXPERT) == stored


def test_a_group_may_have_a_format_of_its_own() -> None:
    config = {**INT8_CHANNEL, "format": "mixed-precision"}
    with pytest.raises(ConfigError, match="in format 'mixed-precision' is not implemented"):
        read(config)
    assert read(with_group(config, format="int-quantized")).stored(EXPERT).codec == "int8_channel"


def test_names_win_over_expressions_and_expressions_over_classes() -> None:
    groups = {
        "a": {**FP8_CHANNEL["config_groups"]["group_0"], "targets": ["Linear"], "format": "float-quantized"},
        "b": {
            **INT8_CHANNEL["config_groups"]["group_0"],
            "targets": [r"re:.*experts\.\d+\."],
            "format": "int-quantized",
        },
        "c": {**INT4_KIMI["config_groups"]["group_0"], "targets": [EXPERT], "format": "pack-quantized"},
    }
    quantization = read({**FP8_CHANNEL, "config_groups": groups})
    codecs = [quantization.stored(module).codec for module in (EXPERT, EXPERT.replace("383", "1"), DENSE)]
    assert codecs == ["int4_group32", "int8_channel", "fp8_channel"]
    assert quantization.smallest_bits == 4


def test_modules_that_no_group_targets_stay_plain() -> None:
    quantization = read(with_group(INT4_KIMI, targets=[r"re:.*experts\.\d+\.down_proj$"]))
    assert quantization.stored(EXPERT) == INT4
    assert quantization.stored(EXPERT.replace("down", "up")) is None


def test_two_groups_for_one_module_are_an_error_if_they_differ() -> None:
    group = INT4_KIMI["config_groups"]["group_0"]
    same = read({**INT4_KIMI, "config_groups": {"a": group, "b": group}})
    assert same.stored(EXPERT) == INT4
    other = {**group, "weights": {**group["weights"], "group_size": 64}}
    with pytest.raises(ConfigError, match=f"two groups with different weights match {EXPERT}"):
        read({**INT4_KIMI, "config_groups": {"a": group, "b": other}}).stored(EXPERT)


@pytest.mark.parametrize(("dynamic", "has_scales"), [(True, False), (False, True)])
def test_activations_are_skipped_with_their_static_scales(dynamic: bool, has_scales: bool) -> None:
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": dynamic}
    assert read(with_group(FP8_CHANNEL, input_activations=inputs)).has_input_scales == has_scales
    assert not read(FP8_CHANNEL).has_input_scales


def test_dense_files_may_have_a_sparsity_config() -> None:
    for harmless in (None, {}, {"format": "dense", "sparsity_structure": "dense", "global_sparsity": 0.1}):
        assert read({**INT4_KIMI, "sparsity_config": harmless}) == read(INT4_KIMI)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq"}, "quant_method='awq' is not implemented (only 'fp8' or 'compressed-tensors')"),
        ({}, "quantization_config.quant_method is missing"),
        ({**FP8, "weight_block_size": [64, 64]}, "weight_block_size=[64, 64] is not implemented"),
        ({**FP8, "fmt": "e5m2"}, "fmt='e5m2' is not implemented"),
        ({**FP8, "zero_point": True}, "unknown field quantization_config.zero_point=True"),
        ({**INT4_KIMI, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme={'num_bits': 8} is not implemented"),
        ({**INT4_KIMI, "quantization_status": "frozen"}, "quantization_status='frozen' is not implemented"),
        ({**INT4_KIMI, "transform_config": {"R1": 1}}, "transform_config={'R1': 1} is not implemented"),
        ({**INT4_KIMI, "sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format='sparse-24' is not"),
        ({**INT4_KIMI, "config_groups": {}}, "quantization_config.config_groups has no groups"),
        ({**INT4_KIMI, "config_groups": None}, "quantization_config.config_groups is missing"),
        ({**INT4_KIMI, "config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 must be an object"),
        ({**INT4_KIMI, "ignore": "lm_head"}, "quantization_config.ignore must list names, got 'lm_head'"),
        ({**INT4_KIMI, "ignore": ["re:("]}, "'re:(' is not a regular expression"),
        ({**INT4_KIMI, "scheme": 1}, "unknown field quantization_config.scheme=1"),
        (with_weights(INT4_KIMI, group_size=16), "weights.group_size=16 is not implemented (only 32 or 64 or 128)"),
        (with_weights(INT4_KIMI, symmetric=False), "weights.symmetric=False is not implemented (only True)"),
        (with_weights(INT4_KIMI, actorder="group"), "weights.actorder='group' is not implemented"),
        (
            with_weights(INT4_KIMI, num_bits=8),
            "weights.type='int' with num_bits=8 and strategy='group' in format",
        ),
        (
            with_weights(INT4_KIMI, strategy="channel"),
            "strategy='channel' in format 'pack-quantized' is not",
        ),
        (with_weights(INT4_KIMI, type="float"), "weights.type='float' with num_bits=4"),
        (with_weights(INT4_KIMI, zero=1), "unknown field quantization_config.config_groups.group_0.weights.zero=1"),
        (with_group(INT4_KIMI, weights=None), "config_groups.group_0.weights is missing"),
        (with_group(INT4_KIMI, output_activations={}), "output_activations={} is not implemented"),
        (with_group(INT4_KIMI, what=1), "unknown field quantization_config.config_groups.group_0.what=1"),
    ],
    ids=lambda value: None,
)
def test_what_is_not_implemented_is_an_error_that_names_it(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(config)
