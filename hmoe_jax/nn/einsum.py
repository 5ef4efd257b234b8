"""Contractions with FP32 sums, whatever the inputs' dtype."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


def einsum_f32(spec: str, a: Float[Array, ...], b: Float[Array, ...]) -> Float32[Array, ...]:
    """`jnp.einsum` of two operands, accumulated and returned in FP32.

    XLA:CPU has no batched BF16 product with an FP32 result: there the operands are widened first, which is exact.
    """

    def widened(a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)

    def mixed(a: Array, b: Array) -> Array:
        precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # a GPU's default rounds to 10 bits
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    return lax.platform_dependent(a, b, cpu=widened, default=mixed)
