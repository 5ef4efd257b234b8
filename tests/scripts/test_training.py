"""The parts of `scripts/train_embedded.py`: the differentiable experts, and what is written and read back."""

from __future__ import annotations

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import card, export, model, text

from hmoe_jax.architectures.deepseek_v3_checkpoint import describe
from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.config import parse_config, read_config
from hmoe_jax.exec.load import check_checkpoint
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices, moe_experts_reference

FIELDS = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 136,
    "intermediate_size": 72,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def trees() -> tuple:
    config = parse_config(FIELDS)
    return model.init(config, describe(config), np.random.default_rng(0))


def test_bucketed_experts_are_the_reference_while_no_bucket_is_full(trees: tuple) -> None:
    rng = np.random.default_rng(1)
    layer = jax.tree.map(lambda w: w[0], trees[1])
    hidden = jnp.asarray(rng.standard_normal((30, FIELDS["hidden_size"]), np.float32))
    ids = jnp.asarray(np.stack([rng.permutation(6)[:2] for _ in range(30)]).astype(np.int32))
    gates = jnp.asarray(rng.random((30, 2), np.float32))
    assert np.bincount(np.asarray(ids).ravel()).max() <= model.CAPACITY * 30 * 2 / 6
    want = moe_experts_reference(
        hidden, ids, gates, ExpertArrays(*(ExpertMatrices(w) for w in (layer.gate, layer.up, layer.down)))
    )
    got = model._bucketed_experts(hidden, ids, gates, layer)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_a_step_against_the_gradient_lowers_the_loss_and_the_bias_moves_against_the_load(trees: tuple) -> None:
    config = parse_config(FIELDS)
    windows = jnp.asarray(np.random.default_rng(2).integers(0, 300, (2, 17)).astype(np.int32))
    loss = jax.jit(lambda params: model.loss(config, *params, windows))
    (before, load), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trees)
    after, _ = loss(jax.tree.map(lambda w, g: w - 0.1 * g, trees, grads))
    assert after < before
    balanced = model.balance(trees[0], load)
    moved = np.array(balanced.layers[1].mlp.router_bias) - np.array(trees[0].layers[1].mlp.router_bias)
    assert (np.sign(moved) == np.sign(np.mean(load[0]) - np.asarray(load[0]))).all()


@pytest.mark.parametrize("fp8", [True, False])
def test_a_written_folder_is_a_valid_checkpoint_of_the_rounded_weights(trees: tuple, tmp_path: Path, fp8: bool) -> None:
    tokenizer = text.train_tokenizer(["some words, some more words"], 300)
    folder = tmp_path / "model"
    for _ in range(2):  # the second time over the first
        export.write_folder(folder, FIELDS, *trees, tokenizer, card="a card", fp8=fp8)
    config = read_config(folder)
    with open_checkpoint(folder) as checkpoint:
        check_checkpoint(config, checkpoint)
    assert (config.quantization is not None) == fp8
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    if not fp8:
        read = export.read_folder(folder, FIELDS)
        want = jax.tree.map(lambda w: np.asarray(w.astype(jnp.bfloat16).astype(jnp.float32)), trees)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), read, want))


def test_fp8_changes_matrices_by_less_than_a_sixteenth_and_nothing_else(trees: tuple) -> None:
    weights, experts = export.through_fp8(*trees, FIELDS)
    assert (np.asarray(weights.embed) == np.asarray(trees[0].embed)).all()
    largest = np.abs(np.asarray(trees[1].gate)).max()
    # 3 mantissa bits: half a unit in the last place is 2^-4 of the value.
    np.testing.assert_allclose(experts.gate, trees[1].gate, rtol=2**-4, atol=largest * 2**-9 / 448)


def test_the_last_tenth_of_a_book_and_the_held_out_book_are_never_trained_on(tmp_path: Path) -> None:
    paragraphs = "\n\n".join(f"Paragraph “{i}” of\nthe _book_." for i in range(100))
    for name in ("emma", "heidi"):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(paragraphs.encode()))
    corpus = text.read_corpus(tmp_path)
    assert set(corpus.train) == {"emma"}
    assert set(corpus.held_out) == {"emma", "heidi"}
    assert corpus.train["emma"] + corpus.held_out["emma"] == corpus.held_out["heidi"]
    assert corpus.train["emma"].startswith('Paragraph "0" of the book.\n\n')
    assert 0.05 < len(corpus.held_out["emma"]) / len(corpus.held_out["heidi"]) < 0.15


def test_the_card_tells_the_sum_of_all_runs() -> None:
    effort = card.Effort(10, 200, 1.5) + card.Effort(5, 100, 0.5)
    facts = card.Facts(effort, 1000, 4.0, 4.1, 1.5, np.array([[1, 3], [2, 2]]))
    assert "| training | 15 steps, 2 minutes on two cores |" in card.text(facts)
    assert "| 1 | 0.50 | 1.50 |" in card.text(facts)
