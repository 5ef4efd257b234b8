"""The engine's own model functions, made trainable: full causal attention and capacity-bucketed experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hmoe_jax.architectures import deepseek_v3
from hmoe_jax.architectures.deepseek_v3 import Layer, Moe, Tokens, Weights
from hmoe_jax.config import ModelConfig
from hmoe_jax.nn.attention import Queries, UpProjections

CAPACITY = 1.5
"""Places per expert over the mean load. Tokens beyond it skip the expert for that step; balanced routing loses none."""

BIAS_STEP = 1e-3
"""How far a step moves an expert's routing bias against its load (arXiv 2412.19437, section 4.2: gamma)."""


@partial(jax.tree_util.register_dataclass, data_fields=("gate", "up", "down"), meta_fields=())
@dataclass(frozen=True)
class ExpertWeights:
    """`gate`, `up` `[m, e, f, d]`, `down` `[m, e, d, f]`, all FP32; m counts MoE layers."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def init(config: ModelConfig, specs: Weights, rng: np.random.Generator) -> tuple[Weights, ExpertWeights]:
    """Normal weights with deviation 1/sqrt(width), outputs of residual branches damped by depth; norms 1, biases 0."""

    def leaf(spec) -> jax.Array:
        if len(spec.shape) == 1:
            fill = np.zeros if "bias" in spec.name else np.ones
            return jnp.asarray(fill(spec.shape, np.float32))
        deviation = 0.02 if "embed" in spec.name else spec.shape[1] ** -0.5
        if spec.name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= (2 * config.num_layers) ** 0.5
        return jnp.asarray(rng.standard_normal(spec.shape, np.float32) * deviation)

    m, e, f, d = config.num_moe_layers, config.num_experts, config.expert_ffn, config.hidden_size

    def expert(shape: tuple[int, ...], damping: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5 * damping)

    experts = ExpertWeights(
        expert((m, e, f, d)), expert((m, e, f, d)), expert((m, e, d, f), (2 * config.num_layers) ** -0.5)
    )
    return jax.tree.map(leaf, specs), experts


def loss(
    config: ModelConfig, weights: Weights, experts: ExpertWeights, windows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mean next-token cross-entropy in nats, tokens per expert `[m, e]`) of `windows [b, length + 1]`."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    b, t = inputs.shape
    tokens = Tokens(
        ids=inputs.reshape(-1),
        positions=jnp.tile(jnp.arange(t, dtype=jnp.int32), b),
        valid=jnp.ones(b * t, jnp.bool_),
    )
    prepared = deepseek_v3.prepare(config, weights, dtype=jnp.float32)

    def attend(cache: None, queries: Queries, up: UpProjections, latents: jax.Array):
        return _causal_attention(queries, up, latents, batch=b, scale=config.softmax_scale), cache

    def routed(layer: int, hidden: jax.Array, ids: jax.Array, gates: jax.Array) -> jax.Array:
        return _bucketed_experts(hidden, ids, gates, jax.tree.map(lambda w: w[layer], experts))

    hidden, _, routes = deepseek_v3.forward(config, prepared, tokens, (None,) * config.num_layers, attend, routed)
    log_probs = jax.nn.log_softmax(deepseek_v3.logits(prepared, hidden), axis=-1)
    nats = -jnp.take_along_axis(log_probs, targets.reshape(-1, 1), axis=1).mean()
    load = jax.nn.one_hot(routes, config.num_experts, dtype=jnp.int32).sum(axis=(1, 2))
    return nats, load


def balance(weights: Weights, load: jax.Array) -> Weights:
    """Pushes every router bias one step against its expert's load: balancing without an auxiliary loss."""
    steps = iter(BIAS_STEP * jnp.sign(load.mean(axis=1, keepdims=True) - load))

    def balanced(layer: Layer) -> Layer:
        if not isinstance(layer.mlp, Moe):
            return layer
        return replace(layer, mlp=replace(layer.mlp, router_bias=layer.mlp.router_bias + next(steps)))

    return replace(weights, layers=tuple(map(balanced, weights.layers)))


def _causal_attention(queries: Queries, up: UpProjections, latents: jax.Array, *, batch: int, scale: float):
    rank = up.key.shape[-1]
    by_sequence = partial(jax.tree.map, lambda x: x.reshape(batch, -1, *x.shape[1:]))
    queries, latents = by_sequence(queries), by_sequence(latents)
    c, k_pe = latents[..., :rank], latents[..., rank:]
    k = jnp.einsum("bsr,hnr->bshn", c, up.key)
    v = jnp.einsum("bsr,hvr->bshv", c, up.value)
    scores = jnp.einsum("bthn,bshn->bhts", queries.nope, k) + jnp.einsum("bthp,bsp->bhts", queries.rope, k_pe)
    t = scores.shape[-1]
    scores = jnp.where(jnp.tril(jnp.ones((t, t), jnp.bool_)), scores * scale, -jnp.inf)
    mixed = jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(-1, *mixed.shape[2:])


def _bucketed_experts(hidden: jax.Array, ids: jax.Array, gates: jax.Array, experts: ExpertWeights) -> jax.Array:
    (t, d), k, e = hidden.shape, ids.shape[1], experts.gate.shape[0]
    capacity = min(int(CAPACITY * t * k / e), t)
    pair_expert = ids.reshape(-1)
    order = jnp.argsort(pair_expert, stable=True)
    sorted_expert = pair_expert[order]
    first = jnp.searchsorted(sorted_expert, jnp.arange(e))
    place = jnp.arange(t * k) - first[sorted_expert]
    slot = jnp.where(place < capacity, sorted_expert * capacity + place, e * capacity)
    token = order // k
    buckets = jnp.zeros((e * capacity, d)).at[slot].set(hidden[token], mode="drop").reshape(e, capacity, d)
    inner = jax.nn.silu(jnp.einsum("ecd,efd->ecf", buckets, experts.gate))
    inner = inner * jnp.einsum("ecd,efd->ecf", buckets, experts.up)
    outputs = jnp.einsum("ecf,edf->ecd", inner, experts.down).reshape(e * capacity, d)
    outputs = outputs.at[slot].get(mode="fill", fill_value=0.0) * gates.reshape(-1)[order][:, None]
    return jnp.zeros((t, d)).at[token].add(outputs)


def learning_rate(progress: float, *, peak: float) -> float:
    """Warm-up over the first 2 %, then straight to zero (`progress` is the share of the time that has passed)."""
    return peak * min(progress / 0.02, 1.0, (1.0 - progress) / 0.98)
