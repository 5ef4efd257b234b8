"""Trains the embedded model from scratch and writes it as a Hugging Face folder in block FP8 (and in BF16)."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from absl import app, flags, logging
from training import card, export, model, text

from hmoe_jax.architectures.deepseek_v3 import Weights
from hmoe_jax.architectures.deepseek_v3_checkpoint import describe
from hmoe_jax.config import parse_config

_BOOKS = flags.DEFINE_string("books", None, "Folder of *.txt.gz books to train on.", required=True)
_OUT = flags.DEFINE_string("out", "models/embedded", "Where the FP8 model goes.")
_OUT_BF16 = flags.DEFINE_string("out_bf16", "out/embedded-bf16", "Where the same model in BF16 goes (not committed).")
_MINUTES = flags.DEFINE_float(
    "minutes", 60.0, "How long to train; the learning rate reaches zero at the end.", lower_bound=0.05
)
_BATCH = flags.DEFINE_integer("batch", 8, "Windows per step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens per window.", lower_bound=8)
_PEAK_LR = flags.DEFINE_float("peak_lr", 2e-3, "Highest learning rate of AdamW.", lower_bound=0.0)
_INIT_FROM = flags.DEFINE_string("init_from", None, "BF16 folder of an earlier run to go on from.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial weights and of the order of the text.")

FIELDS = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


EFFORT_NAME = "effort.json"
"""Beside the BF16 weights: what went into them, so that a run that goes on from them can tell the sum."""


@dataclass(frozen=True)
class Run:
    """A training's result; `load` is tokens per expert `[m, e]` over its last hundred steps."""

    weights: Weights
    experts: model.ExpertWeights
    load: np.ndarray
    effort: card.Effort


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    rng = np.random.default_rng(_SEED.value)
    corpus = text.read_corpus(Path(_BOOKS.value))
    tokenizer = text.train_tokenizer(list(corpus.train.values()), FIELDS["vocab_size"])
    train, held_out = (text.encode_stream(tokenizer, part) for part in (corpus.train, corpus.held_out))
    logging.info("%d tokens to train on, %d held out", len(train), len(held_out))
    windows = text.fixed_windows(held_out, count=64, length=_LENGTH.value, bos=FIELDS["bos_token_id"])

    run = _train(train, windows, rng)
    config = parse_config(FIELDS)
    held_out_loss = _evaluate(config, run.weights, run.experts, windows)
    fp8_loss = _evaluate(config, *export.through_fp8(run.weights, run.experts, FIELDS), windows)
    chars_per_token = sum(map(len, corpus.held_out.values())) / len(held_out)
    facts = card.Facts(
        effort=run.effort + _earlier_effort(),
        corpus_tokens=len(train),
        held_out_loss=held_out_loss,
        fp8_loss=fp8_loss,
        bits_per_char=held_out_loss / math.log(2) / chars_per_token,
        load=run.load,
    )
    out, out_bf16 = Path(_OUT.value), Path(_OUT_BF16.value)
    for folder, fp8 in ((out, True), (out_bf16, False)):
        export.write_folder(folder, FIELDS, run.weights, run.experts, tokenizer, card=card.text(facts), fp8=fp8)
    (out_bf16 / EFFORT_NAME).write_text(json.dumps(asdict(facts.effort)))
    print(json.dumps({**asdict(facts.effort), "held_out_loss": held_out_loss, "fp8_loss": fp8_loss}))


def _earlier_effort() -> card.Effort:
    if not _INIT_FROM.value:
        return card.Effort()
    return card.Effort(**json.loads((Path(_INIT_FROM.value) / EFFORT_NAME).read_text()))


def _train(stream: np.ndarray, held_out: np.ndarray, rng: np.random.Generator) -> Run:
    config = parse_config(FIELDS)
    if _INIT_FROM.value:
        params = export.read_folder(Path(_INIT_FROM.value), FIELDS)
    else:
        params = model.init(config, describe(config), rng)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda w: w.ndim > 1, tree)),
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, windows, rate):
        (nats, load), grads = jax.value_and_grad(lambda p: model.loss(config, *p, windows), has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        weights, experts = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
        return (model.balance(weights, load), experts), state, nats, load

    state, begin, recent, loads = optimizer.init(params), time.monotonic(), [], []
    seconds, steps = _MINUTES.value * 60, 0
    while (progress := (time.monotonic() - begin) / seconds) < 1:
        windows = text.random_windows(stream, rng, batch=_BATCH.value, length=_LENGTH.value, bos=FIELDS["bos_token_id"])
        rate = model.learning_rate(progress, peak=_PEAK_LR.value)
        params, state, nats, load = step(params, state, windows, rate)
        recent, loads, steps = [*recent[-99:], float(nats)], [*loads[-99:], np.asarray(load)], steps + 1
        if steps % 50 == 0:
            spread = np.sum(loads, axis=0)
            logging.info(
                "step %d, %.1f %% of the time: loss %.4f, busiest expert %.2f of the mean, %.0f tok/s",
                steps, 100 * progress, np.mean(recent), (spread.max(axis=1) / spread.mean(axis=1)).max(),
                steps * windows.shape[0] * _LENGTH.value / (time.monotonic() - begin),
            )  # fmt: skip
        if steps % 500 == 0:
            logging.info("step %d: held-out loss %.4f", steps, _evaluate(config, *params, held_out))
    weights, experts = params
    effort = card.Effort(steps, steps * _BATCH.value * _LENGTH.value, _MINUTES.value)
    return Run(weights, experts, np.sum(loads, axis=0), effort)


def _evaluate(config, weights, experts, windows: np.ndarray) -> float:
    nats = jax.jit(lambda w, e, x: model.loss(config, w, e, x)[0])
    return float(np.mean([nats(weights, experts, part) for part in np.split(windows, len(windows) // 8)]))


if __name__ == "__main__":
    app.run(main)
