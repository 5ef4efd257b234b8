"""Root-mean-square normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*t d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*t d"]:
    """x / rms(x) * weight over the last axis, computed in FP32, returned in the dtype of `x` (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)
