"""A router whose experts are as unequally busy as a real model's on one text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from hmoe_jax.config import ModelConfig
from hmoe_jax.nn.router import route

NUM_TOKENS = 2048
NUM_ROUNDS = 200
LARGEST_STEP = 0.02


def target_load(config: ModelConfig, *, skew: float) -> Float[np.ndarray, " e"]:
    """Tokens per expert, relative to the mean: Zipf's law, the r-th busiest in proportion to `r**-skew`.

    No expert can be chosen more than once by a token: what the law wants beyond that goes to the others.
    """
    load = np.arange(1, config.num_experts + 1, dtype=np.float64) ** -skew
    most = 0.95 * config.num_experts / config.top_k
    for _ in range(config.num_experts):
        load *= config.num_experts / load.sum()
        load = np.minimum(load, most)
    return load


def skewed_bias(
    config: ModelConfig, logit_scale: float, rng: np.random.Generator, *, skew: float
) -> Float[np.ndarray, " e"]:
    """The bias with which random tokens load the experts by `target_load`, in a random order of the experts.

    Found as DeepSeek-V3 balances its own (arXiv 2412.19437, section 2.1.2): the bias of an expert that is too busy is
    lowered, that of others raised. `logit_scale` is the deviation of a token's logits.
    """
    target = rng.permutation(target_load(config, skew=skew)) * NUM_TOKENS * config.top_k / config.num_experts
    hidden = jnp.asarray(rng.standard_normal((NUM_TOKENS, config.num_experts), np.float32))
    weight = logit_scale * jnp.eye(config.num_experts, dtype=jnp.float32)
    choose = jax.jit(lambda bias: route(config, hidden, weight, bias)[0])
    bias = np.zeros(config.num_experts, np.float32)
    for index in range(NUM_ROUNDS):
        load = count_load(config, np.asarray(choose(bias)))
        step = LARGEST_STEP * (1 - index / NUM_ROUNDS)
        bias += (step * np.clip((target - load) / target, -1, 1)).astype(np.float32)
    return bias


def count_load(config: ModelConfig, ids: Int[np.ndarray, ...]) -> Int[np.ndarray, " e"]:
    """Tokens per expert; ids of -1 are padding."""
    return np.bincount(ids[ids >= 0].ravel(), minlength=config.num_experts)
