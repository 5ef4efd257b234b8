"""Root-mean-square normalisation."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hmoe_jax.kernels.rms_norm import rms_norm as native_rms_norm


def rms_norm(x: Float[Array, "t d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "t d"]:
    """x / rms(x) * weight over the last axis, computed in FP32, returned in the dtype of `x` (arXiv 1910.07467).

    On the CPU platform the bits of a row of BF16 numbers do not depend on the other rows.
    """
    plain = partial(_rms_norm_xla, eps=eps)
    if x.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16:
        return plain(x, weight)
    return lax.platform_dependent(x, weight, cpu=partial(native_rms_norm, eps=eps), default=plain)


def _rms_norm_xla(x: Float[Array, "t d"], weight: Float[Array, " d"], *, eps: float) -> Float[Array, "t d"]:
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)
