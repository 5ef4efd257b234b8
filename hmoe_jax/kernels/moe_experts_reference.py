"""What `moe_experts` means, in plain JAX: the oracle of its tests, and the `graph` executor's experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from hmoe_jax.quant.dequantize import dequantize


@partial(jax.tree_util.register_dataclass, data_fields=("weight", "scale"), meta_fields=("codec",))
@dataclass(frozen=True)
class ExpertMatrices:
    """One matrix of every expert, stacked as stored in the format `codec` (`quant.formats`): `[e, out, in]` of weights.

    `scale` is a grid for each expert. Weights of codec `bf16` may also be held in FP32.
    """

    weight: Any
    scale: Any = None
    codec: str = "bf16"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertArrays:
    """The experts of one layer: `gate` and `up` are `[e, f, d]`, `down` is `[e, d, f]`."""

    gate: ExpertMatrices
    up: ExpertMatrices
    down: ExpertMatrices


def moe_experts_reference(
    hidden: Float[Array, "t d"],
    ids: Int32[Array, "t k"],
    weights: Float32[Array, "t k"],
    experts: ExpertArrays,
) -> Float32[Array, "t d"]:
    """As `moe_experts`, with the experts as arrays. The intermediate is rounded to the dtype of `hidden`.

    Every expert is computed for every token, one expert at a time: little memory, many operations.
    """

    def add_expert(
        total: Float32[Array, "t d"], expert: tuple[Int32[Array, ""], ExpertArrays]
    ) -> tuple[Float32[Array, "t d"], None]:
        index, matrices = expert
        inner = jax.nn.silu(_project(hidden, matrices.gate)) * _project(hidden, matrices.up)
        routed = _project(inner.astype(hidden.dtype), matrices.down)
        weight = jnp.where(ids == index, weights, 0).sum(axis=1)
        # A where, not a product with zero: a NaN in an expert must not reach tokens that did not choose it.
        chosen = (ids == index).any(axis=1)
        return total + jnp.where(chosen[:, None], weight[:, None] * routed, 0), None

    num_experts = experts.gate.weight.shape[0]
    start = jnp.zeros(hidden.shape, jnp.float32)
    return jax.lax.scan(add_expert, start, (jnp.arange(num_experts, dtype=jnp.int32), experts))[0]


def _project(x: Float[Array, "t i"], matrix: ExpertMatrices) -> Float32[Array, "t o"]:
    """In FP32 throughout: products of BF16 numbers, or of a code and its scale, are nearly or wholly exact there."""
    weight = dequantize(matrix.codec, matrix.weight, matrix.scale, jnp.float32)
    return jnp.einsum("ti,oi->to", x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
