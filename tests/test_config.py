"""Reading `config.json`: both spellings, and an error for everything that would change the mathematics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hmoe_jax.config import ModelConfig, YarnConfig, parse_config, read_config
from hmoe_jax.core import ConfigError
from hmoe_jax.quant.formats import ScaleBlock
from hmoe_jax.quant.published import Group, Quantization, Stored, Target
from tests.quant.configs import FP8
from tests.tiny import CONFIGS

MODELS = Path(__file__).parents[1] / "models"


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**CONFIGS[name], **fields}


def without(name: str, field: str) -> dict[str, Any]:
    return {key: value for key, value in CONFIGS[name].items() if key != field}


def other_spelling(fields: dict[str, Any]) -> dict[str, Any]:
    """The same config as the other major version of `transformers` writes it."""
    fields = dict(fields)
    if "rope_parameters" in fields:
        rope = dict(fields.pop("rope_parameters"))
        fields["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        fields["rope_scaling"] = None if rope == {"type": "default"} else rope
        fields["torch_dtype"] = fields.pop("dtype")
        return fields
    rope = dict(fields.pop("rope_scaling") or {"type": "default"})
    fields["rope_parameters"] = {**rope, "rope_theta": fields.pop("rope_theta"), "rope_type": rope.pop("type")}
    fields["rope_parameters"].pop("type", None)
    fields["dtype"] = fields.pop("torch_dtype")
    return fields


@pytest.mark.parametrize("name", CONFIGS)
def test_both_spellings_are_the_same_record(name: str) -> None:
    assert parse_config(other_spelling(CONFIGS[name])) == parse_config(CONFIGS[name])


def test_deepseek_v3_is_read_as_published() -> None:
    config = read_config(MODELS / "deepseek-v3")
    assert config == ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_layers=61,
        num_dense_layers=3,
        dense_ffn=18432,
        expert_ffn=2048,
        num_experts=256,
        num_shared_experts=1,
        top_k=8,
        num_groups=8,
        top_groups=4,
        norm_top_k=True,
        routed_scale=2.5,
        num_heads=128,
        q_rank=1536,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        v_dim=128,
        rope_theta=10000.0,
        rope_interleave=True,
        yarn=YarnConfig(factor=40.0, original_max_len=4096, mscale=1.0, mscale_all_dim=1.0),
        max_len=163840,
        norm_eps=1e-6,
        tie_embeddings=False,
        dtype="bfloat16",
        quantization=Quantization(
            groups=(Group((Target(2, ""),), Stored("fp8_block", ScaleBlock(128, 128), scale_name="weight_scale_inv")),),
            kept=(Target(0, r"lm_head(\.|\Z)"),),
        ),
        num_mtp_layers=1,
        bos_id=0,
        eos_ids=(1,),
    )
    assert (config.latent_dim, config.qk_dim, config.experts_per_group, config.num_moe_layers) == (576, 192, 32, 58)


def test_kimi_k2_is_read_as_published() -> None:
    config = read_config(MODELS / "kimi-k2")
    assert config.yarn == YarnConfig(
        factor=32.0, original_max_len=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
    )
    assert (config.num_experts, config.num_heads, config.num_groups, config.num_mtp_layers) == (384, 64, 1, 0)
    assert (config.rope_theta, config.routed_scale, config.eos_ids) == (50000.0, 2.827, (163585,))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_saved_by_transformers_is_the_same_record(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="writes the config: pip install hmoe-jax[oracle]")
    dtype = CONFIGS[name].get("dtype") or CONFIGS[name]["torch_dtype"]
    saved = {key: value for key, value in CONFIGS[name].items() if key not in ("dtype", "torch_dtype")}
    transformers.DeepseekV3Config(**saved, dtype=dtype).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    # Where the file is silent, transformers 5 takes and writes one prediction layer.
    want = parse_config({"num_nextn_predict_layers": 1, **CONFIGS[name]})
    assert read_config(tmp_path) == want


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "unsupported architecture LlamaForCausalLM"),
        ({"architectures": None}, "architectures must list one name, got None"),
        ({"attention_bias": True}, "attention_bias=True is not implemented (only False)"),
        ({"mlp_bias": True}, "mlp_bias=True is not implemented"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not implemented (only 'sigmoid')"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not implemented"),
        ({"num_key_value_heads": 1}, "num_key_value_heads must equal num_attention_heads"),
        ({"torch_dtype": "float16"}, "dtype 'float16' is not implemented"),
        ({"sliding_window": 4096}, "unknown field sliding_window=4096"),
        ({"qk_layernorm": True}, "unknown field qk_layernorm=True"),
        ({"hidden_size": "72"}, "hidden_size must be an integer of 32 bits, got '72'"),
        ({"hidden_size": True}, "hidden_size must be an integer of 32 bits, got True"),
        ({"hidden_size": 0}, "hidden_size must be above 0, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0, got 0"),
        ({"q_lora_rank": 0}, "q_lora_rank must be above 0, got 0"),
        ({"vocab_size": 10**400}, "vocab_size must be an integer of 32 bits, got 1000"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number, got 1000"),
        ({"rope_theta": 1}, "rope_theta must be above 1, got 1.0"),
        ({"rope_theta": -10000.0}, "rope_theta must be above 1, got -10000.0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be above 0, got 0.0"),
        ({"routed_scaling_factor": -1}, "routed_scaling_factor must be above 0, got -1.0"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must not be below 0, got -1"),
        (
            {"num_nextn_predict_layers": 1, "num_mtp_layers": 2},
            "num_nextn_predict_layers=1 and num_mtp_layers=2 differ",
        ),
        ({"dtype": "float32"}, "torch_dtype='bfloat16' and dtype='float32' differ"),
        ({"bos_token_id": 259}, "bos_token_id 259 is outside the vocabulary of 259 tokens"),
        ({"eos_token_id": [1, 259]}, "eos_token_id 259 is outside the vocabulary of 259 tokens"),
        ({"eos_token_id": -1}, "eos_token_id -1 is outside the vocabulary of 259 tokens"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, got nan"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace must be between 0 and num_hidden_layers (2), got 3"),
        ({"n_group": 3}, "n_group (3) must divide n_routed_experts (4)"),
        ({"topk_group": 2}, "topk_group (2) exceeds n_group (1)"),
        ({"n_group": 4}, "n_group (4) leaves fewer than two experts in a group"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok (5) exceeds the 4 experts"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim must be even, got 5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not implemented"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings is missing"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "10000.0 outside and 5.0 inside"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, got 'fp8'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method='gptq'"),
        ({"quantization_config": {**FP8, "weight_block_size": [64, 64]}}, "weight_block_size=[64, 64]"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt='e5m2'"),
        ({"quantization_config": {**FP8, "modules_to_not_convert": "lm_head"}}, "must list names, got 'lm_head'"),
        ({"quantization_config": {**FP8, "zero_point": True}}, "unknown field quantization_config.zero_point=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_implemented_is_an_error_that_names_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(changed("plain", **fields))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("partial_rotary_factor", 0.5, "rope_scaling.partial_rotary_factor=0.5 is not implemented"),
        ("long_factor", [1.0], "unknown field rope_scaling.long_factor=[1.0]"),
        ("beta_fast", "32", "rope_scaling.beta_fast must be a finite number, got '32'"),
        ("beta_fast", -32, "beta_fast must be above 0, got -32.0"),
        ("beta_slow", 0, "beta_slow must be above 0, got 0.0"),
        ("factor", 0, "factor must be above 0, got 0.0"),
        ("attention_factor", -1, "attention_factor must be above 0, got -1.0"),
        ("mscale_all_dim", -1, "mscale_all_dim must not be below 0, got -1.0"),
        ("original_max_position_embeddings", 0, "original_max_position_embeddings must be above 0, got 0"),
        ("rope_type", "linear", "rope_scaling.rope_type='linear' and type='yarn' differ"),
    ],
)
def test_rope_fields_are_read_as_strictly(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(changed("deepseek", rope_scaling={**CONFIGS["deepseek"]["rope_scaling"], field: value}))


@pytest.mark.parametrize(
    "field", ["hidden_size", "n_routed_experts", "q_lora_rank", "norm_topk_prob", "rope_theta", "rms_norm_eps"]
)
def test_a_missing_size_is_an_error_that_names_it(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} is missing"):
        parse_config(without("plain", field))


def test_fields_without_mathematics_are_skipped() -> None:
    extra = {"use_cache": False, "transformers_version": "9", "aux_loss_alpha": 0.1, "ep_size": 8, "auto_map": {}}
    assert parse_config(changed("plain", **extra)) == parse_config(CONFIGS["plain"])


def test_end_tokens_may_be_one_many_or_none() -> None:
    assert parse_config(changed("plain", eos_token_id=7)).eos_ids == (7,)
    assert parse_config(changed("plain", eos_token_id=[7, 9])).eos_ids == (7, 9)
    assert parse_config(changed("plain", eos_token_id=None)).eos_ids == ()


def test_absent_yarn_factor_is_the_ratio_of_lengths() -> None:
    rope = {**CONFIGS["deepseek"]["rope_scaling"], "factor": None}
    config = parse_config(changed("deepseek", rope_scaling=rope))
    assert config.yarn is not None
    assert config.yarn.factor == 40.0
    with pytest.raises(ConfigError, match="original_max_position_embeddings must be above 0, got 0"):
        parse_config(changed("deepseek", rope_scaling={**rope, "original_max_position_embeddings": 0}))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (2, 2), (2, None), (None, 2)])
def test_both_names_of_the_prediction_layers_are_read(first: int | None, second: int | None) -> None:
    config = parse_config(changed("plain", num_nextn_predict_layers=first, num_mtp_layers=second))
    assert config.num_mtp_layers == (first or second or 0)


def test_both_names_of_the_rope_type_may_be_there() -> None:
    rope = {**CONFIGS["deepseek"]["rope_scaling"], "rope_type": "yarn"}
    assert parse_config(changed("deepseek", rope_scaling=rope)) == parse_config(CONFIGS["deepseek"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not valid JSON (nested too deeply)"),
        ('{"hidden_size": 1, "hidden_size": 2}', "duplicate key 'hidden_size'"),
    ],
    ids=["missing", "cut off", "a list", "deep", "two meanings"],
)
def test_an_unreadable_file_is_an_error_that_names_it(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [["a"], [True], 1.5, [1, None]])
def test_eos_ids_that_are_no_integers_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="eos_token_id must be an integer or a list of integers"):
        parse_config({**CONFIGS["plain"], "eos_token_id": value})
