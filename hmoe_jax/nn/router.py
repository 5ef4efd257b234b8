"""DeepSeek-V3's auxiliary-loss-free top-k routing (`noaux_tc`; arXiv 2412.19437, section 2.1.2)."""

from __future__ import annotations

import operator
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from hmoe_jax.config import ModelConfig
from hmoe_jax.kernels.linear import linear as native_linear


def route(
    config: ModelConfig,
    hidden: Float[Array, "t d"],
    weight: Float[Array, "e d"],
    bias: Float32[Array, " e"],
    *,
    pool: int | None = None,
) -> tuple[Int32[Array, "t k"], Float32[Array, "t k"]]:
    """Expert ids and their weights, best first, all in FP32.

    `bias` decides who is chosen, never with what weight. Only experts of the best `top_groups` groups are eligible; a
    group counts as much as its two best experts. `pool` names the native thread pool that multiplies BF16 weights on
    the CPU platform, where a token's scores then do not depend on its batch; None leaves it to XLA.
    """
    scores = jax.nn.sigmoid(_logits(hidden, weight, pool=pool))
    _, ids = lax.top_k(_eligible(config, scores + bias), config.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=1)
    if config.norm_top_k:
        # One after the other: the order in which XLA adds up a row depends on how many rows there are.
        total = reduce(operator.add, [weights[:, slot] for slot in range(config.top_k)])
        weights = weights / (total[:, None] + 1e-20)
    return ids, weights * config.routed_scale


def _logits(hidden: Float[Array, "t d"], weight: Float[Array, "e d"], *, pool: int | None) -> Float32[Array, "t e"]:
    """In FP32, where the products of BF16 numbers are exact."""

    def plain(hidden: Float[Array, "t d"], weight: Float[Array, "e d"]) -> Float32[Array, "t e"]:
        wide = (hidden.astype(jnp.float32), weight.astype(jnp.float32))
        return jnp.einsum("td,ed->te", *wide, precision=lax.Precision.HIGHEST)

    if pool is None or hidden.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16:
        return plain(hidden, weight)
    return lax.platform_dependent(hidden, weight, cpu=partial(native_linear, codec="bf16", pool=pool), default=plain)


def _eligible(config: ModelConfig, choice: Float32[Array, "t e"]) -> Float32[Array, "t e"]:
    if config.top_groups == config.num_groups:
        return choice
    groups = choice.reshape(-1, config.num_groups, config.experts_per_group)
    group_scores = lax.top_k(groups, 2)[0].sum(axis=-1)
    _, best = lax.top_k(group_scores, config.top_groups)
    chosen = jax.nn.one_hot(best, config.num_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(chosen[:, :, None], groups, -jnp.inf).reshape(choice.shape)
