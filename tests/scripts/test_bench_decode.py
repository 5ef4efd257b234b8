"""`scripts/write_synthetic.py` and `scripts/bench_decode.py`: their parts, on layers too small to time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from decoding import report
from decoding.bounds import prefill_flops
from decoding.timing import DecodeResult, PrefillResult, time_decode, time_prefill
from synthetic import fields, routing, shards
from synthetic.fields import Size, synthetic_fields
from synthetic.weights import RandomWeights

from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.config import ModelConfig, parse_config, read_config
from hmoe_jax.exec.load import check_checkpoint
from tests.scripts.run import SCRIPTS, finish

REPOSITORY = SCRIPTS.parent
NARROW = {
    "hidden_size": 136,
    "intermediate_size": 200,
    "moe_intermediate_size": 72,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 14,
}
"""Widths that take no time, instead of DeepSeek-V3's."""
TEXT = list(range(3, 400))
SKEW = 0.5


@pytest.fixture(scope="module", params=fields.CODECS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    folder.mkdir()
    size = Size(num_moe_layers=2, num_experts=16, max_len=256, codec=request.param)
    config_fields = synthetic_fields(REPOSITORY / "models" / "deepseek-v3", size) | NARROW
    (folder / "config.json").write_text(json.dumps(config_fields))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((REPOSITORY / "models" / "embedded" / name).read_bytes())
    list(shards.write_shards(folder, RandomWeights(parse_config(config_fields), seed=0, skew=SKEW)))
    return folder


def check(folder: Path) -> ModelConfig:
    config = read_config(folder)
    with open_checkpoint(folder) as checkpoint:
        check_checkpoint(config, checkpoint)
    return config


def test_true_layers_are_those_of_the_published_config() -> None:
    made = parse_config(synthetic_fields(REPOSITORY / "models" / "deepseek-v3", Size()))
    true = read_config(REPOSITORY / "models" / "deepseek-v3")
    chosen = {"num_layers", "num_dense_layers", "num_experts", "vocab_size", "max_len", "num_mtp_layers"}
    differing = {name for name in vars(true) if getattr(made, name) != getattr(true, name)}
    assert differing == chosen


def test_the_strict_loader_takes_the_folder_and_its_cut(folder: Path, tmp_path: Path) -> None:
    assert check(folder).num_layers == 3
    shards.cut(folder, tmp_path / "cut", num_layers=2)
    assert check(tmp_path / "cut").num_layers == 2


@pytest.mark.parametrize("num_layers", [1, 4])
def test_a_cut_needs_a_moe_layer_and_no_more_than_there_are(folder: Path, tmp_path: Path, num_layers: int) -> None:
    with pytest.raises(ValueError, match=f"above the 1 dense ones and at most 3, .* got {num_layers}"):
        shards.cut(folder, tmp_path / "cut", num_layers=num_layers)


def test_rows_of_a_matrix_and_experts_differ(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (0, 1)]
        first, second = (np.asarray(checkpoint.array(name), np.float32) for name in names)
    rows = np.concatenate([first, second])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert np.isfinite(rows).all()


def test_the_load_is_as_skewed_as_was_asked_for() -> None:
    config = parse_config(synthetic_fields(REPOSITORY / "models" / "deepseek-v3", Size()))
    target = routing.target_load(config, skew=SKEW)
    assert target.mean() == pytest.approx(1)
    assert (target * config.top_k / config.num_experts <= 0.95 + 1e-9).all()
    bias = routing.skewed_bias(config, 1.5, np.random.default_rng(0), skew=SKEW)
    assert bias.dtype == np.float32
    # Zipf's first against its last: in the bias they must be far apart, and equal without skew.
    level = routing.skewed_bias(config, 1.5, np.random.default_rng(0), skew=0.0)
    assert np.ptp(bias) > 4 * np.ptp(level)


def test_decode_and_prefill_are_measured(folder: Path) -> None:
    options = {"executor": "fused", "device": "cpu"}
    decoded = time_decode(str(folder), options, TEXT, batch=2, context=40, num_rounds=2)
    assert decoded.step_s > 0
    assert decoded.num_bytes["experts"] > 0
    assert decoded.num_bytes["attention"] > 0
    assert decoded.load.sum() == 2 * 2 * (40 - 19 // 2) * 8  # layers, sequences, prompt, experts of a token
    (prefilled,) = time_prefill(str(folder), options, TEXT, lengths=[33], num_rounds=1)
    assert prefilled.flops == prefill_flops(read_config(folder), 33)


def test_a_context_that_is_too_short_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--context=5 is too short for 19 steps around it: lower --rounds"):
        time_decode(str(folder), {}, TEXT, batch=1, context=5, num_rounds=2)


def result(num_layers: int, step_ms: float, num_bytes: int) -> DecodeResult:
    return DecodeResult(num_layers, 1, 512, step_ms / 1e3, 10.0, 1.5, {"experts": num_bytes}, np.ones((1, 4)))


def test_a_further_layer_costs_the_difference_against_its_own_bytes() -> None:
    table = report.layer_table([result(2, 20, 10**8), result(4, 60, 3 * 10**8)])
    assert table.splitlines()[1].split() == ["2", "->", "4", "20.00", "0.100", "2.00"]


def test_the_prefill_table_tells_the_share_of_the_peak() -> None:
    assert "50.0%" in report.prefill_table([PrefillResult(512, 2.0, 4e9, 4.0)])


def test_prefill_flops_of_the_true_model() -> None:
    config = read_config(REPOSITORY / "models" / "deepseek-v3")
    # 37 B active parameters, two operations each, and attention.
    assert prefill_flops(config, 1000) == pytest.approx(2 * 36.6e9 * 1000, rel=0.03)


def test_the_script_refuses_a_model_that_is_not_there(cache: Path) -> None:
    status, out, err = finish("bench_decode", "--model=/nonexistent", "--quiet", cache=cache)
    assert (status, out) == (1, "")
    assert "/nonexistent: no such model folder" in err
